"""Intervals of paired drops: formulas by hand, and how often they enclose the truth."""

import numpy as np
import pytest
from scipy import stats

from sepconvert.measure.metrics.metric import Metric, means
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import Discordant, MeanDrop, ResampledDrop
from sepconvert.measure.statistics import drop_bound, drop_p_value, paired_difference_interval, samples_needed

RATIO = Metric(
    "ratio", "", True, lambda outputs, targets: outputs, lambda s, w: (w @ s)[:, 0] / (w @ s)[:, 1]
)


def test_shares_are_in_percent() -> None:
    found, plain = Discordant(9, 4, 500), paired_difference_interval(9, 4, 500, 0.9)
    assert found.interval(0.9).to_list() == pytest.approx([100 * plain.lo, 100 * plain.hi])
    assert found.p_value(3.0, 0.05) == drop_p_value(9, 4, 500, 0.03, 0.05)
    assert found.bound(0.95) == pytest.approx(100 * drop_bound(9, 4, 500, 0.95))
    assert found.samples_needed(1.5, 0.05) == samples_needed(9, 4, 500, 0.015, 0.05)


def test_means_against_student_s_t_test() -> None:
    drops = np.random.default_rng(0).normal(0.1, 0.2, 20)
    drops = np.concatenate([drops, 0.2 - drops])  # without skewness
    found, oracle = MeanDrop(drops), stats.ttest_1samp(drops, 0.15, alternative="less")
    assert found.p_value(0.15, 0.05) == pytest.approx(oracle.pvalue)
    interval = stats.ttest_1samp(drops, 0).confidence_interval(0.9)
    assert found.interval(0.9).to_list() == pytest.approx([interval.low, interval.high])
    assert found.bound(0.95) == pytest.approx(interval.high)
    assert found.bound(0.95) in found.interval(0.9)
    # With as many samples as are said to be needed, the test passes, and with far fewer it does not.
    needed = found.samples_needed(0.15, 0.05)
    error = found.error * np.sqrt(40 / needed)
    assert stats.t.sf((0.15 - found.drop) / error, needed - 1) <= 0.05
    error = found.error * np.sqrt(40 / (needed - 2))
    assert stats.t.sf((0.15 - found.drop) / error, needed - 3) > 0.05
    assert found.samples_needed(0.05, 0.05) is None


def test_one_sample_proves_nothing() -> None:
    found = MeanDrop(np.array([0.1]))
    assert found.p_value(1.0, 0.05) == 1.0
    assert MeanDrop(np.zeros(30)).p_value(0.1, 0.05) == 0.0
    assert MeanDrop(np.zeros(30)).p_value(0.0, 0.05) == 1.0


def test_a_bootstrap_finds_the_error_of_a_mean() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.normal(1, 0.3, (2, 400))
    mean = Metric("mean", "", True, lambda outputs, targets: outputs, means)
    found = ResampledDrop(mean, before, after, float((before - after).mean()))
    assert found.error == pytest.approx(MeanDrop(before - after).error, rel=0.06)
    again = ResampledDrop(mean, before, after, found.drop)
    assert again.error == found.error


def test_a_bootstrap_finds_the_error_of_a_ratio() -> None:
    generator = np.random.default_rng(2)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        whole = generator.uniform(1, 3, 200)
        before, after = (whole * generator.beta(8, 2, 200) for _ in range(2))
        return np.stack([before, whole], 1), np.stack([after, whole], 1)

    def drop(before: np.ndarray, after: np.ndarray) -> float:
        return RATIO.value(before) - RATIO.value(after)

    truth = np.std([drop(*drawn()) for _ in range(1000)])
    errors = [ResampledDrop(RATIO, *pair, 0.0).error for pair in (drawn() for _ in range(10))]
    assert np.mean(errors) == pytest.approx(truth, rel=0.08)


@pytest.mark.parametrize("images", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_intervals_of_miou_enclose_the_truth_as_often_as_they_say(images: int) -> None:
    """Of a population of images whose counts correlate before and after, data sets are drawn."""
    generator = np.random.default_rng(3)
    miou, population = named("miou"), 20_000
    present = generator.random((population, 4)) < [1.0, 0.6, 0.4, 0.25]
    area = present * generator.gamma(2, 60, (population, 4))
    skill = generator.beta(9, 2, (population, 4))

    def counts(noise: float) -> np.ndarray:
        hit = np.clip(skill - noise * generator.gamma(1, 1, (population, 4)), 0, 1) * area
        false = generator.gamma(0.5, 8, (population, 4))
        return np.stack([hit, false, area - hit], -1)

    before, after = counts(0.02), counts(0.05)
    truth = miou.value(before) - miou.value(after)
    covered = []
    for _ in range(400):
        chosen = generator.integers(population, size=images)
        pair = before[chosen], after[chosen]
        found = ResampledDrop(miou, *pair, miou.value(pair[0]) - miou.value(pair[1]))
        covered.append(truth in found.interval(0.95))
    # Three standard deviations of the share of 400 trials are 3.3 %.
    assert 0.95 - 0.033 <= np.mean(covered) <= 0.95 + 0.033


@pytest.mark.parametrize("images", [30, 60, 300])
def test_intervals_of_psnr_enclose_the_truth_as_often_as_they_say(images: int) -> None:
    """Pictures differ by ten dB and more, and lose the more the better they were: drops are skewed."""
    generator = np.random.default_rng(4)
    before = generator.normal(29, 5, 200_000)
    after = -10 * np.log10(10 ** (-before / 10) + 10 ** (-4.4 + 0.2 * generator.standard_normal(200_000)))
    truth = float((before - after).mean())
    covered = []
    for _ in range(4000):
        chosen = generator.integers(len(before), size=images)
        covered.append(truth in MeanDrop(before[chosen] - after[chosen]).interval(0.95))
    assert 0.92 <= np.mean(covered) <= 0.97


def test_a_skewed_ratio_is_consistent() -> None:
    drops = np.random.default_rng(5).gamma(0.5, 0.2, 80)
    found = MeanDrop(drops)
    assert found.skewness == pytest.approx(stats.skew(drops, bias=False))
    assert found.skewness > 1
    interval = found.interval(0.9)
    # The tail is longer where drops are large, and a test at 5 % fails at the end of a 90 % interval.
    assert interval.hi - found.drop > found.drop - interval.lo
    assert found.bound(0.95) == pytest.approx(interval.hi)
    assert found.p_value(interval.hi, 0.05) == pytest.approx(0.05, abs=1e-9)
    assert found.p_value(interval.lo, 0.05) == pytest.approx(0.95, abs=1e-9)
