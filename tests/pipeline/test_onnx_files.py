"""Conversion of ONNX files in all modes, with the file of the same network in torch for the oracle."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conversions import UNTIMED, close, converted, run
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.errors import DemandNotMetError, SepconvertError
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.graph.network import OnnxNetwork

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
        found = sepconvert.inspect(file, selection=sepconvert.Selection(include=[name]))
        reasons = [each["reason_code"] for each in found["layers"]]
        assert reasons.count("not-selected") == 2
        assert reasons[1] != "not-selected"


def test_open_sizes_have_to_be_said(tmp_path, file):
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(SepconvertError, match=r"`example_inputs`: are needed, as the file leaves"):
        sepconvert.inspect(model)


@pytest.mark.parametrize("mode", ["exact", "approx"])
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
