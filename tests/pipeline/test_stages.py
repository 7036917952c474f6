"""What a conversion writes: files that agree with the model, all or none of them."""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from command_line import RESULTS, listing
from conversions import Answering, close, convert, decisions, run
from torch import nn

import sepconvert
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import ExportError, SepconvertError, VerificationError
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.verification.outputs import reference
from sepconvert.pipeline.stages import check_onnx
from sepconvert.report.text.sentences import warnings_of


def test_files(net, conversion, x):
    result, folder, _ = conversion
    assert listing(folder) == RESULTS
    original, converted = copy.deepcopy(net).eval(), copy.deepcopy(result.model).eval()
    archive = torch.export.load(folder / "converted.pt2").module()
    for batch in (1, 7):
        images = torch.randn(batch, 3, 12, 12)
        assert close(torch.from_numpy(run(folder / "original.onnx", images)[0]), original(images))
        assert close(torch.from_numpy(run(folder / "converted.onnx", images)[0]), original(images))
        assert close(archive(images), converted(images), 1e-6)
    tensors = safetensors.torch.load_file(folder / "converted.safetensors")
    assert set(tensors) == set(converted.state_dict())


class Slices(nn.Module):
    """Buffers that are parts of one tensor, and a weight that stands in two places."""

    def __init__(self, planted):
        super().__init__()
        self.conv, self.head, self.tied = planted(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.head.weight
        whole = torch.linspace(0, 1, 8)
        self.register_buffer("first", whole[:6])
        self.register_buffer("second", whole[2:])

    def forward(self, x):
        pooled = self.conv(x).mean((2, 3)) * self.first + self.second
        return self.tied(self.head(pooled))


def test_tensors_that_share_memory_are_written_and_read(planted, x, tmp_path):
    torch.manual_seed(0)
    model = Slices(planted).eval()
    result = convert(model, x, timing=sepconvert.Timing(runs=0), out=tmp_path)
    other = Slices(planted).eval()
    other.load_state_dict(model.state_dict())
    again = sepconvert.apply(other, tmp_path / "plan.json")
    assert again.tied.weight is again.head.weight
    assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize(
    ("dtype", "onnx_dtype"),
    [(torch.float64, "float32"), (torch.float16, "float16"), (torch.bfloat16, "float32")],
)
def test_dtypes(dtype, onnx_dtype, x):
    """Small integers, which every dtype holds: rank 1 in each."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, 4, shape, generator=generator).double() for shape in ((3, 3), (8, 3)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model[0].weight.data = torch.einsum("ci,oj->ocij", first, second) / 32
    model = model.to(dtype).eval()
    result = convert(model, x.to(dtype))
    assert decisions(result.report) == {"0": "converted"}
    assert result.report["layers"][0]["rank"] == 1
    assert result.report["dtype"] == str(dtype).removeprefix("torch.")
    assert result.report["export"]["onnx_dtype"] == onnx_dtype
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    assert {value.dtype for value in result.model.parameters()} == {dtype}
    tolerance = 20 * torch.finfo(dtype).eps
    assert close(result.model(x.to(dtype)).double(), model(x.to(dtype)).double(), tolerance)


@dataclass
class UnknownAnswer:
    first: torch.Tensor


class OfAList(Answering):
    def forward(self, parts):
        return self.answer(*(self.conv(each) for each in parts))


class OfADictionary(Answering):
    def forward(self, parts):
        return self.answer(self.conv(parts["image"]), parts["scale"])


@pytest.mark.parametrize(("kind", "batch"), [("list", 1), ("tuple", 2), ("dictionary", 1)])
def test_inputs_in_containers(kind, batch, planted, tmp_path):
    one, two = torch.randn(2, batch, 3, 10, 10)
    cls = OfADictionary if kind == "dictionary" else OfAList
    model = cls(planted(3, 8), lambda a, b: a + 2 * b).eval()
    parts = {
        "list": [one, two],
        "tuple": (one, two),
        "dictionary": {"image": one, "scale": one.mean()},
    }
    result = sepconvert.convert(model, (parts[kind],), timing=sepconvert.Timing(runs=0), out=tmp_path)
    assert decisions(result.report) == {"conv": "converted"}
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    assert result.report["export"]["missing"] == {}
    assert close(result.model(parts[kind]), model(parts[kind]))
    archive = torch.export.load(tmp_path / "converted.pt2").module()
    assert close(archive(parts[kind]), model(parts[kind]))


def test_outputs_of_a_class_that_torch_does_not_know(planted, x, tmp_path):
    """Files answer its tensors, as ONNX does anyway; the model answers as it did."""
    model = Answering(planted(3, 8), lambda y: UnknownAnswer({"a": y, "b": [y * 2, None]}))
    result = convert(model, x, out=tmp_path)
    assert isinstance(result.model(x), UnknownAnswer)
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    archived = torch.export.load(tmp_path / "converted.pt2").module()(x)
    for first, second in (archived, map(torch.from_numpy, run(tmp_path / "converted.onnx", x))):
        assert close(first, model.conv(x))
        assert close(second, 2 * model.conv(x))


class Branching(nn.Module):
    """Torch exports no branch on a value."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def test_what_torch_cannot_export_is_converted_all_the_same(planted, x, tmp_path):
    model = Branching(planted(3, 8))
    (tmp_path / "out").mkdir()
    result = convert(model, x, timing=sepconvert.Timing(runs=5), out=tmp_path / "out")
    assert decisions(result.report) == {"conv": "converted"}
    assert close(result.model(x), model(x))
    missing, check = result.report["export"]["missing"], result.report["verification"]
    assert set(missing) == {"original.onnx", "converted.onnx", "converted.pt2"}
    assert all("cannot export this model" in reason for reason in missing.values())
    assert check["passed"]
    assert check["onnx_reason"] == missing["original.onnx"]
    assert result.report["delta"]["latency_speedup"] is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "plan.json", "converted.safetensors", "report.json", "report.html",
    }  # fmt: skip
    assert any("not written: original.onnx" in note.text for note in warnings_of(result.report))
    fresh = Branching(planted(3, 8, seed=1))
    assert torch.equal(sepconvert.apply(fresh, tmp_path / "out" / "plan.json")(x), result.model(x))


