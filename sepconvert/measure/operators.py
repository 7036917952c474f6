"""Where the time of an ONNX file goes: operators as ONNX Runtime runs them, and the layers they belong to.

The runtime fuses what follows a convolution into it, and calls the whole after what it returns. Which layer
that was is found by going back through the file's own graph to the operator that holds the weight.
"""

import ast
import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from sepconvert.environment import Runtime
from sepconvert.errors import SepconvertError, first_line
from sepconvert.measure.latency import session

_BLOCKED = "_nchwc"  # how names of operators on blocked layouts end
_TIME = "_kernel_time"
_SCOPES = "pkg.torch.onnx.name_scopes"
_OWN_CALLS = ("conv", "linear")  # how torch calls what has weights
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
_WITH_WEIGHTS = (*_CONVOLUTIONS, "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_LAYOUT_CHANGES = ("ReorderInput", "ReorderOutput")
_WARMUP_RUNS = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperatorTime:
    """One operator as the runtime runs it.

    `layer` is the module that it stands for, or what its weight is called; None where neither is known, and
    for what the model's own forward calls.
    `kernel` is the path that its type, layout and shapes imply. `milliseconds` are those of one run of the
    model: the median over runs. The profiler slows small operators down: they are shares, not latencies.
    `bytes_moved` are its inputs, outputs, and weights, but for those of matrix products, which the profiler
    does not see.
    """

    name: str
    layer: str | None
    operator: str
    kernel: str | None
    milliseconds: float
    bytes_moved: int

    @property
    def changes_layout(self) -> bool:
        """Is it one that the runtime put in, to copy values to another layout?"""
        return self.operator in _LAYOUT_CHANGES

    @property
    def has_weights(self) -> bool:
        """Is it a convolution or a matrix product?"""
        return self.operator in _WITH_WEIGHTS

    def to_dict(self) -> dict[str, Any]:
        """One entry of `operators` in a profile."""
        return asdict(self)


def operator_times(
    path: Path, feeds: Mapping[str, npt.NDArray[Any]], *, runs: int, runtime: Runtime
) -> tuple[OperatorTime, ...]:
    """By ONNX Runtime's own profiler, in the order of execution.

    Args:
        path: the ONNX file.
        feeds: arrays by input name.
        runs: that are looked at, after a few that are not.
        runtime: of ONNX Runtime.

    Raises:
        SepconvertError: ONNX Runtime cannot load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(path, runtime, profile=Path(folder) / "profile")
        for _ in range(_WARMUP_RUNS + runs):
            profiled.run(None, dict(feeds))
        try:
            events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SepconvertError(
                f"{folder}: ONNX Runtime did not write its profile there ({first_line(error)}); make room or "
                "set TMPDIR to another place"
            ) from error
    each_run = list(_by_run(events))[_WARMUP_RUNS:]
    graph = _Graph(onnx.load(str(path), load_external_data=False).graph)
    found = []
    for key in each_run[-1]:
        name, operator, shapes, moved = key
        own = name.removesuffix(_BLOCKED)
        found.append(
            OperatorTime(
                own,
                graph.layer(own, operator, shapes[1] if len(shapes) > 1 else ()),
                operator,
                _kernel(operator, name != own, shapes),
                float(np.median([run.get(key, 0.0) for run in each_run])),
                moved,
            )
        )
    return tuple(found)


_Key = tuple[str, str, tuple[Shape, ...], int]
"""Name, type, shapes of the inputs, and bytes moved."""


def _by_run(events: Sequence[Mapping[str, Any]]) -> Iterator[dict[_Key, float]]:
    """Milliseconds of each operator in each run of the model: in a loop it runs several times."""
    times: dict[_Key, float] = defaultdict(float)
    for event in events:
        if event["name"] == "model_run":
            yield dict(times)
            times.clear()
        elif event.get("cat") == "Node" and event["name"].endswith(_TIME):
            about = event["args"]
            shapes = tuple(tuple(shape) for each in about["input_type_shape"] for shape in each.values())
            moved = sum(int(about[f"{what}_size"]) for what in ("activation", "parameter", "output"))
            times[event["name"].removesuffix(_TIME), about["op_name"], shapes, moved] += event["dur"] / 1000


def _kernel(operator: str, blocked: bool, shapes: Sequence[Shape]) -> str | None:
    """What a convolution's type, layout and shapes imply; None for other operators."""
    if operator not in _CONVOLUTIONS or len(shapes) < 2 or len(shapes[1]) < 3:
        return None
    (_, channels, *_), (_, of_each_output, *kernel) = shapes[:2]
    if max(kernel) == 1 and of_each_output == channels:
        return "pointwise, blocked layout" if blocked else "GEMM"
    kind = "depthwise" if of_each_output == 1 else "grouped" if of_each_output < channels else "direct"
    return f"{kind}, blocked layout" if blocked else f"{kind}, im2col and GEMM"


class _Graph:
    """Looks up which layer an operator of the optimised graph comes from."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._by_name = {node.name: node for node in graph.node if node.name}
        self._producers = {output: node for node in graph.node for output in node.output}

    def layer(self, name: str, operator: str, weight: Shape) -> str | None:
        """Of the operator called `name` after what it was, or after what it returns."""
        node = self._by_name.get(name) or self._producers.get(name)
        if node is None:  # the runtime's own, such as a change of layout
            return None
        if operator in _WITH_WEIGHTS:
            found = list(self._holders_behind(node))
            # Of several that meet in a fused sum, the one of this shape.
            matching = [each for each in found if self._weights[each.input[1]] == weight] or found
            if matching:
                return _layer_of(matching[0])
        scopes = _scopes(node)
        return scopes[-2] if len(scopes) > 1 else None

    def _holders_behind(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nearest operators that have weights, from  backwards."""
        waiting, seen = [node], set[str]()
        while waiting:
            now = waiting.pop(0)
            if now.op_type in _WITH_WEIGHTS:
                if len(now.input) > 1 and now.input[1] in self._weights:
                    yield now
                continue
            for value in now.input:
                if value in self._producers and value not in seen:
                    seen.add(value)
                    waiting.append(self._producers[value])


def _layer_of(holder: onnx.NodeProto) -> str | None:
    """The module whose weight it has, or in whose forward it is called, or else what the weight is called."""
    name: str = holder.input[1]
    scopes = _scopes(holder)
    # What exporters fuse, they say the last module has called; and equal weights, they store once.
    if name.endswith(".weight") and not (scopes and scopes[-1].startswith(_OWN_CALLS)):
        return name.removesuffix(".weight")
    if scopes:
        return scopes[-2] if len(scopes) > 1 else None
    if "::" not in name:  # which older exporters call what they have computed
        return name
    return str(holder.name.split("/")[-2]) if "/" in holder.name else None


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Paths of the modules in whose forwards it is called, the innermost last, and what it is called there.

    Empty for files that do not say so.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            with contextlib.suppress(ValueError, SyntaxError):
                _, *scopes = ast.literal_eval(entry.value)  # the first is the model itself
                return [str(scope) for scope in scopes]
    return []
