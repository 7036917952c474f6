"""Searches along a curve for the plan at which a test changes its result."""

import math
from bisect import bisect_left
from collections.abc import Callable

from sepconvert.planning.search.curve import Curve, Plan, Point

_CHEAPER = (0.97, 0.93, 0.88)  # costs that `cheaper_than` tries, as shares of that of the best plan so far


_NEAR = 1.03  # ratio of costs between which no plan is tried


# Share of the way, in the logarithm of the cost, that a plan is tried from both ends of the range at least.
_MARGIN = 0.15


_HALVINGS = 8  # of the range, to find the cost at which the forecast is 1


Test = Callable[[Point], bool]
Forecast = Callable[[Plan], float | None]


def cheapest_that(
    curve: Curve, passes: Test, tries: int, forecast: Forecast, first: Point | None = None
) -> Point:
    """Return the cheapest plan that passes a test, supposing that all dearer ones pass it.

    The dearest plan, with nothing replaced, is taken to pass. Each try is at the cost at which the forecast
    is 1, but well between the dearest plan that failed and the cheapest that passed, so that a wrong forecast
    costs tries, and nothing else.

    Args:
        curve: the plans.
        passes: the test.
        tries: most plans to be tested.
        forecast: of what the test looks at, in units of its limit; None where nothing is known.
        first: plan to be tested first.
    """
    best: Point = curve.frontier[0]
    failed: Point | None = None
    point = first
    for _ in range(tries):
        if point is None:
            plan = _aimed(curve, best, failed, forecast)
            point = None if plan is None else curve.join(plan)
        if point is None or point in (best, failed):
            break
        if passes(point):
            best = point
        else:
            failed = point
        point = None
    return best


def _aimed(curve: Curve, best: Point, failed: Point | None, forecast: Forecast) -> Plan | None:
    """Return the plan to try next; None if there is no room between the best one and one that failed."""
    low, high = curve.least_cost if failed is None else failed.plan.cost, best.plan.cost
    if low <= 0 or high <= low * _NEAR:
        return None
    inner = 0.0 if failed is None else _MARGIN  # the cheapest plan of all may pass
    start, end = low ** (1 - inner) * high**inner, low**_MARGIN * high ** (1 - _MARGIN)
    if _passes_by(forecast, curve.best(start)):
        return curve.best(start)
    for _ in range(_HALVINGS):
        middle = math.sqrt(start * end)
        plan = curve.best(middle)
        if plan is not None and forecast(plan) is None:
            return plan
        if _passes_by(forecast, plan):
            end = middle
        else:
            start = middle
    return curve.best(end)


def _passes_by(forecast: Forecast, plan: Plan | None) -> bool:
    expected = None if plan is None else forecast(plan)
    return expected is not None and expected <= 1


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
