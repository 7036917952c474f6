"""Statistics of channels over the calibration images, by ONNX Runtime."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sepconvert.files.onnx.graph.running import Feed, opened

Array = npt.NDArray[np.float64]

_AXES_ARE_INPUTS = {"ReduceMin": 18, "ReduceMax": 18, "ReduceMean": 18}  # from this opset on


@dataclass(frozen=True)
class Channels:
    """Statistics of each channel of a value, C, over samples and places."""

    low: Array
    high: Array
    mean: Array
    square: Array  # mean of the squares

    @property
    def range(self) -> Array:
        """Length of the interval that holds all values and 0."""
        return np.maximum(self.high, 0) - np.minimum(self.low, 0)


def channel_statistics(
    model: onnx.ModelProto, ranks: Mapping[str, int], feeds: Iterable[Feed]
) -> dict[str, Channels]:
    """Return the statistics of some values.

    Args:
        model: left as it is.
        ranks: number of dimensions of each value, of which the second counts channels.
        feeds: batches of inputs.
    """
    asking = onnx.ModelProto()
    asking.CopyFrom(model)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    del asking.graph.output[:]
    for number, (name, rank) in enumerate(ranks.items()):
        own = f"sepconvert.statistics.{number}"
        # In float32: squares of large numbers exceed float16.
        precise = f"{own}.precise"
        kind = onnx.TensorProto.FLOAT
        asking.graph.node.append(onnx.helper.make_node("Cast", [name], [precise], to=kind))
        asking.graph.node.append(onnx.helper.make_node("Mul", [precise, precise], [f"{own}.squared"]))
        for place, (operator, value) in enumerate(_reductions(precise, own)):
            output = f"{own}.{place}"
            axes = [0, *range(2, rank)]
            if opset >= _AXES_ARE_INPUTS[operator]:
                held = numpy_helper.from_array(np.array(axes), f"{output}.axes")
                asking.graph.initializer.append(held)
                node = onnx.helper.make_node(operator, [value, held.name], [output], keepdims=0)
            else:
                node = onnx.helper.make_node(operator, [value], [output], keepdims=0, axes=axes)
            asking.graph.node.append(node)
            asking.graph.output.append(onnx.helper.make_tensor_value_info(output, kind, None))
    if not ranks:
        return {}
    session = opened(asking, spinning=False)
    runs, weights = [], []
    for feed in feeds:
        runs.append([np.asarray(each, np.float64) for each in session.run(None, feed)])
        weights.append(next((len(array) for array in feed.values() if array.ndim), 1))
    if not runs:
        return {}
    columns = [np.stack(each) for each in zip(*runs, strict=True)]
    return {name: _joined(columns[4 * number : 4 * number + 4], weights) for number, name in enumerate(ranks)}


def _reductions(name: str, own: str) -> tuple[tuple[str, str], ...]:
    return ("ReduceMin", name), ("ReduceMax", name), ("ReduceMean", name), ("ReduceMean", f"{own}.squared")


def _joined(parts: Sequence[Array], weights: Sequence[int]) -> Channels:
    low, high, mean, square = parts
    return Channels(low.min(0), high.max(0), np.average(mean, 0, weights), np.average(square, 0, weights))
