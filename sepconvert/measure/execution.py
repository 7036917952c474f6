"""Where the time of a model goes: operators as ONNX Runtime ran them, and the layers they belong to."""

import ast
import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError, first_line
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


# Of the ratio of MACs; a smaller gain is explained.
_DISAPPOINTING = 0.5


# No operator of ONNX Runtime ends much sooner, whatever it computes, with the profiler looking on.
_SHORTEST_MS = 0.015


# Of MACs to bytes, before to after, and of the fastest flow of bytes that is seen in any operator: from here
# on memory sets the pace.
_THINNER, _FLOWING = 2.0, 0.5


@dataclass(frozen=True)
class Gain:
    """What the conversion of a layer promises, and what it brings."""

    macs: tuple[int, int]  # of the whole batch, before and after
    measured: float  # ratio of times, of the layer alone; at least 1 where it is not slower beyond noise
    kind: Hashable  # equal for layers that are equal but for their weights: what is said of one holds for all


@dataclass(frozen=True)
class LayerExecution:
    """How a layer runs before and after, on the whole batch that is timed.

    Pairs are of the original and of the converted model. `milliseconds` are the profiler's (`OperatorTime`).
    `cause` says why the measured gain is less than half of the ratio of MACs, or none at all; else None.
    """

    milliseconds: tuple[float, float]
    operators: tuple[int, int]
    bytes_moved: tuple[int, int]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]  # of convolutions, each once
    cause: str | None

    def to_dict(self) -> dict[str, Any]:
        """The `execution` object of a layer in the report."""
        return asdict(self)


@dataclass(frozen=True)
class ModelExecution:
    """Where the profiler's milliseconds go, in the original and in the converted model."""

    converted: tuple[float, float]  # in layers that were replaced
    kept: tuple[float, float]  # in other layers with weights
    layout: tuple[float, float]  # in copies to other layouts
    other: tuple[float, float]
    operators: tuple[int, int]
    layout_changes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The `execution` object of the report."""
        return asdict(self)


def by_layer(
    operators: Sequence[OperatorTime], functional: Mapping[str, Sequence[str]]
) -> list[OperatorTime]:
    """Operators of which those that are functional convolutions bear the names that these have as layers.

    A file says in which module's forward a convolution is called; which of several it is, their order says.
    Where they are not as many as the module calls, or a multiple, they are left as they are.

    Args:
        operators: of the original, in the order of execution.
        functional: by module, "" for the model itself, its functional convolutions in the order of calls.
    """
    found = list(operators)
    for owner, names in functional.items():
        places = [
            place
            for place, each in enumerate(operators)
            if each.kernel is not None and (each.layer or "") == owner
        ]
        if len(places) % len(names) == 0:
            for number, place in enumerate(places):
                found[place] = replace(found[place], layer=names[number % len(names)])
    return found


def layer_executions(
    before: Sequence[OperatorTime],
    after: Sequence[OperatorTime],
    gains: Mapping[str, Gain],
) -> dict[str, LayerExecution]:
    """Of the layers that are found among the operators of both models.

    Args:
        before: operators of the original, put to its layers by .
        after: of the converted model.
        gains: by converted layer.
    """
    operators = {name: (_of_layer(before, name), _of_layer(after, name)) for name in gains}
    operators = {name: both for name, both in operators.items() if all(both)}
    fastest = max(
        (_flow([each]) for each in (*before, *after) if each.milliseconds > _SHORTEST_MS), default=0.0
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
    """Of the operators of both models; `converted` are the layers that were replaced."""
    shares: list[dict[str, float]] = []
    names = tuple(converted)
    for operators in (before, after):
        share = dict.fromkeys(("converted", "kept", "layout", "other"), 0.0)
        for each in operators:
            share[_place(each, names)] += each.milliseconds
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
    return [each for each in operators if _belongs(each, layer)]


def _milliseconds(operators: Sequence[OperatorTime]) -> float:
    return sum(each.milliseconds for each in operators)


def _bytes(operators: Sequence[OperatorTime]) -> int:
    return sum(each.bytes_moved for each in operators)


def _kernels(operators: Sequence[OperatorTime]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.kernel for each in operators if each.kernel is not None))


def _layout_changes(operators: Sequence[OperatorTime]) -> int:
    return sum(each.changes_layout for each in operators)


def _flow(operators: Sequence[OperatorTime]) -> float:
    """Gigabytes a second."""
    return _bytes(operators) / max(_milliseconds(operators), 1e-9) / 1e6


def _cause(
    layers: Sequence[tuple[list[OperatorTime], list[OperatorTime]]], gain: Gain, fastest: float
) -> str | None:
    """By the operators of all layers that are alike, together: those of one are few and soon done."""
    promised = gain.macs[0] / max(gain.macs[1], 1)
    if promised <= 1 or gain.measured >= max(_DISAPPOINTING * promised, 1.0):
        return None
    before, after = ([operator for both in layers for operator in both[side]] for side in (0, 1))
    sides = (before, len(layers) * gain.macs[0]), (after, len(layers) * gain.macs[1])
    own, new = (count / max(_milliseconds(each), 1e-9) / 1e6 for each, count in sides)
    pace = f"within the model it does {new:.1f} GMAC/s where the original does {own:.1f}"
    unblocked = [each for each in _kernels(after) if not _blocked(each)]
    if unblocked and all(map(_blocked, _kernels(before))):
        return f"{pace}: {', '.join(unblocked)} instead of the runtime's kernels for blocked layouts"
    if _milliseconds(after) < _SHORTEST_MS * len(after):
        each, number = 1000 * _milliseconds(after) / len(after), len(after) // len(layers)
        return f"{pace}: {number} operators of {each:.0f} µs each, of which starting them is most"
    thick, thin = (count / max(_bytes(each), 1) for each, count in sides)
    if thin * _THINNER < thick and _flow(after) > _FLOWING * fastest:
        return (
            f"{pace}: {thin:.1f} MACs for each byte that it moves instead of {thick:.1f}, at "
            f"{_flow(after):.1f} GB/s: memory sets the pace"
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
