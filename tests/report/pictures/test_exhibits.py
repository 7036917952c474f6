"""Kernels, images and samples are those of the model and of the data."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert import convert
from sepconvert.base.options.values import Timing


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


@pytest.mark.parametrize("mode", ["exact", "approx"])
def test_samples_of_a_model_that_is_no_classifier(mode):
    torch.manual_seed(0)
    x = torch.rand(12, 1, 12, 12)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
    )
    result = convert(
        net, x[:1], mode, data=DataLoader(TensorDataset(x, x), 4), metric="mae", check="torch",
        timing=Timing(runs=0), **({} if mode == "exact" else {"rank": 1, "gate": "none"}),
    )  # fmt: skip
    changed = result.exhibits.changed
    assert not result.exhibits.images
    if mode == "exact":  # outputs are proven to be the same
        assert changed.shown == ()
        return
    assert changed.kind == "pictures"
    with torch.no_grad():
        for sample in changed.shown:
            assert torch.allclose(sample.before, net(sample.image), atol=1e-6)
            assert torch.allclose(sample.after, result.model(sample.image), atol=1e-6)
            mean = float((sample.after - sample.target).abs().mean())
            assert abs(mean - sample.scores[1]) < 1e-6


def test_images_whose_predicted_class_changed():
    torch.manual_seed(0)
    x, y = torch.randn(80, 3, 8, 8), torch.arange(80) % 5
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    result = convert(
        net, x[:1], "approx", data=DataLoader(TensorDataset(x, y), 8), rank=1, gate="none", check="torch",
        timing=Timing(runs=0),
    )  # fmt: skip
    shown = [each["index"] for each in result.report["changed_predictions"]["shown"]]
    assert shown
    assert [*result.exhibits.images] == shown
    assert result.exhibits.changed.shown == ()
    assert all(image.shape == (3, 8, 8) for image in result.exhibits.images.values())
