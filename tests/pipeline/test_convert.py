"""The whole way, with real files and the real runtime. The oracles: the original's outputs, and fvcore."""

import copy
import json
import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conversions import (
    UNTIMED,
    Answering,
    Net,
    close,
    convert,
    converted,
    decided,
    decisions,
    fvcore_macs,
    look,
    run,
    snapshot,
)  # fmt: skip
from shadows import NAMES, AnswersAll, Compared, all_shadowed, shadowing_net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.errors import DemandNotMetError, SepconvertError
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.planning.plan import read_plan

CONVERTED = {"stem", "conv2d_0", "body.0"}


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
    assert list(model.body[0]._forward_hooks.values()) == [look]
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


def test_the_report_is_of_the_models(net, conversion, x):
    result, folder, _ = conversion
    report = json.loads((folder / "report.json").read_text())
    assert report == result.report
    json.dumps(report, allow_nan=False)
    assert report["model"] == {"path": "net.pt", "sha256": "ab" * 32}
    assert report["seed"] == 7
    assert report["command"] == "sepconvert net.pt"
    assert report["changed_predictions"]["count"] == 0
    assert report["execution"]["converted"][0] > 0
    for name, model in (("original", net), ("converted", result.model)):
        profile, evaluated = report[name], copy.deepcopy(model).eval()
        assert profile["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert profile["macs"] == fvcore_macs(evaluated, x) / 2  # a batch of two
        assert profile["flops"] == 2 * profile["macs"]
        assert profile["onnx_bytes"] == (folder / f"{name}.onnx").stat().st_size
        assert profile["accuracy"]["n"] == 30
    delta = report["delta"]
    for key in ("params", "macs"):
        ratio = report["original"][key] / report["converted"][key]
        assert math.isclose(delta[f"{key}_ratio"], ratio)
        assert ratio > 1
    assert delta["accuracy_drop_pp"]["value"] == 0
    assert delta["agreement"] == 1
    assert report["verification"]["passed"]
    before = after = 0
    for layer in report["layers"]:
        assert layer["reason"]
        assert layer["exact"] == (layer["decision"] == "converted") == (layer["scheme"] is not None)
        assert layer["exact"] == (layer["output_error"] is not None) == (layer["latency_ms"] is not None)
        assert layer["exact"] == (layer["execution"] is not None)
        before, after = before + layer["macs"][0], after + layer["macs"][1]
    rest = fvcore_macs(nn.Sequential(copy.deepcopy(net).head), torch.randn(1, 8))
    assert report["original"]["macs"] - before == report["converted"]["macs"] - after >= rest


def test_the_same_seed_gives_the_same_bits(net, conversion, x):
    again = convert(net, x, seed=7)
    assert read_plan(again.plan) == replace(read_plan(conversion[0].plan), model_sha256=None)
    expected = conversion[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_the_stages_take_all_of_the_time(small):
    model, data = small
    begun = time.perf_counter()
    result = sepconvert.convert(
        model, torch.randn(1, 3, 14, 14), "approx", calib=data, rank=1, gate="none", timing=UNTIMED
    )
    seconds, stages = time.perf_counter() - begun, {each["stage"]: each for each in result.report["stages"]}
    assert "start" not in stages  # that of the process is no part of a call
    assert {"trace", "checks", "calibration", "survey", "moments", "fits", "divergence"} < set(stages)
    assert stages["survey"]["parts"].keys() == {layer["name"] for layer in converted(result.report)}
    for each in stages.values():
        assert each["cpu_s"] >= 0 < each["peak_bytes"]
        assert 0 <= sum(each["parts"].values()) <= each["wall_s"]
    assert 0.8 < sum(each["wall_s"] for each in stages.values()) / seconds <= 1


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
    result = decided(WRAPPERS[wrapper](inner), x)
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
            decided(Quantised(layer), x)
        assert "\n" not in str(caught.value)


def test_outputs_that_are_integers(planted, x):
    model = Answering(planted(3, 8), lambda y: y.argmax(1))
    result = decided(model, x)
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
    result = decided(OfFloat32(planted(3, 8)), x)
    assert decisions(result.report) == {"conv": "converted"}
    assert result.report["verification"]["torch_dtype"] == "float32"
    assert result.report["verification"]["passed"]


def test_a_forward_that_asserts_float32(planted, x):
    result = decided(OfNoFloat64(planted(3, 8)), x)
    assert result.report["verification"]["torch_dtype"] == "float32"


def test_hooks_that_change_values(planted, x):
    model = nn.Sequential(planted(3, 8))
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    model[0].register_forward_hook(lambda module, inputs, output: output - 1)
    result = decided(model, x)
    assert close(result.model(x), model(x))


def test_nothing_to_convert(x):
    result = decided(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), x)
    assert result.report["layers"] == []
    assert result.report["delta"]["macs_ratio"] == 1
    assert result.report["verification"]["torch_max_abs_diff"] == 0
    pooling = decided(nn.MaxPool2d(2), x)
    assert pooling.report["original"]["macs"] == 0
    assert pooling.report["delta"]["macs_ratio"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tucker"}, "`mode`: expected one of exact, approx, auto, got 'tucker'"),
        ({"gate": "flops"}, "`gate`: expected one of macs, latency, none"),
        ({"tol": -1.0}, "`tol`: expected"),
        ({"tol": 1.0}, "`tol`: expected"),
        ({"tol": math.nan}, "`tol`: expected"),
        ({"tol": "a"}, "`tol`: expected a number from 0, got 'a'"),
        ({"seed": -1}, "`seed`: expected a whole number from 0"),
        ({"seed": 2**63}, "`seed`: expected a whole number from 0 to 9,223,372,036,854,775,807, got 9223"),
        (
            {"mode": "approx", "rank": 1, "calib": [1]},
            "`calib`: expected a torch.utils.data.DataLoader, got list; make one",
        ),
    ],
)
def test_bad_arguments(options, message, net, x):
    with pytest.raises(SepconvertError, match=message):
        convert(net, x, **options)


