"""The choice among plans that were measured, and its check by all images and by the whole model's time."""

import itertools
import math
from collections.abc import Iterator, Sequence

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.planning.allocate import replaced
from sepconvert.planning.search.curve import Curve, Point
from sepconvert.planning.search.measurements import Measurements

_NEARER = 3  # plans that are tried where all images speak against those that were chosen by some


_SURELY = 0.97  # share of a plan's measured speed-up that it will have again


_DOUBTFUL = 4  # layers, those that save least, that are tested for saving anything in the whole model


class Chooser:
    """Chooses among the measured plans of a curve.

    Attributes:
        revised: whether all images spoke against the plan that was chosen by some of them.
        idle: layers that were left out of the plan, as they save no time in the whole model.
    """

    def __init__(self, curve: Curve, measurements: Measurements) -> None:
        self._curve, self._measurements = curve, measurements
        self.revised, self.idle = False, frozenset[str]()

    def known_fast(self, budget: Budget) -> Point | None:
        """Return the dearest of all plans timed fast enough: a cheaper plan need not be a faster one."""
        timed = [point for point in self._curve.points if point.measured.speedup is not None]
        fast = [point for point in timed if self._measurements.is_fast(point, budget)]
        return max(fast, key=lambda point: point.plan.cost, default=None)

    def fastest(self, point: Point, budget: Budget) -> Point:
        """Return the plan timed fastest of all that were measured to be accurate enough, or else `point`."""
        return next(iter(self._by_speed(budget)), point)

    def _by_speed(self, budget: Budget) -> list[Point]:
        """Return the timed plans that were measured to be accurate enough, the fastest first."""
        speeds = {
            each: each.measured.speedup.median
            for each in self._curve.points
            if each.measured.accuracy is not None
            and each.measured.speedup is not None
            and self._measurements.is_accurate(each, budget)
        }
        return sorted(speeds, key=speeds.__getitem__, reverse=True)

    def confirmed(self, point: Point, budget: Budget) -> Point:
        """Return the plan, carried out and scored, or another if it exceeds the budget on all images.

        Raises:
            DemandNotMetError: no plan that was measured keeps within the budget.
        """
        accurate = [
            each
            for each in self._curve.points
            if each.measured.accuracy is not None and self._measurements.is_accurate(each, budget)
        ]
        others = self._by_speed(budget) or sorted(accurate, key=lambda each: each.plan.cost)
        fixed = budget.rank is not None or budget.share is not None
        measured = (point,) if fixed else (point, *others)
        for tried in itertools.chain(measured, () if fixed else self._dearer_than(measured)):
            self._measurements.fitted(tried)
            if self._measurements.is_confirmed(tried, budget) and self._measurements.is_fast(tried, budget):
                self.revised = tried is not point
                return tried
        raise unmet(budget, self._curve)

    def _dearer_than(self, failed: Sequence[Point]) -> Iterator[Point]:
        """Yield plans ever nearer to the original than the dearest that failed, and at last the original."""
        dense = self._curve.dense_cost
        cost = max(point.plan.cost for point in failed)
        for _ in range(_NEARER):
            cost = (cost + dense) / 2
            plan = self._curve.best(cost)
            if plan is not None and plan.choice:
                yield self._curve.join(plan)
        yield self._curve.join(self._curve.known({}))

    def without_idle_layers(self, point: Point, budget: Budget) -> Point:
        """Return the plan without layers that save no time in the whole model.

        What costs no accuracy and is measured to be faster by itself is not in doubt.

        Nothing is replaced if the whole plan is measured to be slower than the original.

        Raises:
            DemandNotMetError: it is slower, though a speed-up above 1 is demanded.
        """
        fitted, choice = self._measurements.fitted(point), point.plan.choice
        if not choice:
            return point
        saved = {
            name: self._curve.surveyed[name].cost - candidate.cost
            for name, candidate in replaced(choice).items()
            if not self._curve.surveyed[name].is_free(candidate)
        }
        doubtful = sorted(saved, key=saved.__getitem__)[:_DOUBTFUL]
        whole, *others = self._measurements.workshop.speedups(
            [self._measurements.workshop.restored(fitted, name) for name in (None, *doubtful)]
        )
        if whole.significant and whole.median < 1:
            if budget.min_speedup is not None and budget.min_speedup > 1:
                raise DemandNotMetError(
                    f"`min_speedup` {budget.min_speedup:g}: the plan that met it is {whole.median:.2f}× as "
                    "fast when timed again; measure on an idle machine with more `runs`, or relax the demand"
                )
            return self._curve.join(self._curve.known({}))
        idle = [name for name, each in zip(doubtful, others, strict=True) if each.median >= whole.median]
        # With nothing left to replace, there is nothing to gain.
        if not idle or (len(idle) == len(choice) and whole.median > 1):
            return point
        kept = {name: candidate for name, candidate in choice.items() if name not in idle}
        found = self._curve.join(self._curve.known(kept))
        # Noise may make a single layer look idle, so the plan without all of them must be as fast.
        models = [fitted.model, self._measurements.fitted(found).model]
        whole, without = self._measurements.workshop.speedups(models)
        if found.measured.speedup is None and kept:
            found.measured.speedup = without
        good = (
            without.median >= whole.median
            and self._measurements.is_accurate(found, budget)
            and self._measurements.is_fast(found, budget)
        )
        if good:
            self.idle = frozenset(idle)
        return found if good else point


