"""Kernels are those of the model."""

import torch
from torch import nn

from sepconvert import convert
from sepconvert.base.options import Timing


def test_kernels_of_the_layers_that_moved_most():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1))
    result = convert(net, torch.randn(1, 8, 9, 9), "approx", rank=1, timing=Timing(runs=0))
    pairs = {pair.layer: pair for pair in result.exhibits.kernels}
    assert pairs.keys() == {"0", "1"}  # of 1×1 kernels there is nothing to see
    errors = {layer["name"]: layer["weight_error"] for layer in result.report["layers"]}
    assert [pair.layer for pair in result.exhibits.kernels] == sorted(pairs, key=lambda name: -errors[name])
    dense, after = net[1].weight.double(), result.model.get_submodule("1").weight.double()
    shown = pairs["1"]
    assert shown.before.shape == shown.after.shape == (12, 3, 3)
    for before, changed in zip(shown.before, shown.after, strict=True):
        place = (dense == before).all((2, 3)).nonzero()
        assert len(place) == 1
        assert torch.equal(after[tuple(place[0])], changed)
