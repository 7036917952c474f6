"""Networks of ONNX files compute what ONNX Runtime makes of the files, which is the oracle."""

import copy
import pickle

import numpy as np
import onnx
import pytest
import torch
from files.onnx.graph.onnx_cases import (
    FLOAT,
    assert_close,
    conv,
    feed_of,
    kernel,
    model_of,
    node,
    one_conv,
    outputs_of,
    run,
    saved_apart,
    value_of,
    values,
)
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import submodule
from sepconvert.files.onnx.graph.convolutions import OnnxGraph
from sepconvert.files.onnx.graph.network import OnnxNetwork, open_network

W = kernel(8, 4, 3, 3)
BIAS = values(8, seed=1)
DEPTHWISE = kernel(4, 1, 3, 3)


def norm(channels=8, seed=5):
    """Constants of a BatchNormalization by name."""
    names = ("gain", "shift", "mean", "variance")
    constants = {name: values(channels, seed=seed + place) for place, name in enumerate(names)}
    return {**constants, "variance": np.abs(constants["variance"]) + 0.5}


def cast_weight():
    cast = node("Cast", "half", "w", to=FLOAT)
    return model_of([cast, conv(pads=[1, 1, 1, 1])], {"half": W.astype(np.float16)})


def constant_of_shape():
    fill = numpy_helper.from_array(np.array([0.25], np.float32))
    nodes = [node("ConstantOfShape", "shape", "w", value=fill), conv()]
    return model_of(nodes, {"shape": np.array(W.shape)})


def constant_node():
    constants = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W))]
    constants.append(helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(BIAS)))
    return model_of([*constants, conv("x w b")])


def channels_last():
    nodes = [
        node("Transpose", "x", "first", perm=[0, 3, 1, 2]),
        conv("first w", "convolved", pads=[1, 1, 1, 1]),
        node("Transpose", "convolved", "y", perm=[0, 2, 3, 1]),
    ]
    return model_of(nodes, {"w": W}, inputs=[value_of("x", "batch", 9, 10, 4)])


