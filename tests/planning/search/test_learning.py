"""Corrections of a survey: whole plans change the layers that they are measured on, and no others."""

import pytest
import torch

from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.planning.fits.survey import LayerSurvey, Offer
from sepconvert.planning.search.curve import Curve, Totals
from sepconvert.planning.search.learning import corrected_forms, corrected_savings, corrected_sensitivities

SPEC = ConvSpec(4, 4, (3, 3))
WEIGHT = torch.randn(SPEC.weight_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def surveyed():
    problem = Problem(SPEC, WEIGHT, Moments.of_weights(SPEC, WEIGHT))
    fits = [problem.fit("depthwise-pointwise", rank) for rank in (3, 2, 1)]
    offers = tuple(Offer(fit, macs, float(macs)) for fit, macs in zip(fits, (75, 50, 25), strict=True))
    return {name: LayerSurvey(100, 100.0, offers, sensitivity=4.0) for name in "ab"}


def choice_of(surveyed, **ranks):
    offered = {name: {each.rank: each for each in layer.candidates()} for name, layer in surveyed.items()}
    return {name: offered[name][rank] for name, rank in ranks.items()}


def test_a_sensitivity_becomes_the_geometric_mean_of_both_measurements(surveyed):
    choice = choice_of(surveyed, a=2, b=2)
    error = surveyed["a"].offer(choice["a"]).error
    corrected = corrected_sensitivities(surveyed, choice, {"a": 9.0 * error, "b": -1.0})
    assert corrected["a"].sensitivity == pytest.approx(6.0)
    assert corrected["b"] == surveyed["b"]  # noise alone


def test_a_form_that_brings_more_raises_lower_ranks_too(surveyed):
    choice = choice_of(surveyed, a=2, b=2)
    before = {each.rank: each.error for each in surveyed["a"].candidates()}
    brought = {"a": 10.0 * choice["a"].error, "b": 0.5 * choice["b"].error}
    corrected = corrected_forms(surveyed, choice, brought)
    after = {each.rank: each.error for each in corrected["a"].candidates()}
    assert after[3] == before[3]
    assert [after[rank] / before[rank] for rank in (2, 1)] == pytest.approx([10.0, 10.0])
    assert corrected["b"] == surveyed["b"]
    assert corrected_forms(surveyed, choice, dict.fromkeys("ab", 0.0)) is None


@pytest.mark.parametrize(("gain", "expected"), [(1.0, 1.0), (0.7, 0.7), (1.2, 1.2), (0.1, 0.5), (9.0, 1.32)])
def test_savings_are_scaled_to_those_of_whole_plans(surveyed, gain, expected):
    """Within limits: half of what layers save alone, or a form that takes no time."""
    totals = Totals(macs=1200, cost=1200.0, unit="milliseconds")
    plan = Curve(surveyed, totals).known(choice_of(surveyed, a=1, b=2))
    speedup = Speedup(1200.0 / (1200.0 - gain * 125.0), Interval(1.0, 1.0), Interval(1.0, 1.0))
    corrected = corrected_savings(surveyed, totals, [(plan, speedup)])
    for name, layer in corrected.items():
        for before, after in zip(surveyed[name].offers, layer.offers, strict=True):
            assert 100.0 - after.cost == pytest.approx(expected * (100.0 - before.cost), rel=0.1)
            assert after.cost > 0
