"""BatchNorm behind a sum of convolutions → into the convolutions, in the graph of an ONNX model.

A runtime folds a BatchNorm into the convolution before it, but not into several whose outputs are added up,
as the branches of a replaced layer are: it would run by itself.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

Array = npt.NDArray[np.float64]


def fold_batchnorms(model: ir.Model) -> None:
    """Fold, in place, every BatchNorm whose input is a sum of convolutions that nothing else reads.

    The answer stays the same but for rounding: `γ (Σ y_b − μ) / σ + β = Σ (γ/σ) y_b + β − γ μ / σ`, which is
    computed in float64 and cast once.
    """
    graph = model.graph
    for node in graph:
        if node.op_type != "BatchNormalization" or node.outputs[0].is_graph_output():
            continue
        total, *statistics = node.inputs
        convolutions = _added(total)
        constants = [constant for constant in map(_constant, statistics) if constant is not None]
        if total is None or len(convolutions) < 2 or len(constants) < len(statistics):
            continue
        gamma, beta, mean, variance = constants
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        scale = gamma / np.sqrt(variance + epsilon)
        for convolution in convolutions:
            shift = beta - mean * scale if convolution is convolutions[-1] else None
            _scale(graph, convolution, scale, shift)
        node.outputs[0].replace_all_uses_with(total)
    RemoveUnusedNodesPass()(model)


def _added(value: ir.Value | None) -> list[ir.Node]:
    """Convolutions with constant weights of which a value is the sum; none if it is anything else."""
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) != 1 or value.is_graph_output():
        return []
    if node.op_type == "Conv":
        return (
            [node] if all(_constant(each) is not None for each in node.inputs[1:] if each is not None) else []
        )
    if node.op_type == "Add":
        left, right = map(_added, node.inputs)
        return left + right if left and right else []
    return []


def _scale(graph: ir.Graph, convolution: ir.Node, scale: Array, shift: Array | None) -> None:
    """Multiply what a convolution returns by channel, and add to it."""
    weight = _constant(convolution.inputs[1])
    bias = _constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else None
    assert weight is not None  # noqa: S101  (`_added` saw to it)
    _set_input(graph, convolution, 1, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    terms = [term for term in (None if bias is None else bias * scale, shift) if term is not None]
    if terms:
        convolution.resize_inputs(3)
        _set_input(graph, convolution, 2, np.sum(terms, axis=0))


def _set_input(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    """A new constant, since others may use the one that was there."""
    dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    before = node.inputs[index]
    name = f"{before.name if before is not None else node.outputs[0].name}.folded_into_{node.outputs[0].name}"
    tensor = ir.tensor(array.astype((dtype or ir.DataType.FLOAT).numpy()), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    node.replace_input_with(index, value)


def _constant(value: ir.Value | None) -> Array | None:
    """In float64."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return np.asarray(value.const_value.numpy(), np.float64)