def residual():
    """Convolutions of several depths, whose values cross others."""
    nodes = [
        conv("x w", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "relu"),
        conv("relu v", "c", pads=[1, 1, 1, 1]),
        node("Add", "c a", "sum"),
        conv("x u", "d"),
        conv("sum v", "e", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", "d", "mean"),
        node("Mul", "e mean", "y"),
    ]
    return model_of(nodes, {"w": W, "v": kernel(8, 8, 3, 3, seed=1), "u": kernel(8, 4, 1, 1, seed=2)})


def several():
    """Inputs that are scalars and integers, outputs that are inputs of other nodes."""
    nodes = [
        node("Mul", "x factor", "scaled"),
        conv("scaled w", "a"),
        node("Cast", "count", "number", to=FLOAT),
        node("Add", "a number", "z"),
        conv("z2 v", "y"),
    ]
    inputs = [
        value_of("x", "batch", 4, 9, 10), value_of("factor"), value_of("count", kind=TensorProto.INT64),
        value_of("z2", "batch", 3, 9, 9),
    ]  # fmt: skip
    return model_of(nodes, {"w": W, "v": kernel(5, 3, 2, 2)}, inputs=inputs, outputs=("z", "y", "a"))


def reads_from_a_branch():
    """An If whose branches read the output of a Conv, and whose condition follows from another."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(kind, "a", f"{name}_out")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", 1, None)],
        )
        for name, kind in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        conv("x w", "a"),
        node("ReduceMean", "a", "mean", keepdims=0),
        node("Greater", "mean zero", "positive"),
        node("If", "positive", "y", **branches),
    ]
    return model_of(nodes, {"w": W, "zero": np.float32(0)}, outputs=[value_of("y", "n", 8, "h", "w")])


def pair(*names, outputs=("a", "y")):
    nodes = [
        conv("x w", outputs[0], name=names[0], pads=[1, 1, 1, 1]),
        conv(f"{outputs[0]} v", outputs[1], name=names[1], pads=[1, 1, 1, 1]),
    ]
    return model_of(nodes, {"w": W, "v": kernel(8, 8, 3, 3, seed=1)}, outputs=outputs[1:])


def padded(mode, height, width, **attributes):
    return one_conv(W, shape=("batch", 4, height, width), auto_pad=mode, **attributes)


def unnamed(model):
    """The model with no names of nodes."""
    for each in model.graph.node:
        each.ClearField("name")
    return model


CASES = {
    "bias": lambda: one_conv(W, bias=BIAS),
    "no bias": lambda: one_conv(W),
    "an empty bias": lambda: model_of([helper.make_node("Conv", ["x", "w", ""], ["y"])], {"w": W}),
    "asymmetric pads, stride": lambda: one_conv(W, pads=[1, 0, 2, 3], strides=[2, 1]),
    "pads that differ by axis": lambda: one_conv(kernel(8, 4, 3, 5), pads=[1, 2, 1, 2], strides=[1, 2]),
    **{
        f"{mode}, {height}×{width}": lambda mode=mode, height=height, width=width: padded(
            mode, height, width, strides=[2, 2]
        )
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for height, width in ((8, 9), (9, 8))
    },
    "SAME_LOWER, even kernel": lambda: one_conv(kernel(8, 4, 2, 4), auto_pad="SAME_LOWER", strides=[1, 2]),
    "SAME_UPPER, stride above the kernel": lambda: one_conv(
        kernel(8, 4, 2, 2), auto_pad="SAME_UPPER", strides=[3, 4]
    ),
    "VALID, dilated": lambda: one_conv(W, auto_pad="VALID", dilations=[2, 3]),
    "NOTSET": lambda: one_conv(W, auto_pad="NOTSET", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
    "dilation": lambda: one_conv(W, dilations=[2, 1], pads=[2, 1, 2, 1]),
    "groups": lambda: one_conv(kernel(8, 2, 3, 3), group=2, bias=BIAS),
    "depthwise": lambda: one_conv(DEPTHWISE, group=4, pads=[1, 1, 1, 1]),
    "depthwise with a multiplier": lambda: one_conv(kernel(8, 1, 3, 3), group=4),
    "several inputs and outputs": several,
    "residual": residual,
    "initializers that are inputs": lambda: one_conv(W, bias=BIAS, ir=3, opset=8),
    "overridable": lambda: one_conv(W, bias=BIAS, ir=4, opset=9, defaults=("w", "b")),
    "constant nodes": constant_node,
    "identity": lambda: model_of([node("Identity", "v", "w"), conv()], {"v": W}),
    "cast": cast_weight,
    "constant of shape": constant_of_shape,
    "channels last": channels_last,
    "BatchNormalization": lambda: model_of(
        [conv("x w", "c"), node("BatchNormalization", "c gain shift mean variance", "y")],
        {"w": W, **norm()},
    ),
    "a branch that reads": reads_from_a_branch,
    "no names": lambda: unnamed(pair("a", "b")),
    "dots in names": lambda: pair("/model.0/conv/Conv", "/model.0/conv.1/Conv"),
    "names one above the other": lambda: pair("a", "a.b"),
    "names one below the other": lambda: pair("a.b", "a"),
    "names with empty parts": lambda: pair("a..b", ".c."),
    "a name that is another's output": lambda: pair("a_2", "", outputs=("a", "a_2")),
    "opset 11": lambda: one_conv(W, opset=11, ir=6),
    "opset 22": lambda: one_conv(W, bias=BIAS, opset=22, ir=10),
    "no convolution": lambda: model_of([node("Relu", "x", "y")]),
    "several, cut between": lambda: model_of(
        [conv("x w", "c"), node("Split", "c", "a b", axis=1, num_outputs=2)],
        {"w": W},
        opset=18,
        outputs=("b", "a"),
    ),
    "an output that is read": lambda: model_of(
        [conv("x w", "c"), node("Relu", "c", "y")], {"w": W}, outputs=("y", "c")
    ),
    "an output that is an input": lambda: model_of([conv()], {"w": W}, outputs=("x", "y")),
    "an output that is a weight": lambda: model_of([conv()], {"w": W}, outputs=("y", "w")),
    "a constant that is convolved": lambda: model_of(
        [conv("image w", "c"), conv("x w", "d"), node("Add", "c d", "y")],
        {"w": W, "image": values(1, 4, 9, 10)},
    ),
    "an order that is not topological": lambda: model_of(
        [node("Relu", "c", "y"), conv("r w", "c"), node("Relu", "x", "r")], {"w": W}
    ),
    "text behind a convolution": lambda: model_of(
        [
            conv("x w", "c"),
            node("Flatten", "c", "flat"),
            node("ArgMax", "flat", "best", keepdims=0),
            node("Gather", "labels best", "label"),
            node("Equal", "label wanted", "y"),
        ],
        {"w": W, "labels": np.array(["a", "b"] * 224, object), "wanted": np.array(["a"], object)},
        outputs=[value_of("y", "batch", kind=TensorProto.BOOL)],
        opset=19,
        ir=9,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_network_computes_the_file(case):
    model = case()
    before = model.SerializeToString()
    feed = feed_of(model)
    assert_close(outputs_of(open_network(model), feed), run(model, feed))
    assert model.SerializeToString() == before


def test_float16():
    model = one_conv(
        W.astype(np.float16), bias=BIAS.astype(np.float16), kind=TensorProto.FLOAT16, pads=[1, 1, 1, 1]
    )
    feed = feed_of(model)
    network = open_network(model)
    assert {each.dtype for each in network.parameters()} == {torch.float16}
    assert_close(outputs_of(network, feed), run(model, feed), 2e-3)


def test_inputs_of_another_dtype_are_cast():
    model = one_conv(W.astype(np.float16), kind=TensorProto.FLOAT16)
    feed = feed_of(model)
    wide = {name: value.astype(np.float64) for name, value in feed.items()}
    network = open_network(model)
    assert_close(outputs_of(network, wide), outputs_of(network, feed), 0)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            lambda: pair("/model.0/conv/Conv", "/model.0/conv.1/Conv"),
            ["/model.0/conv/Conv", "/model.0/conv.1/Conv"],
        ),
        (lambda: pair("first", ""), ["first", "y"]),
        (lambda: unnamed(pair("a", "b")), ["a", "y"]),
    ],
    ids=["dots", "one name", "no names"],
)
def test_names_of_layers(case, names):
    model = case()
    network = open_network(model)
    assert [each.name for each in network.graph.convolutions] == names
    weights = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for name, stored in zip(names, ("w", "v"), strict=True):
        layer = submodule(network, name)
        assert isinstance(layer, nn.Conv2d)
        np.testing.assert_array_equal(layer.weight.detach().numpy(), weights[stored])


def test_equal_names_of_nodes_give_way_to_those_of_outputs():
    graph = OnnxGraph(pair("same", "same"))  # ONNX Runtime takes no such file
    assert [each.name for each in graph.convolutions] == ["a", "y"]


def test_no_two_layers_share_a_name():
    """Whatever the nodes are called: one may bear the name of another's output, or of a level above it."""
    names = ("y", "a.b", "a", "", "a.b.c", "a_2", "d.", "d_")
    nodes = [conv("x w", f"v{place}", name=name) for place, name in enumerate(names)]
    nodes[3].output[0] = "y"
    outputs = [each.output[0] for each in nodes]
    model = model_of(nodes, {"w": kernel(4, 4, 3, 3)}, outputs=outputs)
    network = open_network(model)
    found = [each.name for each in network.graph.convolutions]
    assert len({*found}) == len(names)
    assert len({id(submodule(network, name)) for name in found}) == len(names)
    assert all(isinstance(submodule(network, name), nn.Conv2d) for name in found)
    feed = feed_of(model)
    assert_close(outputs_of(network, feed), run(model, feed))


@pytest.mark.parametrize(
    "name",
    [
        "batch",
        "graph",
        "forward",
        "_stages",
        "_dtypes",
        "training",
        "weight",
        "input_names",
        "_modules",
        "eval",
        "_orig_mod",
    ],
)
def test_a_layer_may_bear_the_name_of_an_attribute(name):
    model = one_conv(W, shape=(2, 4, 9, 10))
    model.graph.node[0].name = name
    feed = feed_of(model)
    network = open_network(model)
    assert_close(outputs_of(network, feed), run(model, feed))
    assert_close(outputs_of(copy.deepcopy(network), feed), run(model, feed))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_a_fixed_batch_runs_in_parts(size):
    """Of the size that the file takes; what the last lacks has no effect."""
    reshape = [conv("x w", "c"), node("Reshape", "c shape", "y")]
    model = model_of(
        reshape,
        {"w": W, "shape": np.array([2, -1])},
        inputs=[value_of("x", 2, 4, 9, 10)],
        outputs=[value_of("y", 2, 448)],
    )
    network = open_network(model)
    assert network.batch == 2
    whole = values(6, 4, 9, 10)
    expected = np.concatenate([run(model, {"x": whole[start : start + 2]})[0] for start in (0, 2, 4)])
    assert_close(outputs_of(network, {"x": whole[:size]}), [expected[:size]])


@pytest.mark.parametrize("order", [("x", "factor"), ("factor", "x")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_scalar_belongs_to_all_parts_of_a_fixed_batch(order, times):
    inputs = {"x": value_of("x", 2, 4, 9, 10), "factor": value_of("factor")}
    nodes = [node("Mul", "x factor", "scaled"), conv("scaled w")]
    model = model_of(nodes, {"w": W}, inputs=[inputs[name] for name in order])
    parts = [{**feed_of(model, seed=seed), "factor": np.array(3, np.float32)} for seed in range(times)]
    whole = {**parts[0], "x": np.concatenate([each["x"] for each in parts])}
    expected = np.concatenate([run(model, each)[0] for each in parts])
    assert_close(outputs_of(open_network(model), whole), [expected])


@pytest.mark.parametrize(
    ("shape", "batch", "example"),
    [
        ((2, 4, 9, 10), 2, (2, 4, 9, 10)),
        (("n", 4, 9, 10), None, (1, 4, 9, 10)),
        (("n", 4, "h", "w"), None, None),
    ],
)
def test_the_example_is_what_the_file_says(shape, batch, example):
    network = open_network(one_conv(W, shape=shape))
    found = network.example()
    assert network.batch == batch
    assert (found if found is None else tuple(found[0].shape)) == example


def test_the_example_of_scalars_and_integers():
    inputs = [value_of("x", 1, 4, 9, 9), value_of("n", kind=TensorProto.INT64)]
    nodes = [conv(), node("Cast", "n", "z", to=FLOAT)]
    found = open_network(model_of(nodes, {"w": W}, inputs=inputs, outputs=("y", "z"))).example()
    assert [(tuple(each.shape), each.dtype) for each in found] == [
        ((1, 4, 9, 9), torch.float32), ((), torch.int64),
    ]  # fmt: skip


def test_a_wrong_number_of_inputs_names_them():
    with pytest.raises(SepconvertError, match=r"the ONNX file takes \(x, factor, count, z2\), got 1; pass"):
        open_network(several())(torch.zeros(1, 4, 9, 10))


def test_an_overridable_weight_is_no_input():
    network = open_network(one_conv(W, ir=8, defaults=("w",)))
    assert network.input_names == ("x",)


def test_copies_compute_the_same_and_are_their_own():
    model = residual()
    feed = feed_of(model)
    network = open_network(model)
    copied, stored = copy.deepcopy(network), pickle.loads(pickle.dumps(network))  # noqa: S301
    expected = run(model, feed)
    submodule(copied, "c").weight.data.zero_()
    assert_close(outputs_of(network, feed), expected)
    assert_close(outputs_of(stored, feed), expected)
    assert np.abs(outputs_of(copied, feed)[0] - expected[0]).max() > 1e-3


def test_layers_follow_their_weights():
    """A changed kernel changes the output as it does in a file with that kernel."""
    network = open_network(residual())
    with torch.no_grad():
        submodule(network, "d").weight.mul_(2)
    changed = residual()
    changed.graph.initializer[2].CopyFrom(numpy_helper.from_array(2 * kernel(8, 4, 1, 1, seed=2), "u"))
    feed = feed_of(changed)
    assert_close(outputs_of(network, feed), run(changed, feed))


def test_an_open_file_is_a_network_in_eval_mode(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(one_conv(W), path)
    network = open_network(str(path))
    assert isinstance(network, OnnxNetwork)
    assert not network.training
    assert network.graph.content == path.read_bytes()
    assert network.graph.folder == tmp_path


def test_external_data_are_read_from_the_folder_of_the_file(tmp_path, monkeypatch):
    model = residual()
    path = saved_apart(model, tmp_path / "model.onnx", "data/weights.bin")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    feed = feed_of(model)
    assert_close(outputs_of(open_network(path), feed), run(model, feed))


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16])
def test_inputs_that_are_no_numbers_of_numpy(kind):
    model = model_of(
        [node("Cast", "x", "y", to=FLOAT)],
        inputs=[value_of("x", 1, kind=kind)],
        outputs=[value_of("y", 1)],
    )
    with pytest.raises(SepconvertError, match="input x is no tensor of numbers"):
        open_network(model)


def test_sequences_that_cross_a_convolution_are_refused():
    nodes = [
        node("SequenceConstruct", "x x", "both"),
        conv("x w", "c"),
        node("ReduceMax", "c", "top", keepdims=0),
        node("Cast", "top", "place", to=TensorProto.INT64),
        node("Clip", "place zero zero", "first"),
        node("SequenceAt", "both first", "y"),
    ]
    model = model_of(nodes, {"w": W, "zero": np.array(0)}, outputs=("y",))
    with pytest.raises(SepconvertError, match=r"value both is a seq"):
        open_network(model)
