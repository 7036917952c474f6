"""Forecasts of drops, held against drops that follow a law."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_bench import delta
from strategies import numbered

from sepconvert.planning.search.forecast import expected_drop


def plan(expected):
    return SimpleNamespace(expected=expected, choice={"layer": None})


def point(expected, drop):
    measured = SimpleNamespace(accuracy=None if drop is None else delta(drop, n=10**6))
    return SimpleNamespace(plan=plan(expected), measured=measured)


divergences = st.floats(1e-4, 1.0)


@numbered(100)
@given(st.lists(divergences, min_size=2, max_size=6), divergences)
def test_a_law_of_powers_is_followed_between_scored_plans(scored, asked):
    assume(min(scored) < asked < max(scored))
    points = [point(each, 5 * each**0.5) for each in scored]
    assert expected_drop(plan(asked), points, 2.0) == pytest.approx(5 * asked**0.5 / 2, rel=0.02, abs=0.01)


@numbered(100)
@given(st.lists(st.tuples(divergences, st.floats(-1, 10)), min_size=1, max_size=6), divergences, divergences)
def test_a_plan_that_diverges_more_is_never_expected_to_lose_less(scored, one, other):
    points = [point(*each) for each in scored]
    less, more = (expected_drop(plan(each), points, 1.0) for each in sorted((one, other)))
    assert less is None or less <= more * (1 + 1e-9)


def test_beyond_the_scored_plans_the_drop_grows_with_a_power_of_the_divergence():
    found = [expected_drop(plan(each), [point(0.01, 1.0)], 2.0) for each in (0.001, 0.01, 0.1)]
    assert found == pytest.approx([0.5 * 10**-0.8, 0.5, 0.5 * 10**0.8], rel=0.01)


def test_nothing_is_expected_where_nothing_was_scored():
    assert expected_drop(plan(0.1), [], 1.0) is None
    assert expected_drop(plan(0.1), [point(0.01, None)], 1.0) is None
    assert expected_drop(plan(0.1), [point(0.01, 1.0)], 0.0) is None


def test_a_plan_without_errors_loses_nothing():
    assert expected_drop(plan(0.0), [point(0.01, 1.0)], 1.0) == 0
