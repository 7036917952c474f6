"""Measurements of plans on the trade-off curve, each made when it is first needed."""

from collections.abc import Sequence

from sepconvert.base.options import Budget
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics import AccuracyDelta
from sepconvert.planning.search.curve import Point
from sepconvert.planning.workshop import Fitted, Workshop


class Measurements:
    """Carries out, scores and times points of a curve, each once, and holds them against a budget."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def fitted(self, point: Point) -> Fitted:
        """Return the plan of a point, carried out."""
        if point.measured.fitted is None:
            point.measured.fitted = self.workshop.carry_out(point.plan.choice)
        return point.measured.fitted

    def accuracy(self, point: Point) -> AccuracyDelta | None:
        """Return the drop of accuracy of a point's model; None without evaluation data."""
        if point.measured.accuracy is None:
            point.measured.accuracy = self.workshop.accuracy(self.fitted(point).model)
        return point.measured.accuracy

    def speedup(self, point: Point) -> Speedup | None:
        """Return the speed-up of a point's plan; None if plans are not timed."""
        if point.measured.speedup is None:
            self.time([point])
        return point.measured.speedup

    def time(self, points: Sequence[Point]) -> None:
        """Time the plans of some points together, if plans are timed."""
        if not points or not self.workshop.times_plans:
            return
        # Times do not depend on the values that factors are fitted to: plans need not be carried out first.
        models = [
            self.workshop.sketched(point.plan.choice)
            if point.measured.fitted is None
            else point.measured.fitted.model
            for point in points
        ]
        for point, speedup in zip(points, self.workshop.speedups(models), strict=True):
            point.measured.speedup = speedup

    def contributions(self, point: Point, description: str) -> dict[str, float]:
        """Return the divergence that each replaced layer of a point's plan adds to that of all the others."""
        fitted = self.fitted(point)
        reached = self.workshop.divergence(self.workshop.restored(fitted, None))
        return {
            name: reached - self.workshop.divergence(self.workshop.restored(fitted, name))
            for name in self.workshop.progress(list(point.plan.choice), description)
        }

    def is_accurate(self, point: Point, budget: Budget) -> bool:
        """Return whether a plan keeps within the drop of accuracy that the budget allows."""
        if budget.max_drop is None:
            return True
        accuracy = self.accuracy(point)
        return accuracy is not None and accuracy.drop <= budget.max_drop

    def is_fast(self, point: Point, budget: Budget, *, surely: bool = False) -> bool:
        """Return whether a plan has the speed-up that the budget demands; `surely`: by its whole interval."""
        if budget.min_speedup is None:
            return True
        speedup = self.speedup(point)
        if speedup is None:
            return False
        return (speedup.ci95.lo if surely else speedup.median) >= budget.min_speedup
