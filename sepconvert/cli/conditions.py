"""Conditions of `compare --fail-if`, such as `latency > +5%` or `drop > 0.5`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sepconvert.base.errors import SepconvertError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sepconvert.measure.comparison import Comparison, Delta
    from sepconvert.measure.latency import Speedup
    from sepconvert.measure.profiling import Profile
    from sepconvert.report.baseline import ModelChanges

UNITS: Mapping[str, tuple[str, ...]] = {
    "latency": ("%",),
    "speedup": ("", "x", "×"),
    "macs": ("%",),
    "params": ("%",),
    "bytes": ("%",),
    "drop": ("", "pp", "db"),
    "agreement": ("%",),
    "max_abs": ("",),
}
"""The units in which a condition may give each metric; failures are reported in the last of them.

A drop is in the unit of `--metric`, which a condition need not repeat.
"""


QUANTITIES: Mapping[str, str] = {
    "latency": "latency", "macs": "macs", "params": "params", "bytes": "bytes", "drop": "metric",
}  # fmt: skip
"""The metrics that are changes, which are those since a baseline if there is one, and their names there."""


_CONDITION = re.compile(
    r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%|pp|dB|x|×|)\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class Demand:
    """A condition that fails a comparison, such as `latency > +5%`, for use in continuous integration.

    `latency`, `macs`, `params` and `bytes` are changes in percent of the first model's value. `speedup` is
    the ratio of latencies, `drop` the loss of the metric in its unit (percentage points of top-1 accuracy, dB
    of psnr), `agreement` the percentage of equal predictions, and `max_abs` the largest absolute difference
    of any output.
    """

    text: str
    metric: str
    sign: Literal["<", ">"]
    threshold: float
    unit: str = ""  # as it was given, in lower case

    @classmethod
    def parse(cls, text: str) -> "Demand":
        """Read a condition.

        Raises:
            SepconvertError: the text is no condition, or its unit is not one of `UNITS`.
        """
        match = _CONDITION.fullmatch(text)
        metric = match[1].lower() if match else ""
        if match is None or match[4].lower() not in UNITS.get(metric, ()):
            raise SepconvertError(
                f"--fail-if {text!r}: expected one of {', '.join(UNITS)}, then < or >, then a number, with "
                "% for changes; e.g. 'latency > +5%' or 'drop > 0.5'"
            )
        return cls(text, metric, "<" if match[2] == "<" else ">", float(match[3]), match[4].lower())

    def require(self, *, together: bool, timed: bool, data: bool, labels: bool, unit: str) -> None:
        """Check, before anything is measured, that the metric will be.

        Args:
            together: whether the models are measured in this process, not read from stored profiles.
            timed: whether they are timed.
            data: whether they are run on data.
            labels: whether these may have labels.
            unit: that of drops.

        Raises:
            SepconvertError: the metric will not be measured, or not in the unit of the condition.
        """
        measured = {
            **dict.fromkeys(("latency", "speedup"), together and timed),
            "drop": together and labels,
            "agreement": together and data,
            "max_abs": together,
        }
        if self.metric == "drop" and data and not labels:
            raise SepconvertError(
                f"--fail-if {self.text!r}: the images of --data have no labels, which drop needs; add labels "
                "(y, or class folders), or compare predictions: 'agreement < 99%'"
            )
        if not measured.get(self.metric, True):
            raise self._not_measured()
        if self.metric == "drop" and self.unit not in ("", unit.lower()):
            raise SepconvertError(
                f"--fail-if {self.text!r}: drops of this metric are {f'in {unit}' if unit else 'unitless'}; "
                "give the threshold so, or pass another --metric"
            )

    def require_a_base(self, *, models: int, since: bool) -> None:
        """Check, before anything is measured, that there is something to judge a model against.

        Args:
            models: number of models.
            since: whether changes are those since a baseline, not from the first model.

        Raises:
            SepconvertError: a model that stands alone has nothing that the metric compares it with.
        """
        if models > 1 or (since and self.metric in QUANTITIES and self.metric != "latency"):
            return
        what = "the ratio to a reference" if self.metric == "latency" else "that against a reference"
        raise SepconvertError(
            f"--fail-if {self.text!r}: {self.metric} is {what} that is measured in the same run, and there "
            "is one model; pass the reference first: compare REFERENCE MODEL"
        )

    def failures(self, comparison: "Comparison") -> list[str]:
        """Return a message for each model that meets the condition.

        A change of latency that noise can explain counts as no change.

        Raises:
            SepconvertError: the metric was not measured.
        """
        from sepconvert.measure.comparison import Delta  # which imports torch; conditions are read before

        messages = []
        deltas = comparison.deltas or (Delta(),) * (len(comparison.profiles) - 1)
        base = comparison.profiles[0]
        for index, (profile, delta) in enumerate(zip(comparison.profiles[1:], deltas, strict=True), start=1):
            value = self._value(base, profile, delta)
            if self._holds(value):
                name = comparison.names[index] if comparison.names else f"#{index + 1}"
                unit = self._unit(delta)
                messages.append(
                    f"{name}: {self.metric} is {value:.4g}{unit and ' '}{unit} ({self.text.strip()})"
                )
        return messages

    def failures_since(self, models: "Iterable[ModelChanges]") -> list[str]:
        """Return a message for each model that meets the condition by its change since a baseline."""
        found = [(model.name, model.change(QUANTITIES[self.metric])) for model in models]
        return [
            f"{name}: {self.metric} is {each.amount:+.4g}{each.unit and ' '}{each.unit} since {each.since} "
            f"({self.text.strip()})"
            for name, each in found
            if each is not None and self._holds(each.amount)
        ]

    def _holds(self, value: float) -> bool:
        return value > self.threshold if self.sign == ">" else value < self.threshold

    def _unit(self, delta: "Delta") -> str:
        """Return the unit in which a failure is reported."""
        if self.metric == "drop" and delta.accuracy is not None:
            return delta.accuracy.metric.unit
        return UNITS[self.metric][-1]

    def _value(self, base: "Profile", profile: "Profile", delta: "Delta") -> float:
        values: Mapping[str, float | None] = {
            "latency": None if delta.speedup is None else _change(1, _beyond_noise(delta.speedup)),
            "speedup": None if delta.speedup is None else _beyond_noise(delta.speedup),
            "macs": _change(profile.macs, base.macs),
            "params": _change(profile.params, base.params),
            "bytes": _change(profile.onnx_bytes, base.onnx_bytes),
            "drop": None if delta.accuracy is None else delta.accuracy.drop,
            "agreement": _agreement(delta),
            "max_abs": _largest_difference(delta),
        }
        value = values[self.metric]
        if value is None:
            raise self._not_measured()
        return value

    def _not_measured(self) -> SepconvertError:
        return SepconvertError(
            f"--fail-if {self.text!r}: {self.metric} is not measured; compare models, not stored profiles, "
            "with --data, which has labels for drop, and without --runs 0 for latency"
        )


def _beyond_noise(speedup: "Speedup") -> float:
    return speedup.median if speedup.significant else 1.0


def _change(value: float | None, base: float | None) -> float | None:
    """Return a change in percent."""
    return None if value is None or not base else 100 * (value / base - 1)


def _agreement(delta: "Delta") -> float | None:
    """Return the percentage of equal predictions; without labels, that of the first output."""
    share = delta.accuracy.agreement if delta.accuracy is not None else None
    if share is None and delta.outputs:
        share = delta.outputs[0].agreement
    return None if share is None else 100 * share


def _largest_difference(delta: "Delta") -> float | None:
    """Return the largest absolute difference of any output: infinity if outputs cannot be compared."""
    if delta.outputs is None:
        return math.inf
    differences = [math.inf if output.max_abs is None else output.max_abs for output in delta.outputs]
    return max(differences, default=None)
