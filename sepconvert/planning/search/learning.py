"""Corrections of the survey by whole plans.

The survey looks at each layer alone. Where other layers are replaced too, errors do not add up, the inputs of
a layer are no longer the original's, and times of layers do not add up either.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sepconvert.measure.latency import Speedup
from sepconvert.planning.allocate import Choice, replaced
from sepconvert.planning.fits.survey import LayerSurvey
from sepconvert.planning.search.curve import Curve, Plan, Point, Totals
from sepconvert.planning.search.measurements import Measurements

Surveyed = Mapping[str, LayerSurvey]

# Savings in whole plans are corrected to between 1/2 and 2 times the sum of what each layer saves alone.
_LARGEST_GAIN = 2.0


# Weight of the assumption that savings add up, against the measured plans: the relative noise of a plan's
# measured time, divided by the relative error that the sum of its layers' savings usually has.
_PRIOR = 0.03


# Corrected savings of a form are at most this share of its layer's cost, so that no form takes no time.
_LARGEST_SAVING = 0.99


_SURPRISE = (
    8.0  # ratio of measured to expected divergence from which on a plan corrects the errors of its forms
)


class Learner:
    """Measures whole plans of a curve, and corrects its survey by them."""

    def __init__(self, curve: Curve, measurements: Measurements) -> None:
        self._curve, self._measurements = curve, measurements

    def learn_from_first_plans(self) -> None:
        """Correct sensitivities and savings by two whole plans, one of them the cheapest."""
        for cost in (self._curve.middle_cost, self._curve.least_cost):
            plan = self._curve.best(cost)
            if plan is not None and plan.choice:
                self._curve.join(plan)
        if self._curve.points:
            self.learn_sensitivities(self._curve.points[0])
            self._learn_savings()

    def learn_sensitivities(self, point: Point) -> None:
        """Correct the sensitivities of the layers that a plan replaces, where there are held-out images."""
        if self._measurements.workshop.compares_outputs and point.plan.choice:
            brought = self._measurements.contributions(point, "sensitivities among replaced layers")
            self._curve.revise(corrected_sensitivities(self._curve.surveyed, point.plan.choice, brought))

    def learn_forms(self) -> bool:
        """Correct errors of forms by the plan that surprises most, and draw a new curve.

        Returns:
            Whether any plan did surprise, so that the curve is a new one.
        """
        surprises = {
            point: point.measured.fitted.heldout.divergence / point.plan.expected
            for point in self._curve.points
            if point.measured.fitted is not None
            and point.measured.fitted.heldout is not None
            and point.plan.expected > 0
        }
        worst = max(surprises, key=surprises.__getitem__, default=None)
        if worst is None or surprises[worst] < _SURPRISE or not self._measurements.workshop.compares_outputs:
            return False
        brought = self._measurements.contributions(worst, "errors of forms among replaced layers")
        corrected = corrected_forms(self._curve.surveyed, worst.plan.choice, brought)
        if corrected is None:
            return False
        self._curve.points = [point for point in self._curve.points if point.measured]
        self._curve.revise(corrected)
        self._curve.draw()
        return True

    def _learn_savings(self) -> None:
        """Correct the savings of forms by the times of the first plans, where costs are times."""
        if self._curve.totals.by_time:
            self._measurements.time(self._curve.points)
            timed = [
                (point.plan, point.measured.speedup)
                for point in self._curve.points
                if point.measured.speedup is not None
            ]
            self._curve.revise(corrected_savings(self._curve.surveyed, self._curve.totals, timed))


def corrected_sensitivities(surveyed: Surveyed, choice: Choice, brought: Mapping[str, float]) -> Surveyed:
    """Return the survey with the sensitivities of a plan's layers corrected.

    `brought` is the divergence that each layer adds to that of all the others.
    """
    corrected = dict(surveyed)
    for name, divergence in brought.items():
        error = surveyed[name].offer(choice[name]).error
        if error > 0 and divergence > 0:
            # This measurement is as noisy as the one before: take the geometric mean of both.
            before = surveyed[name].sensitivity
            sensitivity = math.sqrt(before * divergence / error) if before else divergence / error
            corrected[name] = replace(surveyed[name], sensitivity=sensitivity)
    return corrected


def corrected_forms(surveyed: Surveyed, choice: Choice, brought: Mapping[str, float]) -> Surveyed | None:
    """Return the survey with errors of a plan's forms raised to what they have `brought`; None if none is.

    Only one form per layer is measured in the survey; the others are extrapolated, assuming that the
    divergence is quadratic in the error. A form that drops a whole direction of the outputs may diverge far
    beyond that.
    """
    excess = {
        name: brought[name] / candidate.error
        for name, candidate in replaced(choice).items()
        if brought[name] > candidate.error > 0
    }
    if not excess:
        return None
    raised = {name: surveyed[name].with_excess(choice[name].form, times) for name, times in excess.items()}
    return {**surveyed, **raised}


def corrected_savings(surveyed: Surveyed, totals: Totals, timed: Sequence[tuple[Plan, Speedup]]) -> Surveyed:
    """Return the survey with all savings scaled by one factor, so that they add up to those of whole plans.

    Timed alone, a layer has surroundings whose time cancels in differences; within a model, all differences
    may be larger or smaller alike. The factor is the least-squares estimate over the relative errors of the
    plans' times, with a prior that it is 1.
    """
    dense = sum(layer.cost for layer in surveyed.values())
    squares, products = _PRIOR**2, _PRIOR**2
    for plan, speedup in timed:
        time = totals.cost / speedup.median
        saved = (dense - plan.cost) / time
        squares += saved**2
        products += saved * (totals.cost - totals.saved_cost - time) / time
    limits = [
        _LARGEST_SAVING * layer.cost / (layer.cost - layer.least_cost)
        for layer in surveyed.values()
        if layer.least_cost < layer.cost
    ]
    gain = min(max(products / squares, 1 / _LARGEST_GAIN), _LARGEST_GAIN, *limits)
    return {name: layer.at_gain(gain) for name, layer in surveyed.items()}
