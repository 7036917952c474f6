"""MACs of operators, against numbers computed by hand from shapes."""

import numpy as np
import pytest
import torch
from files.onnx.graph.onnx_cases import (
    FLOAT,
    conv,
    feed_of,
    kernel,
    model_of,
    node,
    one_conv,
    saved_apart,
    value_of,
    values,
)
from onnx import TensorProto, helper, numpy_helper

from sepconvert.base.modules import submodule
from sepconvert.files.onnx.graph.cost import macs_of_graph, macs_of_node, measured_shapes, weights_of
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.graph.protobuf import parsed

UINT8 = TensorProto.UINT8
MS = {"": 17, "com.microsoft": 1}


def product(kind, first, second, *, opset=17, **attributes):
    """A product of an input `x` with a constant."""
    nodes = [node(kind, "x w", "y", **attributes)]
    return model_of(nodes, {"w": values(*second)}, inputs=[value_of("x", *first)], opset=opset)


def recurrent(kind, gates, *, direction="forward", hidden=5, layout=0):
    """A recurrent layer over 7 steps of 3 samples of 4 numbers."""
    directions = 2 if direction == "bidirectional" else 1
    weights = {
        "w": values(directions, gates * hidden, 4) / 4, "r": values(directions, gates * hidden, hidden) / 4
    }  # fmt: skip
    attributes = {"hidden_size": hidden, "direction": direction, **({"layout": 1} if layout else {})}
    shape = (3, 7, 4) if layout else (7, 3, 4)
    return model_of([node(kind, "x w r", "y", **attributes)], weights, inputs=[value_of("x", *shape)])


def quantised_product():
    codes = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5)
    scales = {"s": np.float32(0.1), "z": np.uint8(3)}
    return model_of(
        [node("QLinearMatMul", "x s z w s z s z", "y")],
        {**scales, "w": codes},
        inputs=[value_of("x", 4, 6, kind=UINT8)],
        outputs=[value_of("y", 4, 5, kind=UINT8)],
    )


def of_integers(kind, shape, codes, **attributes):
    return model_of(
        [node(kind, "x w", "y", **attributes)],
        {"w": np.ones(codes, np.uint8)},
        inputs=[value_of("x", *shape, kind=UINT8)],
        outputs=[value_of("y", *["a"] * len(shape), kind=TensorProto.INT32)],
    )


def quantised_convolution():
    scales = {"s": np.float32(0.1), "z": np.uint8(3)}
    return model_of(
        [node("QLinearConv", "x s z w s z s z", "y")],
        {**scales, "w": np.ones((8, 4, 3, 3), np.uint8)},
        inputs=[value_of("x", 2, 4, 9, 10, kind=UINT8)],
        outputs=[value_of("y", *"abcd", kind=UINT8)],
    )


