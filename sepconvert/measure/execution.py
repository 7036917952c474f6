"""What a runtime makes of a converted model: where its time goes, and why that is not less."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sepconvert.measure.operators import OperatorTime

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
