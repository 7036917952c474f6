"""Convolutions of ONNX files: those that may be replaced are found, all others are listed with a reason."""

import numpy as np
import pytest
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
    value_of,
    values,
)
from onnx import TensorProto, helper

from sepconvert.files.onnx.graph.convolutions import OnnxGraph
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.network.layers import ListedConvolution

W = kernel(8, 4, 3, 3)
UINT8 = TensorProto.UINT8
CODES = np.arange(8 * 4 * 9, dtype=np.uint8).reshape(8, 4, 3, 3)


def branch(name, *nodes, output):
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(output, FLOAT, None)])


def in_a_branch():
    """A Conv in each branch: one with a weight of its own, one with a weight from outside."""
    own = helper.make_node(
        "Constant", [], ["own"], value=helper.make_tensor("own", FLOAT, W.shape, W.ravel())
    )
    then = branch("then", own, conv("x own", "a", name="inner"), output="a")
    other = branch("else", conv("x w", "b", name=""), output="b")
    nodes = [node("If", "positive", "y", then_branch=then, else_branch=other)]
    inputs = [value_of("x", 1, 4, 9, 10), value_of("positive", kind=TensorProto.BOOL)]
    return model_of(nodes, {"w": W}, inputs=inputs)


def in_a_loop():
    body = helper.make_graph(
        [conv("state square", "next", pads=[1, 1, 1, 1], name="looped"), node("Identity", "on", "still")],
        "body",
        [
            value_of("number", kind=TensorProto.INT64), value_of("on", kind=TensorProto.BOOL),
            value_of("state", "n", 4, "h", "w"),
        ],
        [value_of("still", kind=TensorProto.BOOL), value_of("next", "n", 4, "h", "w")],
    )  # fmt: skip
    nodes = [node("Loop", "count yes x", "y", body=body, name="loop")]
    weights = {"square": kernel(4, 4, 3, 3), "count": np.array(2), "yes": np.array(True)}
    return model_of(nodes, weights)


def in_a_scan():
    picture = [1, 4, 9, 10]
    body = helper.make_graph(
        [
            conv("state square", "next", pads=[1, 1, 1, 1], name="scanned"),
            node("Identity", "next", "kept"),
            node("Neg", "each", "negative"),
        ],
        "body",
        [value_of("state", *picture), value_of("each", 3)],
        [value_of("kept", *picture), value_of("negative", 3)],
    )
    nodes = [node("Scan", "x rows", "y rest", body=body, num_scan_inputs=1)]
    inputs = [value_of("x", *picture), value_of("rows", 2, 3)]
    return model_of(nodes, {"square": kernel(4, 4, 3, 3)}, inputs=inputs, outputs=("y", "rest"))


FUNCTION = helper.make_function(
    "own", "Block", ["a", "k"], ["c"],
    [node("Relu", "a", "r"), conv("r k", "c", name="within")],
    [helper.make_opsetid("", 17)],
)  # fmt: skip


def in_a_function():
    call = node("Block", "x w", "y", domain="own", name="call")
    return model_of([call], {"w": W}, opset={"": 17, "own": 1}, functions=[FUNCTION])


def in_a_function_of_a_function():
    inner = node("Block", "a k", "c", domain="own")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    outer = helper.make_function("own", "Outer", ["a", "k"], ["c"], [inner], imports)
    call = node("Outer", "x w", "y", domain="own")
    return model_of([call], {"w": W}, opset={"": 17, "own": 1}, functions=[FUNCTION, outer])


def in_a_function_called_in_a_branch():
    branches = {
        "then_branch": branch("then", node("Block", "x w", "a", domain="own"), output="a"),
        "else_branch": branch("else", node("Identity", "x", "b"), output="b"),
    }
    inputs = [value_of("x", 1, 4, 9, 10), value_of("positive", kind=TensorProto.BOOL)]
    nodes = [node("If", "positive", "y", **branches)]
    return model_of(nodes, {"w": W}, inputs=inputs, opset={"": 17, "own": 1}, functions=[FUNCTION])


def quantised():
    scales = {"s": np.float32(0.1), "z": np.uint8(3), "ws": np.float32(0.02), "wz": np.uint8(128)}
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearConv", "q s z w ws wz s z", "c", name="conv"),
        node("DequantizeLinear", "c s z", "y"),
    ]
    return model_of(nodes, {**scales, "w": CODES})