# MACs are those of a whole batch: outputs times the numbers that each is summed of.
CASES = {
    "Conv": (lambda: one_conv(kernel(8, 4, 3, 3), shape=(2, 4, 9, 10)), 2 * 8 * 7 * 8 * 4 * 9),
    "Conv, strides and pads": (
        lambda: one_conv(kernel(8, 4, 3, 3), shape=(1, 4, 9, 10), pads=[1, 0, 2, 3], strides=[2, 1]),
        8 * 5 * 11 * 4 * 9,
    ),
    "Conv, depthwise": (
        lambda: one_conv(kernel(4, 1, 3, 3), shape=(1, 4, 9, 10), group=4), 4 * 7 * 8 * 9,
    ),
    "Conv, 1-D": (
        lambda: model_of([conv()], {"w": kernel(8, 4, 3)}, inputs=[value_of("x", 2, 4, 9)]), 2 * 8 * 7 * 4 * 3
    ),
    "FusedConv": (
        lambda: model_of(
            [node("FusedConv", "x w", "y", domain="com.microsoft", activation="Relu")],
            {"w": kernel(8, 4, 3, 3)}, inputs=[value_of("x", 1, 4, 9, 10)], opset=MS,
        ),
        8 * 7 * 8 * 4 * 9,
    ),
    "ConvTranspose": (
        # 2 × 4 × 9 × 10 inputs, each times 6 × 2 × 2 weights.
        lambda: model_of(
            [node("ConvTranspose", "x w", "y", strides=[2, 2])],
            {"w": kernel(4, 6, 2, 2)}, inputs=[value_of("x", 2, 4, 9, 10)],
        ),
        2 * 4 * 9 * 10 * 6 * 4,
    ),
    "ConvTranspose, groups": (
        lambda: model_of(
            [node("ConvTranspose", "x w", "y", group=2)],
            {"w": kernel(4, 3, 2, 2)}, inputs=[value_of("x", 1, 4, 9, 10)],
        ),
        4 * 9 * 10 * 3 * 4,
    ),
    "ConvInteger": (lambda: of_integers("ConvInteger", (2, 4, 9, 10), (8, 4, 3, 3)), 2 * 8 * 7 * 8 * 4 * 9),
    "QLinearConv": (quantised_convolution, 2 * 8 * 7 * 8 * 4 * 9),
    "MatMul": (lambda: product("MatMul", (3, 4), (4, 5)), 3 * 4 * 5),
    "MatMul, batches": (lambda: product("MatMul", (2, 1, 3, 4), (7, 4, 5)), 2 * 7 * 3 * 4 * 5),
    "MatMul, vector": (lambda: product("MatMul", (3, 4), (4,)), 3 * 4),
    "MatMul, by a vector": (lambda: product("MatMul", (4,), (2, 4, 5)), 2 * 4 * 5),
    "MatMulInteger": (lambda: of_integers("MatMulInteger", (3, 4), (4, 5)), 3 * 4 * 5),
    "QLinearMatMul": (quantised_product, 4 * 6 * 5),
    "Gemm": (lambda: product("Gemm", (3, 4), (4, 5)), 3 * 4 * 5),
    "Gemm, transposed": (lambda: product("Gemm", (4, 3), (5, 4), transA=1, transB=1), 3 * 4 * 5),
    "FusedMatMul": (
        lambda: product("FusedMatMul", (2, 3, 4), (2, 4, 5), opset=MS, domain="com.microsoft"), 2 * 3 * 4 * 5
    ),
    "FusedMatMul, transposed": (
        lambda: product(
            "FusedMatMul", (2, 4, 3), (2, 5, 4), opset=MS, domain="com.microsoft", transA=1, transB=1
        ),
        2 * 3 * 4 * 5,
    ),
    # For each step, sample and gate: hidden × (inputs + hidden).
    "RNN": (lambda: recurrent("RNN", 1), 7 * 3 * 5 * (4 + 5)),
    "GRU": (lambda: recurrent("GRU", 3), 7 * 3 * 3 * 5 * (4 + 5)),
    "LSTM": (lambda: recurrent("LSTM", 4), 7 * 3 * 4 * 5 * (4 + 5)),
    "LSTM, both ways": (
        lambda: recurrent("LSTM", 4, direction="bidirectional"), 2 * 7 * 3 * 4 * 5 * (4 + 5)
    ),
    "nothing": (lambda: model_of([node("Relu", "x", "y")]), 0),
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), CASES.values(), ids=CASES)
def test_macs(case, expected):
    model = case()
    macs, uncounted = macs_of_graph(model.graph, measured_shapes(model, feed_of(model)))
    assert macs == expected
    assert uncounted == ({} if expected else {"Relu": 1})


def test_a_deformable_convolution():
    """ONNX Runtime need not have it: shapes are given. 8 × 7 × 8 outputs of 4 × 9 products each."""
    deform = node("DeformConv", "x w offset", "y")
    assert macs_of_node(deform, {"x": (1, 4, 9, 10), "w": (8, 4, 3, 3), "y": (1, 8, 7, 8)}) == 8 * 56 * 36


@pytest.mark.parametrize("missing", ["y", "w"])
def test_without_shapes_nothing_is_counted(missing):
    shapes = {"y": (1, 8, 7, 8), "w": (8, 4, 3, 3)}
    del shapes[missing]
    assert macs_of_node(conv(), shapes) is None
    macs, uncounted = macs_of_graph(one_conv(kernel(8, 4, 3, 3)).graph, shapes)
    assert (macs, uncounted) == (0, {"Conv": 1})


