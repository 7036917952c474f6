"""The search itself: it measures the curve where the budget is decided, and chooses the plan to deliver."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from sepconvert.base.options.values import Budget
from sepconvert.planning.fits.survey import LayerSurvey
from sepconvert.planning.search.bisection import cheaper_than, cheapest_that, dearest_that
from sepconvert.planning.search.choosing import Chooser, unmet
from sepconvert.planning.search.curve import Curve, Plan, Point, Totals
from sepconvert.planning.search.forecast import expected_drop
from sepconvert.planning.search.judging import expected_on_unseen_images
from sepconvert.planning.search.learning import Learner
from sepconvert.planning.search.measurements import Measurements
from sepconvert.planning.search.proof import furthest_proven
from sepconvert.planning.workshop import Workshop

_CARRIED_OUT = 5  # plans on the curve that are carried out at least, if there are as many


_REFINEMENTS = 2  # plans that are tried between the best one and its neighbour on the curve


_TRIES = 2  # plans that are tried before that, where forecasts of the drop tell which


_POLISHES = 1  # times that sensitivities are corrected by the best plan, to look for a cheaper one


_LESSONS = 2  # times that errors of forms are corrected by a plan that diverges far more than expected


Found = TypeVar("Found", bound=Point | None)


class Search:
    """Search for the plan that meets a budget, with each plan carried out and measured once at most.

    Several searches may follow one another: each uses what those before have learnt and measured.
    """

    def __init__(self, surveyed: Mapping[str, LayerSurvey], workshop: Workshop, totals: Totals) -> None:
        self.curve, self.measurements = Curve(surveyed, totals), Measurements(workshop)
        self.learner, self._workshop = Learner(self.curve, self.measurements), workshop
        self._chooser = Chooser(self.curve, self.measurements)

    @property
    def points(self) -> list[Point]:
        """Points of the curve."""
        return self.curve.points

    def run(self, budget: Budget, refinements: int = _REFINEMENTS) -> Point:
        """Return the point whose plan is to be delivered, carried out and scored.

        Args:
            budget: what is demanded.
            refinements: plans that are tried between the best one on the curve and its neighbour.

        Raises:
            DemandNotMetError: no plan meets the budget; the error holds the curve.
        """
        if budget.rank is not None:
            point = self._of_rank(budget)
        elif budget.share is not None:
            point = self._of_share(budget.share, budget)
        else:
            point = self._within_limits(budget, refinements)
        if point is None or not self.measurements.is_fast(point, budget):
            raise unmet(budget, self.curve)
        if self.curve.totals.by_time and budget.confidence is None:
            point = self._chooser.without_idle_layers(point, budget)
        return self._chooser.confirmed(point, budget)

    def nearest(self, budget: Budget) -> Point:
        """Return the point of the plan nearest to a budget that none meets, carried out and scored.

        An allowed drop is kept, and the plan is then the one that goes furthest within it. Where none is
        given, it is the plan that was timed fastest, or the cheapest.
        """
        if budget.max_drop is not None:
            return self.run(Budget(max_drop=budget.max_drop))
        speeds = {
            point: point.measured.speedup.median
            for point in self.points
            if point.measured.speedup is not None and point.plan.choice
        }
        point = max(speeds, key=speeds.__getitem__, default=self.points[-1])
        self.measurements.fitted(point)
        self.measurements.accuracy(point)
        return point

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """Return the report's `approximation.curve`."""
        return self.curve.to_json(delivered)

    @property
    def plans_measured_on_data(self) -> int:
        """Number of plans whose drop was measured, on some of the images at least."""
        return sum(point.measured.accuracy is not None and bool(point.plan.choice) for point in self.points)

    def choice(self, point: Point, model: nn.Module, budget: Budget) -> dict[str, Any] | None:
        """Return the report's `approximation.choice`: what the choice of a plan leaves to be expected.

        `model` is the plan's, or what fine-tuning made of it. None without evaluation data.
        """
        scores = self._workshop.scores
        if scores is None or not point.plan.choice:
            return None
        delta, plans = scores.delta(model, scores.sizes[-1]), self.plans_measured_on_data
        rest = None if self._chooser.revised or budget.confidence is not None else scores.rest(model)
        # What is proven of a plan that passed is the budget, and no more.
        proven = budget.max_drop if budget.confidence is not None else None
        return {
            "plans": plans,
            "images": delta.n if rest is None else scores.choosing,
            "confidence": budget.confidence,
            "bound": expected_on_unseen_images(delta, plans) if proven is None else proven,
            "rest": None if rest is None else rest.drop_to_dict(),
        }

    @property
    def idle(self) -> frozenset[str]:
        """Layers that the delivered plan leaves as they are, since they save no time in the whole model."""
        return self._chooser.idle

    # The three kinds of budgets

    def _of_rank(self, budget: Budget) -> Point | None:
        """Return the plan of one rank everywhere, each layer with the cheaper order of its two factors."""
        choice = {name: layer.candidates()[-1] for name, layer in self.curve.surveyed.items()}
        point = Point(self.curve.plan(choice, bound=0.0))
        self.curve.points = [point]
        return point if self.measurements.is_accurate(point, budget) else None

    def _of_share(self, share: float, budget: Budget) -> Point | None:
        """Return the best plan within a share of the original's cost."""

        def best() -> Point | None:
            plan = self.curve.best(share * self.curve.totals.cost - self.curve.rest)
            if plan is None:
                return None
            point = self.curve.join(plan)
            return point if self.measurements.is_accurate(point, budget) else None

        if not self.points:
            self.curve.draw()
        point = self._taught(best)
        if point is not None:
            self._fill_curve(point)
        return point

    def _within_limits(self, budget: Budget, refinements: int) -> Point | None:
        """Return the cheapest plan that is accurate enough, or the most accurate that is fast enough."""
        if not self.points:
            self.learner.learn_from_first_plans()
            self.curve.draw()
        self._carry_out_exact(budget)
        if budget.confidence is not None:
            proven = furthest_proven(self.curve, self.measurements, budget)
            self._fill_curve(proven)
            return proven
        if budget.max_drop is None:
            point = self._taught(lambda: self._most_accurate(budget, refinements))
            self._fill_curve(point or self.points[-1])
            return point or self._chooser.known_fast(budget)
        point = self._taught(lambda: self._cheapest(budget, refinements))
        self._fill_curve(point)
        return self._chooser.fastest(point, budget) if self.curve.totals.by_time else point

    def _most_accurate(self, budget: Budget, refinements: int) -> Point | None:
        def is_fast(point: Point) -> bool:
            return self.measurements.is_fast(point, budget)

        def is_surely_fast(point: Point) -> bool:
            return self.measurements.is_fast(point, budget, surely=True)

        # Some plans near the demand meet it by chance, and would be the first to be found.
        surely = dearest_that(self.curve, is_surely_fast, refinements)
        return surely or dearest_that(self.curve, is_fast, refinements)

    def _taught(self, search: Callable[[], Found]) -> Found:
        """Return the result of a search, repeated as long as its plans correct the errors of forms."""
        point = search()
        for _ in range(_LESSONS):
            if point is not None:
                self.measurements.fitted(point)
            if not self.learner.learn_forms():
                break
            point = search()
        return point

    def _cheapest(self, budget: Budget, refinements: int) -> Point:
        def is_accurate(point: Point) -> bool:
            return self.measurements.is_accurate(point, budget)

        def forecast(plan: Plan) -> float | None:
            return expected_drop(plan, self.points, budget.max_drop or 0.0)

        carried_out = [each for each in self.points if each.measured.fitted is not None and each.plan.choice]
        first = min(carried_out, key=lambda each: each.plan.expected, default=None)
        tries = _TRIES + refinements
        best = cheapest_that(self.curve, is_accurate, tries, forecast, first)
        for _ in range(_POLISHES):
            self.learner.learn_sensitivities(best)
            better = cheaper_than(self.curve, best, is_accurate)
            if better is best:
                break
            best = better
        return best

    def _carry_out_exact(self, budget: Budget) -> None:
        """Carry out the plan of exact mode where plans are chosen by their times, as one to be compared."""
        plan = self.curve.exact()
        if self.curve.totals.by_time and plan.choice and budget.confidence is None:
            point = self.curve.join(plan)
            self.measurements.fitted(point)
            self.measurements.is_accurate(point, budget)

    def _fill_curve(self, chosen: Point) -> None:
        """Carry out more plans, of costs near that of the chosen one, and time all that were carried out."""
        converting = [point for point in self.points if point.plan.choice]
        waiting = [point for point in converting if point.measured.fitted is None]
        lacking = max(0, _CARRIED_OUT - (len(converting) - len(waiting)))
        nearest = sorted(waiting, key=lambda point: abs(point.plan.cost - chosen.plan.cost))[:lacking]
        for point in self._workshop.progress(nearest, "trade-off curve"):
            self.measurements.fitted(point)
        self.measurements.time(
            [
                point
                for point in self.points
                if point.measured.fitted is not None and point.measured.speedup is None
            ]
        )
