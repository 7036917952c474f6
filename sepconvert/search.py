"""Which plan to deliver: the trade-off curve, looked at where the budget is decided."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sepconvert.allocate import Choice, allocate, cost_of
from sepconvert.approximation import Fitted, LayerSurvey
from sepconvert.errors import DemandNotMetError, SepconvertError
from sepconvert.measure.accuracy import AccuracyDelta
from sepconvert.measure.latency import Speedup
from sepconvert.progress import Progress
from sepconvert.report.terminal import curve_table

_POINTS = 8
_REFINEMENTS = 2


@dataclass(frozen=True)
class Budget:
    """What is demanded of a plan; None where nothing is."""

    rank: int | None = None
    target_macs: float | None = None  # most MACs, as a share of the original's
    min_speedup: float | None = None  # least measured latency ratio
    max_drop: float | None = None  # largest measured drop of top-1 accuracy, in percentage points

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, low, high, expected in (
            ("--rank", self.rank, 1, math.inf, "a channel multiplier of 1 or more"),
            ("--target-macs", self.target_macs, 1e-9, 1, "a share of the MACs, above 0 and up to 1"),
            ("--min-speedup", self.min_speedup, 1e-9, math.inf, "a ratio above 0"),
            ("--max-drop", self.max_drop, 0, 100, "percentage points, 0 to 100"),
        ):
            if value is not None and not low <= value <= high:
                raise SepconvertError(f"{name} {value:g}: expected {expected}")
        if self.rank is not None and self.target_macs is not None:
            raise SepconvertError("--rank and --target-macs: each fixes the plan by itself; pass one of them")

    def or_default(self, *, labelled: bool) -> "Budget":
        """With a drop of one point where nothing is demanded.

        Raises:
            SepconvertError: that needs labelled data.
        """
        if self != Budget():
            return self
        if not labelled:
            raise SepconvertError(
                "mode: approx and auto need a budget; pass --rank, --target-macs or --min-speedup, "
                "or --data to hold accuracy"
            )
        return Budget(max_drop=1.0)


@dataclass
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

    def to_json(self, total_macs: int, delivered: bool) -> dict[str, Any]:
        """One entry of the curve in the report."""
        heldout = None if self.fitted is None else self.fitted.heldout
        return {
            "macs": self.macs,
            "macs_ratio": total_macs / self.macs if self.macs else None,
            "converted": len(self.choice),
            "expected_divergence": self.expected,
            "lower_bound": self.bound,
            "heldout": None if heldout is None else asdict(heldout),
            "batchnorm_reestimated": self.fitted is not None and self.fitted.batchnorm,
            "accuracy_drop_pp": None
            if self.accuracy is None
            else self.accuracy.to_dict()["accuracy_drop_pp"],
            "latency_speedup": None if self.speedup is None else self.speedup.to_dict(),
            "delivered": delivered,
            "ranks": {name: [each.scheme, each.rank] for name, each in self.choice.items()},
        }


@dataclass
class Search:
    """Plans are carried out and measured when asked for, each once."""

    surveyed: Mapping[str, LayerSurvey]
    total_macs: int
    carry_out: Callable[[Choice], Fitted]
    accuracy: Callable[[nn.Module], AccuracyDelta] | None  # of a model on the evaluation data
    speedup: Callable[[nn.Module], Speedup] | None
    progress: Progress
    points: list[Point] = field(default_factory=list)

    def run(self, budget: Budget) -> Point:
        """The plan to deliver; `points` is the curve then.

        Raises:
            DemandNotMetError: with the curve.
        """
        if budget.rank is not None:
            self.points = [self._point({n: each.candidates()[0] for n, each in self.surveyed.items()}, 0.0)]
            last = self.points[0]
            point = last if self._accurate_enough(last, budget) else None
        elif budget.target_macs is not None:
            self.points = self._curve()
            point = self._of_macs(budget)
        else:
            self.points = self._curve()
            for each in self.progress(self.points, "trade-off curve"):
                self._carried_out(each)
            if budget.max_drop is not None:
                point = self._last(lambda each: self._accurate_enough(each, budget))
            else:
                point = self._first(lambda each: self._fast_enough(each, budget))
        if point is None or not self._fast_enough(point, budget):
            raise DemandNotMetError(_shortfall(budget, self.points), curve_table(self.to_json(None)))
        self._carried_out(point)
        return point

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """The curve, for the report."""
        return [point.to_json(self.total_macs, point is delivered) for point in self.points]

    @property
    def _dense(self) -> dict[str, float]:
        return {name: each.dense_cost for name, each in self.surveyed.items()}

    def _best(self, cost: float) -> Point | None:
        """The plan of least expected divergence within a cost of the layers."""
        offered = {name: each.candidates() for name, each in self.surveyed.items()}
        found = allocate(self._dense, offered, cost)
        return None if found is None else self._point(found.choice, found.bound)

    def _point(self, choice: Choice, bound: float) -> Point:
        saved = sum(self.surveyed[name].macs_saved(each) for name, each in choice.items())
        return Point(
            choice,
            self.total_macs - saved,
            cost_of(self._dense, choice),
            sum(each.error for each in choice.values()),
            bound,
        )

    def _curve(self) -> list[Point]:
        """Plans at about even ratios of cost, from nothing replaced to the cheapest."""
        first = sum(self._dense.values())
        last = sum(each.least_cost for each in self.surveyed.values())
        ratio = last / first if first else 1.0
        found = [self._best(first * ratio ** (step / (_POINTS - 1))) for step in range(_POINTS - 1)]
        points = [point for point in (*found, self._best(last)) if point is not None]
        return [point for i, point in enumerate(points) if not i or point.choice != points[i - 1].choice]

    def _of_macs(self, budget: Budget) -> Point | None:
        """The best plan within a share of the MACs, which joins the curve."""
        limit = (budget.target_macs or 0) * self.total_macs
        point = self._best(limit - self.total_macs + sum(self._dense.values()))
        if point is None or point.macs > limit:
            return None
        same = next((each for each in self.points if each.choice == point.choice), None)
        if same is None:
            self.points = sorted([*self.points, point], key=lambda each: -each.cost)
        point = same or point
        return point if self._accurate_enough(point, budget) else None

    def _last(self, good: Callable[[Point], bool]) -> Point:
        """The cheapest plan that is good, if the cheaper is the worse; nothing replaced is good."""
        low, high = 0, len(self.points)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(self.points[middle]) else (low, middle)
        best = self.points[low]
        for _ in range(_REFINEMENTS):
            between = self._between(best)
            if between is None:
                break
            if good(between):
                best = between
        return best

    def _first(self, good: Callable[[Point], bool]) -> Point | None:
        """The dearest plan that is good, if the cheaper is the better."""
        low, high = -1, len(self.points) - 1
        if not good(self.points[high]):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if good(self.points[middle]) else (middle, high)
        best = self.points[high]
        for _ in range(_REFINEMENTS):
            index = self.points.index(best)
            between = self._between(self.points[index - 1]) if index else None
            if between is None:
                break
            if good(between):
                best = between
        return best

    def _between(self, point: Point) -> Point | None:
        """A plan of a cost halfway to the next cheaper point of the curve, which it joins."""
        index = self.points.index(point)
        if index + 1 == len(self.points):
            return None
        cheaper = self.points[index + 1]
        middle = self._best((point.cost + cheaper.cost) / 2)
        if middle is None or middle.choice in (point.choice, cheaper.choice):
            return None
        self.points.insert(index + 1, middle)
        return middle

    def _carried_out(self, point: Point) -> Fitted:
        if point.fitted is None:
            point.fitted = self.carry_out(point.choice)
        return point.fitted

    def _accurate_enough(self, point: Point, budget: Budget) -> bool:
        if budget.max_drop is None:
            return True
        if self.accuracy is None:
            raise SepconvertError("--max-drop: needs labelled data to measure the drop on; pass --data")
        if point.accuracy is None:
            point.accuracy = self.accuracy(self._carried_out(point).model)
        return point.accuracy.drop_pp <= budget.max_drop

    def _fast_enough(self, point: Point, budget: Budget) -> bool:
        if budget.min_speedup is None:
            return True
        if self.speedup is None:
            raise SepconvertError("--min-speedup: needs timed runs; leave out --runs 0")
        if point.speedup is None:
            point.speedup = self.speedup(self._carried_out(point).model)
        return point.speedup.median >= budget.min_speedup


def _shortfall(budget: Budget, points: Sequence[Point]) -> str:
    demands = [
        f"{option} {value:g}"
        for option, value in (
            ("--rank", budget.rank),
            ("--target-macs", budget.target_macs),
            ("--max-drop", budget.max_drop),
            ("--min-speedup", budget.min_speedup),
        )
        if value is not None
    ]
    drops = [point.accuracy.drop_pp for point in points if point.accuracy is not None]
    speeds = [point.speedup.median for point in points if point.speedup is not None]
    reached = [
        *([f"smallest drop {min(drops):.2f} pp"] if drops else []),
        *([f"largest speed-up {max(speeds):.2f}×"] if speeds else []),
        f"fewest MACs {min(point.macs for point in points):,}",
    ]
    return (
        f"no plan meets {' and '.join(demands)} ({', '.join(reached)} among {len(points)} plans); "
        "relax a demand, or add --finetune"
    )
