"""Searches along a curve, held against looking at every plan."""

import math
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from strategies import numbered

from sepconvert.planning.search.bisection import cheaper_than, cheapest_that, dearest_that


class Costs:
    """A curve of nothing but costs, on which there is a plan of every cost."""

    def __init__(self, costs):
        self.costs = set(costs)

    @property
    def frontier(self):
        return [self.best(cost) for cost in sorted(self.costs, reverse=True)]

    def best(self, cost):
        return SimpleNamespace(cost=cost, plan=SimpleNamespace(cost=cost))

    @property
    def least_cost(self):
        return min(self.costs)

    def join(self, plan):
        self.costs.add(plan.plan.cost)
        return plan

    def between(self, point):
        cheaper = max((cost for cost in self.costs if cost < point.plan.cost), default=None)
        return None if cheaper is None else self.join(self.best((point.plan.cost + cheaper) / 2))


class Counted:
    def __init__(self, test):
        self.test, self.costs = test, []

    def __call__(self, point):
        self.costs.append(point.plan.cost)
        return self.test(point.plan.cost)


costs = st.sets(st.integers(1, 1000), min_size=1, max_size=12)


def nothing_known(plan):
    return None


forecasts = st.sampled_from([
    nothing_known, lambda plan: 0.0, lambda plan: 2.0,
    lambda plan: plan.cost / 500, lambda plan: 500 / plan.cost,
])  # fmt: skip


@numbered(200)
@given(costs, st.integers(0, 1001), st.integers(0, 6), forecasts, st.booleans())
def test_the_cheapest_plan_that_passes(costs, limit, tries, forecast, has_first):
    curve, passes = Costs(costs), Counted(lambda cost: cost >= limit)
    first = curve.best(min(costs)) if has_first else None
    best = cheapest_that(curve, passes, tries, forecast, first).plan.cost
    # Nothing replaced passes, whatever the test says; the forecast may be as wrong as it likes.
    assert best == min((cost for cost in passes.costs if cost >= limit), default=max(costs))
    assert len(passes.costs) <= tries
    assert len(passes.costs) == len(set(passes.costs))


@numbered(200)
@given(st.floats(110, 900), st.integers(3, 6))
def test_a_right_forecast_finds_the_plan_at_once(limit, tries):
    curve, passes = Costs([1000, 100]), Counted(lambda cost: cost >= limit)
    best = cheapest_that(curve, passes, tries, lambda plan: limit / plan.cost).plan.cost
    assert limit <= best <= 1.02 * limit


@numbered(200)
@given(st.floats(110, 900))
def test_without_a_forecast_each_try_halves_the_range(limit):
    curve, passes = Costs([1000, 100]), Counted(lambda cost: cost >= limit)
    best = cheapest_that(curve, passes, 12, nothing_known).plan.cost
    assert limit <= best <= 1.04 * limit


@numbered(200)
@given(costs, st.integers(0, 1001), st.integers(0, 4))
def test_the_dearest_plan_that_passes(costs, limit, refinements):
    curve, passes = Costs(costs), Counted(lambda cost: cost <= limit)
    best = dearest_that(curve, passes, refinements)
    within = [cost for cost in curve.costs if cost <= limit]
    assert (best and best.plan.cost) == max(within, default=None)
    assert len(passes.costs) <= 1 + math.ceil(math.log2(len(costs))) + refinements
    assert len(passes.costs) == len(set(passes.costs))


def test_somewhat_cheaper_plans_are_tried_until_one_fails():
    curve, passes = Costs([1000, 100]), Counted(lambda cost: cost >= 900)
    assert cheaper_than(curve, curve.best(1000), passes).plan.cost == 1000 * 0.97 * 0.93
    assert len(passes.costs) == 3
    assert cheaper_than(curve, curve.best(900), passes).plan.cost == 900
