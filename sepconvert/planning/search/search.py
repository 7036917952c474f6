"""The search itself: it measures the curve where the budget is decided, and chooses the plan to deliver."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options import Budget
from sepconvert.planning.search.bisection import cheaper_than, cheapest_that, dearest_that
from sepconvert.planning.search.curve import Curve, Point, Totals
from sepconvert.planning.search.learning import Learner
from sepconvert.planning.search.measurements import Measurements
from sepconvert.planning.survey import LayerSurvey
from sepconvert.planning.workshop import Workshop

_CARRIED_OUT = 6  # plans on the curve that are carried out at least, if there are as many


_REFINEMENTS = 2  # plans that are tried between the best one and its neighbour on the curve


_POLISHES = 1  # times that sensitivities are corrected by the best plan, to look for a cheaper one


_LESSONS = 2  # times that errors of forms are corrected by a plan that diverges far more than expected


_DOUBTFUL = 4  # layers, those that save least, that are tested for saving anything in the whole model


Found = TypeVar("Found", bound=Point | None)


class Search:
    """Search for the plan that meets a budget, with each plan carried out and measured once at most.

    Several searches may follow one another: each uses what those before have learnt and measured.
    """

    def __init__(self, surveyed: Mapping[str, LayerSurvey], workshop: Workshop, totals: Totals) -> None:
        self.curve, self.measurements = Curve(surveyed, totals), Measurements(workshop)
        self.learner, self._workshop = Learner(self.curve, self.measurements), workshop

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
            raise DemandNotMetError(_shortfall(budget, self.points), self.to_json(None))
        if self.curve.totals.by_time:
            point = self._without_idle_layers(point, budget)
        self.measurements.fitted(point)
        self.measurements.accuracy(point)
        return point

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """Return the report's `approximation.curve`."""
        return self.curve.to_json(delivered)

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
        if budget.max_drop is None:
            point = self._taught(lambda: self._most_accurate(budget, refinements))
            self._fill_curve(point or self.points[-1])
            return point or self._known_fast(budget)
        point = self._taught(lambda: self._cheapest(budget, refinements))
        self._fill_curve(point)
        return self._fastest(point, budget.max_drop) if self.curve.totals.by_time else point

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

        best = cheapest_that(self.curve, is_accurate, refinements)
        for _ in range(_POLISHES):
            self.learner.learn_sensitivities(best)
            better = cheaper_than(self.curve, best, is_accurate)
            if better is best:
                break
            best = better
        return best

    # Choice among the plans that were measured

    def _known_fast(self, budget: Budget) -> Point | None:
        """Return the dearest of all plans timed fast enough: a cheaper plan need not be a faster one."""
        timed = [point for point in self.points if point.plan.choice and point.measured.speedup is not None]
        fast = [point for point in timed if self.measurements.is_fast(point, budget)]
        return max(fast, key=lambda point: point.plan.cost, default=None)

    def _fastest(self, point: Point, max_drop: float) -> Point:
        """Return the plan timed fastest of all that were measured to be accurate enough, or else `point`."""
        speeds = {
            each: each.measured.speedup.median
            for each in self.points
            if each.measured.accuracy is not None
            and each.measured.accuracy.drop <= max_drop
            and each.measured.speedup is not None
        }
        return max(speeds, key=speeds.__getitem__, default=point)

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

    def _without_idle_layers(self, point: Point, budget: Budget) -> Point:
        """Return the plan without layers that save no time in the whole model.

        Nothing is replaced if the whole plan is measured to be slower than the original.

        Raises:
            DemandNotMetError: it is slower, though a speed-up above 1 is demanded.
        """
        fitted, choice = self.measurements.fitted(point), point.plan.choice
        if not choice:
            return point
        saved = {name: self.curve.surveyed[name].cost - candidate.cost for name, candidate in choice.items()}
        doubtful = sorted(saved, key=saved.__getitem__)[:_DOUBTFUL]
        whole, *others = self._workshop.speedups(
            [self._workshop.restored(fitted, name) for name in (None, *doubtful)]
        )
        if whole.significant and whole.median < 1:
            if budget.min_speedup is not None and budget.min_speedup > 1:
                raise DemandNotMetError(
                    f"`min_speedup` {budget.min_speedup:g}: the plan that met it is {whole.median:.2f}× as "
                    "fast when timed again; measure on an idle machine with more `runs`, or relax the demand"
                )
            return self.curve.join(self.curve.known({}))
        idle = [name for name, each in zip(doubtful, others, strict=True) if each.median >= whole.median]
        if not idle:
            return point
        kept = {name: candidate for name, candidate in choice.items() if name not in idle}
        found = self.curve.join(self.curve.known(kept))
        # Noise may make a single layer look idle, so the plan without all of them must be as fast.
        whole, without = self._workshop.speedups([fitted.model, self.measurements.fitted(found).model])
        if found.measured.speedup is None:
            found.measured.speedup = without
        good = (
            without.median >= whole.median
            and self.measurements.is_accurate(found, budget)
            and self.measurements.is_fast(found, budget)
        )
        return found if good else point


def _shortfall(budget: Budget, points: Sequence[Point]) -> str:
    """Return the message that no plan meets a budget, with how near the plans on the curve come to it."""
    names = ("rank", "target_macs", "target_params", "max_drop", "min_speedup")
    demands = [f"`{name}` {getattr(budget, name):g}" for name in names if getattr(budget, name) is not None]
    drops = [point.measured.accuracy.drop for point in points if point.measured.accuracy is not None]
    speeds = [point.measured.speedup.median for point in points if point.measured.speedup is not None]
    reached = [
        *([f"smallest drop {min(drops):.2f} pp of {len(drops)} measured"] if drops else []),
        *([f"largest speed-up {max(speeds):.2f}× of {len(speeds)} timed"] if speeds else []),
        f"fewest MACs {min(point.plan.macs for point in points):,}",
    ]
    return (
        f"no plan meets {' and '.join(demands)} ({', '.join(reached)} among {len(points)} plans); "
        "relax a demand, or pass `finetune`"
    )
