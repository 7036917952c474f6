"""Plans on the hull and within a budget, against all combinations and against integer programming."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from strategies import numbered

from sepconvert.planning.allocate import Candidate, allocate, cost_of, plans

errors = st.integers(0, 40).map(lambda n: n / 8)
costs = st.integers(1, 60)


@st.composite
def instances(draw):
    dense, candidates = {}, {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        dense[name] = draw(st.integers(10, 50))
        candidates[name] = [
            Candidate("depthwise-pointwise", rank, draw(costs), draw(errors))
            for rank in range(1, draw(st.integers(0, 4)) + 1)
        ]
    return dense, candidates


def combinations(dense, candidates):
    """(cost, error) of every way to choose, keeping a layer included."""
    choices = [[(dense[name], 0.0), *((c.cost, c.error) for c in candidates[name])] for name in dense]
    return [tuple(map(sum, zip(*chosen, strict=True))) for chosen in product(*choices)]


def totals(dense, plan):
    return cost_of(dense, plan), sum(candidate.error for candidate in plan.values())


@numbered(300)
@given(instances(), st.integers(0, 200).map(lambda n: n / 32))
def test_every_multiplier_finds_its_optimum_among_the_plans(instance, multiplier):
    dense, candidates = instance
    best = min(error + multiplier * cost for cost, error in combinations(dense, candidates))
    found = min(
        error + multiplier * cost for cost, error in (totals(dense, p) for p in plans(dense, candidates))
    )
    assert abs(found - best) < 1e-9


@numbered(300)
@given(instances())
def test_every_plan_is_on_the_hull(instance):
    """No combination lies below the line through two plans that follow one another."""
    dense, candidates = instance
    points = [totals(dense, plan) for plan in plans(dense, candidates)]
    assert points[0] == (sum(dense.values()), 0.0)
    for (cost, error), (cheaper, worse) in pairwise(points):
        assert cheaper < cost
        slope = (worse - error) / (cost - cheaper)
        assert all(e >= error + slope * (cost - c) - 1e-9 for c, e in combinations(dense, candidates))


def test_ties_go_to_the_first_layer_and_to_the_lower_cost():
    dense = {"a": 20, "b": 20}
    offered = {
        "a": [Candidate("depthwise-pointwise", 1, 20, 0.0)],
        "b": [Candidate("depthwise-pointwise", 1, 11, 0.0), Candidate("depthwise-pointwise", 2, 4, 1.0)],
    }
    assert [sorted(plan) for plan in plans(dense, offered)] == [[], ["b"], ["b"]]
    assert [plan["b"].rank for plan in plans(dense, offered)[1:]] == [1, 2]


@pytest.mark.parametrize("unit", [1, 1 / 3, 1e-4])
@numbered(200)
@given(instances(), st.integers(1, 220))
def test_the_best_plan_within_a_budget(unit, instance, budget):
    """MACs are whole numbers, milliseconds are not."""
    whole, offered = instance
    dense = {name: cost * unit for name, cost in whole.items()}
    candidates = {
        name: [Candidate(c.scheme, c.rank, c.cost * unit, c.error) for c in each]
        for name, each in offered.items()
    }
    within = [error for cost, error in combinations(whole, offered) if cost <= budget]
    found = allocate(dense, candidates, budget * unit)
    assert (found is None) == (not within)
    if found is None:
        return
    cost, error = totals(dense, found.choice)
    assert error == min(within) == pytest.approx(found.error)
    assert cost <= budget * unit * (1 + 1e-9)
    assert found.cost == pytest.approx(cost)
    assert found.bound <= error + 1e-9


def optimum(dense, candidates, budget):
    """The least error within a budget, by scipy's branch and bound: a 0 or 1 for every candidate."""
    offered = [(name, candidate) for name, each in candidates.items() for candidate in each]
    at_most_one = [[float(name == other) for other, _ in offered] for name in dense]
    saved = [candidate.cost - dense[name] for name, candidate in offered]
    found = milp(
        [candidate.error for _, candidate in offered],
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint([saved], ub=budget - sum(dense.values())),
            LinearConstraint(at_most_one, ub=1),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.status == 0
    return found.fun


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7])
def test_the_best_plan_of_fifty_layers(share):
    rng = np.random.default_rng(0)
    dense = {str(i): float(rng.uniform(1, 9)) for i in range(50)}
    candidates = {
        name: [
            Candidate(
                "spatial-vh", rank, cost * share, float(rng.uniform(0.5, 1.5)) * (1 - share) ** 2 * cost
            )
            for rank, share in enumerate(rng.uniform(0.1, 1, 8), start=1)
        ]
        for name, cost in dense.items()
    }
    budget = share * sum(dense.values())
    found = allocate(dense, candidates, budget)
    assert cost_of(dense, found.choice) <= budget * (1 + 1e-9)
    assert found.error == pytest.approx(optimum(dense, candidates, budget), rel=1e-9)
    # The bound is below, and close.
    assert 0.99 * found.error <= found.bound <= found.error