def test_a_gate_that_inspect_does_not_know(net, x):
    with pytest.raises(SepconvertError, match="`gate`: expected one of macs, latency, none, got 'flops'"):
        sepconvert.inspect(net, x, gate="flops")


@pytest.mark.parametrize("inputs", ["x", (), torch.empty(1, 3, 8, 8, device="meta")])
def test_inputs_that_are_none(inputs, net):
    with pytest.raises(SepconvertError, match="`example_inputs`: expected a tensor, or a tuple"):
        decided(net, inputs)


def test_a_module_needs_inputs(net):
    with pytest.raises(SepconvertError, match="`example_inputs`: are needed, as a module names none"):
        decided(net, None)


def test_bad_inputs(net):
    for shape in ((2, 4, 12, 12), (0, 3, 12, 12), (12,)):
        with pytest.raises(SepconvertError) as caught:
            decided(net, torch.randn(shape))
        assert "\n" not in str(caught.value)


def shadowing(kind):
    """A network that uses names of `nn.Module` for itself, or whose modules are equal, empty and false."""
    return {
        "all names": all_shadowed,
        "special": lambda: shadowing_net([], outer=Compared, inner=AnswersAll),
    }[kind]()


@pytest.mark.parametrize("kind", ["all names", pytest.param("special", marks=pytest.mark.slow)])
def test_a_model_that_shadows_names_of_its_modules(kind, tmp_path):
    model, x = shadowing(kind), torch.rand(2, 3, 16, 16)
    expected = model(x)
    result = convert(model, x, out=tmp_path)
    assert decisions(result.report) == {"stem": "converted", "block.conv": "converted"}
    assert isinstance(result.model._modules["stem"], FactorizedConv2d)
    assert type(result.model) is type(model)
    assert close(result.model(x), expected)
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    assert result.report["original"]["macs"] == fvcore_macs(shadowing_net([]), x) / 2
    assert (tmp_path / "converted.pt2").exists()
    profile = sepconvert.profile(model, x)
    assert (profile.params, profile.macs) == tuple(
        result.report["original"][key] for key in ("params", "macs")
    )
    again = sepconvert.apply(model, tmp_path / "plan.json", x)
    assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize("kind", ["all names", "special"])
def test_approximation_and_fine_tuning_of_such_a_model(kind):
    model, images = shadowing(kind), torch.rand(32, 3, 16, 16)
    calib = DataLoader(TensorDataset(images, torch.arange(32) % 4), batch_size=8)
    with torch.no_grad():
        model.block.conv.weight.add_(0.5 * torch.randn(8, 8, 5, 5))
    expected, settings = model(images), {"rank": 2, "gate": "macs", "timing": UNTIMED}
    result = decided(model, images[:2], "approx", calib=calib, finetune=1, **settings)
    assert decisions(result.report)["block.conv"] == "converted"
    start, trained = result.report["approximation"]["finetune"]["history"]
    assert trained["heldout_loss"] < start["heldout_loss"]
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_shadowed_name(name):
    found = sepconvert.inspect(shadowing_net([name]), torch.rand(1, 3, 8, 8)).to_json()
    assert decisions(found) == {"stem": "converted", "block.conv": "converted"}


# ONNX files: the file of the same network in torch is the oracle -----------------------------------------

