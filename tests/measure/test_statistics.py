import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import numbered

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.statistics import (
    Interval,
    difference_interval,
    drop_bound,
    drop_p_value,
    mcnemar,
    median_interval,
    paired_difference_interval,
    proportion_interval,
    samples_needed,
)


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


# Drops on unseen images


@cache
def rejected(n: int, limit: float, level: float) -> frozenset[tuple[int, int]]:
    """All pairs (lost, won) of n samples at which the drop is called proven."""
    pairs = ((lost, won) for lost in range(n + 1) for won in range(n + 1 - lost))
    return frozenset(pair for pair in pairs if drop_p_value(*pair, n, limit, level) <= level)


@pytest.mark.parametrize(("n", "limit"), [(25, 0.1), (40, 0.2), (30, 0.02)])
@pytest.mark.parametrize("won", [0.0, 0.02, 0.1, 0.3, 0.39])
def test_a_drop_at_the_limit_is_called_proven_in_at_most_the_level_of_samples(n, limit, won):
    """The oracle: the multinomial probabilities of all samples that are rejected, added up."""
    level = 0.05
    lost = won + limit
    same = 1 - lost - won
    probability = sum(
        math.comb(n, a) * math.comb(n - a, b) * lost**a * won**b * same ** (n - a - b)
        for a, b in rejected(n, limit, level)
    )
    assert probability <= level


def test_drops_of_few_samples_can_be_proven():
    assert rejected(40, 0.2, 0.05)


@numbered(25)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 2000), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_bound_of_a_drop_is_where_its_proof_ends(lost, won, agreeing, confidence):
    n = max(1, lost + won + agreeing)
    bound = drop_bound(lost, won, n, confidence)
    assert max(0.0, (lost - won) / n) <= bound <= 1
    if 2e-5 < bound < 1:
        level = 1 - confidence
        assert (
            drop_p_value(lost, won, n, bound, level)
            <= level
            < drop_p_value(lost, won, n, bound - 2e-5, level)
        )


def test_the_bound_narrows_with_more_samples_and_widens_with_confidence():
    bounds = [drop_bound(5 * k, 2 * k, 1000 * k) for k in (1, 4, 16, 64)]
    assert bounds == sorted(bounds, reverse=True)
    assert 0.003 < bounds[-1] < 0.004
    wider = [drop_bound(50, 20, 10_000, confidence) for confidence in (0.6, 0.9, 0.99, 0.9999)]
    assert wider == sorted(wider)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 100), (3, 3, 300), (5, 1, 1000)])
def test_the_number_of_samples_that_would_do_is_enough_and_not_far_too_many(lost, won, n):
    needed = samples_needed(lost, won, n, 0.01)
    for size, enough in ((needed, True), (0.9 * needed, False)):
        scale = size / n
        proof = drop_p_value(round(lost * scale), round(won * scale), round(size), 0.01) <= 0.05
        assert proof is enough


def test_no_number_of_samples_proves_what_is_not_so():
    assert samples_needed(20, 5, 1000, 0.01) is None


@pytest.mark.parametrize(("lost", "won", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts_are_refused(lost, won, n):
    for function in (drop_p_value, samples_needed):
        with pytest.raises(SepconvertError, match="two counts >= 0"):
            function(lost, won, n, 0.01)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (3, 10), (10, 10), (37, 1000), (99_999, 100_000)])
def test_a_proportion_against_the_tails_of_the_binomial_distribution(count, n, confidence):
    found = proportion_interval(count, n, confidence)
    tail = (1 - confidence) / 2
    assert (found.lo == 0) if count == 0 else stats.binom.sf(count - 1, n, found.lo) == pytest.approx(tail)
    assert (found.hi == 1) if count == n else stats.binom.cdf(count, n, found.hi) == pytest.approx(tail)


def test_a_proportion_and_a_difference_of_proportions():
    assert proportion_interval(0, 10).hi == pytest.approx(1 - 0.025**0.1)
    low, high = proportion_interval(30, 100).to_list()
    assert low < 0.3 < high
    # Agresti & Caffo: 7 of 8 and 1 of 8 give (8 / 10 - 2 / 10) ± 1.96 · √(2 · 0.16 / 10).
    found = difference_interval((7, 8), (1, 8))
    assert found.to_list() == pytest.approx([0.6 - 1.96 * 0.032**0.5, 0.6 + 1.96 * 0.032**0.5], abs=1e-4)
    with pytest.raises(SepconvertError, match="expected two counts"):
        difference_interval((9, 8), (1, 8))
