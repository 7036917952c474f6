"""Allocation of a form to each layer: a multiple-choice knapsack over error and cost.

A layer may stay as it is, at no error, or take one of its candidates; errors and costs add up. Plans that
minimise error + λ·cost for some λ ≥ 0 form the lower convex hull of all plans. Each of them is made of points
on the layers' own hulls, and taking the steps of these hulls in order of their slope gives every such plan
(H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
resources", Operations Research 11 (1963)). Interpolation between the plans of the hull is the linear
relaxation: a lower bound, by which the exact search discards partial plans that cannot become the best one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sepconvert.factorize.structures import Form

_ROUNDING = 1e-12  # relative, of sums of costs and of errors


Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One way to replace a layer."""

    scheme: str
    rank: int
    cost: float  # over all calls of one forward pass: MACs, or milliseconds
    error: float  # expected divergence of the model's output if this layer alone is replaced so

    @property
    def form(self) -> Form:
        """Scheme and rank."""
        return self.scheme, self.rank


Choice = Mapping[str, Candidate]
"""The layers that are replaced, or stay in floating point in a network of int8, by name."""


IN_FLOAT = "float"
"""Scheme of a layer that stays as it is, in floating point, where other layers are deployed in int8."""


def replaced(choice: Choice) -> dict[str, Candidate]:
    """Return the layers that are replaced."""
    return {name: each for name, each in choice.items() if each.scheme != IN_FLOAT}


def in_float(choice: Choice) -> frozenset[str]:
    """Return the layers that stay in floating point."""
    return frozenset(choice.keys() - replaced(choice).keys())


@dataclass(frozen=True)
class Allocation:
    """The best plan within a budget, and the Lagrangian lower `bound` of the error of all plans within it."""

    choice: Choice
    cost: float
    error: float
    bound: float