def of_integers():
    nodes = [node("ConvInteger", "x w z", "y", name="conv")]
    return model_of(
        nodes,
        {"w": CODES, "z": np.uint8(5)},
        inputs=[value_of("x", "batch", 4, 9, 10, kind=UINT8)],
        outputs=[value_of("y", *"abcd", kind=TensorProto.INT32)],
    )


def dequantised():
    nodes = [node("DequantizeLinear", "codes s z", "w"), conv(name="conv")]
    return model_of(nodes, {"codes": CODES, "s": np.float32(0.02), "z": np.uint8(128)})


def fused():
    attributes = {"domain": "com.microsoft", "activation": "Relu", "name": "conv"}
    return model_of(
        [node("FusedConv", "x w", "y", **attributes)], {"w": W}, opset={"": 17, "com.microsoft": 1}
    )


def of_a_spoilt_kernel():
    weight = W.copy()
    weight[2, 1, 0, 0] = np.nan
    return one_conv(weight)


def computed(name, shape):
    """A Conv whose kernel or bias is an input without default."""
    weights = {"w": W, "b": values(8)}
    inputs = [value_of("x", "batch", 4, 9, 10), value_of(name, *shape)]
    del weights[name]
    return model_of([conv("x w b", name="conv")], weights, inputs=inputs)


def of_dimensions(shape, *size):
    return model_of([conv(name="conv")], {"w": kernel(*shape)}, inputs=[value_of("x", "batch", 4, *size)])


# The model, and the names, operators and reasons that are listed.
KEPT = {
    "ConvTranspose": (
        lambda: model_of([node("ConvTranspose", "x w", "y", name="up")], {"w": kernel(4, 8, 2, 2)}),
        [("up", "ConvTranspose", "transposed convolutions are not factorised")],
    ),
    "1-D": (
        lambda: of_dimensions((8, 4, 3), 9),
        [("conv", "Conv", "1-D convolutions are not factorised")],
    ),
    "3-D": (
        lambda: of_dimensions((8, 4, 3, 3, 3), 5, 5, 5),
        [("conv", "Conv", "3-D convolutions are not factorised")],
    ),
    "ConvInteger": (of_integers, [("conv", "ConvInteger", "it is quantised")]),
    "QLinearConv": (quantised, [("conv", "QLinearConv", "it is quantised")]),
    "DequantizeLinear": (dequantised, [("conv", "Conv", "its kernel is quantised (DequantizeLinear)")]),
    "FusedConv": (fused, [("conv", "FusedConv", "it is an operator of com.microsoft")]),
    "function": (in_a_function, [("Block.within", "Conv", "it lies in the function Block")]),
    "function of a function": (
        in_a_function_of_a_function,
        [("Block.within", "Conv", "it lies in the function Block")],
    ),
    "function in a branch": (
        in_a_function_called_in_a_branch,
        [("Block.within", "Conv", "it lies in the function Block")],
    ),
    "If": (
        in_a_branch,
        [
            ("b", "Conv", "it lies in the body of a If"),  # the order of attributes is that of the alphabet
            ("inner", "Conv", "it lies in the body of a If"),
        ],
    ),
    "Loop": (in_a_loop, [("looped", "Conv", "it lies in the body of a Loop")]),
    "Scan": (in_a_scan, [("scanned", "Conv", "it lies in the body of a Scan")]),
    "computed kernel": (
        lambda: computed("w", W.shape),
        [("conv", "Conv", "its kernel is computed from the input")],
    ),
    "computed bias": (
        lambda: computed("b", (8,)),
        [("conv", "Conv", "its bias is computed from the input")],
    ),
    "random kernel": (
        lambda: model_of([node("RandomNormalLike", "v", "w", seed=1.0), conv(name="conv")], {"v": W}),
        [("conv", "Conv", "its kernel is computed from the input")],
    ),
    "NaN": (of_a_spoilt_kernel, [("conv", "Conv", "its kernel holds NaN or Inf")]),
}


@pytest.mark.parametrize(("case", "expected"), KEPT.values(), ids=KEPT)
def test_what_is_listed_and_not_replaced(case, expected):
    model = case()
    network = open_network(model)
    kept = network.graph.kept
    assert network.graph.convolutions == []
    assert [(each.name, each.operator) for each in kept] == [each[:2] for each in expected]
    for each, (_, _, reason) in zip(kept, expected, strict=True):
        assert each.reason.startswith(reason)
    listed = [each for each in network.modules() if isinstance(each, ListedConvolution)]
    assert [each.obstacle for each in listed] == [each.reason for each in kept]


