"""Right factors of a layer pass, and wrong ones are caught, however little is wrong."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_kernels import conv_with, factors
from hypothesis import given
from strategies import ROUNDOFF, geometries, numbered, planted, run, spec_of
from torch import nn

from sepconvert.measure.verification.layer import LayerCheck, check_layer, dense_convolution
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.trace import DenseConv


def layer_of(conv, scheme, rank=None):
    factorization = factors(conv, scheme, rank)
    layer = FactorizedConv2d(spec_of(conv), scheme, factorization.rank, factorization.border)
    layer.set_factors(factorization.weights, None if conv.bias is None else conv.bias.detach())
    return layer


def checked(conv, layer, inputs, tolerance=None):
    """The check of a layer, with the tolerance that 64 roundings leave."""
    bias = None if conv.bias is None else conv.bias.detach()
    site = DenseConv(spec_of(conv), conv.weight.detach(), bias, inputs, conv.weight.device)
    return check_layer(site, layer, 64 * ROUNDOFF[conv.weight.dtype] if tolerance is None else tolerance)


# The dense layer


@numbered(60)
@given(geometries())
def test_the_dense_layer_by_its_definition_is_that_of_torch(geometry):
    conv, inputs = geometry.conv().double(), geometry.inputs().double()
    expected = run(conv, inputs)
    actual = dense_convolution(spec_of(conv), inputs, conv.weight, conv.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Layer by layer


@numbered(50)
@given(planted())
def test_right_factors_pass_and_the_numbers_are_those_of_torch(case):
    inputs = case.geometry.inputs()
    layer = layer_of(case.conv, case.scheme)
    check = checked(case.conv, layer, inputs)
    assert check.holds
    expected = run(copy.deepcopy(case.conv).double(), inputs.double())
    difference = run(copy.deepcopy(layer).double(), inputs.double()) - expected
    slack = 1e-13 * float(expected.abs().max())
    assert check.max_abs_diff_float64 == pytest.approx(float(difference.abs().max()), rel=1e-6, abs=slack)
    relative = float(difference.norm() / (expected.norm() or 1))
    assert check.output_error == pytest.approx(relative, rel=1e-6, abs=1e-13)
    own = (run(layer, inputs).double() - run(case.conv, inputs).double()).abs().max()
    # Torch pads 'same' by itself or in one go, and sums in another order then.
    scale = float(run(copy.deepcopy(case.conv).double().requires_grad_(False), inputs.double()).abs().max())
    assert abs(check.max_abs_diff - float(own)) <= 64 * ROUNDOFF[case.geometry.dtype] * scale
    # 64 u is what the certificate may permit, √n more is what a patch may make of it.
    if case.geometry.dtype != torch.float64:
        norms = case.conv.weight.double().flatten(1).norm(dim=1).max()
        patch = inputs.double().abs().max() * case.conv.weight[0].numel() ** 0.5
        assert check.bound_float64 <= 65 * ROUNDOFF[case.geometry.dtype] * norms * patch


INPUTS = torch.randn(2, 6, 12, 11, generator=torch.Generator().manual_seed(0))


def scaled_bias(layer):
    layer.bias.data *= 1.001


def other_mode(layer):
    for part in layer.convolutions:
        part.padding_mode = "zeros"


def other_dilation(layer):
    layer.convolutions[0].dilation, layer.convolutions[0].padding = (1, 1), (1, 0)


def other_end(layer):
    layer.branches[0][0] = nn.ZeroPad2d((0, 0, 2, 1))


class Times(nn.Module):
    """Multiplies one channel."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        x = x.clone()
        x[..., 3, :, :] *= self.factor
        return x


def one_output(layer):
    layer.branches[0].append(Times(1.001))


def nan(layer):
    layer.branches[0].append(Times(np.nan))


