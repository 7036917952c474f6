"""Measurements of plans on the trade-off curve, each made when it is first needed."""

from collections.abc import Sequence

from sepconvert.base.options.values import Budget
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.planning.allocate import replaced
from sepconvert.planning.scores import Scores
from sepconvert.planning.search.curve import Point
from sepconvert.planning.search.judging import is_clearly_within, is_proven
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

    def accuracy(self, point: Point) -> MetricDelta | None:
        """Return the drop of accuracy of a point's model on all images; None without evaluation data."""
        scores = self.workshop.scores
        return None if scores is None else self._accuracy(point, scores, scores.sizes[-1])

    def _accuracy(self, point: Point, scores: Scores, images: int) -> MetricDelta:
        found = scores.delta(self.fitted(point).model, images)
        if point.measured.accuracy is None or images > point.measured.accuracy.n:
            point.measured.accuracy = found
        return found

    def speedup(self, point: Point) -> Speedup | None:
        """Return the speed-up of a point's plan; None if plans are not timed."""
        if point.measured.speedup is None:
            self.time([point])
        return point.measured.speedup

    def time(self, points: Sequence[Point]) -> None:
        """Time the plans of some points together, if plans are timed.

        A plan that replaces nothing is the original: any difference of its time would be noise.
        """
        points = [point for point in points if point.plan.choice]
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
        fitted, name = self.fitted(point), ("contributions", point.plan.forms)
        known: dict[str, float] | None = self.workshop.learnt.recall(name)
        if known is not None:
            return known
        reached = self.workshop.divergence(self.workshop.restored(fitted, None))
        found = {
            layer: reached - self.workshop.divergence(self.workshop.restored(fitted, layer))
            for layer in self.workshop.progress(list(replaced(point.plan.choice)), description)
        }
        self.workshop.learnt.keep(name, found)
        return found

    def is_accurate(self, point: Point, budget: Budget) -> bool:
        """Return whether a plan keeps within the drop of accuracy that the budget allows.

        Judged by the images that plans are chosen on, or fewer if they leave no doubt.
        """
        scores = self.workshop.scores
        if budget.max_drop is None or scores is None:
            return budget.max_drop is None
        if budget.confidence is not None:
            return self.is_proven(point, budget)
        for images in scores.sizes[: scores.sizes.index(scores.choosing)]:
            verdict = is_clearly_within(self._accuracy(point, scores, images), budget.max_drop)
            if verdict is not None:
                return verdict
        return self._accuracy(point, scores, scores.choosing).drop <= budget.max_drop

    def is_confirmed(self, point: Point, budget: Budget) -> bool:
        """Return whether a plan keeps within the budget on all images."""
        accuracy = self.accuracy(point)
        return budget.max_drop is None or (accuracy is not None and accuracy.drop <= budget.max_drop)

    def is_proven(self, point: Point, budget: Budget, *, on_all: bool = False) -> bool:
        """Return whether a plan's drop on unseen images is below the budget's, with its confidence.

        The test stops as soon as it has the proof, or as soon as a proof is out of reach; `on_all` images, it
        looks at the last of its steps alone.
        """
        scores, most, confidence = self.workshop.scores, budget.max_drop, budget.confidence
        if scores is None or most is None or confidence is None:
            return False
        for images in scores.sizes[-1:] if on_all else scores.sizes:
            delta, last = self._accuracy(point, scores, images), images == scores.sizes[-1]
            if is_proven(delta, most, 1 - confidence, len(scores.sizes), last):
                return True
            if is_clearly_within(delta, most) is False:
                break
        return False

    def is_fast(self, point: Point, budget: Budget, *, surely: bool = False) -> bool:
        """Return whether a plan has the speed-up that the budget demands; `surely`: by its whole interval.

        One above 1 is no speed-up as long as it may be noise.
        """
        if budget.min_speedup is None:
            return True
        speedup = self.speedup(point)
        if speedup is None:
            return False
        reached = (speedup.ci95.lo if surely else speedup.median) >= budget.min_speedup
        return reached and (speedup.significant or budget.min_speedup <= 1)
