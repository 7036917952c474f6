"""Plans carried out: layers fitted one after the other."""

import pytest
import torch
from hypothesis import assume, given
from sepconvert.planning.carry_out import carry_out
from strategies import geometries, numbered
from torch import nn

from sepconvert.base.progress import silent
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.record import record
from sepconvert.calibration.split import Calibration
from sepconvert.network.copies import private_copy
from sepconvert.network.trace import trace
from sepconvert.planning.forms import Prices, depthwise_forms
from sepconvert.planning.survey import survey


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
    sites = [
        site
        for site in trace(private_copy(model), (images,))
        if site.conv is not None and min(site.conv.spec.weight_shape[0] // site.conv.spec.groups, 2) > 1
        and site.conv.spec.weight_shape[1] > 1 and max(site.conv.spec.kernel_size) > 1
    ]  # fmt: skip
    assume(sites)
    full = conv.weight[0, 0].numel()
    prices = {site.name: Prices(1, dict.fromkeys(depthwise_forms(site.conv.spec, full), 1)) for site in sites}
    answers = record(model, {0: images}, sites, images=1, seed=0)
    calibration = Calibration((images,), (images,), "test", answers)
    heldout = Heldout(model, calibration.heldout)
    found = survey(model, sites, calibration, heldout, prices, silent)
    choice = {name: each.candidates()[0] for name, each in found.items()}
    fitted = carry_out(model, sites, choice, found, calibration, heldout, silent)
    with torch.no_grad():
        expected, actual = model(images), fitted.model(images)
        magnitude = nn.functional.conv2d(
            torch.ones_like(images[:1, :, :1, :1]).expand(-1, -1, *conv.kernel_size) * images.abs().max(),
            conv.weight.abs(), groups=conv.groups,
        ).max()  # fmt: skip
    # Sums of products of factors that are rounded: about the magnitude of the terms times eps·κ.
    assert (actual - expected).abs().max() <= 1e3 * torch.finfo(dtype).eps * (magnitude + 1)


def test_what_plans_have_in_common_is_fitted_once():
    """Layers before the first that differs are taken over; the result is, bit by bit, the same."""
    torch.manual_seed(0)
    twice = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    images = torch.randn(24, 3, 14, 14)
    sites = [site for site in trace(private_copy(model), (images[:1],)) if site.name != "0"]
    answers = record(model, {0: images}, sites, images=24, seed=0)
    calibration = Calibration((images,), (images[:4],), "test", answers)
    heldout = Heldout(model, calibration.heldout)
    forms = {site.name: dict.fromkeys([("depthwise-pointwise", r) for r in (1, 2, 3)], 1) for site in sites}
    prices = {name: Prices(4, {form: form[1] for form in each}) for name, each in forms.items()}
    found = survey(model, sites, calibration, heldout, prices, silent)
    fitted = []

    def counted(each, description):
        fitted.extend([description] * len(each))
        return each

    def plan(ranks, earlier=()):
        fitted.clear()
        offered = {name: {c.rank: c for c in each.candidates()} for name, each in found.items()}
        choice = {name: offered[name][rank] for name, rank in ranks.items()}
        return carry_out(model, sites, choice, found, calibration, heldout, counted, earlier)

    first, second = {"2": 1, "4": 2, "8": 1}, {"2": 1, "4": 2, "8": 3}
    known, alone = (plan(first), plan({"4": 2})), plan(second)
    assert len(fitted) == 3
    after = plan(second, known)
    assert len(fitted) == 1
    assert list(after.layers) == list(alone.layers)
    for one, other in zip(after.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # The module that is called twice is the first to be fitted, and here it differs.
    plan({"2": 1, "4": 1, "8": 1}, known)
    assert len(fitted) == 3
    plan({"4": 2, "8": 1}, known)
    assert len(fitted) == 1
    assert plan(first, known).layers == known[0].layers
    assert not fitted
    # What was not replaced is held once, however many plans there are.
    assert {each.model[0].weight.data_ptr() for each in (*known, alone)} == {model[0].weight.data_ptr()}
