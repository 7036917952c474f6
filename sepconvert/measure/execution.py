"""Time by operator and layer: ONNX Runtime's profiler, and why a layer is not as fast as its MACs promise."""

import ast
import contextlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
    small operators
    down: they are shares, not latencies. `bytes_moved` is the size of its inputs, outputs and weights, except
    for the weights of matrix products, which the profiler does not report.
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
    each_run = list(_by_run(events))[_WARMUP_RUNS:]
    graph = _Graph(_loaded(deployed.model).graph, known or {})
    times = []
    for key in each_run[-1]:
        name, operator, shapes, moved = key
        own = _MERGED.sub("", name.removesuffix(_BLOCKED))
        if operator == _IN_INT8:  # the weight is packed, and the channels come last
            first = shapes[0]
            shapes = ((first[0], first[-1], *first[1:-1]), graph.weight_of(own))
        times.append(
            OperatorTime(
                own,
                graph.layer(own, operator, shapes[1] if len(shapes) > 1 else ()),
                operator,
                _kernel(operator, name.endswith(_BLOCKED), shapes),
                float(np.median([run.get(key, 0.0) for run in each_run])),
                moved,
            )
        )
    return tuple(times)


def _loaded(model: Path | bytes) -> onnx.ModelProto:
    if isinstance(model, Path):
        return onnx.load(str(model), load_external_data=False)
    return onnx.load_model_from_string(model)


_Key = tuple[str, str, tuple[Shape, ...], int]
"""Name, type, shapes of the inputs, and bytes moved."""


def _by_run(events: Sequence[Mapping[str, Any]]) -> Iterator[dict[_Key, float]]:
    """Yield the milliseconds of each operator in each run of the model: in a loop it runs several times."""
    times: dict[_Key, float] = defaultdict(float)
    for event in events:
        if event["name"] == "model_run":
            yield dict(times)
            times.clear()
        elif event.get("cat") == "Node" and event["name"].endswith(_TIME):
            about = event["args"]
            shapes = tuple(
                tuple(shape) for by_type in about["input_type_shape"] for shape in by_type.values()
            )
            moved = sum(int(about[f"{what}_size"]) for what in ("activation", "parameter", "output"))
            times[event["name"].removesuffix(_TIME), about["op_name"], shapes, moved] += event["dur"] / 1000


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


class _Graph:
    """The graph of a file, to look up which layer an operator of the optimised graph comes from."""

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


# Share of the ratio of MACs; a smaller gain is explained.
_DISAPPOINTING = 0.5


# No operator of ONNX Runtime takes much less under the profiler, whatever it computes.
_SHORTEST_MS = 0.015


# Memory is the limit if the MACs per byte fall by the first factor, and if bytes are moved at the second
# share of the fastest rate of any operator.
_THINNER, _FLOWING = 2.0, 0.5


@dataclass(frozen=True)
class Gain:
    """The gain that the conversion of a layer promises, and the one that it brings."""

    macs: tuple[int, int]  # of the whole batch, before and after
    measured: float  # ratio of times, of the layer alone; at least 1 where it is not slower beyond noise
    kind: Hashable  # equal for layers that differ in their weights alone; they are explained together


