"""Correction of biases after weights have been rounded: the mean of each output stays as it was.

A convolution with the kernel Ŵ in the place of W moves the mean of output o by Σ (Ŵ − W)_oc · E x_c, which
its bias takes back (M. Nagel et al., "Data-free quantization through weight equalization and bias
correction", ICCV 2019, section 4.2, with means that are measured).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sepconvert.files.onnx.graph.protobuf import attribute
from sepconvert.files.onnx.int8.statistics import Channels

Array = npt.NDArray[np.float64]

_BACK = "DequantizeLinear"


_QUANTIZED, _SCALE, _ZERO = "_quantized", "_scale", "_zero_point"  # suffixes that the quantizer gives names


def convolutions_in(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the convolutions of constant kernels."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.domain in ("", "ai.onnx") and node.input[1] in constants:
            yield node


def with_corrected_biases(
    model: onnx.ModelProto, quantized: onnx.ModelProto, channels: Mapping[str, Channels]
) -> onnx.ModelProto:
    """Return a model with the biases that suit its rounded kernels.

    Args:
        model: in floating point; left as it is.
        quantized: what the quantizer made of it.
        channels: statistics of the inputs of its convolutions.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    integers = {tensor.name: tensor for tensor in quantized.graph.initializer}
    in_integers = {name for node in quantized.graph.node if node.op_type == _BACK for name in node.output}
    rounded = {
        node.name for node in quantized.graph.node if node.op_type == "Conv" and node.input[0] in in_integers
    }
    for number, node in enumerate(convolutions_in(changed)):
        name, held = node.input[1], node.input[2] if len(node.input) > 2 else ""
        if name + _QUANTIZED not in integers or node.name not in rounded or (held and held not in weights):
            continue  # it or its input stays in floating point, or its bias is computed
        kernel = numpy_helper.to_array(weights[name])
        rounded_kernel = _rounded(name, integers)
        if rounded_kernel.shape != kernel.shape:  # another weight that bears the name
            continue
        difference = rounded_kernel - kernel
        groups = int(attribute(node, "group", 1))
        means = channels[node.input[0]].mean.reshape(groups, 1, -1)
        by_group = difference.reshape(groups, len(kernel) // groups, kernel.shape[1], -1).sum(-1)
        moved = (by_group * means).sum(-1).ravel()
        before = numpy_helper.to_array(weights[held]).astype(np.float64) if held else 0.0
        bias = numpy_helper.from_array((before - moved).astype(kernel.dtype), f"sepconvert.bias.{number}")
        changed.graph.initializer.append(bias)
        if len(node.input) > 2:
            node.input[2] = bias.name
        else:
            node.input.append(bias.name)
    return changed


def _rounded(name: str, integers: Mapping[str, onnx.TensorProto]) -> Array:
    """Return a kernel as the integers stand for it."""
    values, scale, zero = (
        numpy_helper.to_array(integers[name + suffix]).astype(np.float64)
        for suffix in (_QUANTIZED, _SCALE, _ZERO)
    )
    by_output = [-1, *[1] * (values.ndim - 1)]
    return (values - zero.reshape(by_output)) * scale.reshape(by_output)
