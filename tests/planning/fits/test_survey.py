"""Sensitivities of layers."""

import pytest
import torch
from plan_bench import layer
from torch import nn

from sepconvert.base.options.values import Int8
from sepconvert.base.progress import silent
from sepconvert.calibration.heldout import Heldout
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import trace
from sepconvert.planning.allocate import IN_FLOAT
from sepconvert.planning.fits.survey import survey, with_float_options
from sepconvert.planning.forms import Prices


class Counting(nn.Module):
    """Remembers how many images it was shown."""

    shown = 0

    def forward(self, x):
        Counting.shown += len(x)
        return x


@pytest.mark.parametrize(
    ("layers", "images"), [(2, 128), (40, 64), pytest.param(200, 16, marks=pytest.mark.slow)]
)
def test_sensitivities_take_time_that_is_linear_in_layers(layers, images):
    """Each is a pass of all layers: of more than 20, each is judged on fewer images, down to 16."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, (3, 1), padding=(1, 0)) for _ in range(layers)]
    model = nn.Sequential(Counting(), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    heldout = Heldout(model, [*InputBatch((torch.randn(200, 4, 2, 2),)).split(60)])
    sites = trace(private_copy(model), heldout.batches[0].inputs)
    prices = {site.name: Prices(3, {("depthwise-pointwise", 1): 1}) for site in sites}
    Counting.shown = 0
    found = survey(model, sites, None, heldout, prices, silent)
    assert len(found) == layers
    # All once for the variances of the outputs; then once for what is expected of the first images, and once
    # for each layer. Each copy of the model tries one image before.
    assert Counting.shown == 200 + (images + 1) * (layers + 1)


def test_layers_that_int8_harms_may_stay_in_floating_point():
    """The first layer reads a channel of small values beside one of large values, which share a scale."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight *= torch.tensor([300.0, 0.01]).view(1, 2, 1, 1)
        model[6].weight *= 5
    x = torch.rand(48, 2, 10, 10) * torch.tensor([0.01, 10.0]).view(1, 2, 1, 1)
    batch = InputBatch((x,))
    form, heldout = Int8Form(Int8("on"), model, (x[:1],), [batch]), Heldout(model, [batch])
    surveyed = {"0": layer(400, 1.0), "2": layer(400, 1.0)}
    costs = {"0": 800.0, "2": 800.0}
    found = with_float_options(model, surveyed, heldout, form, costs, silent)
    whole = heldout.measure(form.module(model)).divergence
    option = found["0"].in_float
    assert option.cost == 800.0
    assert 0.5 * whole < -option.error <= whole  # most of the harm is the first layer's
    assert found["2"] == surveyed["2"]
    assert [each.form for each in found["0"].options()] == [
        *(each.form for each in surveyed["0"].candidates()), (IN_FLOAT, 0),
    ]  # fmt: skip
    # One that costs no more than in int8 is a matter of the form of the whole model.
    assert with_float_options(model, surveyed, heldout, form, {"0": 300.0}, silent) == surveyed
