"""The trade-off curve: which plans it holds, and what is expected of each."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_bench import REST, Bench, layer, surveys
from strategies import numbered

from sepconvert.planning.allocate import IN_FLOAT, Candidate, in_float, replaced
from sepconvert.planning.search.curve import Curve, Measurement, Totals


@pytest.fixture
def curve():
    surveyed = {name: layer(macs, 1.0) for name, macs in zip("abcd", (400, 400, 800, 1200), strict=True)}
    total = REST + sum(each.macs for each in surveyed.values())
    return Curve(surveyed, Totals(total, total))


def test_a_curve_is_drawn_from_nothing_replaced_to_the_cheapest(curve):
    curve.draw()
    plans = [point.plan for point in curve.points]
    assert plans[0].choice == {}
    assert plans[0].macs == curve.totals.macs
    assert plans[-1].cost == curve.least_cost == 700
    assert [plan.cost for plan in plans] == sorted({plan.cost for plan in plans}, reverse=True)
    assert [plan.expected for plan in plans] == sorted(plan.expected for plan in plans)
    assert all(plan.bound <= plan.expected + 1e-12 for plan in plans)
    assert len(plans) >= 5


@numbered(60)
@given(surveys(most=4), st.floats(0, 1))
def test_no_plan_of_the_same_cost_is_expected_to_diverge_less(surveyed, share):
    bench = Bench(surveyed)
    curve = bench.search.curve
    cost = curve.least_cost + share * (curve.dense_cost - curve.least_cost)
    plan = curve.best(cost)
    assert plan.cost <= cost + 1e-9
    assert plan.expected == pytest.approx(bench.best_within(REST + cost + 1e-9))


def test_a_plan_is_on_the_curve_once(curve):
    plan = curve.best(1800)
    point = curve.join(plan)
    assert curve.join(curve.known(plan.choice)) is point
    assert curve.points == [point]


def test_between_two_points_there_is_a_third_until_they_are_neighbours(curve):
    curve.draw()
    dense, number = curve.points[0], len(curve.points)
    costs = []
    while (middle := curve.between(dense)) is not None:
        costs.append(middle.plan.cost)
        assert middle in curve.points
    assert costs == sorted(costs, reverse=True)
    assert len(curve.points) == number + len(costs) > number
    assert curve.between(curve.points[-1]) is None


def test_points_that_another_one_beats_are_off_the_frontier(curve):
    curve.draw()
    (candidate,) = [each for each in curve.surveyed["d"].candidates() if each.rank == 1]
    poor = curve.join(curve.known({"d": candidate}))
    better = curve.best(poor.plan.cost - 1)
    assert poor.plan.expected > better.expected
    curve.join(better)
    assert poor in curve.points
    assert poor not in curve.frontier
    assert curve.frontier[0].plan.choice == {}


def test_a_corrected_survey_changes_what_is_expected_but_no_form(curve):
    curve.draw()
    before = [(point.plan.forms, point.plan.expected) for point in curve.points]
    curve.revise({name: layer(each.macs, 3.0) for name, each in curve.surveyed.items()})
    for point, (forms, expected) in zip(curve.points, before, strict=True):
        assert point.plan.forms == forms
        assert point.plan.expected == pytest.approx(3 * expected)


def test_merged_pairs_are_saved_in_every_plan():
    surveyed = {"a": layer(400, 1.0)}
    curve = Curve(surveyed, Totals(1000, 10.0 * 1000, "milliseconds", saved_macs=100, saved_cost=1000.0))
    plan = curve.best(100)
    assert plan.macs == 1000 - 100 - 300
    assert curve.rest == 10_000 - 1000 - 400
    assert plan.predicted == pytest.approx(10_000 / (curve.rest + 100))
    assert Curve(surveyed, Totals(1000, 1000)).best(100).predicted is None


def test_the_entry_of_a_point_in_the_report(curve):
    curve.draw()
    dense, *_, cheapest = curve.to_json(curve.points[-1])
    assert (dense["macs_ratio"], dense["converted"], dense["ranks"]) == (1.0, 0, {})
    assert (dense["delivered"], cheapest["delivered"]) == (False, True)
    assert cheapest["ranks"] == {name: ["depthwise-pointwise", 1] for name in "abcd"}
    assert cheapest["heldout"] is cheapest["accuracy_drop_pp"] is cheapest["latency_speedup"] is None
    assert not Measurement()


@numbered(60)
@given(
    surveys(most=3), st.lists(st.tuples(st.floats(0.01, 3), st.floats(1.05, 4)), max_size=3), st.floats(0, 1)
)
def test_layers_stay_in_floating_point_where_that_is_worth_its_time(surveyed, options, share):
    """Of all combinations within a cost, the plan is one that diverges least; each option by brute force."""
    harm = {}
    for (name, each), (brought, times) in zip(list(surveyed.items()), options, strict=False):
        option = Candidate(IN_FLOAT, 0, times * each.cost, -brought)
        surveyed[name], harm[name] = replace(each, in_float=option), brought
    floor = 1.0 + sum(harm.values())
    total = REST + sum(each.macs for each in surveyed.values())
    curve = Curve(surveyed, Totals(total, total, floor=floor))
    cost = curve.least_cost + share * (curve.dense_cost - curve.least_cost)
    combinations = itertools.product(*([None, *each.options()] for each in surveyed.values()))
    dense = [each.cost for each in surveyed.values()]
    least = min(
        floor + sum(each.error for each in chosen if each is not None)
        for chosen in combinations
        if sum(one if each is None else each.cost for one, each in zip(dense, chosen, strict=True))
        <= cost + 1e-9
    )
    plan = curve.best(cost)
    assert plan.cost <= cost + 1e-9
    assert plan.expected == pytest.approx(least)
    assert plan.bound <= plan.expected + 1e-9
    # MACs are those of the layers that are replaced; one in floating point has as many as before.
    saved = sum(
        surveyed[name].macs - surveyed[name].offer(each).macs for name, each in replaced(plan.choice).items()
    )
    assert plan.macs == total - saved
    assert in_float(plan.choice) <= harm.keys()
