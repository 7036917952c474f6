"""History of comparisons: what may be compared truthfully with an earlier run, and by how much it changed.

MACs, parameters, sizes, and the metric on the same data are those of the model. A latency is that of a
machine at a moment: two runs are compared by the speed-ups over one reference, the first model of both, and
only on the same processor, with the same settings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from sepconvert.base.documents import decode, read_file, replacing, writing
from sepconvert.base.environment import TIMES_DEPEND_ON
from sepconvert.base.errors import SepconvertError, quoted
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.report.schema import profile as stored
from sepconvert.report.schema.baseline import BaselineDocument, BaselineEntry, BaselineModel

SCHEMA: Literal["sepconvert.baseline/1"] = "sepconvert.baseline/1"

MOST_ENTRIES = 100
"""Runs that a history holds; the oldest make room for new ones."""

Quantity = Literal["params", "macs", "bytes", "metric", "latency"]


@dataclass(frozen=True)
class Change:
    """Change of a quantity of a model since an earlier run.

    `amount` is in `unit`: percent, or for a metric, whose drop it is, that of the metric. Of a latency,
    `then` and `now` are the speed-ups over the reference, and `speedup` is their ratio: above 1 the model has
    become faster. Its interval and its noise are as wide as those of both runs together allow, and a change
    within them is none: its amount is 0.
    """

    quantity: Quantity
    then: float
    now: float
    amount: float
    unit: str
    since: str  # date of the earlier run
    speedup: Speedup | None = None
    metric: str | None = None  # its name

    def to_json(self) -> dict[str, Any]:
        """Return one entry of `changes` in the JSON of a comparison."""
        return {
            "quantity": self.quantity,
            "metric": self.metric,
            "then": self.then,
            "now": self.now,
            "change": self.amount,
            "unit": self.unit,
            "since": self.since,
            "latency_speedup": None if self.speedup is None else self.speedup.to_dict(),
        }


@dataclass(frozen=True)
class ModelChanges:
    """Changes of a model since earlier runs, and why other quantities cannot be compared."""

    name: str
    changes: tuple[Change, ...]
    missing: Mapping[str, str]

    def change(self, quantity: str) -> Change | None:
        """Return the change of a quantity, if there is one."""
        return next((each for each in self.changes if each.quantity == quantity), None)

    def to_json(self) -> dict[str, Any]:
        """Return one entry of `baseline.models` in the JSON of a comparison."""
        return {
            "model": self.name,
            "changes": [change.to_json() for change in self.changes],
            "missing": dict(self.missing),
        }


@dataclass(frozen=True)
class _Versioned:
    schema: str


def read_baseline(path: Path) -> BaselineDocument:
    """Read a history; an empty one if there is no such file.

    Raises:
        SepconvertError: it is no history, is damaged, or is of another version.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        return BaselineDocument(schema=SCHEMA, entries=())
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    where, advice = f"{path}: is no history of comparisons", "restore it, or begin a new one in another file"
    if (schema := decode(text, _Versioned, where, advice).schema) != SCHEMA:
        raise SepconvertError(
            f"{path}: expected schema {SCHEMA!r}, got {quoted(schema)}; use the version of sepconvert that "
            "wrote it, or begin a new one in another file"
        )
    return decode(text, BaselineDocument, where, advice)


def write_baseline(path: Path, history: BaselineDocument, entry: BaselineEntry) -> int:
    """Add a run to a history and write it, completely or not at all; return the number of its runs.

    Raises:
        SepconvertError: the file cannot be written.
    """
    entries = (*history.entries, entry)[-MOST_ENTRIES:]
    document = msgspec.json.encode(BaselineDocument(schema=SCHEMA, entries=entries))
    with writing(path, "baseline"), replacing(path) as unfinished:
        unfinished.write_bytes(msgspec.json.format(document) + b"\n")
    return len(entries)


def changes_since(history: BaselineDocument, now: BaselineEntry) -> tuple[ModelChanges, ...]:
    """Return the changes of each model of a run since the last earlier runs that allow a comparison."""
    return tuple(_changes(history.entries, now, model) for model in now.models)


