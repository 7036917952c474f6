"""Models and ONNX files measured in one process; the files are real, and run by ONNX Runtime."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import silent
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.facts import onnx_sizes, read_onnx
from sepconvert.measure.head_to_head import Subject, measure
from sepconvert.measure.metrics.evaluation import Scoring, evaluate


def network(width=8, seed=0, classes=7):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=2), nn.ReLU(), nn.ConvTranspose2d(width, 4, 2), nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


def exported(model, folder, name, *, batch=None, dtype=torch.float32):
    """A file that this package did not make."""
    path, x = folder / name, torch.randn(batch or 2, 3, 12, 12).to(dtype)
    model = model.to(dtype)
    shapes = None if batch else ({0: torch.export.Dim("n")},)
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    return path


@pytest.fixture(scope="module")
def files(folder):
    return [
        exported(network(), folder, "first.onnx"),
        exported(network(16, seed=1), folder, "wide.onnx"),
        exported(network(), folder, "four.onnx", batch=4),
    ]


def subjects(paths):
    return [Subject.of_file(path, read_onnx(path)) for path in paths]


def measured(subjects, data=None, runs=0, batch=4, scoring=Scoring()):
    inputs = [np.random.default_rng(0).standard_normal((batch, 3, 12, 12))]
    return measure(
        subjects, inputs, data=data, scoring=scoring, runs=runs, runtime=Runtime(1), seed=0, progress=silent
    )


@pytest.fixture(scope="module")
def data():
    x, y = torch.randn(42, 3, 12, 12, generator=torch.Generator().manual_seed(2)), torch.arange(42) % 7
    return DataLoader(TensorDataset(x, y), batch_size=10)


def test_a_file_says_what_it_costs(files):
    found = read_onnx(files[0])
    model = network()
    assert found.params == sum(each.numel() for each in model.parameters())
    assert found.macs == 36 * 8 * 27 + 36 * 8 * 4 * 4 + 25 * 8 * 18 + 8 * 7
    assert found.shapes == ((None, 3, 12, 12),)
    assert "Relu" in found.uncounted_ops
    assert "Conv" not in found.uncounted_ops
    assert read_onnx(files[2]).shapes == ((4, 3, 12, 12),)
    assert read_onnx(files[2]).macs == found.macs


def test_accuracy_and_outputs_are_those_of_the_models(files, data):
    """A file that fixes the batch, and samples of which the last do not fill one, make no difference."""
    found = measured(subjects(files), data)
    models = [network(), network(16, seed=1), network()]
    expected = [evaluate(model, data) for model in models]
    assert [each.accuracy for each in found.profiles] == [each.accuracy() for each in expected]
    x = data.dataset.tensors[0]
    with torch.no_grad():
        base, other = models[0](x), models[1](x)
    wide, four = found.deltas
    assert wide.outputs[0].max_abs == pytest.approx(float((other - base).abs().max()), rel=1e-4)
    assert wide.outputs[0].relative == pytest.approx(float((other - base).norm() / base.norm()), rel=1e-4)
    assert wide.accuracy.agreement == pytest.approx(float((base.argmax(1) == other.argmax(1)).float().mean()))
    assert four.accuracy.drop == 0
    assert four.accuracy.p_value == 1
    assert four.outputs[0].relative < 1e-5
    assert wide.speedup is None
    assert found.profiles[0].latency is None


def test_the_data_are_known_by_all_that_is_in_them(files, data):
    x, y = data.dataset.tensors
    models = subjects(files[:2])

    def seen(*batches):
        return measured(models, list(batches)).data_sha256

    usual = seen((x[:20], y[:20]), (x[20:], y[20:]))
    assert re.fullmatch("[0-9a-f]{64}", usual)
    assert seen((x[:20], y[:20]), (x[20:], y[20:])) == usual
    other_x, other_y = x.clone(), y.clone()
    other_x[-1, -1, -1, -1] += 1
    other_y[-1] = 0
    others = [seen((x[:20], y[:20]), rest) for rest in ((other_x[20:], y[20:]), (x[20:], other_y[20:]))]
    assert len({usual, *others}) == 3
    assert seen((x, None)) == seen((x, None)) != seen((x, y))
    assert measured(models).data_sha256 is None
    assert measured(models, data).to_json()["data_sha256"] == measured(models, data).data_sha256


def test_outputs_are_compared_on_images_without_labels(files, data):
    x, y = data.dataset.tensors
    unlabelled = DataLoader(TensorDataset(x, torch.full_like(y, -1)), batch_size=10)
    found = measured(subjects(files), unlabelled)
    assert [each.accuracy for each in found.profiles] == [None] * 3
    assert [each.accuracy for each in found.deltas] == [None] * 2
    assert [each.outputs for each in found.deltas] == [
        each.outputs for each in measured(subjects(files), data).deltas
    ]
    assert "drop" not in str(found)
    y = y.index_fill(0, torch.tensor([41]), -1)
    with pytest.raises(SepconvertError, match=r"labels: expected 0 to 6, .* got -1"):
        measured(subjects(files), DataLoader(TensorDataset(x, y), batch_size=10))


def test_models_and_files_are_measured_together(files, folder):
    inputs = (torch.randn(4, 3, 12, 12),)
    whole = Subject.of_model("whole", network().double(), inputs, folder / "whole.onnx")
    slow = Subject.of_model("slow", network(width=512), inputs, folder / "slow.onnx")
    found = measured([whole, *subjects(files[2:]), slow], runs=12)
    same, slower = found.deltas
    assert same.outputs[0].relative < 1e-5
    assert same.speedup.noise_floor == slower.speedup.noise_floor
    assert [each.latency.batch for each in found.profiles] == [4, 4, 4]
    text = str(found)
    assert "whole" in text
    assert "slow" in text
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["deltas"][1]["latency_speedup"]["median"] == slower.speedup.median > 0
    assert len(document["names"]) == len(document["profiles"]) == 3


def test_files_in_other_dtypes_are_fed_in_theirs(folder, files):
    half = exported(network(), folder, "half.onnx", dtype=torch.float16)
    found = measured(subjects([files[0], half]))
    assert 1e-6 < found.deltas[0].outputs[0].relative < 1e-2


def test_outputs_of_other_shapes_are_not_compared(files, folder):
    other = exported(network(classes=5), folder, "five.onnx")
    found = measured(subjects([files[0], other]))
    assert found.deltas[0].outputs is None
    assert "other shapes" in str(found)


class Two(nn.Module):
    def forward(self, a, b):
        return a + b


def test_what_cannot_be_compared_is_named(files, folder, data):
    with pytest.raises(SepconvertError, match=r"wide.onnx: ONNX Runtime cannot run it: expected .*12, 12"):
        measure(
            subjects(files[1:2] * 2), [np.zeros((1, 3, 9, 9), np.float32)],
            data=None, scoring=Scoring(), runs=0, runtime=Runtime(1), seed=0, progress=silent,
        )  # fmt: skip
    two = folder / "two.onnx"
    x = torch.zeros(4, 3, 12, 12)
    torch.onnx.export(Two().eval(), (x, x), two, dynamo=True, verbose=False)
    with pytest.raises(
        SepconvertError, match=r"two.onnx: expected a model with 1 inputs, as the first one has, got 2"
    ):
        measured(subjects([files[0], two]))
    few = exported(network(classes=3), folder, "three.onnx")
    with pytest.raises(
        SepconvertError, match=r"three.onnx: .*labels: expected 0 to 2, as the model has 3 classes"
    ):
        measured(subjects([few, files[0]]), data)
    headless = exported(network()[:5].eval(), folder, "headless.onnx")
    with pytest.raises(SepconvertError, match=r"headless.onnx: .*logits of shape .*say by `metric`"):
        measured(subjects([headless, files[0]]), data)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a"])
def test_what_is_no_onnx_file(folder, content):
    path = folder / "odd.onnx"
    path.write_bytes(content)
    with pytest.raises(SepconvertError, match=r"odd.onnx: not an ONNX model"):
        read_onnx(path)
    with pytest.raises(SepconvertError, match=r"gone.onnx: cannot be read"):
        read_onnx(folder / "gone.onnx")


def test_inputs_that_are_no_numbers(folder):
    text = onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [1])
    answer = onnx.helper.make_tensor_value_info("answer", onnx.TensorProto.STRING, [1])
    node = onnx.helper.make_node("Identity", ["text"], ["answer"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [text], [answer])),
              str(folder / "text.onnx"))  # fmt: skip
    with pytest.raises(SepconvertError, match=r"text.onnx: its input text is no tensor of numbers"):
        read_onnx(folder / "text.onnx")


@pytest.mark.parametrize("shape", [(1, 3, 2**16, 2**16), (2**31, 2**31), (1, -5)])
def test_inputs_of_absurd_shapes(folder, shape):
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])),
        str(folder / "large.onnx"),
    )
    with pytest.raises(SepconvertError, match=r"large.onnx: its input x has the shape .*, of more than 67,1"):
        read_onnx(folder / "large.onnx")


def test_weights_beside_a_file_count_as_the_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    save_onnx(export_program(model, (torch.randn(1, 3, 8, 8),)), tmp_path / "one.onnx")
    onnx.save(
        onnx.load(str(tmp_path / "one.onnx")), str(tmp_path / "two.onnx"), save_as_external_data=True,
        location="weights.bin",
    )  # fmt: skip
    whole, weights = onnx_sizes(tmp_path / "one.onnx")
    assert weights == sum(4 * parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "two.onnx").stat().st_size < weights
    split = onnx_sizes(tmp_path / "two.onnx")
    assert split[1] == weights
    assert split[0] == pytest.approx(whole, rel=0.05)


class Named(nn.Module):
    """Returns an embedding before its logits."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, views):
        logits = self.body(views["near"] + 0.5 * views["far"])
        return {"embedding": -logits, "logits": logits}