BREAKAGES = {
    "zeros for reflect": ({"padding_mode": "reflect"}, other_mode),
    "zeros for circular": ({"padding_mode": "circular"}, other_mode),
    "bias of a thousandth more": ({}, scaled_bias),
    "padding at the wrong end": ({"kernel_size": 4, "padding": "same"}, other_end),
    "dilation": ({"dilation": 2, "padding": 2}, other_dilation),
    "one output by a thousandth": ({}, one_output),
    "NaN": ({}, nan),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", BREAKAGES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_broken_layers_are_caught(name, dtype):
    options, breakage = BREAKAGES[name]
    conv = conv_with(dtype=dtype, **options)
    layer = layer_of(conv, "spatial-vh")
    assert checked(conv, layer, INPUTS.to(dtype)).holds
    breakage(layer)
    check = checked(conv, layer, INPUTS.to(dtype))
    assert not check.holds
    # none of these is in the kernel: only running the layer shows them
    assert check.kernel_error <= check.kernel_tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_kernels_that_differ_by_more_than_permitted_are_caught(dtype):
    """Where the outputs differ by what the kernels do, the kernels themselves are judged."""
    conv = conv_with(dtype=dtype)
    layer = layer_of(conv, "spatial-vh")
    inputs = INPUTS.to(dtype)
    composed = copy.deepcopy(layer).double().weight.detach()
    errors = (composed - conv.weight.double()).flatten(1).norm(dim=1)
    errors /= conv.weight.double().flatten(1).norm(dim=1)
    worst = float(errors.max())
    assert checked(conv, layer, inputs).kernel_error == pytest.approx(worst, rel=1e-6)
    assert checked(conv, layer, inputs, 1.01 * worst).holds
    assert not checked(conv, layer, inputs, 0.99 * worst).holds
    with torch.no_grad():
        layer.convolutions[1].weight[3] *= 1 + 256 * ROUNDOFF[dtype]
    check = checked(conv, layer, inputs)
    assert not check.holds
    assert check.kernel_error == pytest.approx(256 * ROUNDOFF[dtype], rel=0.02)
    assert check.max_abs_diff_float64 <= check.bound_float64


def test_a_bias_before_the_second_factor_is_caught_at_the_border_alone():
    conv = conv_with(rank=10, kernel_size=(3, 3))
    # full rank, so that the first factor can carry any bias
    layer = layer_of(conv, "spatial-vh", rank=18)
    assert checked(conv, layer, INPUTS).holds
    with torch.no_grad():
        first, second = layer.convolutions
        kernel = second.weight.sum(dim=(2, 3))
        moved = torch.linalg.lstsq(kernel, second.bias[:, None]).solution[:, 0]
        torch.testing.assert_close(kernel @ moved, second.bias, rtol=1e-4, atol=1e-5)
        first.bias, second.bias = nn.Parameter(moved), None
        inner = slice(1, -1)
        torch.testing.assert_close(
            layer(INPUTS)[..., inner, inner], conv(INPUTS)[..., inner, inner], rtol=1e-3, atol=1e-3
        )
    assert not checked(conv, layer, INPUTS).holds
    # without padding there is no border, and nothing is wrong but the rounding of the bias
    bare = conv_with(rank=10, padding=0)
    assert checked(bare, layer_of(bare, "spatial-vh", rank=18), INPUTS).holds


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_bias_much_larger_than_the_rest_is_no_error(scale):
    conv = conv_with("output-subspace")
    conv.weight.copy_(torch.ones_like(conv.weight))  # factors to the last bit
    conv.bias.mul_(scale)
    layer = layer_of(conv, "output-subspace")
    for inputs in (INPUTS * 1e-3, torch.zeros_like(INPUTS)):
        assert checked(conv, layer, inputs).holds


def test_a_layer_check_compares_both_with_their_bounds():
    check = LayerCheck(1.0, 5.0, 5.0, 1.0, 2.0, 2.0)
    assert check.holds
    assert not replace(check, max_abs_diff_float64=1.1).holds
    assert not replace(check, kernel_error=2.1).holds
    assert not replace(check, max_abs_diff_float64=np.nan).holds
    assert not replace(check, kernel_error=np.nan).holds