@pytest.mark.parametrize("case", [case for name, (case, _) in KEPT.items() if name != "random kernel"])
def test_what_is_listed_is_computed(case):
    model = case()
    feed = feed_of(model)
    found, expected = outputs_of(open_network(model), feed), run(model, feed, optimised=False)
    np.testing.assert_array_equal(np.isnan(found[0]), np.isnan(expected[0]))
    assert_close([*map(np.nan_to_num, found)], [*map(np.nan_to_num, expected)])


def test_kernels_of_other_dtypes():
    """ONNX Runtime runs them on other devices than the CPU, if at all."""
    [kept] = OnnxGraph(one_conv(W.astype(np.float64), kind=TensorProto.DOUBLE)).kept
    assert kept.reason == "kernels of float64 are not factorised"


@pytest.mark.parametrize("case", [of_a_spoilt_kernel, of_integers, quantised])
def test_weights_that_are_listed_are_counted(case):
    assert [each.params for each in OnnxGraph(case()).kept] == [8 * 4 * 9]


def test_what_only_sounds_like_a_convolution_is_none():
    nodes = [node("Convert", "x", "a", domain="own"), node("Relu", "a", "y")]
    function = helper.make_function(
        "own", "Convert", ["a"], ["b"], [node("Neg", "a", "b")], [helper.make_opsetid("", 17)]
    )
    graph = OnnxGraph(model_of(nodes, opset={"": 17, "own": 1}, functions=[function]))
    assert (graph.convolutions, graph.kept) == ([], [])


def test_the_facts_of_a_convolution():
    bias = values(6)
    model = one_conv(
        kernel(6, 2, 3, 5), bias=bias, shape=(1, 4, 12, 12),
        group=2, strides=[2, 1], dilations=[1, 2], pads=[1, 0, 2, 3],
    )  # fmt: skip
    [found] = OnnxGraph(model).convolutions
    assert (found.name, found.input, found.output) == ("conv", "x", "y")
    assert (found.stride, found.dilation, found.groups) == ((2, 1), (1, 2), 2)
    assert (found.pads, found.padding((12, 12))) == ((1, 0, 2, 3), ((1, 2), (0, 3)))
    assert not found.is_symmetric
    np.testing.assert_array_equal(found.weight, kernel(6, 2, 3, 5))
    np.testing.assert_array_equal(found.bias, bias)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        # ceil(8 / 2) = 4 outputs of a kernel of 3 reach over 2·3 + 3 = 9 rows, one more than there are.
        ("SAME_UPPER", (8, 9), ((0, 1), (1, 1))),
        ("SAME_LOWER", (8, 9), ((1, 0), (1, 1))),
        ("VALID", (8, 9), ((0, 0), (0, 0))),
    ],
)
def test_padding_of_modes(mode, size, expected):
    model = one_conv(W, shape=("n", 4, *size), auto_pad=mode, strides=[2, 2])
    [found] = OnnxGraph(model).convolutions
    assert found.padding(size) == expected
    assert found.is_symmetric == (mode == "VALID")


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([], {"w": W}),
        ([node("Identity", "v", "u"), node("Identity", "u", "w")], {"v": W}),
        ([node("Cast", "v", "w", to=FLOAT)], {"v": W.astype(np.float64)}),
        ([node("Mul", "v two", "w")], {"v": W / 2, "two": np.float32(2)}),
        ([node("Transpose", "v", "w", perm=[3, 2, 0, 1])], {"v": W.transpose(2, 3, 1, 0)}),
    ],
    ids=["initializer", "identities", "cast", "product", "transposed"],
)
def test_weights_are_what_constant_nodes_compute(nodes, weights):
    [found] = OnnxGraph(model_of([*nodes, conv()], weights)).convolutions
    np.testing.assert_array_equal(found.weight, W)


def test_a_sparse_weight_is_constant():
    indices = np.flatnonzero(np.arange(W.size) % 5 == 0)
    dense = np.zeros(W.size, np.float32)
    dense[indices] = W.ravel()[indices]
    model = model_of([conv()])
    stored = helper.make_tensor("w", FLOAT, indices.shape, dense[indices])
    places = helper.make_tensor("places", TensorProto.INT64, indices.shape, indices)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(stored, places, W.shape))
    feed = feed_of(model)
    assert_close(outputs_of(open_network(model), feed), run(model, feed))
    [found] = OnnxGraph(model).convolutions
    np.testing.assert_array_equal(found.weight.ravel(), dense)


def test_the_model_is_left_as_it_is():
    model = in_a_branch()
    before = model.SerializeToString()
    open_network(model)
    assert model.SerializeToString() == before