_ADVICE_ON_NOISE = "measure with more `runs` while the machine is idle, "


def unmet(budget: Budget, curve: Curve) -> DemandNotMetError:
    """Return the error that no plan meets a budget: how near plans come to it, and what they do meet."""
    return DemandNotMetError(
        _shortfall(budget, curve.points), curve.to_json(None), within_reach(budget, curve.points)
    )


def within_reach(budget: Budget, points: Sequence[Point]) -> dict[str, float]:
    """Return the demand to relax, by name, and a value of it at which one of the plans meets the budget.

    That is the speed-up, where one is demanded that no plan has which keeps within the allowed drop; and that
    drop, where no plan is both fast enough and keeps within it. None is returned of what was not measured, or
    may be noise.
    """
    most, least = budget.max_drop, budget.min_speedup
    timed = [
        (point.measured.speedup.median, point.measured.accuracy)
        for point in points
        if point.measured.speedup is not None and point.measured.speedup.significant and point.plan.choice
    ]
    within = [speed for speed, drop in timed if most is None or (drop is not None and drop.drop <= most)]
    if least is not None and max(within, default=1.0) * _SURELY > 1:
        return {"min_speedup": math.floor(100 * _SURELY * max(within)) / 100}
    drops = [drop.drop for speed, drop in timed if drop is not None and speed >= (least or 0.0)]
    if most is not None and drops:
        return {"max_drop": math.ceil(100 * min(drops)) / 100}
    return {}


def _shortfall(budget: Budget, points: Sequence[Point]) -> str:
    """Return the message that no plan meets a budget, with how near the plans on the curve come to it."""
    names = ("rank", "target_macs", "target_params", "max_drop", "min_speedup")
    demands = [f"`{name}` {getattr(budget, name):g}" for name in names if getattr(budget, name) is not None]
    deltas = [point.measured.accuracy for point in points if point.measured.accuracy is not None]
    timed = [point.measured.speedup for point in points if point.measured.speedup is not None]
    fastest = max(timed, key=lambda speedup: speedup.median, default=None)
    noise = "" if fastest is None or fastest.significant else ", within noise"
    reached = [
        *([f"smallest drop {_smallest(deltas)} of {len(deltas)} measured"] if deltas else []),
        *([f"largest speed-up {fastest.median:.2f}× of {len(timed)} timed{noise}"] if fastest else []),
        f"fewest MACs {min(point.plan.macs for point in points):,}",
    ]
    return (
        f"no plan meets {' and '.join(demands)} ({', '.join(reached)} among {len(points)} plans); "
        f"{_ADVICE_ON_NOISE if noise and budget.min_speedup else ''}relax a demand, pass `finetune`, or "
        "`nearest` for the plan that comes nearest"
    )


def _smallest(deltas: Sequence[MetricDelta]) -> str:
    return min(deltas, key=lambda delta: delta.drop).written_drop
