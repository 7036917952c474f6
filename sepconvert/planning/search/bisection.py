"""Searches along a curve for the plan at which a test changes its result."""

from bisect import bisect_left
from collections.abc import Callable

from sepconvert.planning.search.curve import Curve, Point

_CHEAPER = (0.97, 0.93, 0.88)  # costs that `cheaper_than` tries, as shares of that of the best plan so far


Test = Callable[[Point], bool]


def cheapest_that(curve: Curve, passes: Test, refinements: int) -> Point:
    """Return the cheapest plan that passes a test, supposing that all dearer ones pass it.

    The dearest plan, with nothing replaced, is taken to pass. `refinements` more plans are tried between the
    best one on the curve and the next cheaper one.
    """
    plans = curve.frontier[::-1]
    best = plans[bisect_left(plans, True, hi=len(plans) - 1, key=passes)]
    for _ in range(refinements):
        between = curve.between(best)
        if between is None:
            break
        if passes(between):
            best = between
    return best


def dearest_that(curve: Curve, passes: Test, refinements: int) -> Point | None:
    """Return the dearest plan that passes a test, supposing that all cheaper ones pass it; None if none does.

    `refinements` more plans are tried between the best one on the curve and the next dearer one.
    """
    plans = curve.frontier[::-1]
    if not passes(plans[0]):
        return None
    best = plans[bisect_left(plans, True, lo=1, key=lambda point: not passes(point)) - 1]
    for _ in range(refinements):
        dearer = [point for point in curve.frontier if point.plan.cost > best.plan.cost]
        between = curve.between(dearer[-1]) if dearer else None
        if between is None:
            break
        if passes(between):
            best = between
    return best


def cheaper_than(curve: Curve, best: Point, passes: Test) -> Point:
    """Return a somewhat cheaper plan that passes a test, or `best` itself if none does."""
    for share in _CHEAPER:
        plan = curve.best(best.plan.cost * share)
        if plan is None:
            break
        point = curve.join(plan)
        if not passes(point):
            break
        best = point
    return best
