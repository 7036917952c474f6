"""Confidence intervals of latencies, without a distribution, and of differences of paired predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from sepconvert.base.errors import SepconvertError


@dataclass(frozen=True)
class Interval:
    """A closed interval `[lo, hi]`, in the unit of the quantity that it encloses."""

    lo: float
    hi: float

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies between the bounds, bounds included."""
        return self.lo <= value <= self.hi

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals share at least one value."""
        return self.lo <= other.hi and other.lo <= self.hi

    def to_list(self) -> list[float]:
        """Return `[lo, hi]`, as in the JSON reports."""
        return [self.lo, self.hi]


def median_interval(
    samples: Sequence[float] | npt.NDArray[np.floating], confidence: float = 0.95
) -> tuple[float, Interval]:
    """Return the sample median and a distribution-free confidence interval of the population median.

    The bounds are the order statistics `x_(k)` and `x_(n+1-k)` for the largest `k` with
    `P(Binomial(n, 1/2) < k) <= (1 - confidence) / 2` (David & Nagaraja, *Order Statistics*, 3rd ed.,
    section 7.1), so that the coverage is at least `confidence` for independent samples of a continuous
    quantity. When `n` is too small for such a `k` (at 95 %: `n < 6`) the interval is minimum to maximum,
    the widest that the samples can give; its coverage is then `1 - 2^(1-n)`, less than `confidence`.

    Raises `SepconvertError` if there is no sample, a sample is not finite, or `confidence` is not in (0, 1).
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise SepconvertError(
            f"median: expected a non-empty list of finite samples, got shape {values.shape} with"
            f" {np.count_nonzero(~np.isfinite(values))} not finite; measure again with at least one run"
        )
    _check_confidence(confidence)
    median = float(np.median(values))
    ordered, below = np.sort(values), special.bdtr(np.arange(values.size), values.size, 0.5)
    k = max(1, int(np.count_nonzero(below <= (1 - confidence) / 2)))
    return median, Interval(float(ordered[k - 1]), float(ordered[-k]))


def paired_difference_interval(
    only_first: int, only_second: int, n: int, confidence: float = 0.95
) -> Interval:
    """Return an interval of the difference of two proportions, first minus second, on the same `n` subjects.

    `only_first` and `only_second` count the discordant subjects: those where the first succeeds and the
    second fails, and the converse. The adjusted Wald interval of Bonett & Price ("Adjusted Wald Confidence
    Interval for a Difference of Binomial Proportions Based on Paired Data", J. Educ. Behav. Stat. 37(4),
    2012): with `p = (count + 1) / (n + 2)` for each of the two counts,
    `p1 - p2 ± z · sqrt((p1 + p2 - (p1 - p2)²) / (n + 2))`, cut to [-1, 1]. It keeps a width when no
    subject is discordant, and it always contains `(only_first - only_second) / n`. A percentile bootstrap
    has none then: of 50 subjects, with shares of 0.02 and 0.01, it covers the truth in 65 % of samples.

    Raises `SepconvertError` if the counts are negative or exceed `n`, `n` is 0, or `confidence` is not in
    (0, 1).
    """
    _check_counts(only_first, only_second, n)
    _check_confidence(confidence)
    p1, p2 = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = special.ndtri((1 + confidence) / 2) * np.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return Interval(max(-1.0, float(p1 - p2 - half)), min(1.0, float(p1 - p2 + half)))