def allocate(
    dense_cost: Mapping[str, float], candidates: Mapping[str, Sequence[Candidate]], budget: float
) -> Allocation | None:
    """Return the plan of the least error whose cost is within `budget`; None if there is none.

    The result is exact. Layer by layer, all partial plans are kept that no other one beats in both cost and
    error, except those of which the linear relaxation of the remaining layers shows that they cannot become
    the best one.

    Args:
        dense_cost: cost of each layer as it is.
        candidates: those of each layer, in any order.
        budget: largest cost of all these layers together.
    """
    names = list(candidates)
    options = [[None, *(each for each in candidates[name] if each.cost < dense_cost[name])] for name in names]
    cost, error = np.zeros(1), np.zeros(1)
    chosen: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    # Sums in another order differ by their rounding.
    budget += _ROUNDING * sum(dense_cost.values())
    slack = _ROUNDING * sum(
        max((each.error for each in offered), default=0.0) for offered in candidates.values()
    )
    relaxations = [_relaxation(dense_cost, candidates, names[i:]) for i in range(len(names) + 1)]
    bound = _interpolated(relaxations[0], np.array([budget]))[0]
    if not np.isfinite(bound):
        return None
    upper = _feasible(dense_cost, candidates, budget)
    for name, offered, relaxed in zip(names, options, relaxations[1:], strict=True):
        costs = np.array([dense_cost[name] if each is None else each.cost for each in offered])
        errors = np.array([0.0 if each is None else each.error for each in offered])
        new_cost, new_error = (cost[:, None] + costs).ravel(), (error[:, None] + errors).ravel()
        least = new_error + _interpolated(relaxed, budget - new_cost)
        order = np.lexsort((new_error, new_cost))
        order = order[least[order] <= upper + slack]
        falling = np.minimum.accumulate(new_error[order])
        order = order[np.r_[True, falling[1:] < falling[:-1]]]
        chosen.append((order // len(offered), order % len(offered)))
        cost, error = new_cost[order], new_error[order]
    best = state = int(error.argmin())
    choice = {}
    for name, offered, (parents, picks) in zip(names[::-1], options[::-1], chosen[::-1], strict=True):
        if (candidate := offered[picks[state]]) is not None:
            choice[name] = candidate
        state = int(parents[state])
    ordered = {name: choice[name] for name in names if name in choice}
    return Allocation(ordered, float(cost[best]), float(error[best]), float(bound))


def plans(dense_cost: Mapping[str, float], candidates: Mapping[str, Sequence[Candidate]]) -> list[Choice]:
    """Return all plans on the lower convex hull of error against cost, from nothing replaced to the cheapest.

    Args:
        dense_cost: cost of each layer as it is.
        candidates: those of each layer, in any order; one that costs more than the layer is never chosen.
    """
    steps = []
    for order, (name, offered) in enumerate(candidates.items()):
        hull = _hull(dense_cost[name], offered)
        before = (dense_cost[name], 0.0)
        for candidate in hull:
            slope = (candidate.error - before[1]) / (before[0] - candidate.cost)
            steps.append((slope, order, name, candidate))
            before = (candidate.cost, candidate.error)
    chosen: dict[str, Candidate] = {}
    found: list[Choice] = [{}]
    # Slopes grow along each layer's hull; ties go by layer, and `sorted` keeps the order within one.
    for _, _, name, candidate in sorted(steps, key=lambda step: step[:2]):
        chosen[name] = candidate
        found.append(dict(chosen))
    return found


def cost_of(dense_cost: Mapping[str, float], choice: Choice) -> float:
    """Return the cost of all layers together, replaced or not."""
    return sum(choice[name].cost if name in choice else cost for name, cost in dense_cost.items())


def _hull(dense_cost: float, offered: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates on the lower convex hull that begins at the dense layer, by falling cost."""
    points: list[Candidate] = []
    for candidate in sorted(offered, key=lambda each: (-each.cost, each.error)):
        if candidate.cost >= dense_cost:
            continue
        # Of two at one cost the first has the lower error; of two at one error the last costs less.
        while points and points[-1].cost > candidate.cost and points[-1].error >= candidate.error:
            points.pop()
        if points and points[-1].cost == candidate.cost:
            continue
        while points and not _turns(
            points[-2] if len(points) > 1 else None, points[-1], candidate, dense_cost
        ):
            points.pop()
        points.append(candidate)
    return points


def _turns(before: Candidate | None, middle: Candidate, after: Candidate, dense_cost: float) -> bool:
    """Return whether the slope of error over saved cost grows at `middle`."""
    cost, error = (dense_cost, 0.0) if before is None else (before.cost, before.error)
    return (middle.error - error) * (middle.cost - after.cost) < (after.error - middle.error) * (
        cost - middle.cost
    )


def _relaxation(
    dense_cost: Mapping[str, float], candidates: Mapping[str, Sequence[Candidate]], names: Sequence[str]
) -> tuple[Array, Array]:
    """Return the rising costs, and the errors, of the plans on the hull of some layers."""
    costs = {name: dense_cost[name] for name in names}
    hull = plans(costs, {name: candidates[name] for name in names})[::-1]
    return (
        np.array([cost_of(costs, plan) for plan in hull]),
        np.array([sum(each.error for each in plan.values()) for plan in hull]),
    )


def _interpolated(relaxed: tuple[Array, Array], budget: Array) -> Array:
    """Return the least error of the relaxation within each budget; Inf where no plan is within it."""
    costs, errors = relaxed
    found: Array = np.where(budget < costs[0], np.inf, np.interp(budget, costs, errors))
    return found


def _feasible(
    dense_cost: Mapping[str, float], candidates: Mapping[str, Sequence[Candidate]], budget: float
) -> float:
    """Return the error of the first plan on the hull that is within the budget."""
    return next(
        sum(each.error for each in plan.values())
        for plan in plans(dense_cost, candidates)
        if cost_of(dense_cost, plan) <= budget
    )