@dataclass(frozen=True)
class _Rule:
    """Rule for a quantity: its value for a model, and why runs cannot be compared in it; None if they can."""

    value: Callable[[BaselineModel], float | None]
    obstacle: Callable[[BaselineEntry, BaselineEntry], str | None] = lambda then, now: None


def _changes(entries: Sequence[BaselineEntry], now: BaselineEntry, model: BaselineModel) -> ModelChanges:
    changes, missing = list[Change](), dict[str, str]()
    for quantity, rule in _RULES.items():
        if rule.value(model) is None:  # not measured, or that of the reference
            continue
        earlier = [
            (entry, then)
            for entry in reversed(entries)
            for then in entry.models
            if then.name == model.name and rule.value(then) is not None
        ]
        fitting = next((pair for pair in earlier if rule.obstacle(pair[0], now) is None), None)
        if fitting is not None:
            entry, then = fitting
            changes.append(_change(quantity, then, model, entry.date))
        elif earlier:
            missing[quantity] = rule.obstacle(earlier[0][0], now) or ""
        else:
            missing[quantity] = "there is no earlier run with it"
    return ModelChanges(model.name, tuple(changes), missing)


def _change(quantity: Quantity, before: BaselineModel, after: BaselineModel, since: str) -> Change:
    then, now = (_RULES[quantity].value(each) or 0.0 for each in (before, after))
    metric, ratio = after.profile.metric, _ratio(before, after)
    if quantity == "metric" and isinstance(metric, stored.MetricValue):
        drop = then - now if metric.higher_is_better else now - then
        return Change(quantity, then, now, drop, metric.unit, since, metric=metric.name)
    if quantity == "latency" and ratio is not None:
        amount = 100 * (1 / ratio.median - 1) if ratio.significant else 0.0
        return Change(quantity, then, now, amount, "%", since, ratio)
    return Change(quantity, then, now, 100 * (now / then - 1) if then else 0.0, "%", since)


def _metric(model: BaselineModel) -> float | None:
    metric = model.profile.metric
    return metric.value if isinstance(metric, stored.MetricValue) else None


def _speedup(model: BaselineModel) -> float | None:
    return None if model.speedup is None else model.speedup.median


def _other_scores(then: BaselineEntry, now: BaselineEntry) -> str | None:
    """Return why metrics of two runs are not comparable; None if they are."""
    if then.data_sha256 != now.data_sha256:
        return f"the run of {then.date} had other data"
    return None if then.task == now.task else f"the run of {then.date} was scored in another way"


def _other_times(then: BaselineEntry, now: BaselineEntry) -> str | None:
    """Return why speed-ups of two runs are not comparable; None if they are."""
    before, after = then.models[0], now.models[0]
    if before.sha256 != after.sha256:
        return (
            f"the run of {then.date} had another reference ({before.name}, SHA-256 "
            f"{(before.sha256 or 'unknown')[:12]}…; now {after.name}, {(after.sha256 or 'unknown')[:12]}…)"
        )
    pairs = [
        (name, getattr(then.environment, name), getattr(now.environment, name)) for name in TIMES_DEPEND_ON
    ]
    pairs.append(("batch", then.batch, now.batch))
    differences = [f"{name} {_text(old)}, now {_text(new)}" for name, old, new in pairs if old != new]
    if not differences:
        return None
    return f"the run of {then.date} was on another machine or with other settings ({'; '.join(differences)})"


def _text(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _ratio(then: BaselineModel, now: BaselineModel) -> Speedup | None:
    """Return the ratio of two speed-ups over the same reference, with the widest intervals that it allows."""
    if then.speedup is None or now.speedup is None:
        return None

    def divided(new: tuple[float, float], old: tuple[float, float]) -> Interval:
        return Interval(new[0] / old[1], new[1] / old[0])

    return Speedup(
        now.speedup.median / then.speedup.median,
        divided(now.speedup.ci95, then.speedup.ci95),
        divided(now.speedup.noise_floor, then.speedup.noise_floor),
    )


_RULES: Mapping[Quantity, _Rule] = {
    "params": _Rule(lambda model: model.profile.params),
    "macs": _Rule(lambda model: model.profile.macs),
    "bytes": _Rule(lambda model: model.profile.onnx_bytes),
    "metric": _Rule(_metric, _other_scores),
    "latency": _Rule(_speedup, _other_times),
}