def test_results_go_to_a_directory_that_is_made_or_empty(net, x, tmp_path):
    folder = tmp_path / "of mine" / "results"
    convert(net, x, timing=sepconvert.Timing(runs=0), out=str(folder))
    assert listing(folder) == RESULTS
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SepconvertError, match="results is not empty; pass an empty directory"):
        convert(net, x, timing=sepconvert.Timing(runs=0), out=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(SepconvertError, match=r"plan\.json.*pass a directory"):
        convert(net, x, timing=sepconvert.Timing(runs=0), out=folder / "plan.json")


def test_of_a_conversion_that_is_interrupted_no_file_is_left(net, x, tmp_path):
    seen = []

    def interrupt(items, description):
        for item in items:
            yield item
            if description == "exporting":
                seen.extend(tmp_path.iterdir())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(net, x, timing=sepconvert.Timing(runs=0), out=tmp_path, progress=interrupt)
    assert [path.name for path in seen] == ["original.onnx"]
    assert not list(tmp_path.iterdir())


def test_auto_mode_says_what_it_needs_of_the_exporter(planted, x):
    with pytest.raises(ExportError, match="cannot export this model"):
        convert(Branching(planted(16, 16)), torch.randn(1, 16, 12, 12), mode="auto", min_speedup=1.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetblur18"])
def test_blur_pools_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    pools = [path for path, module in model.named_modules() if type(module).__name__ == "BlurPool2d"]
    assert len(pools) == 4
    result = convert(model, images, gate="none", out=tmp_path)
    functional = {
        layer["name"].rpartition(".")[0]: layer["decision"]
        for layer in result.report["layers"]
        if layer["kind"] == "functional conv2d"
    }
    assert functional == dict.fromkeys(pools, "converted")
    assert type(model) in type(result.model).__mro__
    outputs = [run(tmp_path / f"{each}.onnx", images)[0] for each in ("original", "converted")]
    assert np.allclose(*outputs, atol=1e-4 * np.abs(outputs[0]).max())
    assert np.allclose(outputs[0], model(images).detach().numpy(), atol=1e-4 * np.abs(outputs[0]).max())


# Networks whose outputs saturate, and differences that are not the conversion's


def saturated(final, bias):
    """Two convolutions, the second of one channel, with a bias that saturates what follows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), final)
    model[2].bias.data += bias
    return model.eval()


@pytest.mark.parametrize("bias", [-6.0, -16.0])
@pytest.mark.parametrize("final", [nn.Sigmoid(), nn.SiLU(), nn.LogSigmoid()], ids=["sigmoid", "silu", "log"])
def test_networks_that_answer_near_zero_are_converted(final, bias):
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    check = convert(saturated(final, bias), x).verification
    assert check.holds
    assert check.original.holds


class SmallLogarithm(nn.Module):
    """The exporter makes log(1 + x) of it, which is 0 where x is small."""

    def forward(self, x):
        return torch.log1p(x * 1e-9) * 1e9


def test_an_export_that_computes_something_else_is_refused():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VerificationError, match=r"original.onnx is off .* more than rounding"):
        convert(saturated(SmallLogarithm(), 0.0), x)


def scaled(path, factor):
    """Change the largest weight of an ONNX file."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda each: int(np.prod(each.dims)))
    values = onnx.numpy_helper.to_array(largest) * np.float32(factor)
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    onnx.save(model, path)


@pytest.fixture
def exported(tmp_path):
    model, x = saturated(nn.Identity(), 0.0), torch.rand(1, 3, 16, 16)
    paths = tmp_path / "original.onnx", tmp_path / "converted.onnx"
    for path in paths:
        save_onnx(export_program(model, (x,), dynamic_batch=False), path)
    return model, reference(model, (x,), (), {}, 0), paths


def test_a_small_difference_of_the_original_is_reported_and_no_failure(exported):
    model, expected, paths = exported
    for path in paths:
        scaled(path, 1 + 1e-4)
    checks = check_onnx(partial(onnx_feed, model), (expected, None), paths, Runtime(1))
    assert not checks.original.holds
    assert checks.converted.holds


@pytest.mark.parametrize("own", [False, True])
def test_a_difference_of_the_converted_file_alone_is_a_failure(exported, own):
    model, expected, paths = exported
    scaled(paths[1], 1 + 1e-4)
    feed = partial(onnx_feed, model)
    checks = check_onnx(feed, (expected, expected if own else None), paths, Runtime(1))
    assert checks.original.holds
    assert not checks.converted.holds


def test_a_large_difference_of_the_original_is_refused(exported):
    model, expected, paths = exported
    scaled(paths[0], 1.01)
    with pytest.raises(VerificationError, match="more than rounding"):
        check_onnx(partial(onnx_feed, model), (expected, None), paths, Runtime(1))
