"""Positions at which outputs are recorded, and the outputs themselves."""

import pytest
import torch
from in_step import IMAGES, calibrate, conv, drive, sites_of
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.record import FEWEST_POSITIONS, PATCHES, record
from sepconvert.network.tensors import InputBatch


def test_outputs_are_those_of_the_original_at_the_sampled_positions():
    model = nn.Sequential(conv(padding=1), nn.ReLU(), conv(6, 5))
    found = record(model, {3: InputBatch((IMAGES,))}, sites_of(model), images=6, seed=0)
    first, last = found.outputs[("0", 0), 3], found.outputs[("2", 0), 3]
    assert first.shape == (6, 8 * 7, 6)  # fewer positions than are asked for
    assert last.shape == (6, 6 * 5, 5)
    with torch.no_grad():
        expected = model(IMAGES).flatten(2).mT
    for one, other in zip(last, expected, strict=True):
        torch.testing.assert_close(one.sort(0).values, other.sort(0).values)


def test_a_model_that_fails_on_the_images():
    model = nn.Sequential(conv())
    with pytest.raises(
        SepconvertError, match=r"the model fails on samples of shape \(3, 8, 7\): .* channels"
    ):
        record(model, {0: InputBatch((IMAGES[:, :3],))}, sites_of(model), images=6, seed=0)


def test_positions_are_a_seeded_sample_that_batches_alone_decide():
    images = torch.randn(4, 4, 40, 40)
    layer = nn.Sequential(conv())
    sites = sites_of(layer, images)
    found = drive(layer, images.split(2), sites=sites)["0"]
    assert found.count == 4 * PATCHES * layer[0].weight[0].numel()
    again = drive(layer, images.split(2), sites=sites)["0"]
    assert torch.equal(found.covariance, again.covariance)
    backwards = next(calibrate(layer, {1: images[2:], 0: images[:2]}, sites, seed=0))[1]
    torch.testing.assert_close(backwards.covariance, found.covariance, rtol=1e-12, atol=1e-12)
    other = next(calibrate(layer, {0: images}, sites, seed=1))[1]
    assert not torch.allclose(other.covariance, found.covariance)


def test_no_position_is_drawn_twice():
    images = torch.rand(1, 1, 1, 17, dtype=torch.float64)
    assert images[0].numel() == FEWEST_POSITIONS + 1
    model = nn.Sequential(nn.Conv2d(1, 1, 1).double())
    found = {seed: next(calibrate(model, {0: images}, sites_of(model, images), seed=seed)) for seed in (0, 1)}
    left_out = [images.sum() - FEWEST_POSITIONS * moments.mean.item() for _, moments in found.values()]
    assert all((images - value).abs().min() < 1e-9 for value in left_out)
    assert left_out[0] != pytest.approx(left_out[1])
