"""Equalization of channels between two convolutions in a row, as the factors of a layer are.

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

Where both convolutions mix all channels, these may be exchanged for any mixture of them, too: `rotated`.
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


def rotated(model: onnx.ModelProto, channels: Mapping[str, Channels]) -> onnx.ModelProto:
    """Return a model with the channels between its `pairs_in` mixed by orthogonal matrices, where both mix.

    It computes the same. Channels are balanced first: each is multiplied by the square root of ‖w_r‖ / σ_r,
    so that its contribution t_r = σ_r ‖w_r‖ lies in values and weights alike. A cosine transform then gives
    each channel the mean of all: of R that are uncorrelated, Σ t² becomes (Σ t)² / R, which is never more.
    Sums of many values also have fewer outliers, which set the range (S. Ashkboos et al., "QuaRot",
    arXiv:2404.00456, mix channels of language models for this).

    Args:
        model: left as it is.
        channels: statistics of the values between.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    for first, second in _own_pairs(changed):
        if any(int(attribute(node, "group", 1)) > 1 for node in (first, second)):
            continue
        kernel = numpy_helper.to_array(weights[second.input[1]]).astype(np.float64)
        norms = np.sqrt(np.square(_by_channel(kernel, 1)).sum((1, 2)))
        sizes = np.sqrt(channels[first.output[0]].square)
        alive = (norms > 0) & (sizes > 0)
        balance = np.ones(len(norms))
        balance[alive] = np.sqrt(norms[alive] / sizes[alive])
        mixing = _cosines(len(norms))
        for name in first.input[1:]:
            if name:
                array = numpy_helper.to_array(weights[name]).astype(np.float64)
                _store(weights[name], np.einsum("sr,r...->s...", mixing * balance, array))
        _store(weights[second.input[1]], np.einsum("or...,sr->os...", kernel, mixing / balance))
    return changed


def quieter(
    model: onnx.ModelProto,
    other: onnx.ModelProto,
    channels: tuple[Mapping[str, Channels], Mapping[str, Channels]],
) -> tuple[onnx.ModelProto, dict[str, Channels]]:
    """Return a model with each of its pairs as it is, or as in another one, whichever int8 harms less.

    The statistics of the values between are those of the one that is taken.

    Args:
        model: left as it is.
        other: the same with other kernels, from `rotated`.
        channels: statistics of the values between in both.
    """
    changed, chosen = onnx.ModelProto(), dict(channels[0])
    changed.CopyFrom(model)
    own, others = ({tensor.name: tensor for tensor in each.graph.initializer} for each in (changed, other))
    for first, second in _own_pairs(changed):
        groups, between = int(attribute(second, "group", 1)), first.output[0]
        before, after = (
            _least_noise(numpy_helper.to_array(each[second.input[1]]), groups, known[between])
            for each, known in zip((own, others), channels, strict=True)
        )
        if after < before:
            chosen[between] = channels[1][between]
            for name in (*first.input[1:], second.input[1]):
                if name:
                    own[name].CopyFrom(others[name])
    return changed, chosen


def equalized(model: onnx.ModelProto, channels: Mapping[str, Channels]) -> onnx.ModelProto:
    """Return a model with the scales between its `pairs_in` equalized; it computes the same.

    Args:
        model: left as it is.
        channels: statistics of the values between.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    for first, second in _own_pairs(changed):
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


def _own_pairs(model: onnx.ModelProto) -> list[Pair]:
    """Return the pairs whose weights nothing else reads or returns."""
    uses = Counter(name for node in model.graph.node for name in reads(node))
    uses.update(value.name for value in model.graph.output)
    return [
        pair
        for pair in pairs_in(model)
        if all(uses[name] == 1 for node in pair for name in node.input[1:] if name)
    ]


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


def _least_noise(weight: Array, groups: int, between: Channels) -> float:
    weight = weight.astype(np.float64)
    return noise(weight, groups, between, best_scale(weight, groups, between))


def _cosines(size: int) -> Array:
    """Return the orthogonal matrix of the cosine transform (DCT-II), which spreads each channel over all."""
    place = np.arange(size)
    found = np.sqrt(2 / size) * np.cos(np.pi / size * np.outer(place, place + 0.5))
    found[0] /= np.sqrt(2)
    return np.asarray(found)


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
