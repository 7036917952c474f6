"""The whole way, with real files and the real runtime. The oracles: the original's outputs, and fvcore."""

import copy
import hashlib
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.documents import sealed
from sepconvert.base.errors import DemandNotMetError, ExportError, SepconvertError
from sepconvert.measure.cost import FlopCountAnalysis
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.pipeline.replay import apply_plan
from sepconvert.planning.plan import read_plan
from sepconvert.report.sentences import warnings_of


def convert(model, *inputs, **options):
    return sepconvert.convert(model, inputs, **{"runs": 0, "threads": 1, **options})


def decisions(report):
    return {layer["name"]: layer["decision"] for layer in report["layers"]}


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))


def close(actual, expected, tolerance=1e-5):
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def fvcore_macs(model, *inputs):
    analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    return analysis.uncalled_modules_warnings(False).tracer_warnings("none").total()


class Net(nn.Module):
    """Convolutions that separate and such that do not, a blur, a frozen stem."""

    def __init__(self, planted):
        super().__init__()
        torch.manual_seed(0)
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(line, line).repeat(8, 1, 1, 1))
        self.stem = planted(3, 8, 5, padding=2).requires_grad_(False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(planted(8, 8, padding=1, seed=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.conv2d(self.norm(self.stem(x)), self.blur, stride=2, padding=2, groups=8)
        return self.head(self.body(x).mean((2, 3)))

    def predict(self, x):
        return self(x).argmax(1)


CONVERTED = {"stem", "conv2d_0", "body.0"}


@pytest.fixture(scope="module")
def net(planted):
    model = Net(planted).train()
    for _ in range(3):
        model(torch.randn(8, 3, 12, 12) + 1)  # running statistics
    model.body.eval()
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "gradients": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "hooks": [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def test_layers_under_autocast_are_compared_in_the_dtype_of_their_kernels(planted):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(planted(3, 8), planted(8, 8, seed=1))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.convs(x).float()

    model, x = Cast().eval(), torch.randn(2, 3, 12, 12)
    result = sepconvert.convert(model, x, runs=0, gate="none")
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"] * 2
    with torch.no_grad():
        expected, actual = model(x), result.model(x)
    # Two roundings to bfloat16 in place of one, in each of two layers.
    assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert not torch.equal(actual, expected)


@pytest.fixture(scope="module")
def conversion(net, x, tmp_path_factory):
    """Result, folder, and what the conversion left behind, of one conversion with everything on."""
    folder = tmp_path_factory.mktemp("conversion")
    net.body[0].register_forward_hook(_look)
    before, random_state = snapshot(net), torch.get_rng_state()
    labelled = TensorDataset(torch.randn(30, 3, 12, 12, generator=torch.Generator().manual_seed(2)),
                             torch.arange(30) % 5)  # fmt: skip
    result = convert(
        net, x, runs=5, out=folder, data=DataLoader(labelled, batch_size=16, generator=torch.Generator()),
        source={"path": "net.pt", "sha256": "ab" * 32}, command="sepconvert net.pt", seed=7,
    )  # fmt: skip
    return result, folder, (before, random_state, torch.get_rng_state())


def _look(module, inputs, output):
    return None


def test_the_input_model_is_untouched(net, conversion):
    _, _, (before, random_before, random_after) = conversion
    after = snapshot(net)
    state = after.pop("state")
    assert all(torch.equal(value, state[name]) for name, value in before["state"].items())
    assert {key: value for key, value in before.items() if key != "state"} == after
    assert torch.equal(random_before, random_after)


def test_the_result_is_the_users_model(net, conversion, x):
    model = conversion[0].model
    assert isinstance(model, Net)
    assert decisions(conversion[0].report) == {
        "stem": "converted", "conv2d_0": "converted", "body.0": "converted", "body.2": "kept",
    }  # fmt: skip
    assert {name for name, m in model.named_modules() if isinstance(m, FactorizedConv2d)} == CONVERTED
    assert (model.training, model.norm.training, model.body.training) == (True, True, False)
    assert model.stem.training
    assert not model.body[0].training
    assert list(model.body[0]._forward_hooks.values()) == [_look]
    assert not any(parameter.requires_grad for parameter in model.stem.parameters())
    assert all(parameter.requires_grad for parameter in model.body.parameters())
    assert not list(model.conv2d_0.parameters())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    evaluated, original = copy.deepcopy(model).eval(), copy.deepcopy(net).eval()
    assert close(evaluated(x), original(x))
    assert torch.equal(evaluated.predict(x), original.predict(x))
    assert close(copy.deepcopy(model)(x), copy.deepcopy(net)(x))  # BatchNorm on the batch


def test_the_result_trains(conversion, x):
    model, target = copy.deepcopy(conversion[0].model), torch.tensor([1, 3])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses, stem = [], model.stem.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert torch.equal(model.stem.weight, stem)


def test_copies_files_and_state_dicts(net, conversion, x, tmp_path):
    model = copy.deepcopy(conversion[0].model).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(copy.deepcopy(loaded)(x), model(x))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.stem.weight.mul_(2)
        other.head.weight.zero_()
    fresh = convert(other, x).model.eval()
    assert not close(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_files(net, conversion, x):
    result, folder, _ = conversion
    assert {path.name for path in folder.iterdir()} == {
        "original.onnx", "converted.onnx", "converted.pt2", "plan.json", "converted.safetensors",
        "report.json", "report.html",
    }  # fmt: skip
    original, converted = copy.deepcopy(net).eval(), copy.deepcopy(result.model).eval()
    archive = torch.export.load(folder / "converted.pt2").module()
    for batch in (1, 7):
        images = torch.randn(batch, 3, 12, 12)
        assert close(torch.from_numpy(run(folder / "original.onnx", images)[0]), original(images))
        assert close(torch.from_numpy(run(folder / "converted.onnx", images)[0]), original(images))
        assert close(archive(images), converted(images), 1e-6)
    tensors = safetensors.torch.load_file(folder / "converted.safetensors")
    assert set(tensors) == set(converted.state_dict())


def test_the_report_keeps_the_contract(net, conversion, x):
    result, folder, _ = conversion
    report = json.loads((folder / "report.json").read_text())
    assert report == result.report
    json.dumps(report, allow_nan=False)
    assert report["schema"] == "sepconvert.report/1"
    assert report["model"] == {"path": "net.pt", "sha256": "ab" * 32}
    assert report["seed"] == 7
    assert report["command"] == "sepconvert net.pt"
    assert report["changed_predictions"]["count"] == 0
    assert report["execution"]["converted"][0] > 0
    assert set(report) >= {
        "mode", "model", "environment", "seed", "original", "converted", "delta", "layers", "verification",
    }  # fmt: skip
    assert set(report["environment"]) >= {"sepconvert", "torch", "onnxruntime", "cpu", "threads"}
    for name, model in (("original", net), ("converted", result.model)):
        profile, evaluated = report[name], copy.deepcopy(model).eval()
        assert set(profile) >= {
            "params", "macs", "flops", "onnx_bytes", "latency_ms", "accuracy", "uncounted_ops",
        }  # fmt: skip
        assert profile["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert profile["macs"] == fvcore_macs(evaluated, x) / 2  # a batch of two
        assert profile["flops"] == 2 * profile["macs"]
        assert profile["onnx_bytes"] == (folder / f"{name}.onnx").stat().st_size
        assert set(profile["latency_ms"]) >= {"median", "ci95", "p90", "runs", "threads", "batch"}
        assert set(profile["accuracy"]) >= {"top1", "top5", "n"}
        assert profile["accuracy"]["n"] == 30
    delta = report["delta"]
    for key in ("params", "macs"):
        ratio = report["original"][key] / report["converted"][key]
        assert math.isclose(delta[f"{key}_ratio"], ratio)
        assert ratio > 1
    assert set(delta["latency_speedup"]) >= {"median", "ci95", "significant"}
    assert set(delta["accuracy_drop_pp"]) >= {"value", "ci95"}
    assert delta["accuracy_drop_pp"]["value"] == 0
    assert delta["agreement"] == 1
    assert set(report["verification"]) >= {"torch_max_abs_diff", "onnx_max_abs_diff"}
    assert report["verification"]["passed"]
    before = after = 0
    for layer in report["layers"]:
        assert set(layer) >= {
            "name", "kind", "decision", "reason", "scheme", "rank", "exact", "macs", "params",
            "weight_error", "output_error", "latency_ms",
        }  # fmt: skip
        assert layer["reason"]
        assert layer["exact"] == (layer["decision"] == "converted") == (layer["scheme"] is not None)
        assert layer["exact"] == (layer["output_error"] is not None) == (layer["latency_ms"] is not None)
        assert layer["exact"] == (layer["execution"] is not None)
        before, after = before + layer["macs"][0], after + layer["macs"][1]
    rest = fvcore_macs(nn.Sequential(copy.deepcopy(net).head), torch.randn(1, 8))
    assert report["original"]["macs"] - before == report["converted"]["macs"] - after >= rest


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
    result = convert(model, x, runs=0, out=tmp_path)
    other = Slices(planted).eval()
    other.load_state_dict(model.state_dict())
    again = sepconvert.apply(other, tmp_path / "plan.json")
    assert again.tied.weight is again.head.weight
    assert torch.equal(again(x), result.model(x))


def test_the_same_seed_gives_the_same_bits(net, conversion, x):
    again = convert(net, x, seed=7)
    assert again.plan == {**conversion[0].plan, "model_sha256": None}
    expected = conversion[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


@pytest.fixture
def replayable(net, conversion, tmp_path):
    """A fresh model and a writable copy of the plan's folder."""
    for name in ("plan.json", "converted.safetensors"):
        (tmp_path / name).write_bytes((conversion[1] / name).read_bytes())
    (tmp_path / "out").mkdir()
    return copy.deepcopy(net), tmp_path


def replay(model, folder, sha256="ab" * 32):
    return apply_plan(
        model,
        read_plan(folder / "plan.json"),
        folder / "converted.safetensors",
        folder / "out",
        model_sha256=sha256,
    )


def test_apply_reproduces_the_conversion(replayable, conversion, x):
    model, folder = replayable
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(-3)  # the plan's weights replace these
    assert replay(model, folder, sha256=None) is None
    converted = copy.deepcopy(conversion[0].model).eval()
    assert torch.equal(torch.export.load(folder / "out" / "converted.pt2").module()(x), converted(x))
    assert close(torch.from_numpy(run(folder / "out" / "converted.onnx", x)[0]), converted(x))


def test_apply_verifies_on_the_very_model(replayable):
    verified = replay(*replayable)
    assert verified["max_abs_diff"] <= verified["tolerance"]


def tamper(folder, name, factor):
    path = folder / "converted.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[name] = tensors[name] * factor
    safetensors.torch.save_file(tensors, path)


def rehash(folder):
    document = json.loads((folder / "plan.json").read_text())
    document["weights_sha256"] = hashlib.sha256((folder / "converted.safetensors").read_bytes()).hexdigest()
    (folder / "plan.json").write_text(json.dumps(sealed(document)))


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [("body.0.branches.0.0.weight", "body.0"), ("conv2d_0.branches.0.1.weight", "conv2d_0")],
)
def test_tampered_weights(replayable, tensor, layer):
    model, folder = replayable
    tamper(folder, tensor, 1.001)
    with pytest.raises(SepconvertError, match="is not the file that the plan was written with"):
        replay(model, folder)
    rehash(folder)
    with pytest.raises(DemandNotMetError, match=rf"verification failed: .*\b{layer}\b") as caught:
        replay(model, folder)
    assert caught.value.exit_code == 3
    assert not list((folder / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: nn.Sequential(nn.Conv2d(3, 4, 3)), "expected a convolution stem.*the model has none"),
        (lambda model: setattr(model, "stem", nn.Conv2d(3, 8, 5, padding=1)), "expected a convolution stem"),
        (lambda model: setattr(model, "stem", nn.Conv2d(1, 8, 5, padding=2)), "check the input's shape"),
        (
            lambda model: setattr(model, "head", nn.Bilinear(8, 8, 5)),
            "missing .* pass a tuple of all its inputs",
        ),
        (lambda model: setattr(model, "head", nn.Linear(8, 6)), "does not fit the model"),
        (lambda model: setattr(model, "extra", nn.Linear(8, 6)), "does not fit the model"),
    ],
)
def test_the_plan_of_another_model(replayable, change, message):
    model, folder = replayable
    other = change(model) or model
    with pytest.raises(SepconvertError, match=message) as caught:
        replay(other, folder, sha256=None)
    assert "\n" not in str(caught.value)


def test_weights_that_are_gone(replayable):
    model, folder = replayable
    (folder / "converted.safetensors").unlink()
    with pytest.raises(SepconvertError, match=r"cannot be read: .*belongs beside the plan"):
        replay(model, folder)


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


class Answering(nn.Module):
    def __init__(self, conv, answer):
        super().__init__()
        self.conv, self.answer = conv, answer

    def forward(self, x, *others):
        return self.answer(self.conv(x), *others)


class OfFixedBatch(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        if x.shape[0] != 2:
            raise ValueError("expected two")
        return self.conv(x)


class OfFloat32(OfFixedBatch):
    def forward(self, x):
        return self.conv(x.float())


class OfNoFloat64(OfFixedBatch):
    def forward(self, x):
        assert x.dtype == torch.float32
        return self.conv(x)


@dataclass
class ModelAnswer:
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class UnknownAnswer:
    first: torch.Tensor


class NamedAnswer(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


torch.export.register_dataclass(ModelAnswer, serialized_type_name="test_pipeline.ModelAnswer")
ANSWERS = {
    "tuple": lambda y: (y, y.mean()),
    "dict": lambda y: {"first": y, "rest": [y * 2]},
    "dataclass": lambda y: ModelAnswer(y, y * 2),
    "named tuple": lambda y: NamedAnswer(y, y * 2),
    "other inputs": lambda y, a, b: y * a + b.float(),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_outputs_and_inputs_of_many_kinds(name, planted, x):
    model = Answering(planted(3, 8), ANSWERS[name]).train()
    others = (torch.randn(2, 8, 10, 10), torch.arange(2).view(2, 1, 1, 1)) if name == "other inputs" else ()
    result = convert(model, x, *others)
    assert decisions(result.report) == {"conv": "converted"}
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    leaves = [torch.utils._pytree.tree_leaves(m(x, *others)) for m in (model, result.model)]
    assert all(close(actual, expected) for expected, actual in zip(*leaves, strict=True))
    assert result.model.training


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
    result = sepconvert.convert(model, (parts[kind],), runs=0, out=tmp_path)
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


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled in parts": lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]),
    "compiled in place": lambda model: (model.compile(), model)[1],
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper, planted, x):
    inner = nn.Sequential(nn.Sequential(planted(3, 8), nn.ReLU()), nn.Conv2d(8, 5, 1)).train()
    expected = inner(x)
    result = convert(WRAPPERS[wrapper](inner), x)
    assert type(result.model) is nn.Sequential
    assert decisions(result.report) == {"0.0": "converted", "1": "kept"}
    assert set(result.model.state_dict()) > {"1.weight", "1.bias"}
    assert close(result.model(x), expected)
    assert result.model.training


class Quantised(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.filterwarnings("ignore")  # of torch's own plans for quantisation
def test_quantised_models_are_refused(x):
    for layer, named in (
        (torch.ao.nn.quantized.Conv2d(3, 8, 3), r"layer is torch\.ao\.nn\.quantized\.Conv2d"),
        (torch.ao.nn.quantized.dynamic.Linear(3, 8), r"layer is torch\.ao\.nn\.quantized\.dynamic\.Linear"),
    ):
        with pytest.raises(SepconvertError, match=rf"the model is quantised \({named}\)") as caught:
            convert(Quantised(layer), x)
        assert "\n" not in str(caught.value)


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
    result = convert(model, x, runs=5, out=tmp_path / "out")
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
    convert(net, x, runs=0, out=str(folder))
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "original.onnx", "converted.onnx", "converted.pt2", "converted.safetensors",
        "plan.json", "report.json", "report.html",
    }  # fmt: skip
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SepconvertError, match="results is not empty; pass an empty directory"):
        convert(net, x, runs=0, out=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(SepconvertError, match=r"plan\.json.*pass a directory"):
        convert(net, x, runs=0, out=folder / "plan.json")


def test_of_a_conversion_that_is_interrupted_no_file_is_left(net, x, tmp_path):
    seen = []

    def interrupt(items, description):
        for item in items:
            yield item
            if description == "exporting":
                seen.extend(tmp_path.iterdir())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(net, x, runs=0, out=tmp_path, progress=interrupt)
    assert [path.name for path in seen] == ["original.onnx"]
    assert not list(tmp_path.iterdir())


def test_auto_mode_says_what_it_needs_of_the_exporter(planted, x):
    with pytest.raises(ExportError, match="cannot export this model"):
        convert(Branching(planted(16, 16)), torch.randn(1, 16, 12, 12), mode="auto", min_speedup=1.1)


def test_outputs_that_are_integers(planted, x):
    model = Answering(planted(3, 8), lambda y: y.argmax(1))
    result = convert(model, x)
    assert torch.equal(result.model(x), model(x))


def test_one_tensor_for_two_inputs(planted, x):
    model = Answering(planted(3, 3, padding=1), lambda y, a: y - 3 * a)
    result = convert(model, x, x)
    assert close(result.model(x, 2 * x), model(x, 2 * x))
    assert result.report["verification"]["passed"]
    assert result.report["verification"]["onnx_tolerance"] < 1e-3


def test_a_fixed_batch(planted, x):
    result = convert(OfFixedBatch(planted(3, 8)), x)
    assert decisions(result.report) == {"conv": "converted"}
    assert not result.report["export"]["dynamic_batch"]
    assert result.report["export"]["reason"]


def test_a_forward_that_insists_on_float32(planted, x):
    result = convert(OfFloat32(planted(3, 8)), x)
    assert decisions(result.report) == {"conv": "converted"}
    assert result.report["verification"]["torch_dtype"] == "float32"
    assert result.report["verification"]["passed"]


def test_a_forward_that_asserts_float32(planted, x):
    result = convert(OfNoFloat64(planted(3, 8)), x)
    assert result.report["verification"]["torch_dtype"] == "float32"


def test_hooks_that_change_values(planted, x):
    model = nn.Sequential(planted(3, 8))
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    model[0].register_forward_hook(lambda module, inputs, output: output - 1)
    result = convert(model, x)
    assert close(result.model(x), model(x))


def test_nothing_to_convert(x):
    result = convert(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), x)
    assert result.report["layers"] == []
    assert result.report["delta"]["macs_ratio"] == 1
    assert result.report["verification"]["torch_max_abs_diff"] == 0
    pooling = convert(nn.MaxPool2d(2), x)
    assert pooling.report["original"]["macs"] == 0
    assert pooling.report["delta"]["macs_ratio"] is None


def test_the_model_is_a_convolution(planted, x):
    dense = planted(3, 8).eval()
    result = convert(dense, x)
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"]
    assert isinstance(result.model, FactorizedConv2d)
    assert close(result.model(x), dense(x))


def test_a_kernel_of_zeros(x):
    model = nn.Conv2d(3, 8, 3)
    nn.init.zeros_(model.weight)
    result = convert(model, x)
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"]
    assert torch.equal(result.model(x), model(x))
    assert result.report["layers"][0]["weight_error"] == 0


class Filters(nn.Module):
    """An image pipeline, all functional."""

    def __init__(self):
        super().__init__()
        smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
        gauss = torch.exp(-(torch.arange(11) - 5.0).square() / 8).double()
        binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("sobel", torch.outer(smooth, slope)[None, None])
        self.register_buffer("scharr", torch.outer(slope, torch.tensor([3.0, 10.0, 3.0]))[None, None])
        self.register_buffer("binomial", torch.outer(binomial, binomial)[None, None])
        self.register_buffer("gauss", (torch.outer(gauss, gauss) / gauss.sum() ** 2).float()[None, None])

    def forward(self, x):
        smooth = F.conv2d(F.conv2d(x.mean(1, keepdim=True), self.gauss, padding=5), self.binomial, padding=2)
        return F.conv2d(smooth, self.sobel).square() + F.conv2d(smooth, self.scharr).square()


def test_an_image_pipeline(x):
    model = Filters()
    result = convert(model, x)
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert [layers[f"conv2d_{index}"]["macs"] for index in range(2)] == [
        [144 * 121, 144 * 22],
        [144 * 25, 144 * 10],
    ]
    assert [layers[f"conv2d_{index}"]["decision"] for index in range(2)] == ["converted", "converted"]
    # A rank-one 3×3 filter without padding: the first factor has 10×12 outputs, or 12×10.
    for index in (2, 3):
        assert layers[f"conv2d_{index}"]["macs"][0] == 900
        if layers[f"conv2d_{index}"]["decision"] == "converted":
            assert layers[f"conv2d_{index}"]["macs"][1] < 900
    for name, each in (("original", model), ("converted", result.model)):
        assert result.report[name]["macs"] == fvcore_macs(each, x) / 2
    assert isinstance(result.model, Filters)
    images = torch.randn(3, 3, 30, 17)
    assert close(result.model(images), model(images), 1e-4)
    assert result.report["original"]["params"] == result.report["converted"]["params"] == 0


def test_gates_and_globs(net, x):
    chosen = convert(net, x, include=("body.*", "stem"), exclude=("*.0",)).report
    assert {name for name, decision in decisions(chosen).items() if decision == "converted"} == {"stem"}
    assert {layer["reason"] for layer in chosen["layers"] if layer["name"] in ("conv2d_0", "body.0")} == {
        "not selected"
    }
    timed = convert(net, x, gate="latency", runs=5).report
    for layer in timed["layers"]:
        assert (layer["decision"] == "kept") == (layer["scheme"] is None)
        if layer["name"] in CONVERTED and layer["decision"] == "kept":
            assert "is measured" in layer["reason"]
    assert timed["verification"]["passed"]


def test_inspect_decides_as_convert_does(net, x, conversion):
    found = sepconvert.inspect(net, x)
    keys = ("name", "decision", "reason", "scheme", "rank", "macs", "params", "weight_error", "structures")
    for inspected, converted in zip(found["layers"], conversion[0].report["layers"], strict=True):
        assert {key: inspected[key] for key in keys} == {key: converted[key] for key in keys}
        assert all("best_relative_error" in structure for structure in inspected["structures"])
    json.dumps(found, allow_nan=False)


def test_tolerance(planted, x):
    """A kernel off by 1e-3 is exact only if that is asked for."""
    model = nn.Sequential(planted(3, 8))
    noise = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(5))
    weight = model[0].weight.data
    weight += 3e-4 * noise * (weight.norm() / noise.norm())
    assert decisions(sepconvert.inspect(model, x)) == {"0": "kept"}
    result = convert(model, x, tol=1e-3)
    assert decisions(result.report) == {"0": "converted"}
    assert 1e-6 < result.report["layers"][0]["weight_error"] <= 1e-3
    assert result.plan["tol"] == 1e-3
    with torch.no_grad():
        assert 0 < (result.model(x) - model(x)).norm() / model(x).norm() < 3e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tucker"}, "mode: expected"),
        ({"gate": "flops"}, "gate: expected one of macs, latency, none"),
        ({"tol": -1.0}, "tol: expected"),
        ({"tol": 1.0}, "tol: expected"),
        ({"tol": math.nan}, "tol: expected"),
        ({"tol": "a"}, "tol: expected a number from 0, got 'a'"),
        ({"runs": 1.5}, "runs: expected a whole number from 0, got 1.5"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 2**63}, "seed: expected a whole number from 0 to 9,223,372,036,854,775,807, got 9223"),
        ({"threads": 10**8}, "threads: expected a whole number from 1 to 1,024"),
        ({"memory": math.nan}, "memory: expected a number from 1, got nan"),
        ({"memory": -1}, "memory: expected a number from 1, got -1"),
        ({"mode": "approx", "rank": 1.5}, "--rank 1.5: expected a whole channel multiplier"),
        ({"mode": "approx", "target_macs": math.nan}, "--target-macs nan: expected a share"),
        ({"mode": "approx", "rank": 1, "calib": [1]}, r"calib: expected .*DataLoader, got list; make one"),
    ],
)
def test_bad_arguments(options, message, net, x):
    with pytest.raises(SepconvertError, match=message):
        convert(net, x, **options)


def test_a_gate_that_inspect_does_not_know(net, x):
    with pytest.raises(SepconvertError, match="gate: expected one of macs, latency, none, got 'flops'"):
        sepconvert.inspect(net, x, gate="flops")


@pytest.mark.parametrize("inputs", ["x", None, (), torch.empty(1, 3, 8, 8, device="meta")])
def test_inputs_that_are_none(inputs, net):
    with pytest.raises(SepconvertError, match="example_inputs: expected a tensor, or a tuple"):
        convert(net, inputs)


def test_bad_inputs(net):
    for shape in ((2, 4, 12, 12), (0, 3, 12, 12), (12,)):
        with pytest.raises(SepconvertError) as caught:
            convert(net, torch.randn(shape))
        assert "\n" not in str(caught.value)


class Standardised(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "ScaledStdConv2d"])
@pytest.mark.filterwarnings("ignore::FutureWarning:timm")
def test_subclasses_of_timm(name, planted, x):
    layers = pytest.importorskip("timm.layers")
    conv = getattr(layers, name)(8, 8, 3, **({"stride": 2} if name == "Conv2dSame" else {"padding": 1}))
    conv.weight.data = planted(8, 8, rank=1).weight.data
    model, images = Standardised(conv).eval(), torch.randn(2, 8, 13, 13)
    result = convert(model, images, gate="none")
    [layer] = result.report["layers"]
    if name == "Conv2dSame":
        assert layer["decision"] == "kept"
        assert "does more than convolve its input" in layer["reason"]
    else:  # subtracting the mean adds one to the rank
        assert (layer["decision"], layer["rank"]) == ("converted", 2)
        torch.testing.assert_close(result.model(images), model(images), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_kernels_that_are_not_finite_are_kept_and_the_others_converted(planted, x, value, broken):
    layers = [planted(3, 8), planted(8, 4)]
    model = nn.Sequential(*layers)
    model[broken].weight.data[0, 0, 0, 0] = value
    result = convert(model, x)
    assert decisions(result.report) == {str(broken): "kept", str(1 - broken): "converted"}
    assert "NaN or Inf" in result.report["layers"][broken]["reason"]
    assert result.report["verification"]["passed"]


class ReadsAWeight(nn.Module):
    """A functional convolution, beside a look at the kernel of a layer that is replaced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(line, line).repeat(8, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(self.layer(x), self.blur, groups=8) + self.layer.weight.mean()


def test_a_forward_may_read_the_weight_of_a_replaced_layer(planted, x):
    model = ReadsAWeight(planted(3, 8, 5))
    result = convert(model, x)
    assert decisions(result.report) == {"layer": "converted", "conv2d_0": "converted"}
    assert close(result.model(x), model(x))


def test_a_kernel_shared_by_two_layers_stays_shared(planted, x):
    model = nn.Sequential(planted(3, 3, 5, rank=1, padding=2), nn.ReLU(), nn.Conv2d(3, 3, 5))
    model[2].weight = model[0].weight
    result = convert(model, x)
    assert decisions(result.report) == {"0": "kept", "2": "kept"}
    assert all("shared with" in layer["reason"] for layer in result.report["layers"])
    assert result.model[2].weight is result.model[0].weight


def test_what_is_within_tol_only_is_not_called_exact(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 5))
    (layer,) = convert(model, x, tol=0.5).report["layers"]
    assert layer["decision"] == "converted"
    assert not layer["exact"]
    assert "within --tol only" in layer["reason"]
    assert layer["weight_error"] > 1e-3


def test_a_glob_that_matches_nothing_is_an_error(planted, x):
    with pytest.raises(SepconvertError, match="nosuch: matches none of the 1 convolutions"):
        convert(planted(3, 8), x, include=["nosuch"])


class HoldsATensor(nn.Module):
    """A kernel that is neither parameter nor buffer, and so does not follow `.double()`."""

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.kernel = torch.outer(line, line)[None, None].repeat(3, 1, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=3)


def test_plain_tensors_follow_to_float64(x):
    result = convert(HoldsATensor(), x)
    assert decisions(result.report) == {"conv2d_0": "converted"}
    assert result.report["verification"]["torch_dtype"] == "float64"
