"""Measurements of plans: made when they are needed, and once."""

import pytest
from plan_bench import Bench, layer

from sepconvert.base.options.values import Budget
from sepconvert.planning.search.measurements import Measurements


@pytest.fixture
def surveyed():
    return {name: layer(400, 1.0) for name in "ab"}


def cheapest(bench):
    return bench.search.curve.join(bench.search.curve.best(bench.search.curve.least_cost))


def test_each_is_made_once(surveyed):
    bench = Bench(surveyed, drop=lambda cost: 2.0, ratio=lambda cost: 1.5)
    measurements, point = Measurements(bench), cheapest(bench)
    assert bench.carried == bench.measured["drop"] == bench.measured["ratio"] == []
    for _ in range(2):
        assert measurements.fitted(point) is point.measured.fitted
        assert measurements.accuracy(point).drop == 2.0
        assert measurements.speedup(point).median == 1.5
    assert bench.carried == [point.plan.choice]
    assert len(bench.measured["drop"]) == len(bench.measured["ratio"]) == 1


def test_a_plan_is_timed_without_being_carried_out(surveyed):
    bench = Bench(surveyed, ratio=lambda cost: 1.5)
    point = cheapest(bench)
    Measurements(bench).time([point])
    assert point.measured.speedup.median == 1.5
    assert (bench.carried, point.measured.fitted) == ([], None)


def test_without_a_stopwatch_or_data_there_is_nothing_to_say(surveyed):
    bench = Bench(surveyed)
    measurements, point = Measurements(bench), cheapest(bench)
    measurements.time([point])
    assert measurements.speedup(point) is measurements.accuracy(point) is None
    assert measurements.is_accurate(point, Budget())
    assert measurements.is_fast(point, Budget())
    assert not measurements.is_accurate(point, Budget(max_drop=50.0))
    assert not measurements.is_fast(point, Budget(min_speedup=0.1))


def test_plans_are_held_against_a_budget(surveyed):
    bench = Bench(surveyed, drop=lambda cost: 2.0, ratio=lambda cost: 1.5)
    measurements, point = Measurements(bench), cheapest(bench)
    assert measurements.is_accurate(point, Budget(max_drop=2.0))
    assert not measurements.is_accurate(point, Budget(max_drop=1.9))
    assert measurements.is_fast(point, Budget(min_speedup=1.5))
    assert not measurements.is_fast(point, Budget(min_speedup=1.5), surely=True)  # its interval begins below
    assert measurements.is_fast(point, Budget(min_speedup=1.48), surely=True)
    assert not measurements.is_fast(point, Budget(min_speedup=1.6))


def test_what_noise_explains_is_no_speedup(surveyed):
    """The noise of the bench reaches to 1.1."""
    bench = Bench(surveyed, ratio=lambda cost: 1.08)
    measurements, point = Measurements(bench), cheapest(bench)
    assert not measurements.is_fast(point, Budget(min_speedup=1.05))
    assert measurements.is_fast(point, Budget(min_speedup=0.9))  # a demand not to be much slower


def test_contributions_are_what_is_gained_by_restoring_a_layer(surveyed):
    weights = {"a": 3.0, "b": 1.0}
    bench = Bench(surveyed, divergence=lambda model: sum(weights[name] for name in model.choice))
    point = cheapest(bench)
    assert Measurements(bench).contributions(point, "testing") == weights
