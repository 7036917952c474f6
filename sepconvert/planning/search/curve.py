"""The trade-off curve: plans of falling cost and rising divergence, and what was measured of them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sepconvert.factorize.structures import Form
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.planning.allocate import Allocation, Candidate, Choice, allocate, cost_of, replaced
from sepconvert.planning.fits.survey import LayerSurvey
from sepconvert.planning.forms import Unit
from sepconvert.planning.workshop import Fitted

_AS_IT_IS = "int8"  # scheme, within an allocation, of a layer that is not replaced


_POINTS = 7  # plans that a curve is drawn with, at even ratios of cost


@dataclass(frozen=True)
class Totals:
    """Costs of the whole original, and what merging pairs of convolutions saves of them in every plan."""

    macs: int
    cost: float  # in `unit`, as all costs of layers and plans
    unit: Unit = "macs"
    saved_macs: int = 0
    saved_cost: float = 0.0
    floor: float = 0.0  # divergence of the original itself, in the form that it is deployed in

    @property
    def by_time(self) -> bool:
        """Whether costs are measured times, which whole plans may contradict."""
        return self.unit == "milliseconds"


@dataclass(frozen=True)
class Plan:
    """A form for each layer that is replaced, and the consequences that are expected."""

    choice: Choice
    macs: int  # of the whole model
    cost: float  # of all layers in the survey
    expected: float  # divergence, if the errors of the layers add up
    bound: float  # least expected divergence that any plan of this cost could have
    predicted: float | None  # speed-up, if the times of the layers add up; None if costs are no times

    @property
    def forms(self) -> dict[str, Form]:
        """The replaced layers and their forms, which stay the same whatever is learnt about their errors."""
        return {name: candidate.form for name, candidate in self.choice.items()}


@dataclass
class Measurement:
    """Measurements of one plan; None for those that have not been made."""

    fitted: Fitted | None = None
    accuracy: MetricDelta | None = None
    speedup: Speedup | None = None

    def __bool__(self) -> bool:
        """Whether anything has been measured."""
        return any(each is not None for each in (self.fitted, self.accuracy, self.speedup))


@dataclass(eq=False)
class Point:
    """A plan on the curve. The plan is exchanged when more is learnt about the layers; its forms are not."""

    plan: Plan
    measured: Measurement = field(default_factory=Measurement)

    def to_json(self, total_macs: int, delivered: bool) -> dict[str, Any]:
        """Return the point's entry in the report's `approximation.curve`."""
        plan, fitted = self.plan, self.measured.fitted
        heldout = None if fitted is None else fitted.heldout
        accuracy, speedup = self.measured.accuracy, self.measured.speedup
        return {
            "macs": plan.macs,
            "macs_ratio": total_macs / plan.macs if plan.macs else None,
            "converted": len(replaced(plan.choice)),
            "cost": plan.cost,
            "expected_divergence": plan.expected,
            "lower_bound": plan.bound,
            "heldout": None if heldout is None else asdict(heldout),
            "batchnorm_reestimated": fitted is not None and fitted.batchnorm,
            "drop": None if accuracy is None else accuracy.drop_to_dict(),
            "accuracy_drop_pp": None if accuracy is None else accuracy.to_dict()["accuracy_drop_pp"],
            "predicted_speedup": plan.predicted,
            "latency_speedup": None if speedup is None else speedup.to_dict(),
            "delivered": delivered,
            "ranks": {name: list(form) for name, form in plan.forms.items()},
        }


class Curve:
    """Plans by falling cost, each of them there once, and the survey that they are made from."""

    def __init__(self, surveyed: Mapping[str, LayerSurvey], totals: Totals) -> None:
        self.surveyed, self.totals = surveyed, totals
        self.points: list[Point] = []

    @property
    def dense_cost(self) -> float:
        """Cost of all layers in the survey as they are."""
        return sum(self._dense.values())

    @property
    def least_cost(self) -> float:
        """Cost of all layers in their cheapest forms."""
        return sum(layer.least_cost for layer in self.surveyed.values())

    @property
    def middle_cost(self) -> float:
        """Geometric mean of `dense_cost` and `least_cost`."""
        return math.sqrt(self.dense_cost * self.least_cost)

    @property
    def rest(self) -> float:
        """Cost of everything but the layers in the survey."""
        return self.totals.cost - self.totals.saved_cost - self.dense_cost

    @property
    def _dense(self) -> dict[str, float]:
        return {name: layer.cost for name, layer in self.surveyed.items()}

    def best(self, cost: float) -> Plan | None:
        """Return the plan of least expected divergence within a cost of the layers; None if there is none.

        Whatever the cost, it holds all that is free of loss.
        """
        found = self._allocated(cost)
        return None if found is None else self.plan(self._with_lossless(found.choice), found.bound)

    def known(self, choice: Choice) -> Plan:
        """Return the plan of a choice that was found in another way than by `best`."""
        best = self._allocated(cost_of(self._dense, choice))
        return self.plan(choice, 0.0 if best is None else best.bound)

    def plan(self, choice: Choice, bound: float) -> Plan:
        """Return the plan of a choice, given the bound of its expected divergence."""
        layers = ((self.surveyed[name], candidate) for name, candidate in replaced(choice).items())
        saved = sum(layer.macs - layer.offer(candidate).macs for layer, candidate in layers)
        cost = cost_of(self._dense, choice)
        return Plan(
            choice=choice,
            macs=self.totals.macs - self.totals.saved_macs - saved,
            cost=cost,
            expected=self.totals.floor + sum(candidate.error for candidate in choice.values()),
            bound=self.totals.floor + bound,
            predicted=self.totals.cost / (self.rest + cost) if self.totals.by_time else None,
        )

    def _with_lossless(self, choice: Choice) -> Choice:
        """Return a choice with every other layer that has a cheaper exact form in that form."""
        free = {name: layer.lossless() for name, layer in self.surveyed.items() if name not in choice}
        return {**choice, **{name: candidate for name, candidate in free.items() if candidate is not None}}

    def exact(self) -> Plan:
        """Return the plan of exact mode: every layer in the exact form of the fewest MACs, if it has one."""
        found = {name: layer.fewest_macs() for name, layer in self.surveyed.items()}
        return self.known({name: candidate for name, candidate in found.items() if candidate is not None})

    def draw(self, points: int = _POINTS) -> None:
        """Add plans at about even ratios of cost, from nothing replaced to the cheapest."""
        first, last = self.dense_cost, self.least_cost
        ratio = last / first if first else 1.0
        costs = [first * ratio ** (step / (points - 1)) for step in range(points - 1)]
        for cost in (*costs, last):
            plan = self.best(cost)
            if plan is not None:
                self.join(plan)

    def join(self, plan: Plan) -> Point:
        """Return the point of a plan on the curve, to which it is added if it is not there yet."""
        same = next((point for point in self.points if point.plan.forms == plan.forms), None)
        if same is not None:
            return same
        joined = Point(plan)
        self.points = sorted([*self.points, joined], key=lambda point: -point.plan.cost)
        return joined

    def between(self, point: Point) -> Point | None:
        """Return a plan whose cost is halfway to that of the next cheaper point, and which joins the curve.

        None if there is no other plan in between.
        """
        cheaper = next((each for each in self.frontier if each.plan.cost < point.plan.cost), None)
        if cheaper is None:
            return None
        middle = self.best((point.plan.cost + cheaper.plan.cost) / 2)
        if middle is None or middle.forms in (point.plan.forms, cheaper.plan.forms):
            return None
        return self.join(middle)

    @property
    def frontier(self) -> list[Point]:
        """Points by falling cost, without those that another one beats in cost and expected divergence."""
        kept: list[Point] = []
        for point in self.points:
            while len(kept) > 1 and kept[-1].plan.expected >= point.plan.expected:
                kept.pop()
            kept.append(point)
        return kept

    def revise(self, surveyed: Mapping[str, LayerSurvey]) -> None:
        """Take a corrected survey, and correct what is expected of every plan."""
        self.surveyed = surveyed
        for point in self.points:
            candidates = {
                name: {candidate.form: candidate for candidate in surveyed[name].options()}
                for name in point.plan.choice
            }
            point.plan = self.known({name: candidates[name][form] for name, form in point.plan.forms.items()})

    def to_json(self, delivered: Point | None) -> list[dict[str, Any]]:
        """Return the report's `approximation.curve`."""
        return [point.to_json(self.totals.macs, point is delivered) for point in self.points]

    def _allocated(self, cost: float) -> Allocation | None:
        """Return the best plan within a cost.

        A layer that may stay in floating point does so unless another option is taken: one of them is the
        layer in int8, at the error that this brings.
        """
        dense, offered, harm = dict(self._dense), dict[str, list[Candidate]](), 0.0
        for name, layer in self.surveyed.items():
            offered[name] = layer.candidates()
            if layer.in_float is not None:
                brought = -layer.in_float.error
                as_it_is = Candidate(_AS_IT_IS, 0, layer.cost, 0.0)
                offered[name] = [
                    replace(each, error=each.error + brought) for each in (as_it_is, *offered[name])
                ]
                dense[name], harm = layer.in_float.cost, harm + brought
        found = allocate(dense, offered, cost)
        if found is None or not harm:
            return found
        options = {
            name: {each.form: each for each in layer.options()} for name, layer in self.surveyed.items()
        }
        choice = {
            name: options[name][candidate.form]
            for name, candidate in found.choice.items()
            if candidate.scheme != _AS_IT_IS
        }
        for name, layer in self.surveyed.items():
            if layer.in_float is not None and name not in found.choice:
                choice[name] = layer.in_float
        return replace(found, choice=choice, error=found.error - harm, bound=found.bound - harm)
