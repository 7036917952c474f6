"""Time by layer: what the conversion of a layer gained, and why it is not as fast as its MACs promise."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sepconvert.measure.execution.operators import BLOCKED_KERNELS, OperatorTime

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
    unblocked = [kernel for kernel in _kernels(after) if kernel not in BLOCKED_KERNELS]
    if unblocked and BLOCKED_KERNELS.issuperset(_kernels(before)):
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
