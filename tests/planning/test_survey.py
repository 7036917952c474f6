"""Sensitivities of layers."""

import pytest
import torch
from torch import nn

from sepconvert.base.progress import silent
from sepconvert.calibration.heldout import Heldout
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import trace
from sepconvert.planning.forms import Prices
from sepconvert.planning.survey import survey


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
