"""Moments of single layers, against `F.unfold` over all positions."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from in_step import IMAGES, conv, covariance, drive, outputs_of, patches_of, sites_of
from strategies import geometries, numbered
from torch import nn
from torch.nn import functional as F

from sepconvert.calibration.record import FEWEST_POSITIONS, PATCHES

GEOMETRIES = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 2), "dilation": (2, 1)},
    "grouped": {"groups": 2, "padding": 1},
    "not square": {"kernel_size": (1, 5), "padding": (0, 2), "bias": False},
    "same": {"kernel_size": (2, 4), "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 1), "padding_mode": "circular", "groups": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("batch", [6, 4, 1])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_moments_of_one_layer(options, batch):
    layer = conv(**options)
    moments = drive(nn.Sequential(layer), IMAGES.split(batch))["0"]
    x, y = patches_of(layer, IMAGES), outputs_of(layer(IMAGES).detach())
    assert moments.count == x.shape[1]
    wanted = covariance(x, x)
    # Sums of n products in single precision, relative to the norms of what is multiplied.
    rounding = x.shape[1] * torch.finfo(torch.float32).eps * float(wanted.diagonal(dim1=1, dim2=2).max())
    torch.testing.assert_close(moments.covariance, wanted, rtol=0, atol=rounding)
    torch.testing.assert_close(moments.mean, x.mean(1), rtol=1e-9, atol=1e-9)
    assert moments.power == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-5)
    # Both networks are one as yet.
    assert not moments.residual_covariance.any()
    assert not moments.cross.any()
    assert not moments.residual_mean.any()


def test_large_means_cancel_nothing():
    images = (torch.randn(6, 4, 8, 7, dtype=torch.float64) + 1e7).split(2)
    layer = nn.Sequential(conv().double())
    moments = drive(layer, images, sites=sites_of(layer, images[0]))["0"]
    x = patches_of(layer[0], torch.cat(images) - 1e7)
    torch.testing.assert_close(moments.covariance, covariance(x, x), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@numbered(150)
@given(geometries(dtypes=(torch.float64,)), st.sampled_from((1, 2, 5)))
def test_moments_of_any_layer_behind_a_replaced_one(geometry, batch):
    layer, channels = geometry.conv(), geometry.in_channels
    model = nn.Sequential(nn.Conv2d(channels, channels, 1).double(), layer).requires_grad_(False)
    images = torch.randn(5, channels, *geometry.size, dtype=torch.float64)
    height, width = model(images).shape[2:]
    assume(height * width <= max(FEWEST_POSITIONS, PATCHES * layer.weight[0].numel()))
    kernel = torch.randn(channels, channels, 1, 1).double(), torch.randn(channels).double()
    moments = drive(model, images.split(batch), {"0": kernel}, sites_of(model, images))["1"]
    x = F.conv2d(images, *kernel)
    patches, wanted = patches_of(layer, x), outputs_of(model(images))
    residual = wanted - outputs_of(layer(x))
    by_group = residual.reshape(len(residual), geometry.groups, -1).transpose(0, 1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert moments.count == len(wanted)
    torch.testing.assert_close(moments.covariance, covariance(patches, patches), **close)
    torch.testing.assert_close(moments.cross, covariance(by_group, patches), **close)
    torch.testing.assert_close(moments.mean, patches.mean(1), **close)
    torch.testing.assert_close(moments.residual_mean, residual.mean(0), **close)
    torch.testing.assert_close(moments.residual_covariance, covariance(by_group, by_group), **close)
    outputs_by_group = wanted.reshape(len(wanted), geometry.groups, -1).transpose(0, 1)
    torch.testing.assert_close(
        moments.output_covariance, covariance(outputs_by_group, outputs_by_group), **close
    )
    assert moments.power == pytest.approx(float(wanted.var(0, correction=0).sum()), abs=1e-9)
