"""Forecast of the drop of a plan that was not carried out, from those that were scored."""

import math
from collections.abc import Sequence
from itertools import pairwise

from sepconvert.planning.search.curve import Plan, Point

# Power of the divergence that drops of accuracy grow with. (ResNet-9, 58 plans of ten runs, on 500 to 5,000
# images: 0.78 by least squares of the logarithms.)
_POWER = 0.8


def expected_drop(plan: Plan, points: Sequence[Point], most: float) -> float | None:
    """Return the drop that is expected of a plan, over the allowed one; None where no plan was scored.

    In the logarithms, the drop is interpolated linearly in the expected divergence between the plans that
    were scored, and beyond them it grows with its 0.8th power. A drop is taken to be one standard error at
    least: below that it is noise.

    Args:
        plan: any plan.
        points: plans, some of them scored.
        most: the allowed drop, in the metric's unit.
    """
    known = sorted(
        (point.plan.expected, max(point.measured.accuracy.drop, _error(point)))
        for point in points
        if point.measured.accuracy is not None and point.plan.choice and point.plan.expected > 0
    )
    known = [(divergence, drop) for divergence, drop in known if drop > 0]
    if not known or most <= 0:
        return None
    if plan.expected <= 0:
        return 0.0
    rising, largest = [], 0.0
    for divergence, drop in known:  # noise must not make a plan that goes further look better
        largest = max(largest, drop)
        rising.append((math.log(divergence), math.log(largest / most)))
    return math.exp(_interpolated(math.log(plan.expected), rising))


def _error(point: Point) -> float:
    """Return the standard error of a measured drop, about a quarter of its 95 % interval."""
    assert point.measured.accuracy is not None  # noqa: S101  (callers have looked)
    interval = point.measured.accuracy.ci95
    return (interval.hi - interval.lo) / 4


def _interpolated(x: float, known: Sequence[tuple[float, float]]) -> float:
    """Return y at x by the known pairs (x, y), by rising x."""
    (first, low), (last, high) = known[0], known[-1]
    if x <= first:
        return low + _POWER * (x - first)
    if x >= last:
        return high + _POWER * (x - last)
    for (left, before), (right, after) in pairwise(known):
        if x <= right:
            return before if right <= left else before + (after - before) * (x - left) / (right - left)
    return high
