"""What a drop on some samples says of others of the same kind: intervals, tests and bounds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import special

from sepconvert.measure.metrics.metric import Metric, Statistics, Weights
from sepconvert.measure.statistics import (
    Interval,
    drop_bound,
    drop_p_value,
    paired_difference_interval,
    samples_needed,
)

_REPLICATES, _COSTLY_REPLICATES = 1000, 100

_STEPS = 8

_SYMMETRIC = 1e-6

_FEWEST = 8  # samples that tell a skewness

_AT_ONCE = 2**22  # weights held at once


class Uncertainty(Protocol):
    """Uncertainty of the drop of a metric on `n` samples; all numbers are in the metric's unit."""

    @property
    def n(self) -> int:
        """Number of samples."""

    def interval(self, confidence: float) -> Interval:
        """Return an interval that encloses the drop on samples of the same kind with this confidence."""

    def p_value(self, limit: float, level: float) -> float:
        """Return the p-value of the hypothesis that the drop is `limit` or more, for a test at `level`."""

    def bound(self, confidence: float) -> float:
        """Return the drop that is not exceeded with this confidence; 0 at least."""

    def samples_needed(self, limit: float, level: float) -> int | None:
        """Return how many samples would prove a drop below `limit`, at the rates seen; None if none would."""


@dataclass(frozen=True)
class Discordant:
    """Uncertainty of a drop of shares, in percent, of `n` samples: `lost` are wrong after and not before.

    `won` are right after and not before. Tests and bounds are exact: `drop_p_value` in
    `sepconvert.measure.statistics`.
    """

    lost: int
    won: int
    n: int

    def interval(self, confidence: float) -> Interval:
        """Return the adjusted Wald interval; see `paired_difference_interval`."""
        found = paired_difference_interval(self.lost, self.won, self.n, confidence)
        return Interval(100 * found.lo, 100 * found.hi)

    def p_value(self, limit: float, level: float) -> float:
        """Return the exact p-value."""
        return drop_p_value(self.lost, self.won, self.n, limit / 100, level)

    def bound(self, confidence: float) -> float:
        """Return the exact bound."""
        return 100 * drop_bound(self.lost, self.won, self.n, confidence)

    def samples_needed(self, limit: float, level: float) -> int | None:
        """Return the number by doubling and bisection."""
        return samples_needed(self.lost, self.won, self.n, limit / 100, level)


class Estimated:
    """A drop with a standard error, whose ratio is taken for Student's t with n − 1 degrees of freedom.

    Where the drops of single samples are skewed, so is the ratio; P. Hall's transformation ("On the removal
    of skewness by transformation", J. R. Stat. Soc. B 54(1), 1992) takes that away. Without it, intervals of
    60 pictures' drops of PSNR with a skewness of 5 cover 90 % in place of 95 %, with it 93 %.
    """

    drop: float
    n: int
    skewness = 0.0  # of the drops of single samples

    @property
    def error(self) -> float:
        """Standard error of the drop."""
        raise NotImplementedError

    def interval(self, confidence: float) -> Interval:
        """Return the drop ± about t standard errors."""
        quantile = self._quantile((1 + confidence) / 2)
        low, high = (self.drop - self._skewed(each) * self.error for each in (quantile, -quantile))
        return Interval(low, high)

    def p_value(self, limit: float, level: float) -> float:
        """Return the p-value of a one-sided t-test; 1 for a single sample."""
        if self.n < 2:
            return 1.0
        if not self.error:
            return 0.0 if self.drop < limit else 1.0
        ratio, scaled = (self.drop - limit) / self.error, self.skewness / math.sqrt(self.n)
        symmetric = ratio + scaled * ratio**2 / 3 + scaled**2 * ratio**3 / 27 + scaled / 6
        return float(special.stdtr(self.n - 1, symmetric))

    def bound(self, confidence: float) -> float:
        """Return the end of a one-sided interval."""
        return max(0.0, self.drop - self._skewed(-self._quantile(confidence)) * self.error)

    def samples_needed(self, limit: float, level: float) -> int | None:
        """Return the number at which the standard error would be small enough, skewness aside."""
        if self.drop >= limit:
            return None
        deviation, needed = self.error * math.sqrt(self.n), self.n
        for _ in range(_STEPS):  # the quantile depends on the number itself
            ratio = special.stdtrit(max(needed - 1, 1), 1 - level) * deviation / (limit - self.drop)
            needed = max(2, math.ceil(ratio**2))
        return needed

    def _quantile(self, share: float) -> float:
        return float(special.stdtrit(max(self.n - 1, 1), share))

    def _skewed(self, quantile: float) -> float:
        """Return the quantile of the ratio of drop and error that belongs to one of Student's t."""
        scaled = self.skewness / math.sqrt(self.n)
        if abs(scaled) < _SYMMETRIC:
            return quantile
        return 3 / scaled * (float(np.cbrt(1 + scaled * (quantile - scaled / 6))) - 1)


class MeanDrop(Estimated):
    """The mean of N paired drops."""

    def __init__(self, drops: npt.NDArray[np.float64]) -> None:
        """Take the drop of each sample."""
        self._drops = drops
        self.drop, self.n = float(drops.mean()), len(drops)
        deviations = drops - self.drop
        if self.n > _FEWEST and self.error > 0:
            moment = float((deviations**3).mean()) / float((deviations**2).mean()) ** 1.5
            self.skewness = moment * math.sqrt(self.n * (self.n - 1)) / (self.n - 2)

    @cached_property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self._drops.std(ddof=1) / math.sqrt(self.n)) if self.n > 1 else 0.0


class ResampledDrop(Estimated):
    """The drop of a metric that is no mean of its samples; its error is found by a bootstrap over samples.

    Both models are scored on the same samples, drawn with replacement (B. Efron, R. Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapter 6); the draws are seeded.
    """

    def __init__(self, metric: Metric, before: Statistics, after: Statistics, drop: float) -> None:
        """Take the statistics of both models on the same samples, and the drop on all of them."""
        self._metric, self._before, self._after = metric, before, after
        self.drop, self.n = drop, len(before)

    @cached_property
    def error(self) -> float:
        """Standard deviation of the drop over the data sets that are drawn."""
        replicates = _COSTLY_REPLICATES if self._metric.costly else _REPLICATES
        found = np.concatenate(
            [
                self._metric.values(self._before, weights) - self._metric.values(self._after, weights)
                for weights in _drawn(self.n, replicates)
            ]
        )
        finite = found[np.isfinite(found)]
        return float(finite.std(ddof=1)) if len(finite) > 1 else 0.0


def _drawn(n: int, replicates: int) -> Iterator[Weights]:
    """Yield how often each of `n` samples is drawn, a part of the replicates at a time."""
    generator = np.random.default_rng(0)
    part = max(1, min(replicates, _AT_ONCE // n))
    for start in range(0, replicates, part):
        size = min(part, replicates - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