QUICK = {"timing": UNTIMED, "gate": "none"}


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    """The ONNX file of the network `small`."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    save_onnx(export_program(small[0], (torch.randn(1, 3, 14, 14),)), path)
    return path


def test_a_file_needs_no_inputs_and_no_source(file, tmp_path):
    content = file.read_bytes()
    found = sepconvert.convert(file, out=tmp_path / "out", **QUICK)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (tmp_path / "out/original.onnx").read_bytes() == content == file.read_bytes()
    assert isinstance(found.model, OnnxNetwork)
    assert report["model"]["path"] == str(file)
    assert len(report["layers"]) == 3
    # The norm is folded. Positions × weights of three convolutions, and a matrix product.
    assert report["original"]["macs"] == 12**2 * 16 * 27 + 12**2 * 16 * 144 + 5**2 * 24 * 144 + 24 * 5
    assert report["export"]["missing"].keys() == {"converted.pt2"}
    assert not (tmp_path / "out/converted.pt2").exists()


@pytest.mark.slow
def test_the_same_plan_from_the_file_and_from_torch(small, file):
    model, data = small
    mine, theirs = (
        sepconvert.convert(each, torch.randn(1, 3, 14, 14), "approx", calib=data, rank=2, **QUICK)
        for each in (file, model)
    )
    forms = [[(each["scheme"], each["rank"]) for each in converted(one.report)] for one in (mine, theirs)]
    assert forms[0] == forms[1] != []
    saved = [each.original.macs - each.converted.macs for each in (mine, theirs)]
    assert saved[0] == saved[1]
    x = next(iter(data))[0]
    assert close(mine.model(x), theirs.model(x), 0.05)
    [returned] = onnx_outputs(mine.onnx_model, x)
    assert close(torch.from_numpy(returned), mine.model(x))


def onnx_outputs(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def test_budgets_hold_for_files(small, file, tmp_path):
    data = small[1]
    found = sepconvert.convert(
        file, None, "approx", data=data, calib=data_of_others(data), max_drop=20.0, out=tmp_path, **QUICK
    )
    assert found.accuracy.drop <= 20
    assert found.converted.macs < found.original.macs
    x, y = next(iter(data))
    [before] = run(tmp_path / "original.onnx", x)
    assert (before.argmax(1) == y.numpy()).all()
    replayed = sepconvert.apply(file, tmp_path / "plan.json", x[:1])
    assert close(replayed(x), torch.from_numpy(run(tmp_path / "converted.onnx", x)[0]))


def data_of_others(data):
    x = torch.cat([x for x, _ in data])
    return DataLoader(TensorDataset(x.flip(3) + 0.01), batch_size=100)


def test_fine_tuning_trains_the_convolutions_of_a_file(small, file):
    pytest.importorskip("onnx2pytorch")
    data = data_of_others(small[1])
    options = {"calib": data, "rank": 1, **QUICK}
    plain, tuned = (sepconvert.convert(file, None, "approx", finetune=epochs, **options) for epochs in (0, 2))
    x = next(iter(small[1]))[0]
    with torch.no_grad():
        error = [float((each.model(x) - small[0](x)).square().mean()) for each in (plain, tuned)]
    assert error[1] < error[0]
    assert plain.report["approximation"]["no_gradients"] is None


def test_without_gradients_fine_tuning_is_refused(small, tmp_path):
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("QuickGelu", ["a"], ["y"], domain="com.microsoft"),
    ]
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype("f"), "w")
    picture = [onnx.helper.make_tensor_value_info(n, 1, ["batch", 8, 9, 9]) for n in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "graph", picture[:1], picture[1:], [weight])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    images = DataLoader(TensorDataset(torch.randn(40, 8, 9, 9)), batch_size=20)
    with pytest.raises(SepconvertError, match=r"`finetune`: needs gradients.*QuickGelu"):
        sepconvert.convert(model, None, "approx", calib=images, finetune=1, **QUICK)
    found = sepconvert.convert(model, None, "approx", calib=images, rank=2, **QUICK)
    assert "QuickGelu" in found.report["approximation"]["no_gradients"]


def test_layers_are_selected_by_node_or_output(file):
    nodes = [node for node in onnx.load(file).graph.node if node.op_type == "Conv"]
    for name in (nodes[1].name, nodes[1].output[0]):
        found = sepconvert.inspect(file, selection=sepconvert.Selection(include=[name])).to_json()
        reasons = [each["reason_code"] for each in found["layers"]]
        assert reasons.count("not-selected") == 2
        assert reasons[1] != "not-selected"


def test_open_sizes_have_to_be_said(tmp_path, file):
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(SepconvertError, match=r"`example_inputs`: are needed, as the file leaves"):
        sepconvert.inspect(model)


@pytest.mark.parametrize("mode", ["exact", pytest.param("approx", marks=pytest.mark.slow)])
def test_a_fixed_batch_is_kept(small, file, tmp_path, mode):
    model = onnx.load(file)
    sizes = {each.name: each.type.tensor_type.shape.dim[0] for each in model.graph.input}
    for size in sizes.values():
        size.ClearField("dim_param")
        size.dim_value = 1
    flat = onnx.helper.make_tensor("flat", onnx.TensorProto.INT64, [2], [1, -1])
    model.graph.initializer.append(flat)
    last = model.graph.output[0]
    model.graph.node.append(onnx.helper.make_node("Reshape", [last.name, "flat"], ["fixed"]))
    last.name = "fixed"
    del last.type.tensor_type.shape.dim[:]
    options = {} if mode == "exact" else {"data": small[1], "calib": data_of_others(small[1]), "rank": 2}
    found = sepconvert.convert(model, None, mode, out=tmp_path, **options, **QUICK)
    assert not found.report["export"]["dynamic_batch"]
    if mode == "approx":
        assert found.accuracy.original == 100


def test_a_demand_that_no_plan_meets_is_told(small, file):
    with pytest.raises(DemandNotMetError, match="target_macs"):
        sepconvert.convert(
            file, None, "approx", calib=data_of_others(small[1]), target_macs=0.001, timing=UNTIMED
        )