class Views(TensorDataset):
    def __getitem__(self, index):
        near, far, label = super().__getitem__(index)
        return {"near": near, "far": far}, label


def test_inputs_and_outputs_of_mappings_keep_their_names(folder, data):
    x, y = data.dataset.tensors
    model, views = Named().eval(), {"near": x[:4], "far": x[4:8]}
    path = folder / "named.onnx"
    save_onnx(export_program(model, (views,)), path)
    opened = onnxruntime.InferenceSession(path)
    assert [each.name for each in opened.get_inputs()] == ["near", "far"]
    assert [each.name for each in opened.get_outputs()] == ["embedding", "logits"]
    loader = DataLoader(Views(x, x.flip(0), y), 10)
    expected = evaluate(model, loader)
    # The output called logits is judged, as of the model itself, though another comes first.
    for scoring in (
        Scoring(),
        Scoring(output="logits"),
        Scoring(postprocess=lambda outputs: outputs["logits"]),
    ):
        inputs = [np.asarray(each, np.float32) for each in (x[:4], x[4:8])]
        found = measure(
            subjects([path, path]), inputs, data=loader, scoring=scoring, runs=0, runtime=Runtime(1), seed=0,
            progress=silent,
        )  # fmt: skip
        assert found.profiles[0].accuracy == expected.accuracy()