@dataclass(frozen=True)
class LayerExecution:
    """Execution of a layer before and after, on the whole batch that is timed.

    Pairs are those of the original and of the converted model. `milliseconds` are the profiler's
    (`OperatorTime`). `cause` says why the measured gain is less than half of the ratio of MACs, or none at
    all; else None.
    """

    milliseconds: tuple[float, float]
    operators: tuple[int, int]
    bytes_moved: tuple[int, int]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]  # of convolutions, each once
    cause: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the `execution` object of a layer in the report."""
        return asdict(self)


@dataclass(frozen=True)
class ModelExecution:
    """The profiler's milliseconds by kind of operator, in the original and in the converted model."""

    converted: tuple[float, float]  # in layers that were replaced
    kept: tuple[float, float]  # in other layers with weights
    layout: tuple[float, float]  # in copies to other memory layouts
    other: tuple[float, float]
    operators: tuple[int, int]
    layout_changes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the `execution` object of the report."""
        return asdict(self)


def by_layer(
    operators: Sequence[OperatorTime], functional: Mapping[str, Sequence[str]]
) -> list[OperatorTime]:
    """Return the operators, those of functional convolutions with the names that these have as layers.

    A file says in which module's forward a convolution is called; if there are several, their order tells
    them apart. They are left as they are if their number is no multiple of the number of convolutions that
    the module calls.

    Args:
        operators: those of the original, in the order of execution.
        functional: by module ("" for the model itself), its functional convolutions in the order of calls.
    """
    named = list(operators)
    for owner, names in functional.items():
        places = [
            place
            for place, operator in enumerate(operators)
            if operator.kernel is not None and (operator.layer or "") == owner
        ]
        if len(places) % len(names) == 0:
            for number, place in enumerate(places):
                named[place] = replace(named[place], layer=names[number % len(names)])
    return named


def layer_executions(
    before: Sequence[OperatorTime],
    after: Sequence[OperatorTime],
    gains: Mapping[str, Gain],
) -> dict[str, LayerExecution]:
    """Return the execution of each layer that is found among the operators of both models.

    Args:
        before: operators of the original, attributed to its layers by `by_layer`.
        after: operators of the converted model.
        gains: gains by converted layer.
    """
    operators = {name: (_of_layer(before, name), _of_layer(after, name)) for name in gains}
    operators = {name: both for name, both in operators.items() if all(both)}
    fastest = max(
        (_flow([operator]) for operator in (*before, *after) if operator.milliseconds > _SHORTEST_MS),
        default=0.0,
    )
    return {
        name: LayerExecution(
            (_milliseconds(own), _milliseconds(new)),
            (len(own), len(new)),
            (_bytes(own), _bytes(new)),
            (_kernels(own), _kernels(new)),
            _cause(
                [both for other, both in operators.items() if gains[other].kind == gains[name].kind],
                gains[name],
                fastest,
            ),
        )
        for name, (own, new) in operators.items()
    }


def model_execution(
    before: Sequence[OperatorTime], after: Sequence[OperatorTime], converted: Iterable[str]
) -> ModelExecution:
    """Return where the time of both models goes; `converted` are the layers that were replaced."""
    shares: list[dict[str, float]] = []
    names = tuple(converted)
    for operators in (before, after):
        share = dict.fromkeys(("converted", "kept", "layout", "other"), 0.0)
        for operator in operators:
            share[_place(operator, names)] += operator.milliseconds
        shares.append(share)
    first, second = shares
    return ModelExecution(
        **{place: (first[place], second[place]) for place in first},
        operators=(len(before), len(after)),
        layout_changes=(_layout_changes(before), _layout_changes(after)),
    )


def _place(operator: OperatorTime, converted: Sequence[str]) -> str:
    if operator.changes_layout:
        return "layout"
    if any(_belongs(operator, name) for name in converted):
        return "converted"
    return "kept" if operator.has_weights else "other"


def _belongs(operator: OperatorTime, layer: str) -> bool:
    return operator.layer is not None and (operator.layer == layer or operator.layer.startswith(f"{layer}."))


def _of_layer(operators: Sequence[OperatorTime], layer: str) -> list[OperatorTime]:
    return [operator for operator in operators if _belongs(operator, layer)]


def _milliseconds(operators: Sequence[OperatorTime]) -> float:
    return sum(operator.milliseconds for operator in operators)


def _bytes(operators: Sequence[OperatorTime]) -> int:
    return sum(operator.bytes_moved for operator in operators)


def _kernels(operators: Sequence[OperatorTime]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(operator.kernel for operator in operators if operator.kernel is not None))


def _layout_changes(operators: Sequence[OperatorTime]) -> int:
    return sum(operator.changes_layout for operator in operators)


def _flow(operators: Sequence[OperatorTime]) -> float:
    """Return the bytes moved, in gigabytes per second."""
    return _bytes(operators) / max(_milliseconds(operators), 1e-9) / 1e6


def _cause(
    layers: Sequence[tuple[list[OperatorTime], list[OperatorTime]]], gain: Gain, fastest: float
) -> str | None:
    """Return why the gain is small, if it is, from the operators of all equal layers together."""
    promised = gain.macs[0] / max(gain.macs[1], 1)
    if promised <= 1 or gain.measured >= max(_DISAPPOINTING * promised, 1.0):
        return None
    before, after = ([operator for both in layers for operator in both[side]] for side in (0, 1))
    sides = (before, len(layers) * gain.macs[0]), (after, len(layers) * gain.macs[1])
    own, new = (macs / max(_milliseconds(operators), 1e-9) / 1e6 for operators, macs in sides)
    pace = f"within the model it runs at {new:.1f} GMAC/s, the original at {own:.1f}"
    unblocked = [kernel for kernel in _kernels(after) if not _blocked(kernel)]
    if unblocked and all(map(_blocked, _kernels(before))):
        return f"{pace}: {', '.join(unblocked)} instead of the runtime's kernels for blocked layouts"
    if _milliseconds(after) < _SHORTEST_MS * len(after):
        microseconds, number = 1000 * _milliseconds(after) / len(after), len(after) // len(layers)
        return f"{pace}: {number} operators of {microseconds:.0f} µs each, mostly the cost of starting them"
    thick, thin = (macs / max(_bytes(operators), 1) for operators, macs in sides)
    if thin * _THINNER < thick and _flow(after) > _FLOWING * fastest:
        return (
            f"{pace}: {thin:.1f} MACs per byte that it moves instead of {thick:.1f}, at "
            f"{_flow(after):.1f} GB/s: memory bandwidth is the limit"
        )
    times: dict[str, float] = {}
    for operator in after:
        kernel = operator.kernel or operator.operator
        times[kernel] = times.get(kernel, 0.0) + operator.milliseconds
    slowest = max(times, key=times.__getitem__)
    share = 100 * times[slowest] / (_milliseconds(after) or 1.0)
    return f"{pace}: {share:.0f} % of its time is in {slowest}"


def _blocked(kernel: str) -> bool:
    return kernel.endswith("blocked layout")
