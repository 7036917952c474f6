"""Conditions of `compare --fail-if`, such as `latency > +5%` or `drop > 0.5`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.latency import Speedup
from sepconvert.measure.profiling import Profile

# Demands -------------------------------------------------------------------------------------------

_DEMAND = re.compile(
    r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%|pp|x|×|)\s*", re.IGNORECASE
)


_UNITS = {
    "latency": ("%",),
    "speedup": ("", "x", "×"),
    "macs": ("%",),
    "params": ("%",),
    "bytes": ("%",),
    "drop": ("", "pp"),
    "agreement": ("%",),
    "max_abs": ("",),
}


@dataclass(frozen=True)
class Demand:
    """A condition that fails a comparison, such as `latency > +5%`: for use in continuous integration.

    `latency`, `macs`, `params` and `bytes` are changes in per cent of the first model's, `speedup` a ratio,
    `drop` of top-1 in percentage points, `agreement` of predictions in per cent, `max_abs` the largest
    difference of any output.
    """

    text: str
    metric: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Demand":
        """Raises `SepconvertError` for what is no such condition."""
        match = _DEMAND.fullmatch(text)
        metric = match[1].lower() if match else ""
        if match is None or metric not in _UNITS or match[4].lower() not in _UNITS[metric]:
            raise SepconvertError(
                f"--fail-if {text!r}: expected one of {', '.join(_UNITS)}, then < or >, then a number, with "
                "% for changes; e.g. 'latency > +5%' or 'drop > 0.5'"
            )
        return cls(text, metric, match[2], float(match[3]))

    def require(self, *, together: bool, timed: bool, data: bool) -> None:
        """Refuse, before anything is measured, what will not be.

        Args:
            together: whether models are compared, and not stored profiles.
            timed: whether they are timed.
            data: whether they are shown evaluation data.

        Raises:
            SepconvertError: if so.
        """
        needs = {
            **dict.fromkeys(("latency", "speedup"), together and timed),
            **dict.fromkeys(("drop", "agreement"), together and data),
            "max_abs": together,
        }
        if not needs.get(self.metric, True):
            raise self._not_measured()

    def _not_measured(self) -> SepconvertError:
        return SepconvertError(
            f"--fail-if {self.text!r}: it is not measured; compare models, not stored profiles, with"
            " --data for accuracy, and without --runs 0 for latency"
        )

    def failures(self, comparison: Comparison) -> list[str]:
        """What it says of each model for which it holds.

        A change of latency within noise is none.

        Raises:
            SepconvertError: that was not measured.
        """
        found = []
        deltas = comparison.deltas or (Delta(),) * (len(comparison.profiles) - 1)
        base = comparison.profiles[0]
        for index, (profile, delta) in enumerate(zip(comparison.profiles[1:], deltas, strict=True), start=1):
            value = self._value(base, profile, delta)
            if value > self.value if self.sign == ">" else value < self.value:
                name = comparison.names[index] if comparison.names else f"#{index + 1}"
                unit = _UNITS[self.metric][-1]
                found.append(
                    f"{name}: {self.metric} is {value:.4g}{unit and ' '}{unit} ({self.text.strip()})"
                )
        return found

    def _value(self, base: Profile, profile: Profile, delta: Delta) -> float:
        values: Mapping[str, float | None] = {
            "latency": None if delta.speedup is None else _change(1, _certain(delta.speedup)),
            "speedup": None if delta.speedup is None else _certain(delta.speedup),
            "macs": _change(profile.macs, base.macs),
            "params": _change(profile.params, base.params),
            "bytes": _change(profile.onnx_bytes, base.onnx_bytes),
            "drop": None if delta.accuracy is None else delta.accuracy.drop,
            "agreement": None if delta.accuracy is None else 100 * delta.accuracy.agreement,
            # What is not finite is beyond all bounds.
            "max_abs": math.inf
            if delta.outputs is None
            else max(
                (math.inf if each.max_abs is None else each.max_abs for each in delta.outputs), default=None
            ),
        }
        value = values[self.metric]
        if value is None:
            raise self._not_measured()
        return value


def _certain(found: Speedup) -> float:
    return found.median if found.significant else 1.0


def _change(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else 100 * (value / base - 1)
