"""Plans carried out: layers fitted one after the other."""

import math

import pytest
import torch
from hypothesis import assume, given
from strategies import geometries, numbered
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import silent
from sepconvert.calibration.evidence import Evidence
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.record import record
from sepconvert.calibration.split import CalibrationSet
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced
from sepconvert.planning.fits.survey import survey
from sepconvert.planning.forms import Prices, depthwise_forms
from sepconvert.planning.workshop import StepKind, Workshop


def evidence_of(model, sites, images, heldout):
    """What factors are fitted to, where all outputs are of the same importance."""
    fit, judged = InputBatch((images,)), InputBatch((heldout,))
    recorded = record(model, {0: fit}, sites, images=len(images), seed=0)
    return Evidence(CalibrationSet((fit,), (judged,), (), "test"), lambda: (recorded, {}))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@numbered(200)
@given(geometries())
def test_full_rank_is_the_original_on_every_kind_of_layer(geometry):
    conv = geometry.conv()
    dtype = conv.weight.dtype
    if dtype not in (torch.float32, torch.float64):
        conv, dtype = conv.float(), torch.float32
    model = nn.Sequential(conv).eval()
    images = geometry.inputs().to(dtype)
    images = images if images.ndim == 4 else images[None]
    found = traced(model, (images,))
    sites = [
        site
        for site in found.sites
        if site.conv is not None and min(site.conv.spec.weight_shape[0] // site.conv.spec.groups, 2) > 1
        and site.conv.spec.weight_shape[1] > 1 and max(site.conv.spec.kernel_size) > 1
    ]  # fmt: skip
    assume(sites)
    full = conv.weight[0, 0].numel()
    prices = {site.name: Prices(1, dict.fromkeys(depthwise_forms(site.conv.spec, full), 1)) for site in sites}
    evidence = evidence_of(model, sites, images, heldout=images)
    heldout = Heldout(model, evidence.calibration.heldout)
    surveyed = survey(model, sites, evidence, heldout, prices, silent)
    choice = {name: each.candidates()[0] for name, each in surveyed.items()}
    fitted = Workshop(found, sites, surveyed, evidence, heldout, silent).carry_out(choice)
    with torch.no_grad():
        expected, actual = model(images), fitted.model(images)
        magnitude = nn.functional.conv2d(
            torch.ones_like(images[:1, :, :1, :1]).expand(-1, -1, *conv.kernel_size) * images.abs().max(),
            conv.weight.abs(), groups=conv.groups,
        ).max()  # fmt: skip
    # Sums of products of factors that are rounded: about the magnitude of the terms times eps·κ.
    assert (actual - expected).abs().max() <= 1e3 * torch.finfo(dtype).eps * (magnitude + 1)


@pytest.fixture(scope="module")
def several():
    """A function that opens a workshop for a network of three layers, of which one is called twice.

    It takes a function that shows progress, here to see which layers are fitted.
    """
    torch.manual_seed(0)
    twice = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    images = torch.randn(24, 3, 14, 14)
    found = traced(model, (images[:1],))
    sites = [site for site in found.sites if site.name != "0"]
    evidence = evidence_of(model, sites, images, heldout=images[:4])
    heldout = Heldout(model, evidence.calibration.heldout)
    forms = [("depthwise-pointwise", rank) for rank in (1, 2, 3)]
    prices = {site.name: Prices(4, {form: form[1] for form in forms}) for site in sites}
    surveyed = survey(model, sites, evidence, heldout, prices, silent)

    def open_workshop(progress=silent):
        return Workshop(found, sites, surveyed, evidence, heldout, progress)

    return open_workshop


def choice_of(workshop, ranks):
    offered = {name: {c.rank: c for c in each.candidates()} for name, each in workshop.surveyed.items()}
    return {name: offered[name][rank] for name, rank in ranks.items()}


def test_what_plans_have_in_common_is_fitted_once(several):
    """Layers before the first that differs are taken over; the result is, bit by bit, the same."""
    fitted = []

    def counted(each, description):
        fitted.extend([description] * len(each))
        return each

    def plan(ranks, workshop):
        fitted.clear()
        return workshop.carry_out(choice_of(workshop, ranks))

    first, second = {"2": 1, "4": 2, "8": 1}, {"2": 1, "4": 2, "8": 3}
    alone = plan(second, several(counted))
    assert len(fitted) == 3
    workshop = several(counted)
    known = plan(first, workshop), plan({"4": 2}, workshop)
    after = plan(second, workshop)
    assert len(fitted) == 1
    assert list(after.layers) == list(alone.layers)
    for one, other in zip(after.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # The module that is called twice is the first to be fitted, and here it differs.
    plan({"2": 1, "4": 1, "8": 1}, workshop)
    assert len(fitted) == 3
    plan({"4": 2, "8": 1}, workshop)
    assert len(fitted) == 1
    assert plan(first, workshop).layers == known[0].layers
    assert not fitted
    # What was not replaced is held once, however many plans there are.
    kept = workshop.traced.model[0].weight.data_ptr()
    assert {each.model[0].weight.data_ptr() for each in (*known, alone)} == {kept}


def test_a_layer_restored_is_the_one_of_the_original(several):
    workshop = several()
    fitted = workshop.carry_out(choice_of(workshop, {"2": 1, "8": 1}))
    original = workshop.traced.model
    restored = workshop.restored(fitted, "2")
    assert torch.equal(restored[2].weight, original[2].weight)
    assert isinstance(restored[8], FactorizedConv2d)
    x = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        assert not torch.equal(workshop.restored(fitted, None)(x), restored(x))
    assert workshop.divergence(original) == 0
    assert workshop.divergence(restored) > 0


def test_steps_begin_with_two_simpler_ways_that_were_not_taken(several):
    workshop = several()
    fitted = workshop.carry_out(choice_of(workshop, {"2": 1, "4": 1, "8": 1}))
    steps = workshop.explain(fitted)
    assert [step.kind for step in steps] == [
        StepKind.WEIGHTS, StepKind.DATA, StepKind.DATA, StepKind.BATCHNORM,
    ]  # fmt: skip
    assert [step.kept for step in steps[:3]] == [False, False, True]
    assert steps[2].reached.divergence < steps[0].reached.divergence
    assert steps[2:] == fitted.steps
    assert fitted.heldout == (steps[3] if steps[3].kept else steps[2]).reached


def test_images_that_do_not_reach_a_layer(several):
    workshop = several()
    choice = choice_of(workshop, {"2": 1, "4": 1})
    workshop.layers = [site for site in workshop.layers if site.name != "4"]
    with pytest.raises(SepconvertError, match="`calib`: the images do not reach 4; leave it out"):
        workshop.carry_out(choice)


def test_without_held_out_images_nothing_is_compared(several):
    workshop = several()
    workshop.heldout = None
    fitted = workshop.carry_out(choice_of(workshop, {"2": 1}))
    assert not workshop.compares_outputs
    assert math.isnan(workshop.divergence(fitted.model))
    assert (fitted.heldout, workshop.explain(fitted)) == (None, ())
    assert workshop.speedups([fitted.model]) == []