def test_shapes_are_those_of_the_run_whatever_the_file_leaves_open():
    nodes = [node("Resize", "x none sizes", "large", mode="nearest"), conv("large w", "y")]
    nodes[0].input[1] = ""
    del nodes[0].input[2:]
    nodes[0].input.extend(["", "sizes"])
    inputs = [value_of("x", "n", 4, "h", "w"), value_of("sizes", 4, kind=TensorProto.INT64)]
    model = model_of(nodes, {"w": kernel(8, 4, 3, 3)}, inputs=inputs)
    feed = {"x": values(1, 4, 3, 3), "sizes": np.array([1, 4, 12, 11])}
    shapes = measured_shapes(model, feed)
    assert shapes["large"] == (1, 4, 12, 11)
    assert macs_of_graph(model.graph, shapes)[0] == 8 * 10 * 9 * 4 * 9


def test_operators_of_other_domains_alone():
    """The standard operators need not be imported by the file."""
    model = product(
        "FusedMatMul", (3, 4), (4, 5), opset={"com.microsoft": 1}, domain="com.microsoft"
    )  # fmt: skip
    assert macs_of_graph(model.graph, measured_shapes(model, feed_of(model)))[0] == 3 * 4 * 5


def test_a_function_that_is_called_as_an_operator_is():
    """Its rule is that of another operator."""
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Conv", ["a"], ["b"], [node("Relu", "a", "b")], imports)
    call = node("Conv", "x", "y", domain="own")
    model = model_of([call], opset={"": 17, "own": 1}, functions=[function])
    macs, uncounted = macs_of_graph(model.graph, measured_shapes(model, feed_of(model)))
    assert (macs, uncounted) == (0, {"Conv": 1})


def test_graphs_within_operators_are_left_out():
    branches = {
        f"{name}_branch": helper.make_graph(
            [conv("x w", name)], name, [], [helper.make_tensor_value_info(name, FLOAT, None)]
        )
        for name in ("then", "else")
    }
    inputs = [value_of("x", 1, 4, 9, 10), value_of("on", kind=TensorProto.BOOL)]
    nodes = [node("If", "on", "y", **branches)]
    model = model_of(nodes, {"w": kernel(8, 4, 3, 3)}, inputs=inputs)
    shapes = measured_shapes(model, feed_of(model))
    assert macs_of_graph(model.graph, shapes) == (0, {"If": 1})


def test_weights_are_numbers_in_floating_point(tmp_path):
    """120 of the kernel, 6 halves, 3 of the constant; neither integers nor a constant scalar."""
    constants = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(values(3))),
        helper.make_node("Constant", [], ["d"], value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Constant", [], ["e"], value=numpy_helper.from_array(np.arange(4))),
        helper.make_node("Constant", [], ["f"], value_float=1.0),
    ]
    weights = {"w": values(2, 3, 4, 5), "h": values(6, dtype=np.float16), "i": np.arange(7)}
    model = model_of([*constants, node("Relu", "x", "y")], weights)
    assert weights_of(model) == 129
    path = saved_apart(model, tmp_path / "model.onnx")
    assert weights_of(parsed(path.read_bytes(), path)) == 129


@pytest.mark.parametrize("batch", [1, 3])
def test_listed_convolutions_have_the_macs_of_a_sample(batch):
    up = node("ConvTranspose", "x w", "a", name="up")
    body = helper.make_graph(
        [conv("a v", "inner", name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    nodes = [up, node("If", "on", "y", then_branch=body, else_branch=body)]
    nodes[1].attribute[0].g.node[0].output[0] = nodes[1].attribute[0].g.output[0].name = "other"
    inputs = [value_of("x", "batch", 4, 9, 10), value_of("on", kind=TensorProto.BOOL)]
    model = model_of(nodes, {"w": kernel(4, 6, 2, 2), "v": kernel(8, 6, 3, 3)}, inputs=inputs)
    network = open_network(model)
    network.note_costs((torch.zeros(batch, 4, 9, 10), torch.tensor(True)))
    assert submodule(network, "up").macs == 4 * 9 * 10 * 6 * 4
    assert [submodule(network, name).macs for name in ("inner", "other")] == [0, 0]
