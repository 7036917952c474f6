"""Time by operator: what ONNX Runtime's profiler reports, attributed to the layers of a model."""

import ast
import contextlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import Stage, stage
from sepconvert.measure.latency import Deployed, session

_BLOCKED = "_nchwc"  # suffix of names of operators on blocked layouts
_TIME = "_kernel_time"
_SCOPES = "pkg.torch.onnx.name_scopes"
_OWN_CALLS = ("conv", "linear")  # torch's names of operators with weights
_IN_INT8 = "QLinearConv"
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose", _IN_INT8)
_WITH_WEIGHTS = (
    *_CONVOLUTIONS, "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul",
)  # fmt: skip
_MERGED = re.compile(r"_token_\d+$")  # what the runtime adds to the name of an operator that it fuses
_DEQUANTIZED = "_DequantizeLinear_Output"  # what its quantizer adds to the name of a weight
_LAYOUT_CHANGES = ("ReorderInput", "ReorderOutput")
_WARMUP_RUNS = 3


Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperatorTime:
    """One operator as the runtime runs it.

    `layer` is the module that it belongs to, or the name of its weight; None where neither is known, and for
    operators called by the model's own forward. `kernel` is the implementation that its type, layout and
    shapes imply. `milliseconds` are those of one run of the model: the median over runs. The profiler slows
    small operators down: they are shares, not latencies. `bytes_moved` is the size of its inputs, outputs and
    weights, except for the weights of matrix products, which the profiler does not report.
    """

    name: str
    layer: str | None
    operator: str
    kernel: str | None
    milliseconds: float
    bytes_moved: int

    @property
    def changes_layout(self) -> bool:
        """Whether the runtime inserted it to copy values to another layout."""
        return self.operator in _LAYOUT_CHANGES

    @property
    def has_weights(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return self.operator in _WITH_WEIGHTS

    def to_dict(self) -> dict[str, Any]:
        """Return one entry of `operators` in a profile."""
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """One call of an operator of the optimised graph; `start` and `duration` are in microseconds."""

    name: str
    operator: str
    shapes: tuple[Shape, ...]  # of the inputs
    bytes_moved: int
    start: float
    duration: float

    @property
    def key(self) -> "Key":
        """Identity of the operator, which several calls of a run share if it is in a loop."""
        return self.name, self.operator, self.shapes, self.bytes_moved


Key = tuple[str, str, tuple[Shape, ...], int]
"""Name, type, shapes of the inputs, and bytes moved."""


@dataclass(frozen=True)
class Run:
    """One run of a model, in microseconds, with the calls of its operators in the order of execution."""

    start: float
    duration: float
    calls: tuple[Call, ...]


@stage(Stage.TIMING)
def operator_times(
    deployed: Deployed,
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    runs: int,
    known: Mapping[str, str] | None = None,
) -> tuple[OperatorTime, ...]:
    """Measure the operators of a model by ONNX Runtime's own profiler, in the order of execution.

    Args:
        deployed: the model.
        feeds: arrays by input name.
        runs: number of runs that count, after a few for warm-up.
        known: layers by output of their operator, where the file itself does not name them.

    Raises:
        SepconvertError: ONNX Runtime cannot load the model, or write the profile.
    """
    each_run = [_by_operator(run) for run in profiled_runs(deployed, feeds, runs)]
    graph = Graph.of(deployed, known)
    return tuple(
        graph.timed(key, float(np.median([run.get(key, 0.0) for run in each_run]))) for key in each_run[-1]
    )


def profiled_runs(deployed: Deployed, feeds: Mapping[str, npt.NDArray[Any]], runs: int) -> list[Run]:
    """Return so many runs as ONNX Runtime's profiler reports them, after a few for warm-up.

    Raises:
        SepconvertError: ONNX Runtime cannot load the model, or write the profile.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(deployed, profile=Path(folder) / "profile")
        for _ in range(_WARMUP_RUNS + runs):
            profiled.run(None, dict(feeds))
        try:
            events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SepconvertError(
                f"{folder}: ONNX Runtime did not write its profile there ({first_line(error)}); free disk "
                "space, or set TMPDIR to another folder"
            ) from error
    return list(_runs(events))[_WARMUP_RUNS:]


def _runs(events: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """Yield the runs of a profile, in which operators come before the run that calls them."""
    calls: list[Call] = []
    for event in events:
        if event["name"] == "model_run":
            yield Run(event["ts"], event["dur"], tuple(calls))
            calls.clear()
        elif event.get("cat") == "Node" and event["name"].endswith(_TIME):
            about = event["args"]
            shapes = tuple(
                tuple(shape) for by_type in about["input_type_shape"] for shape in by_type.values()
            )
            moved = sum(int(about[f"{what}_size"]) for what in ("activation", "parameter", "output"))
            name = event["name"].removesuffix(_TIME)
            calls.append(Call(name, about["op_name"], shapes, moved, event["ts"], event["dur"]))


def _by_operator(run: Run) -> dict[Key, float]:
    """Return the milliseconds of each operator in a run."""
    times: dict[Key, float] = defaultdict(float)
    for call in run.calls:
        times[call.key] += call.duration / 1000
    return times


def _loaded(model: Path | bytes) -> onnx.ModelProto:
    if isinstance(model, Path):
        return onnx.load(str(model), load_external_data=False)
    return onnx.load_model_from_string(model)


BLOCKED_KERNELS = frozenset(
    f"{kind}, blocked layout" for kind in ("pointwise", "depthwise", "grouped", "direct")
)
"""Kernels of convolutions for layouts in which channels lie in blocks of a vector's width."""


def _kernel(operator: str, blocked: bool, shapes: Sequence[Shape]) -> str | None:
    """Return the kernel that a convolution's type, layout and shapes imply; None for other operators."""
    if operator not in _CONVOLUTIONS or len(shapes) < 2 or len(shapes[1]) < 3:
        return None
    (_, channels, *_), (_, of_each_output, *kernel) = shapes[:2]
    if operator == _IN_INT8:
        kinds = {1: "depthwise", channels: "pointwise" if max(kernel) == 1 else "dense"}
        return f"int8, {kinds.get(of_each_output, 'grouped')}"
    if max(kernel) == 1 and of_each_output == channels:
        return "pointwise, blocked layout" if blocked else "GEMM"
    kind = "depthwise" if of_each_output == 1 else "grouped" if of_each_output < channels else "direct"
    return f"{kind}, blocked layout" if blocked else f"{kind}, im2col and GEMM"


class Graph:
    """The graph of a file, to look up which layer an operator of the optimised graph comes from."""

    @classmethod
    def of(cls, deployed: Deployed, known: Mapping[str, str] | None = None) -> "Graph":
        """Return that of a model; `known` are layers by output of their operator."""
        return cls(_loaded(deployed.model).graph, known or {})

    def __init__(self, graph: onnx.GraphProto, known: Mapping[str, str]) -> None:
        self._known = known
        self._weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._weights |= {
            node.output[0]: self._weights[node.input[0]]
            for node in graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in self._weights
        }
        self._by_name = {node.name: node for node in graph.node if node.name}
        self._producers = {output: node for node in graph.node for output in node.output}

    def timed(self, key: Key, milliseconds: float) -> OperatorTime:
        """Return an operator that the runtime called, with its layer, its kernel and its time."""
        name, operator, shapes, moved = key
        own = _MERGED.sub("", name.removesuffix(_BLOCKED))
        if operator == _IN_INT8:  # the weight is packed, and the channels come last
            first = shapes[0]
            shapes = ((first[0], first[-1], *first[1:-1]), self.weight_of(own))
        layer = self.layer(own, operator, shapes[1] if len(shapes) > 1 else ())
        kernel = _kernel(operator, name.endswith(_BLOCKED), shapes)
        return OperatorTime(own, layer, operator, kernel, milliseconds, moved)

    def layer(self, name: str, operator: str, weight: Shape) -> str | None:
        """Return the layer of an operator, whose `name` is its own or that of its output."""
        node = self._by_name.get(name) or self._producers.get(name)
        if node is None:  # the runtime's own, such as a change of layout
            return None
        if operator in _WITH_WEIGHTS:
            holders = list(self._holders_before(node))
            # Where several meet in a fused sum, take the one with a weight of this shape.
            matching = [holder for holder in holders if self._weights[holder.input[1]] == weight] or holders
            if matching:
                return self._known.get(matching[0].output[0]) or _layer_of(matching[0])
        scopes = _scopes(node)
        return scopes[-2] if len(scopes) > 1 else None

    def weight_of(self, name: str) -> Shape:
        """Return the shape of the weight of an operator; () if it is not known."""
        node = self._by_name.get(name)
        return () if node is None or len(node.input) < 2 else self._weights.get(node.input[1], ())

    def _holders_before(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield the nearest operators with weights, searching from `node` towards the inputs."""
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
    """Return the module that owns the weight or calls the operator, or else the name of the weight."""
    name: str = holder.input[1].removesuffix(_DEQUANTIZED)
    scopes = _scopes(holder)
    # Exporters attribute fused operators to the last module that calls them, and store equal weights once.
    if name.endswith(".weight") and not (scopes and scopes[-1].startswith(_OWN_CALLS)):
        return name.removesuffix(".weight")
    if scopes:
        return scopes[-2] if len(scopes) > 1 else None
    if "::" not in name:  # which older exporters call what they have computed
        return name
    return str(holder.name.split("/")[-2]) if "/" in holder.name else None


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Return the paths of the modules that call it, the innermost last, and its own name there.

    The list is empty for files that do not hold them.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            with contextlib.suppress(ValueError, SyntaxError):
                _, *scopes = ast.literal_eval(entry.value)  # the first is the model itself
                return [str(scope) for scope in scopes]
    return []
