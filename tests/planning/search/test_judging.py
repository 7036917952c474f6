"""Verdicts on a drop: early ones agree with those by all images, and proofs keep their level."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_bench import delta
from strategies import numbered

from sepconvert.measure.statistics import drop_bound, drop_p_value
from sepconvert.planning.search.judging import (
    expected_on_unseen_images,
    final_level,
    is_clearly_within,
    is_proven,
)


@numbered(60)
@given(st.floats(0, 20), st.floats(0, 10), st.integers(100, 20_000))
def test_clear_verdicts_are_those_of_the_measured_drop(drop, most, n):
    verdict = is_clearly_within(delta(drop, n), most)
    assert verdict is None or verdict == (drop <= most)


@pytest.mark.parametrize(
    ("drop", "n", "verdict"),
    [(0.0, 300, None), (0.0, 500, True), (10.0, 500, False), (1.2, 2000, None), (1.2, 50_000, False)],
)
def test_verdicts_are_clear_only_with_images_enough(drop, n, verdict):
    assert is_clearly_within(delta(drop, n), 1.0) is verdict


@numbered(20)
@given(st.floats(0, 3), st.sampled_from([500, 2000, 5000]), st.integers(2, 4), st.booleans())
def test_a_proof_is_a_p_value_within_its_share_of_the_level(drop, n, looks, last):
    measured = delta(drop, n)
    share = 0.9 * 0.05 if last else 0.1 * 0.05 / (looks - 1)
    p_value = drop_p_value(measured.uncertainty.lost, measured.uncertainty.won, n, 0.01, share)
    assume(abs(p_value - share) > 1e-6)
    assert is_proven(measured, 1.0, 0.05, looks, last) == (p_value < share)


def test_the_shares_of_all_looks_are_the_level():
    assert final_level(0.05, 1) == 0.05
    assert final_level(0.05, 3) + 2 * (0.1 * 0.05 / 2) == pytest.approx(0.05)


def test_a_choice_among_many_is_expected_to_be_worse():
    measured = delta(0.9, 5000)
    bounds = [expected_on_unseen_images(measured, plans) for plans in (1, 5, 50)]
    assert bounds[0] == pytest.approx(100 * drop_bound(measured.uncertainty.lost, 0, 5000, 0.95))
    assert bounds[0] < bounds[1] < bounds[2]
    assert expected_on_unseen_images(measured, 0) == bounds[0]
