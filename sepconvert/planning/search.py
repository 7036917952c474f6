"""Which plan to deliver: the trade-off curve, looked at where the budget is decided."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options import Budget
from sepconvert.base.progress import Progress
from sepconvert.factorize.structures import Form
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics import AccuracyDelta
from sepconvert.planning.allocate import Allocation, Choice, allocate, cost_of
from sepconvert.planning.carry_out import Fitted
from sepconvert.planning.survey import LayerSurvey

_POINTS = 7


_CARRIED_OUT = 6  # that the curve shows at least, if it has as many


_REFINEMENTS = 2


_POLISHES = 1


_DOUBTFUL = 4


_LESSONS, _SURPRISE = 2, 8.0  # plans to learn forms' errors from, and the divergence, over what was expected


_MOST_ASTRAY = 2.0  # by which layers together may save more or less than the sum of each


_PRIOR = 0.03  # noise of a plan's time, relative, over that of the sum of what its layers save


_NEARLY = 0.99


@dataclass(eq=False)
class Point:
    """One plan on the trade-off curve, and what was found out about it so far."""

    choice: Choice
    macs: int
    cost: float  # of all layers in the survey, in its unit
    expected: float  # divergence, if errors of layers added up
    bound: float  # what no plan of this cost can go below, if they did
    fitted: Fitted | None = None
    accuracy: AccuracyDelta | None = None
    speedup: Speedup | None = None
    predicted: float | None = None  # speed-up, if times of layers added up

    @property
    def forms(self) -> dict[str, Form]:
        """What the plan is, whatever was learnt of its errors."""
        return {name: each.form for name, each in self.choice.items()}

    def to_json(self, total_macs: int, delivered: bool) -> dict[str, Any]:
        """One entry of the curve in the report."""
        heldout = None if self.fitted is None else self.fitted.heldout
        return {
            "macs": self.macs,
            "macs_ratio": total_macs / self.macs if self.macs else None,
            "converted": len(self.choice),
            "cost": self.cost,
            "expected_divergence": self.expected,
            "lower_bound": self.bound,
            "heldout": None if heldout is None else asdict(heldout),
            "batchnorm_reestimated": self.fitted is not None and self.fitted.batchnorm,
            "accuracy_drop_pp": None
            if self.accuracy is None
            else self.accuracy.to_dict()["accuracy_drop_pp"],
            "predicted_speedup": self.predicted,
            "latency_speedup": None if self.speedup is None else self.speedup.to_dict(),
            "delivered": delivered,
            "ranks": {name: list(form) for name, form in self.forms.items()},
        }


@dataclass
class Search:
    """Plans are carried out and measured when asked for, each once."""

    surveyed: Mapping[str, LayerSurvey]
    total_macs: int
    total: float  # cost of the original, in the unit of the survey
    carry_out: Callable[[Choice], Fitted]
    sketched: Callable[[Choice], nn.Module]  # a plan with the factors of the survey, to be timed
    restored: Callable[[Fitted, str | None], nn.Module]  # a plan's model, with one layer as it was
    divergence: Callable[[nn.Module], float] | None  # from the original on images held out
    accuracy: Callable[[nn.Module], AccuracyDelta] | None  # of a model on the evaluation data
    speedups: Callable[[Sequence[nn.Module]], list[Speedup]] | None  # of models timed together
    timed: bool  # the unit of cost is time
    progress: Progress
    saved_macs: int = 0  # by what was merged, whatever the plan
    saved: float = 0.0  # and cost
    points: list[Point] = field(default_factory=list)

    def run(self, budget: Budget, refinements: int = _REFINEMENTS) -> Point:
        """The plan to deliver; `points` is the curve then.

        `refinements`: plans that are looked for between the one found and the next cheaper one.

        Raises:
            DemandNotMetError: with the curve.
        """
        if budget.rank is not None:
            point = self._of_rank(budget)
        else:
            if not self.points:
                if budget.share is None:
                    self._learn()
                self._draw_curve()
            point = self._chosen(budget, refinements)
            if point is not None or budget.share is None:
                self._fill_curve(point)
                self._time_carried_out()
            if point is None and budget.share is None and budget.max_drop is None:
                point = self._known_fast(budget)
            point = self._fastest(point, budget)
        if point is None or not self._fast_enough(point, budget):
            raise DemandNotMetError(_shortfall(budget, self.points), self.to_json(None))
        point = self._paying(point, budget) if self.timed else point
        fitted = self.carried_out(point)
        if self.accuracy is not None and point.accuracy is None:
            point.accuracy = self.accuracy(fitted.model)
        return point

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """The curve, for the report."""
        return [point.to_json(self.total_macs, point is delivered) for point in self.points]

    # Plans

    @property
    def _dense(self) -> dict[str, float]:
        return {name: each.cost for name, each in self.surveyed.items()}

    @property
    def _rest(self) -> float:
        """Cost of all but the layers in the survey."""
        return self.total - self.saved - sum(self._dense.values())

    @property
    def _least(self) -> float:
        return sum(each.least_cost for each in self.surveyed.values())

    @property
    def _middle(self) -> float:
        return math.sqrt(sum(self._dense.values()) * self._least)

    def _best(self, cost: float) -> Point | None:
        """The plan of least expected divergence within a cost of the layers."""
        found = self._allocated(cost)
        return None if found is None else self._point(found.choice, found.bound)

    def _allocated(self, cost: float) -> Allocation | None:
        offered = {name: each.candidates() for name, each in self.surveyed.items()}
        return allocate(self._dense, offered, cost)

    def _known(self, choice: Choice) -> Point:
        """A plan that was found otherwise, with what none of its cost can go below."""
        best = self._allocated(cost_of(self._dense, choice))
        return self._point(choice, 0.0 if best is None else best.bound)

    def _point(self, choice: Choice, bound: float) -> Point:
        layers = ((self.surveyed[name], each) for name, each in choice.items())
        saved = sum(layer.macs - layer.offer(each).macs for layer, each in layers)
        cost = cost_of(self._dense, choice)
        return Point(
            choice,
            self.total_macs - self.saved_macs - saved,
            cost,
            sum(each.error for each in choice.values()),
            bound,
            predicted=self.total / (self._rest + cost) if self.timed else None,
        )

    def _draw_curve(self) -> None:
        """Plans at about even ratios of cost, from nothing replaced to the cheapest."""
        first, last = sum(self._dense.values()), self._least
        ratio = last / first if first else 1.0
        costs = [first * ratio ** (step / (_POINTS - 1)) for step in range(_POINTS - 1)]
        for cost in (*costs, last):
            found = self._best(cost)
            if found is not None:
                self._join(found)

    def _fill_curve(self, point: Point | None) -> None:
        """Carry out more plans, of costs as near as can be to that of the plan that was found."""
        found = point or self.points[-1]
        converting = [each for each in self.points if each.choice]
        waiting = [each for each in converting if each.fitted is None]
        lacking = max(0, _CARRIED_OUT - (len(converting) - len(waiting)))
        nearest = sorted(waiting, key=lambda each: abs(each.cost - found.cost))[:lacking]
        for each in self.progress(nearest, "trade-off curve"):
            self.carried_out(each)

    def _join(self, point: Point) -> Point:
        """Put a plan on the curve, by falling cost; of equal plans the one that is there."""
        same = next((each for each in self.points if each.forms == point.forms), None)
        if same is None:
            self.points = sorted([*self.points, point], key=lambda each: -each.cost)
        return same or point

    def _revise(self, point: Point) -> None:
        """What is expected of a plan, by what is known now."""
        now = self._known(
            {
                name: next(now for now in self.surveyed[name].candidates() if now.form == each.form)
                for name, each in point.choice.items()
            }
        )
        point.choice, point.cost, point.predicted = now.choice, now.cost, now.predicted
        point.expected, point.bound = now.expected, now.bound

    @property
    def _frontier(self) -> list[Point]:
        """Plans by falling cost, without those that another undercuts in cost and expected divergence."""
        found: list[Point] = []
        for point in self.points:
            while len(found) > 1 and found[-1].expected >= point.expected:
                found.pop()
            found.append(point)
        return found

    def _learn(self) -> None:
        """Correct what is known of layers by two whole plans, one of them the cheapest."""
        for cost in (self._middle, self._least):
            found = self._best(cost)
            if found is not None and found.choice:
                self._join(found)
        if self.points:
            self._learn_from(self.points[0])
            self._learn_gain()

    def _learn_from(self, point: Point) -> None:
        """Correct the sensitivities by what each layer's errors do where all the others are replaced too.

        Errors do not add up, and inputs of a layer are other than in the original.
        """
        if self.divergence is None or not point.choice:
            return
        fitted = self.carried_out(point)
        reached = self.divergence(self.restored(fitted, None))
        corrected = dict(self.surveyed)
        for name in self.progress(list(point.choice), "sensitivities among replaced layers"):
            brought = reached - self.divergence(self.restored(fitted, name))
            error = self.surveyed[name].offer(point.choice[name]).error
            if error > 0 and brought > 0:
                # What is measured here is as noisy as what was: their geometric mean.
                before = self.surveyed[name].sensitivity
                sensitivity = math.sqrt(before * brought / error) if before else brought / error
                corrected[name] = replace(self.surveyed[name], sensitivity=sensitivity)
        self._learnt(corrected)

    def _learnt(self, surveyed: Mapping[str, LayerSurvey]) -> None:
        self.surveyed = surveyed
        for each in self.points:
            self._revise(each)

    def _learn_forms(self) -> bool:
        """Correct errors of forms by the plan that surprises most, and draw a new curve; False if none does.

        Of the forms of a layer one was measured; the others follow while the divergence is quadratic in their
        errors. A form that drops a whole direction of the outputs may be far beyond that.
        """
        astray = {
            point: point.fitted.heldout.divergence / point.expected
            for point in self.points
            if point.fitted is not None and point.fitted.heldout is not None and point.expected > 0
        }
        point = max(astray, key=astray.__getitem__, default=None)
        if point is None or self.divergence is None or astray[point] < _SURPRISE:
            return False
        fitted = self.carried_out(point)
        reached = self.divergence(self.restored(fitted, None))
        times = {}
        for name, each in self.progress(list(point.choice.items()), "errors of forms among replaced layers"):
            brought = reached - self.divergence(self.restored(fitted, name))
            if brought > each.error > 0:
                times[name] = brought / each.error
        if not times:
            return False
        self.points = [each for each in self.points if each.fitted or each.accuracy or each.speedup]
        worse = {
            name: self.surveyed[name].with_excess(point.choice[name].form, each)
            for name, each in times.items()
        }
        self._learnt({**self.surveyed, **worse})
        self._draw_curve()
        return True

    def _learn_gain(self) -> None:
        """Correct what forms save by what whole plans do.

        Timed by themselves, layers have surroundings in all their times, which cancel in differences; among
        other layers all differences may be larger or smaller alike. By least squares, of relative errors of
        the time of a plan, with a prior that they are not.
        """
        if not self.timed:
            return
        self._time(self.points)
        dense, squares, products = self._dense, _PRIOR**2, _PRIOR**2
        for point in self.points:
            assert point.speedup is not None  # noqa: S101  (`_time` saw to it)
            time = self.total / point.speedup.median
            saved = (sum(dense.values()) - point.cost) / time
            squares += saved**2
            products += saved * (self.total - self.saved - time) / time
        # No form takes less than nothing.
        most = [
            _NEARLY * each.cost / (each.cost - each.least_cost)
            for each in self.surveyed.values()
            if each.least_cost < each.cost
        ]
        gain = min(max(products / squares, 1 / _MOST_ASTRAY), _MOST_ASTRAY, *most)
        self._learnt({name: each.at_gain(gain) for name, each in self.surveyed.items()})

    # Choice

    def _of_rank(self, budget: Budget) -> Point | None:
        # Of the orders of the two factors the one that costs less.
        self.points = [self._point({n: each.candidates()[-1] for n, each in self.surveyed.items()}, 0.0)]
        point = self.points[0]
        return point if self._accurate_enough(point, budget) else None

    def _of_share(self, share: float, budget: Budget) -> Point | None:
        """The best plan within a share of the cost, which joins the curve."""
        point = self._best(share * self.total - self._rest)
        if point is None:
            return None
        point = self._join(point)
        return point if self._accurate_enough(point, budget) else None

    def _chosen(self, budget: Budget, refinements: int) -> Point | None:
        """The plan that meets the budget, chosen anew where plans do what was not expected of them."""
        point = self._searched(budget, refinements)
        for _ in range(_LESSONS):
            if point is not None:
                self.carried_out(point)
            if not self._learn_forms():
                break
            point = self._searched(budget, refinements)
        return point

    def _searched(self, budget: Budget, refinements: int) -> Point | None:
        """The plan that meets the budget and goes furthest, or errs least where speed alone is demanded."""
        if budget.share is not None:
            return self._of_share(budget.share, budget)
        if budget.max_drop is None:
            # Of plans near the demand some meet it by chance, and would be the first that do.
            surely = self._first(lambda each: self._fast_enough(each, budget, surely=True), refinements)
            return surely or self._first(lambda each: self._fast_enough(each, budget), refinements)

        def good(point: Point) -> bool:
            return self._accurate_enough(point, budget)

        best = self._last(good, refinements)
        for _ in range(_POLISHES):
            self._learn_from(best)
            better = self._beyond(best, good)
            if better is best:
                break
            best = better
        return best

    def _beyond(self, best: Point, good: Callable[[Point], bool]) -> Point:
        """A cheaper plan that is good too, by what was learnt."""
        for share in (0.97, 0.93, 0.88):
            found = self._best(best.cost * share)
            if found is None:
                break
            point = self._join(found)
            if not good(point):
                break
            best = point
        return best

    def _last(self, good: Callable[[Point], bool], refinements: int) -> Point:
        """The cheapest plan that is good, if the cheaper is the worse; nothing replaced is good."""
        plans = self._frontier
        low, high = 0, len(plans)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(plans[middle]) else (low, middle)
        best = plans[low]
        for _ in range(refinements):
            between = self._between(best)
            if between is None:
                break
            if good(between):
                best = between
        return best

    def _first(self, good: Callable[[Point], bool], refinements: int) -> Point | None:
        """The dearest plan that is good, if the cheaper is the better."""
        plans = self._frontier
        low, high = -1, len(plans) - 1
        if not good(plans[high]):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if good(plans[middle]) else (middle, high)
        best = plans[high]
        for _ in range(refinements):
            dearer = [each for each in self._frontier if each.cost > best.cost]
            between = self._between(dearer[-1]) if dearer else None
            if between is None:
                break
            if good(between):
                best = between
        return best

    def _known_fast(self, budget: Budget) -> Point | None:
        """Of all plans that were timed fast enough the dearest: a cheaper one need not be a faster one."""
        timed = [each for each in self.points if each.choice and each.speedup is not None]
        fast = [each for each in timed if self._fast_enough(each, budget)]
        return max(fast, key=lambda each: each.cost, default=None)

    def _fastest(self, point: Point | None, budget: Budget) -> Point | None:
        """Of all plans that were carried out and are within the budget of accuracy the one timed fastest."""
        if point is None or budget.max_drop is None or not self.timed:
            return point
        known = [
            each
            for each in self.points
            if each.accuracy is not None
            and each.accuracy.drop <= budget.max_drop
            and each.speedup is not None
        ]
        return max(known, key=lambda each: each.speedup.median if each.speedup else 0.0, default=point)

    def _between(self, point: Point) -> Point | None:
        """A plan of a cost halfway to the next cheaper point of the curve, which it joins."""
        cheaper = next((each for each in self._frontier if each.cost < point.cost), None)
        if cheaper is None:
            return None
        middle = self._best((point.cost + cheaper.cost) / 2)
        if middle is None or middle.forms in (point.forms, cheaper.forms):
            return None
        return self._join(middle)

    def _paying(self, point: Point, budget: Budget) -> Point:
        """The plan without layers that, timed in the whole model, bring nothing; of a slower one, none."""
        assert self.speedups is not None  # noqa: S101  (plans are timed)
        fitted = self.carried_out(point)
        if not point.choice:
            return point
        saved = {name: self.surveyed[name].cost - each.cost for name, each in point.choice.items()}
        doubtful = sorted(saved, key=saved.__getitem__)[:_DOUBTFUL]
        whole, *others = self.speedups([self.restored(fitted, name) for name in (None, *doubtful)])
        if whole.significant and whole.median < 1:
            if budget.min_speedup is not None and budget.min_speedup > 1:
                raise DemandNotMetError(
                    f"--min-speedup {budget.min_speedup:g}: the plan that met it is {whole.median:.2f}× as "
                    "fast when timed again; measure on an idle machine with more --runs, or relax the demand"
                )
            return self._join(self._known({}))
        idle = [name for name, each in zip(doubtful, others, strict=True) if each.median >= whole.median]
        if not idle:
            return point
        kept = {name: each for name, each in point.choice.items() if name not in idle}
        found = self._join(self._known(kept))
        # Layer by layer noise may call idle what is not: the plan without all of them must hold its own.
        whole, without = self.speedups([fitted.model, self.carried_out(found).model])
        if found.speedup is None:
            found.speedup = without
        faster = without.median >= whole.median
        enough = faster and self._accurate_enough(found, budget) and self._fast_enough(found, budget)
        return found if enough else point

    # Measurements

    def carried_out(self, point: Point) -> Fitted:
        """The plan at a point, fitted once."""
        if point.fitted is None:
            point.fitted = self.carry_out(point.choice)
        return point.fitted

    def _time_carried_out(self) -> None:
        """What is on the curve: it is drawn over what plans take."""
        waiting = [each for each in self.points if each.fitted is not None and each.speedup is None]
        if self.speedups is not None and waiting:
            self._time(waiting)

    def _time(self, points: Sequence[Point]) -> None:
        assert self.speedups is not None  # noqa: S101  (plans are timed)
        # What a plan takes does not hang on what its factors are fitted to.
        models = [self.sketched(each.choice) if each.fitted is None else each.fitted.model for each in points]
        found = self.speedups(models)
        for point, speedup in zip(points, found, strict=True):
            point.speedup = speedup

    def _accurate_enough(self, point: Point, budget: Budget) -> bool:
        if budget.max_drop is None:
            return True
        assert self.accuracy is not None  # noqa: S101  (`Budget.or_default` saw to it)
        if point.accuracy is None:
            point.accuracy = self.accuracy(self.carried_out(point).model)
        return point.accuracy.drop <= budget.max_drop

    def _fast_enough(self, point: Point, budget: Budget, *, surely: bool = False) -> bool:
        """`surely`: beyond the interval of the measurement."""
        if budget.min_speedup is None:
            return True
        if point.speedup is None:
            self._time([point])
        assert point.speedup is not None  # noqa: S101  (`_time` saw to it)
        return (point.speedup.ci95.lo if surely else point.speedup.median) >= budget.min_speedup


def _shortfall(budget: Budget, points: Sequence[Point]) -> str:
    demands = [
        f"{option} {value:g}"
        for option, value in (
            ("--rank", budget.rank),
            ("--target-macs", budget.target_macs),
            ("--target-params", budget.target_params),
            ("--max-drop", budget.max_drop),
            ("--min-speedup", budget.min_speedup),
        )
        if value is not None
    ]
    drops = [point.accuracy.drop for point in points if point.accuracy is not None]
    speeds = [point.speedup.median for point in points if point.speedup is not None]
    reached = [
        *([f"smallest drop {min(drops):.2f} pp of {len(drops)} measured"] if drops else []),
        *([f"largest speed-up {max(speeds):.2f}× of {len(speeds)} timed"] if speeds else []),
        f"fewest MACs {min(point.macs for point in points):,}",
    ]
    return (
        f"no plan meets {' and '.join(demands)} ({', '.join(reached)} among {len(points)} plans); "
        "relax a demand, or add --finetune"
    )
