"""Passes over exported ONNX graphs: BatchNorms behind sums of convolutions, and logarithms of sigmoids.

A runtime folds a BatchNorm into the convolution before it, but not into several whose outputs are added up,
as the branches of a replaced layer are: there it would run the BatchNorm as an operator of its own.

torch's exporter writes a log-sigmoid as the logarithm of a sigmoid, which is noise where the sigmoid is as
small as its error in the runtime, and minus infinity where it is 0.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

Array = npt.NDArray[np.float64]


class FoldBatchNormPass(InPlacePass):
    """Fold every BatchNorm with constant statistics whose input is a sum of convolutions, read only by it.

    Requires nothing. Works in place. Ensures that no such BatchNorm is left, and that what the graph returns
    stays the same but for rounding: `γ (Σ y_b − μ) / σ + β = Σ (γ/σ) y_b + β − γ μ / σ`, where `y_b` are the
    outputs of the convolutions; it is computed in float64 and cast once.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold in place; `modified` says whether there was anything to fold."""
        modified = False
        for node in model.graph:  # after one is folded, the next may be foldable: the order is topological
            fold = _fold_of(node)
            if fold is None:
                continue
            for convolution in fold.convolutions:
                # The constant term is added once, by the last convolution.
                shift = fold.shift if convolution is fold.convolutions[-1] else None
                _scale(model.graph, convolution, fold.scale, shift)
            node.outputs[0].replace_all_uses_with(fold.total)
            modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Raise `PostconditionError` if a BatchNorm is left that could be folded."""
        left = [node.name for node in model.graph if _fold_of(node) is not None]
        if left:
            raise PostconditionError(f"BatchNorms that could be folded are left: {', '.join(map(str, left))}")


class LogSigmoidPass(InPlacePass):
    """Write every logarithm of a sigmoid as `-softplus(-x)`.

    Requires nothing. Works in place. Ensures that no logarithm of a sigmoid is left, and that what the graph
    returns stays the same but for rounding, which no longer grows as the sigmoid shrinks.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place; `modified` says whether there was anything to rewrite."""
        found = [(node, value) for node in model.graph if (value := _input_of_log_sigmoid(node)) is not None]
        for node, value in found:
            old, chain = node.outputs[0], list[ir.Node]()
            for operator in ("Neg", "Softplus", "Neg"):
                chain.append(ir.node(operator, [value]))
                value = chain[-1].outputs[0]
                value.shape, value.type = old.shape, old.type
            replace_nodes_and_values(model.graph, node, [node], chain, [old], [value])
        if found:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Raise `PostconditionError` if a logarithm of a sigmoid is left."""
        left = [node.name for node in model.graph if _input_of_log_sigmoid(node) is not None]
        if left:
            raise PostconditionError(f"logarithms of sigmoids are left: {', '.join(map(str, left))}")


def _input_of_log_sigmoid(node: ir.Node) -> ir.Value | None:
    """Return the input of the sigmoid whose logarithm a node is; None if the node is anything else."""
    value = node.inputs[0] if node.op_type == "Log" else None
    sigmoid = None if value is None else value.producer()
    return sigmoid.inputs[0] if sigmoid is not None and sigmoid.op_type == "Sigmoid" else None


class _Fold(NamedTuple):
    """A sum of convolutions, and the factor and the term of each channel by which a BatchNorm changes it."""

    total: ir.Value
    convolutions: list[ir.Node]
    scale: Array
    shift: Array


def _fold_of(node: ir.Node) -> _Fold | None:
    """Return what folding a node takes; None unless it is a BatchNorm that can be folded."""
    if node.op_type != "BatchNormalization" or node.outputs[0].is_graph_output():
        return None
    total, *statistics = node.inputs
    convolutions = _added(total)
    constants = [constant for constant in map(_constant, statistics) if constant is not None]
    if total is None or len(convolutions) < 2 or len(constants) < len(statistics):
        return None
    gamma, beta, mean, variance = constants
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    scale = gamma / np.sqrt(variance + epsilon)
    return _Fold(total, convolutions, scale, beta - mean * scale)


def _added(value: ir.Value | None) -> list[ir.Node]:
    """Return the convolutions with constant weights whose sum is a value; none if it is anything else."""
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) != 1 or value.is_graph_output():
        return []
    if node.op_type == "Conv":
        is_constant = all(_constant(weight) is not None for weight in node.inputs[1:] if weight is not None)
        return [node] if is_constant else []
    if node.op_type == "Add":
        left, right = map(_added, node.inputs)
        return left + right if left and right else []
    return []


def _scale(graph: ir.Graph, convolution: ir.Node, scale: Array, shift: Array | None) -> None:
    """Multiply the output of a convolution by `scale`, of each channel, and add `shift`."""
    weight = _constant(convolution.inputs[1])
    bias = _constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else None
    assert weight is not None  # noqa: S101  (`_added` returns no others)
    _set_input(graph, convolution, 1, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    terms = [term for term in (None if bias is None else bias * scale, shift) if term is not None]
    if terms:
        convolution.resize_inputs(3)
        _set_input(graph, convolution, 2, np.sum(terms, axis=0))


def _set_input(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    """Make a new constant an input of a node; others may read the one that it replaces."""
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
    """Return a constant in float64; None if the value is no constant."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return np.asarray(value.const_value.numpy(), np.float64)