def proportion_interval(count: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the exact interval of a proportion (Clopper–Pearson), of which `count` of `n` were seen.

    Raises `SepconvertError` if the count is not in [0, n], `n` is 0, or `confidence` is not in (0, 1).
    """
    _check_counts(count, 0, n)
    _check_confidence(confidence)
    tail = (1 - confidence) / 2
    low = special.betaincinv(count, n - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 1 - tail) if count < n else 1.0
    return Interval(float(low), float(high))


def difference_interval(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> Interval:
    """Return an interval of the difference of two proportions on different subjects, first minus second.

    Each is a count of successes and the number of subjects. The adjusted Wald interval of Agresti & Caffo
    ("Simple and Effective Confidence Intervals for Proportions …", Am. Stat. 54(4), 2000): one success and
    one failure are added to each, and the result is cut to [-1, 1].

    Raises `SepconvertError` as `proportion_interval` does.
    """
    _check_confidence(confidence)
    for count, n in (first, second):
        _check_counts(count, 0, n)
    (p1, n1), (p2, n2) = (((count + 1) / (n + 2), n + 2) for count, n in (first, second))
    half = special.ndtri((1 + confidence) / 2) * np.sqrt(p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2)
    return Interval(max(-1.0, float(p1 - p2 - half)), min(1.0, float(p1 - p2 + half)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test that discordant subjects favour neither.

    (McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12,
    1947; exact by the binomial distribution.) 1 where no subject is discordant.

    Raises `SepconvertError` if a count is negative.
    """
    if min(only_first, only_second) < 0:
        raise SepconvertError(
            f"McNemar: expected two counts >= 0, got {only_first} and {only_second}; count the pairs anew"
        )
    from scipy import stats  # which takes half a second to import, and only data need it

    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


_NUISANCE = 0.1  # share of a test's level that is spent on the share of discordant subjects


_NUISANCE_STEPS = 3  # the probability rises with the share: the upper end decides


_NEGLIGIBLE = 1e-9  # more than the probability of numbers beyond 8 σ, which are left out


def drop_p_value(lost: int, won: int, n: int, limit: float, level: float = 0.05) -> float:
    """Return the p-value of the hypothesis that a classifier loses `limit` or more of its accuracy.

    Of `n` independent samples, `lost` are right before and wrong after, and `won` the converse; `limit` is a
    fraction in (0, 1). A small value is evidence that the drop on samples of the same kind is below `limit`.

    The test is exact, for every `n`: the p-value is the largest probability of a difference as small as
    lost − won over all shares θ of discordant samples in a Clopper–Pearson interval, plus the probability
    that θ lies outside of it, a tenth of `level` (Berger & Boos, "P values maximized over a confidence set
    for the nuisance parameter", J. Am. Stat. Assoc. 89(427), 1994).

    Raises `SepconvertError` if the counts are negative or exceed `n`, or `n` is 0.
    """
    _check_counts(lost, won, n)
    gamma = _NUISANCE * level
    share = proportion_interval(lost + won, n, 1 - gamma)
    low, high = max(share.lo, limit), max(share.hi, limit)
    thetas = np.unique(np.linspace(low, high, _NUISANCE_STEPS))
    return min(1.0, gamma + max(_tail(lost - won, n, theta, limit) for theta in thetas))


def _tail(difference: int, n: int, discordant: float, drop: float) -> float:
    """Return P(lost − won ≤ difference) for shares (θ ± drop) / 2 of lost and won samples."""
    from scipy import stats  # as above

    width = 8 * math.sqrt(n * discordant * (1 - discordant)) + 40
    numbers = np.arange(max(0, int(n * discordant - width)), min(n, int(n * discordant + width)) + 1)
    weights = stats.binom.pmf(numbers, n, discordant)
    lost = stats.binom.cdf(np.floor((numbers + difference) / 2), numbers, (1 + drop / discordant) / 2)
    return float(weights @ lost) + _NEGLIGIBLE


def drop_bound(lost: int, won: int, n: int, confidence: float = 0.95) -> float:
    """Return the drop of accuracy that is not exceeded, with this confidence, on samples of the same kind.

    It is the smallest `limit`, to a thousandth of a percentage point, whose `drop_p_value` is at most
    1 − `confidence`; a fraction, 1 at most. Below 0 the accuracy rises, which the bound does not resolve: it
    is at least 0.

    Raises `SepconvertError` as `drop_p_value` does, or if `confidence` is not in (0, 1).
    """
    _check_confidence(confidence)
    level = 1 - confidence
    low, high = max(0.0, (lost - won) / n if n else 0.0), 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if drop_p_value(lost, won, n, middle, level) <= level else (middle, high)
    return high


def samples_needed(lost: int, won: int, n: int, limit: float, level: float = 0.05) -> int | None:
    """Return how many samples `drop_p_value` would need to be at most `level`, at the rates seen so far.

    None if the drop seen so far is at or above `limit`: more samples would hardly help. The count is doubled
    until the test passes and then bisected, to about 1 %.
    """
    _check_counts(lost, won, n)
    if (lost - won) / n >= limit:
        return None

    def passes(size: int) -> bool:
        more = size / n
        return drop_p_value(round(lost * more), round(won * more), size, limit, level) <= level

    high = n
    while not passes(high):
        if high > _MOST_SAMPLES:
            return None
        high *= 2
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


_MOST_SAMPLES = 10**7


def _check_counts(lost: int, won: int, n: int) -> None:
    if min(lost, won) < 0 or lost + won > n or n == 0:
        raise SepconvertError(
            "paired difference: expected two counts >= 0 of together at most n >= 1,"
            f" got {lost} and {won} of n = {n}; count the discordant pairs anew"
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SepconvertError(
            f"confidence: expected a number between 0 and 1, got {confidence}; 0.95 is usual"
        )
