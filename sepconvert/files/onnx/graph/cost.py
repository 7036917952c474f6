"""MACs of the operators of an ONNX graph, by the shapes of their values."""

import math
from collections.abc import Callable, Mapping

import onnx

from sepconvert.files.onnx.graph.protobuf import attribute, bodies
from sepconvert.files.onnx.graph.running import Feed, shapes_of

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


_FLOATING = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16,
)  # fmt: skip


def macs_of_graph(graph: onnx.GraphProto, shapes: Shapes) -> tuple[int, dict[str, int]]:
    """Return the MACs of one batch, one fused multiply-add being 1, and the operators that are left out.

    Operators are left out that do not multiply matrices, and those with values of unknown shape: the number
    of each kind is returned. The graphs within an operator are left out with it.
    """
    total, uncounted = 0, dict[str, int]()
    for node in graph.node:
        macs = macs_of_node(node, shapes)
        if macs is None:
            uncounted[node.op_type] = uncounted.get(node.op_type, 0) + 1
        else:
            total += macs
    return total, uncounted


def weights_of(model: onnx.ModelProto) -> int:
    """Return the number of weights: initializers, and constants of several elements.

    They are floating-point numbers, or integers that stand for such; scales and zero points are not counted.
    """
    graph = model.graph
    constants = (each.t for node in graph.node for each in node.attribute if node.op_type == "Constant")
    tensors = (*graph.initializer, *(tensor for tensor in constants if math.prod(tensor.dims) > 1))
    quantized = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    integers = {node.input[0] for node in quantized if node.op_type == "DequantizeLinear"}
    scales = {name for node in quantized for name in node.input[1:]}
    return sum(
        math.prod(tensor.dims)
        for tensor in tensors
        if tensor.name not in scales and (tensor.data_type in _FLOATING or tensor.name in integers)
    )


def measured_shapes(model: onnx.ModelProto, feed: Feed) -> Shapes:
    """Return the shapes of all values that MACs depend on, from one run of the model."""
    costly = [node for node in model.graph.node if node.op_type in _RULES]
    return shapes_of(
        model, feed, {name for node in costly for name in (*node.input, *node.output[:1]) if name}
    )


def macs_of_node(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Return the MACs of a convolution, a matrix product or a recurrent layer; None for other operators."""
    rule = _RULES.get(node.op_type)
    if rule is None or any(bodies(node)):
        return None
    try:
        return rule(node, shapes)
    except (KeyError, IndexError):  # a shape is unknown, or an input left out
        return None


def _convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _quantised_convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[3]][1:])


def _transposed_convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(node: onnx.NodeProto, shapes: Shapes) -> int:
    inner = shapes[node.input[0]][-2 if attribute(node, "transA", 0) else -1]
    return math.prod(shapes[node.output[0]]) * inner


def _recurrent(gates: int) -> Callable[[onnx.NodeProto, Shapes], int]:
    def count(node: onnx.NodeProto, shapes: Shapes) -> int:
        length, batch, size = shapes[node.input[0]]
        directions, rows, _ = shapes[node.input[1]]
        hidden = rows // gates
        return length * batch * directions * rows * (size + hidden)

    return count


_RULES: Mapping[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "DeformConv"), _convolution),
    "QLinearConv": _quantised_convolution,
    "ConvTranspose": _transposed_convolution,
    **dict.fromkeys(("Gemm", "MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul"), _product),
    "RNN": _recurrent(1),
    "GRU": _recurrent(3),
    "LSTM": _recurrent(4),
}
