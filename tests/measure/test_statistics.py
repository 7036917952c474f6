import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.statistics import Interval, mcnemar, median_interval, paired_difference_interval


# Ranks (from 1) of the 95 % interval of a median, from the tables of textbooks on non-parametric statistics.
@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15), (50, 18, 33), (100, 40, 61)],
)
def test_median_interval_has_the_tabulated_ranks(n: int, low: int, high: int) -> None:
    samples = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    median, interval = median_interval(samples)
    assert median == (n + 1) / 2
    assert interval == Interval(low, high)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_median_interval_of_few_samples_is_their_range(n: int) -> None:
    samples = [3.0, 1.0, 7.0, 5.0, 4.0][:n]
    assert median_interval(samples)[1] == Interval(min(samples), max(samples))


@pytest.mark.parametrize(("n", "least"), [(3, 0.75), (6, 0.95), (10, 0.95), (25, 0.95), (51, 0.95)])
def test_median_interval_covers_the_median_of_a_skewed_distribution(n: int, least: float) -> None:
    rng = np.random.default_rng(n)
    hits = [math.log(2) in median_interval(rng.exponential(size=n))[1] for _ in range(1500)]
    assert np.mean(hits) > least - 0.02


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0.5, 0.999))
def test_median_lies_in_its_interval(samples: list[float], confidence: float) -> None:
    median, interval = median_interval(samples, confidence)
    assert median in interval
    assert min(samples) <= interval.lo
    assert interval.hi <= max(samples)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]])
def test_median_interval_refuses_what_has_no_median(samples: list[float]) -> None:
    with pytest.raises(SepconvertError, match=r"^median: expected .* samples, got [^\n]*; measure again"):
        median_interval(samples)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(SepconvertError, match="confidence: expected a number between 0 and 1"):
        median_interval([1.0, 2.0], confidence)
    with pytest.raises(SepconvertError, match="confidence: expected a number between 0 and 1"):
        paired_difference_interval(1, 2, 10, confidence)


def test_paired_difference_by_hand() -> None:
    # p1 = 10/52, p2 = 3/52; (13/52 - (7/52)²)/52 = 0.0044592, its root 0.066777, times 1.95996: 0.130881
    interval = paired_difference_interval(9, 2, 50)
    assert interval.lo == pytest.approx(0.134615 - 0.130881, abs=2e-6)
    assert interval.hi == pytest.approx(0.134615 + 0.130881, abs=2e-6)


# Shares of samples that only the first, and only the second, gets right.
@pytest.mark.parametrize("n", [50, 300, 2000])
@pytest.mark.parametrize(("first", "second"), [(0.02, 0.01), (0.10, 0.10), (0.15, 0.05), (0.0, 0.0)])
def test_paired_difference_covers_the_true_difference(n: int, first: float, second: float) -> None:
    rng = np.random.default_rng([n, int(1000 * first), int(1000 * second)])
    interval = cache(paired_difference_interval)
    counts = rng.multinomial(n, [first, second, 1 - first - second], size=3000)
    assert np.mean([(first - second) in interval(int(a), int(b), n) for a, b, _ in counts]) >= 0.93


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_paired_difference_contains_the_estimate_and_is_antisymmetric(a: int, b: int, agreeing: int) -> None:
    n = max(1, a + b + agreeing)
    interval = paired_difference_interval(a, b, n)
    assert -1 <= interval.lo < interval.hi <= 1
    assert (a - b) / n in interval
    assert paired_difference_interval(b, a, n) == Interval(-interval.hi, -interval.lo)


def test_paired_difference_without_discordant_pairs_keeps_a_width_that_shrinks() -> None:
    widths = [paired_difference_interval(0, 0, n).hi for n in (10, 100, 1000)]
    assert widths[0] > widths[1] > widths[2] > 0


@pytest.mark.parametrize(("a", "b", "n"), [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, 0)])
def test_paired_difference_refuses_impossible_counts(a: int, b: int, n: int) -> None:
    with pytest.raises(SepconvertError, match=r"^paired difference: expected [^\n]* got [^\n]*$"):
        paired_difference_interval(a, b, n)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [((0, 1), (1, 2), True), ((0, 1), (1.1, 2), False), ((0, 3), (1, 2), True), ((2, 3), (0, 1), False)],
)
def test_intervals_overlap(one: tuple[float, float], other: tuple[float, float], shared: bool) -> None:
    assert Interval(*one).overlaps(Interval(*other)) is shared
    assert Interval(*other).overlaps(Interval(*one)) is shared


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (30, 12), (200, 260)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == mcnemar(won, lost) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_counts():
    with pytest.raises(SepconvertError, match="two counts >= 0"):
        mcnemar(-1, 3)
