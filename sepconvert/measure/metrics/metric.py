"""Metrics as values: name, unit, direction, and how a value is made of statistics of single samples."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Statistics = npt.NDArray[Any]
"""Sufficient statistics of N samples, one after the other along the first dimension."""

Weights = npt.NDArray[np.float64]
"""How often each of N samples counts, in each of B data sets: B × N."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A quality of a model's outputs that a conversion may change.

    Values and differences are in `unit`: "pp" for shares, which are counted in percent, "dB" for PSNR, and ""
    for numbers without one.

    Attributes:
        name: as `--metric` and reports call it.
        unit: of values and of differences.
        higher_is_better: the direction.
        statistics: returns the statistics of a batch, given outputs and targets; raises `SepconvertError` if
            these are not such as the metric takes.
        values: returns the values of B data sets, given the statistics of N samples and weights B × N.
        is_mean: whether a value is the mean of the statistics, N numbers.
        targets: what targets are: class numbers (of samples or pixels), pictures, or anything.
        costly: whether `values` takes long.
    """

    name: str
    unit: str
    higher_is_better: bool
    statistics: Callable[[Any, Any], Statistics] = field(repr=False)
    values: Callable[[Statistics, Weights], npt.NDArray[np.float64]] = field(repr=False)
    is_mean: bool = False
    targets: Literal["classes", "pictures", "any"] = "any"
    costly: bool = False

    def value(self, statistics: Statistics) -> float:
        """Return the value for all samples, each counted once."""
        return float(self.values(statistics, np.ones((1, len(statistics))))[0])

    def drop(self, before: float, after: float) -> float:
        """Return by how much `after` is worse than `before`."""
        return before - after if self.higher_is_better else after - before


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric on `n` samples, in its unit, as profiles hold it."""

    name: str
    unit: str
    higher_is_better: bool
    value: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the `metric` object of the JSON profile."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{written(self.value, self.unit)} of {self.n}"


def value_unit(unit: str) -> str:
    """Return the unit of values, given that of differences: percent, where these are percentage points."""
    return "%" if unit == "pp" else unit


def value_number(value: float, unit: str) -> str:
    """Return a value as people read it, without its unit: 91.73, 28.20, 0.0412."""
    return f"{value:.2f}" if unit else f"{value:.4g}"


def written(value: float, unit: str) -> str:
    """Return a value as people read it, with its unit: 91.73 %, 28.20 dB, 0.0412."""
    return f"{value_number(value, unit)} {value_unit(unit)}".rstrip()


def drop_number(drop: float, unit: str) -> str:
    """Return a drop as people read it, without its unit: 0.71, 0.085, 0.00123."""
    text = f"{drop:.2f}" if unit == "pp" else f"{drop:.3g}"
    return text.lstrip("-") if float(text) == 0 else text


def written_drop(drop: float, unit: str) -> str:
    """Return a drop as people read it, with its unit: 0.71 pp, 0.085 dB, 0.00123."""
    return f"{drop_number(drop, unit)} {unit}".rstrip()


def written_interval(ends: Sequence[float], unit: str) -> str:
    """Return an interval of drops as people read it, without its unit: [0.52, 0.90], [0.079, 0.091]."""
    low, high = (drop_number(end, unit) for end in ends)
    return f"[{low}, {high}]"


def means(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the weighted means of N numbers."""
    found: npt.NDArray[np.float64] = weights @ statistics.astype(np.float64) / weights.sum(1)
    return found


def shares(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the weighted means of N numbers from 0 to 1, in percent."""
    return 100 * means(statistics, weights)
