"""Which plan to deliver: the trade-off curve, looked at where the budget is decided."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from sepconvert.allocate import Choice, macs_of, spread
from sepconvert.approximation import Fitted, LayerSurvey, hull
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
                "mode approx: needs a budget; pass --rank, --target-macs or --min-speedup, "
                "or --data to hold accuracy"
            )
        return Budget(max_drop=1.0)


@dataclass
class Point:
    """One plan on the trade-off curve, and what was found out about it so far."""

    choice: Choice
    macs: int
    expected: float  # divergence, if errors of layers added up
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
        dense = {name: each.dense_macs for name, each in self.surveyed.items()}
        if budget.rank is not None:
            choice = {name: each.candidates()[0] for name, each in self.surveyed.items()}
            found: list[Choice] = [choice]
        else:
            found = hull(self.surveyed)
        costs = [macs_of(self.total_macs, dense, choice) for choice in found]
        plans = [
            Point(choice, cost, sum(each.error for each in choice.values()))
            for choice, cost in zip(found, costs, strict=True)
        ]
        if budget.rank is not None:
            self.points = plans
        else:
            self.points = [plans[index] for index in spread(found, costs, _POINTS)]
        point = self._within(budget, plans)
        if point is None or not self._fast_enough(point, budget):
            raise DemandNotMetError(_shortfall(budget, self.points), curve_table(self.to_json(None)))
        self._carried_out(point)
        return point

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """The curve, for the report."""
        return [point.to_json(self.total_macs, point is delivered) for point in self.points]

    def _within(self, budget: Budget, plans: Sequence[Point]) -> Point | None:
        if budget.rank is not None:
            return plans[0] if self._accurate_enough(plans[0], budget) else None
        if budget.target_macs is not None:
            limit = budget.target_macs * self.total_macs
            fits = next((point for point in plans if point.macs <= limit), None)
            if fits is not None and fits not in self.points:
                self.points = sorted([*self.points, fits], key=lambda point: -point.macs)
            return fits if fits is not None and self._accurate_enough(fits, budget) else None
        for point in self.progress(self.points, "trade-off curve"):
            self._carried_out(point)
        if budget.max_drop is not None:
            return self._last(lambda point: self._accurate_enough(point, budget), plans)
        # The least divergence that is fast enough: the plan before the first one of the cheaper that is.
        return self._first(lambda point: self._fast_enough(point, budget), plans)

    def _last(self, good: Callable[[Point], bool], plans: Sequence[Point]) -> Point | None:
        """The cheapest plan that is good, if the cheaper is the worse; nothing replaced is good."""
        low, high = 0, len(self.points)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(self.points[middle]) else (low, middle)
        best = self.points[low]
        for _ in range(_REFINEMENTS):
            between = self._between(best, plans)
            if between is None:
                break
            if good(between):
                best = between
        return best

    def _first(self, good: Callable[[Point], bool], plans: Sequence[Point]) -> Point | None:
        low, high = -1, len(self.points) - 1
        if not good(self.points[high]):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if good(self.points[middle]) else (middle, high)
        return self.points[high]

    def _between(self, point: Point, plans: Sequence[Point]) -> Point | None:
        """A plan halfway to the next cheaper point of the curve, which it joins."""
        index = self.points.index(point)
        if index + 1 == len(self.points):
            return None
        first, last = plans.index(point), plans.index(self.points[index + 1])
        if last - first < 2:
            return None
        middle = plans[(first + last) // 2]
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
