"""Choice of a plan whose drop on unseen images is proven, by tests of plans in a fixed order."""

from collections.abc import Iterable
from itertools import takewhile

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget
from sepconvert.planning.search.curve import Curve, Point
from sepconvert.planning.search.measurements import Measurements

_PLANS = 12  # that are tested at most, at even ratios of cost


def furthest_proven(curve: Curve, measurements: Measurements, budget: Budget) -> Point:
    """Return the fastest or cheapest plan whose drop on unseen images is proven to be within the budget.

    The plans and their order, by rising expected divergence, come from the calibration images; the scored
    images have no part in them. Each plan is tested at the full level, up to the first that fails: so the
    probability that any plan which passes exceeds the budget is at most 1 − `confidence` (fixed-sequence
    testing; Angelopoulos et al., "Learn then Test", arXiv:2110.01052, section 3), whichever of them is taken.
    The plan of exact mode loses nothing in floating point, and needs no proof by images there.

    Raises:
        DemandNotMetError: no plan is proven.
    """
    curve.draw(_PLANS)
    plan = curve.exact()
    exact = curve.join(plan) if plan.choice and measurements.workshop.form is None else None
    order = [point for point in curve.frontier if point.plan.choice and point is not exact]
    order = [point for point in order if measurements.is_fast(point, budget)]
    proven = proven_in_order(measurements.workshop.progress(order, "proving plans"), measurements, budget)
    if exact is not None and measurements.is_fast(exact, budget):
        proven.append(exact)
    measurements.time([point for point in proven if point.measured.speedup is None])
    for point in sorted(proven, key=_preference, reverse=True):
        # What passed early must not be contradicted by the rest of the images.
        if point is exact or measurements.is_proven(point, budget, on_all=True):
            return point
    raise DemandNotMetError(_shortfall(order, budget), curve.to_json(None))


def proven_in_order(order: Iterable[Point], measurements: Measurements, budget: Budget) -> list[Point]:
    """Return the plans of a sequence before the first whose drop is not proven."""
    return list(takewhile(lambda point: measurements.is_proven(point, budget), order))


def _preference(point: Point) -> tuple[float, float]:
    speedup = point.measured.speedup
    return (0.0 if speedup is None else speedup.median), -point.plan.cost


def _shortfall(order: list[Point], budget: Budget) -> str:
    """Return why no plan is proven, and how many images would be needed."""
    most, confidence = budget.max_drop or 0.0, budget.confidence or 0.0
    demand = f"`max_drop` {most:g} with `confidence` {confidence:g}"
    if not order or order[0].measured.accuracy is None:
        return f"no plan meets {demand}: none is cheap and fast enough; relax a demand"
    first = order[0].measured.accuracy
    needed = first.uncertainty.samples_needed(most, 1 - confidence)
    outlook = (
        "more images would not help; allow a larger drop"
        if needed is None
        else f"at these rates, about {needed:,} images would prove it; pass more `data`, or allow a "
        "larger drop"
    )
    return (
        f"{demand}: even the most cautious plan, with {len(order[0].plan.choice)} layers replaced, is not "
        f"proven to keep within it: it loses {first.written_drop} on {first.n:,} images; {outlook}"
    )
