"""Numbers as text, written the same way in tables, sentences and pages."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sepconvert.measure.metrics.metric import (
    drop_number,
    value_unit,
    written,
    written_drop,
    written_interval,
)

Document = Mapping[str, Any]
"""The report as JSON, or an object within it; see `sepconvert.report.schema`."""


_TERMINAL_WIDTH = 80  # columns

_SMALL = 1e-3  # divergences below it have too few digits among four decimals


def fold(sentence: str) -> str:
    """Return a sentence on lines of 80 columns, the second and later ones indented by two."""
    return textwrap.fill(
        sentence, _TERMINAL_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def count_text(count: int | None) -> str:
    """Return a count with thousands separators, or a dash for None."""
    return "-" if count is None else f"{count:,}"


def ratio_text(ratio: float | None) -> str:
    """Return a ratio as `2.00×`, or nothing for None."""
    return "" if ratio is None else f"{ratio:.2f}×"


def written_count(number: float) -> str:
    """Return a count in three digits with a prefix, such as `161M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"


def written_size(count: int | None) -> str:
    """Return a number of bytes as people read it, such as `1.2 MB`, or a dash for None."""
    if count is None:
        return "-"
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def three_digits(number: float) -> str:
    """Return a number in three digits, or all of those before the point: 0.0480, 1.25, 1,240."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"


def duration_text(seconds: float) -> str:
    """Return a duration as people read it: `3.7 s`, `221 s`, `39 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def percent_text(share: float | None, digits: int = 2) -> str:
    """Return a fraction in [0, 1] as a percentage without its sign, or a dash for None."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def estimate_text(value: float, ci95: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Return an estimate, its unit and its 95 % interval, such as `1.50× [1.40, 1.60]`."""
    low, high = ci95
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def range_text(ends: Sequence[float]) -> str:
    """Return a range of values, such as `-2.1 to 2.6`."""
    low, high = ends
    return f"{low:.3g} to {high:.3g}"


def speedup_text(speedup: Document) -> str:
    """Return a `latency_speedup` object with its interval, marked if noise can explain it."""
    noise = "" if speedup["significant"] else " ~ within noise"
    return estimate_text(speedup["median"], speedup["ci95"], "×") + noise


def as_fast_text(speedup: Document) -> str:
    """Return a `latency_speedup` object in words, without its interval, marked if noise can explain it."""
    return f"{ratio_text(speedup['median'])} as fast" + ("" if speedup["significant"] else " (within noise)")


def divergence_text(divergence: float) -> str:
    """Return a divergence as people read it, small ones with two digits: 0.0123, 4.1e-05."""
    return f"{divergence:.4f}" if divergence >= _SMALL or not divergence else f"{divergence:.1e}"


def drop_text(drop: Document, *, unit: bool = True) -> str:
    """Return a `drop` object with its interval, such as `0.098 dB [0.0901, 0.106]`."""
    write = written_drop if unit else drop_number
    return f"{write(drop['value'], drop['unit'])} {written_interval(drop['ci95'], drop['unit'])}"


@dataclass(frozen=True)
class Quality:
    """The metric that a report judges a model by: that of its data, or accuracy where there are none."""

    name: str
    unit: str
    higher_is_better: bool

    @classmethod
    def of(cls, document: Document) -> "Quality":
        """Return that of a report."""
        metric = document["delta"]["metric"]
        if metric is None:
            return TOP1
        return cls(metric["name"], metric["unit"], metric["higher_is_better"])

    @property
    def is_top1(self) -> bool:
        """Whether it is top-1 accuracy."""
        return self == TOP1

    @property
    def noun(self) -> str:
        """Word in sentences: accuracy, psnr, miou."""
        return "accuracy" if self.is_top1 else self.name

    @property
    def heading(self) -> str:
        """Name in headings, without a unit: top-1, psnr."""
        return "top-1" if self.is_top1 else self.name

    @property
    def of_values(self) -> str:
        """Heading of values: `top-1, %`, `psnr, dB`."""
        return heading(self.heading, value_unit(self.unit))

    @property
    def of_drops(self) -> str:
        """Heading of drops: `drop, pp`, `drop, dB`."""
        return heading("drop", self.unit)

    def value(self, value: float) -> str:
        """Return a value with its unit."""
        return written(value, self.unit)

    def drop(self, drop: float) -> str:
        """Return a drop with its unit."""
        return written_drop(drop, self.unit)

    def limit(self, most: float) -> str:
        """Return a limit as it was given, with the unit unless it is that of top-1 accuracy."""
        return f"{most:g}" if self.is_top1 else with_unit(f"{most:g}", self.unit)


TOP1 = Quality("top1", "pp", True)
"""Top-1 accuracy, which has words of its own."""


def heading(name: str, unit: str) -> str:
    """Return a heading with a unit, if there is one: `drop, dB`."""
    return f"{name}, {unit}" if unit else name


def with_unit(number: str, unit: str) -> str:
    """Return a number with a unit, if there is one: `0.1 dB`."""
    return f"{number} {unit}".rstrip()


def measured_drop(document: Document) -> Document | None:
    """Return a report's drop as a `drop` object; None if none was measured."""
    metric = document["delta"]["metric"]
    if metric is None:
        return None
    return {**metric, "value": metric["drop"]}


def by_time(stages: Sequence[Document]) -> list[Document]:
    """Return the stages of a conversion, the longest first."""
    return sorted(stages, key=lambda stage: -stage["wall_s"])


def total_time(stages: Sequence[Document]) -> float:
    """Return the wall seconds of all stages together; they do not overlap."""
    return sum(float(stage["wall_s"]) for stage in stages)


def peak_memory(stages: Sequence[Document]) -> int:
    """Return the most bytes that the process held in any stage."""
    return max(int(stage["peak_bytes"]) for stage in stages)


_DIVERGENCES = {
    "kl": "Kullback-Leibler divergence over classes",
    "bernoulli": "Bernoulli divergence of each value",
    "squared": "squared error",
    "relative": "relative squared error",
}


def compared_by(kinds: Sequence[str], quality: Quality) -> str:
    """Return by what outputs are compared, unless it goes without saying: logits of a classifier."""
    if kinds == ["kl"] and quality == TOP1:
        return ""
    return ", by " + " and ".join(_DIVERGENCES[kind] for kind in dict.fromkeys(kinds))
