"""Equalization of scales between two convolutions in a row, as the factors of a layer are.

Where nothing but a channel-wise linear value lies between them, channel r of it may be multiplied by any
d_r > 0 in the first convolution, and divided by it in the second: the product stays the same (M. Nagel et
al., "Data-free quantization through weight equalization and bias correction", ICCV 2019). Here d is chosen to
minimise the noise that int8 brings to the output of the second one. Rounding to a step Δ has the variance
Δ²/12, and with a_r the range of channel r, p_r its mean square, and w_or the weights from it to output o,

    noise(d) = (max_r a_r d_r / 255)² / 12 · Σ_or |w_or|² / d_r²
             + Σ_o (max_r |w_or|∞ / d_r / 127)² / 12 · T Σ_r p_r d_r²

where T is the number of taps: the first term is that of the value between, which has one scale, the second
that of the second kernel, which has one for each output. The first kernel has a scale for each of its
outputs and does not mind. d is searched along d_r = m_r^(1−α) / a_r^α, m_r = max_o |w_or|∞, from equal
weights (α = 0) to equal ranges (α = 1), beside d = 1.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sepconvert.files.onnx.graph.protobuf import attribute, reads
from sepconvert.files.onnx.int8.statistics import Channels

Array = npt.NDArray[np.float64]

_STEPS = 20  # between equal weights and equal ranges


class Pair(NamedTuple):
    """Two convolutions in a row."""

    first: onnx.NodeProto
    second: onnx.NodeProto

    @property
    def between(self) -> str:
        """The value between them."""
        return str(self.first.output[0])


def pairs_in(model: onnx.ModelProto) -> list[Pair]:
    """Return the convolutions of constant kernels whose outputs one other such convolution alone reads."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in reads(node))
    returned = {value.name for value in graph.output}
    held = [
        node
        for node in graph.node
        if node.op_type == "Conv" and node.domain in ("", "ai.onnx") and {*node.input[1:]} - {""} <= constants
    ]
    by_input = {node.input[0]: node for node in held}
    return [
        Pair(node, by_input[node.output[0]])
        for node in held
        if node.output[0] in by_input and readers[node.output[0]] == 1 and node.output[0] not in returned
    ]


def equalized(model: onnx.ModelProto, channels: Mapping[str, Channels]) -> onnx.ModelProto:
    """Return a model with the scales between its `pairs_in` equalized; it computes the same.

    Args:
        model: left as it is.
        channels: statistics of the values between.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    uses = Counter(name for node in changed.graph.node for name in reads(node))
    uses.update(value.name for value in changed.graph.output)
    for first, second in pairs_in(changed):
        if any(uses[name] > 1 for node in (first, second) for name in node.input[1:] if name):
            continue  # another convolution has the same kernel, or the graph returns it
        scale = best_scale(
            numpy_helper.to_array(weights[second.input[1]]).astype(np.float64),
            int(attribute(second, "group", 1)),
            channels[first.output[0]],
        )
        for name in first.input[1:]:
            if name:
                _multiply(weights[name], scale, axis=0)
        _multiply_inputs(weights[second.input[1]], 1 / scale, int(attribute(second, "group", 1)))
    return changed


def best_scale(weight: Array, groups: int, between: Channels) -> Array:
    """Return the factors d of the channels between two convolutions, C.

    Args:
        weight: kernel of the second, O × C/groups × k….
        groups: its groups.
        between: statistics of the value between.
    """
    by_channel = _by_channel(weight, groups)
    largest = np.abs(by_channel).max((1, 2))
    alive = (largest > 0) & (between.range > 0)
    if not alive.any():
        return np.ones(len(largest))
    found = [np.ones(len(largest))]
    for share in np.linspace(0, 1, _STEPS + 1):
        scale = np.ones(len(largest))
        scale[alive] = largest[alive] ** (1 - share) / between.range[alive] ** share
        # A channel that is never seen, or never read, must not set the steps of the others.
        unseen, unread = (between.range == 0) & (largest > 0), (largest == 0) & (between.range > 0)
        scale[unseen] = largest[unseen] / (largest / scale)[alive].min()
        scale[unread] = (between.range * scale)[alive].min() / between.range[unread]
        found.append(scale)
    return min(found, key=lambda scale: noise(weight, groups, between, scale))


def noise(weight: Array, groups: int, between: Channels, scale: Array) -> float:
    """Return the variance that rounding to int8 brings to the second convolution's output, summed over it."""
    by_channel = _by_channel(weight, groups) / scale[:, None, None]
    step = float((between.range * scale).max()) / 255
    of_value = step**2 / 12 * float(np.square(by_channel).sum())
    taps = by_channel.shape[2]
    powers = (between.square * scale**2).reshape(groups, -1).sum(1)
    # groups × C/groups × O/groups: largest weight of each output
    largest = np.abs(by_channel).max(2).reshape(groups, -1, by_channel.shape[1]).max(1)
    of_weights = float((np.square(largest / 127).sum(1) / 12 * taps * powers).sum())
    return of_value + of_weights


def _by_channel(weight: Array, groups: int) -> Array:
    """Return a kernel as C × O/groups × taps: what each channel of the input is multiplied by."""
    outputs, inputs = weight.shape[:2]
    parts = weight.reshape(groups, outputs // groups, inputs, -1)
    return np.swapaxes(parts, 1, 2).reshape(groups * inputs, outputs // groups, -1)


def _multiply(tensor: onnx.TensorProto, scale: Array, axis: int) -> None:
    array = numpy_helper.to_array(tensor)
    shape = [1] * array.ndim
    shape[axis] = -1
    _store(tensor, array.astype(np.float64) * scale.reshape(shape))


def _multiply_inputs(tensor: onnx.TensorProto, scale: Array, groups: int) -> None:
    array = numpy_helper.to_array(tensor)
    parts = array.astype(np.float64).reshape(groups, len(array) // groups, array.shape[1], -1)
    _store(tensor, (parts * scale.reshape(groups, 1, -1, 1)).reshape(array.shape))


def _store(tensor: onnx.TensorProto, values: Array) -> None:
    name, dtype = tensor.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), name))
