"""Plans on the hull, against all combinations."""

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st
from strategies import numbered

from sepconvert.allocate import Candidate, macs_of, plans, spread

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
    choices = [[(dense[name], 0.0), *((c.macs, c.error) for c in candidates[name])] for name in dense]
    return [tuple(map(sum, zip(*chosen, strict=True))) for chosen in product(*choices)]


def totals(dense, plan):
    cost = sum(plan[name].macs if name in plan else dense[name] for name in dense)
    return cost, sum(candidate.error for candidate in plan.values())


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


def test_what_costs_as_much_or_more_is_never_chosen():
    dense = {"a": 10, "b": 10}
    offered = {
        "a": [Candidate("depthwise-pointwise", 1, 10, 0.0)],
        "b": [Candidate("depthwise-pointwise", 1, 11, 0.0), Candidate("depthwise-pointwise", 2, 4, 1.0)],
    }
    assert [sorted(plan) for plan in plans(dense, offered)] == [[], ["b"]]
    assert plans(dense, offered)[1]["b"].rank == 2
    assert macs_of(100, dense, plans(dense, offered)[1]) == 94


def test_points_are_spread_over_ratios_of_cost():
    found = [{}] * 101
    costs = [1000 - 9 * index for index in range(101)]
    picked = spread(found, costs, 3)
    assert picked[0] == 0
    assert picked[-1] == 100
    assert abs(costs[picked[1]] / 1000 - (100 / 1000) ** 0.5) < 0.01
    assert spread([{}], [7], 8) == [0]
