"""Factors in the place of a dense layer; torch's own `nn.Conv2d` is the judge."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import DTYPES, ROUNDOFF, numbered, plant, planted, run, spec_of
from torch import nn

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, analyse
from sepconvert.factorize.exact.factors import factorize
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.network.layers import FactorizedConv2d

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts one of its losses on import
    from fvcore.nn import FlopCountAnalysis


def factorized(conv, scheme, size=(16, 16), **options):
    """The layer that takes the place of `conv`, and what was found."""
    analysis = analyse(spec_of(conv), conv.weight.detach(), [size])
    finding = next(finding for finding in analysis.findings if finding.scheme == scheme)
    factorization = factorize(analysis, finding, conv.weight.detach())
    layer = FactorizedConv2d(spec_of(conv), scheme, factorization.rank, factorization.border)
    layer.set_factors(factorization.weights, None if conv.bias is None else conv.bias.detach(), **options)
    return layer, finding


def with_weight(conv, weight, bias):
    """Another dense layer of the same geometry."""
    other = copy.deepcopy(conv).double()
    other.weight = nn.Parameter(weight.double())
    other.bias = bias
    return other.requires_grad_(False)


def magnitudes(layer):
    """The same layer with absolute values for weights: it bounds all that rounding can do."""
    other = copy.deepcopy(layer).double()
    for convolution in other.convolutions:
        convolution.weight.data.abs_()
        if convolution.bias is not None:
            convolution.bias.data.abs_()
    return other


def assert_computes_the_same(conv, layer, inputs):
    u = ROUNDOFF[conv.weight.dtype]
    expected = run(copy.deepcopy(conv).double(), inputs.double())
    actual = run(copy.deepcopy(layer).double(), inputs.double())
    assert actual.shape == expected.shape
    # |Δy| ≤ ‖ΔW_o‖ ‖patch‖, where ‖ΔW_o‖ ≤ 8 u ‖W_o‖ (tests of `factorize`), in each position; and
    # float64's own rounding of so many terms.
    patches = run(with_weight(conv, torch.ones_like(conv.weight), None), inputs.double().square()).sqrt()
    norms = conv.weight.double().square().sum(dim=(1, 2, 3)).sqrt()[:, None, None]
    terms = sum(convolution.weight[0].numel() for convolution in layer.convolutions) + 2
    through = run(magnitudes(layer), inputs.double().abs())
    rounding = terms * ROUNDOFF[torch.float64] * through
    assert ((actual - expected).abs() <= 8 * u * norms * patches + rounding).all()
    # In its own dtype: √n rounding errors of the terms (Higham and Mary), those of the stored results.
    own = run(layer, inputs)
    assert own.dtype == conv.weight.dtype
    smallest = torch.finfo(own.dtype).smallest_normal
    allowed = 4 * terms**0.5 * u * through + 8 * u * norms * patches + terms * smallest
    assert ((own.double() - expected).abs() <= allowed).all()


def assert_answers_alike(conv, layer):
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode",
        "transposed", "output_padding",
    ):  # fmt: skip
        assert getattr(layer, name) == getattr(conv, name), name
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    assert layer.padding == ((top, left) if (top, left) == (bottom, right) else "same")
    assert (layer.bias is None) == (conv.bias is None)
    if conv.bias is not None:
        assert torch.equal(layer.bias, conv.bias)
    assert layer.weight.shape == conv.weight.shape
    assert layer.weight.dtype == conv.weight.dtype
    norms = conv.weight.double().square().sum(dim=(1, 2, 3)).sqrt()
    precise = copy.deepcopy(layer).double().weight
    errors = (precise - conv.weight.double()).square().sum(dim=(1, 2, 3)).sqrt()
    assert (errors <= 8 * ROUNDOFF[conv.weight.dtype] * norms).all()


@numbered(300)
@given(planted())
def test_the_layer_is_the_dense_one(case):
    layer, _ = factorized(case.conv, case.scheme, case.geometry.size)
    assert_computes_the_same(case.conv, layer, case.geometry.inputs())
    assert_answers_alike(case.conv, layer)


@numbered(250)
@given(planted(bordered=True))
def test_the_layer_without_a_border_is_the_dense_one(case):
    for scheme in (case.scheme, ZERO_BORDER):
        layer, _ = factorized(case.conv, scheme, case.geometry.size)
        assert_computes_the_same(case.conv, layer, case.geometry.inputs())
        assert_answers_alike(case.conv, layer)
    assert torch.equal(layer.weight, case.conv.weight)


@numbered(120)
@given(planted(dtypes=(torch.float32,)))
def test_planned_costs_are_what_fvcore_counts(case):
    assert_costs(case, case.scheme)


@numbered(80)
@given(planted(bordered=True, dtypes=(torch.float32,)))
def test_planned_costs_without_a_border_are_what_fvcore_counts(case):
    assert_costs(case, case.scheme)
    assert_costs(case, ZERO_BORDER)


def assert_costs(case, scheme):
    layer, finding = factorized(case.conv, scheme, case.geometry.size)
    analysis = FlopCountAnalysis(layer, torch.zeros(1, case.geometry.in_channels, *case.geometry.size))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own
        assert analysis.total() == finding.macs
    bias = 0 if case.conv.bias is None else case.conv.bias.numel()
    weights = (
        case.factor_params
        if scheme == case.scheme
        else case.conv.weight[..., 0, 0].numel() * np.prod(case.kept)
    )
    assert sum(parameter.numel() for parameter in layer.parameters()) == weights + bias


# Asymmetric padding, by hand: the ways in which it can go wrong


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel_size", [(4, 4), (2, 5), (5, 2), (4, 3)])
@pytest.mark.parametrize("scheme", ["spatial-vh", "spatial-hv", "depthwise-pointwise", "output-subspace"])
def test_same_padding_of_even_kernels(padding_mode, kernel_size, scheme):
    conv = planted_conv(scheme, kernel_size=kernel_size, padding="same", padding_mode=padding_mode)
    layer, _ = factorized(conv, scheme)
    assert_computes_the_same(conv, layer, torch.randn(2, 6, 9, 8, dtype=torch.float64))
    assert layer.padding == "same"


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 3), "same"])
def test_a_border_wider_than_the_padding_crops_the_input(padding_mode, padding):
    conv = planted_conv("spatial-vh", kernel_size=(6, 7), padding=padding, padding_mode=padding_mode)
    conv.weight[:, :, :2] = conv.weight[:, :, :, 4:] = 0
    layer, _ = factorized(conv, ZERO_BORDER)
    assert layer.convolutions[0].kernel_size == (4, 4)
    assert_computes_the_same(conv, layer, torch.randn(2, 6, 9, 8, dtype=torch.float64))


def planted_conv(scheme, *, rank=2, out_channels=10, in_channels=6, dtype=torch.float64, seed=0, **options):
    options = {"kernel_size": (3, 3), "groups": 1, **options}
    kh, kw = options["kernel_size"]
    groups = options["groups"]
    axes = {"g": groups, "o": out_channels // groups, "c": in_channels // groups, "i": kh, "j": kw}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        conv = nn.Conv2d(in_channels, out_channels, **options)
    conv.weight.data = torch.from_numpy(plant(scheme, axes, rank, np.random.default_rng(seed)))
    return conv.to(dtype).requires_grad_(False)


# As a module


@pytest.fixture
def conv():
    return planted_conv("spatial-vh", padding=1, stride=2, dtype=torch.float32)


@pytest.fixture
def layer(conv):
    return factorized(conv, "spatial-vh")[0]


INPUTS = torch.randn(2, 6, 12, 11, generator=torch.Generator().manual_seed(0))


def test_parts_are_plain_torch_modules(layer):
    assert [type(part) for part in layer.branches[0]] == [nn.Conv2d, nn.Conv2d]
    assert layer.branches[0][0].bias is None
    assert layer.branches[0][1].bias is layer.bias
    assert "spatial-vh, rank=2" in repr(layer)
    even = factorized(planted_conv("spatial-hv", kernel_size=(4, 4), padding="same"), "spatial-hv")[0]
    assert [type(part) for part in even.branches[0]] == [nn.ZeroPad2d, nn.Conv2d, nn.ZeroPad2d, nn.Conv2d]


def test_the_same_gradient_reaches_the_input_and_the_factors_learn(conv, layer):
    dense_inputs, inputs = INPUTS.clone().requires_grad_(), INPUTS.clone().requires_grad_()
    conv(dense_inputs).square().sum().backward()
    layer(inputs).square().sum().backward()
    torch.testing.assert_close(inputs.grad, dense_inputs.grad, rtol=1e-4, atol=1e-3)
    assert {name for name, _ in layer.named_parameters()} == {
        "branches.0.0.weight",
        "branches.0.1.weight",
        "branches.0.1.bias",
    }
    for parameter in layer.parameters():
        assert parameter.requires_grad
        assert parameter.grad.abs().max() > 0
    optimizer = torch.optim.SGD(layer.parameters(), 1e-5)
    before = layer(INPUTS).square().sum().item()
    optimizer.step()
    assert layer(INPUTS).square().sum().item() < before


@pytest.mark.parametrize("scheme", ["depthwise-pointwise", "pointwise-depthwise"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_multiplier_is_laid_out_as_a_sum_of_branches(scheme, groups):
    conv = planted_conv(scheme, padding=1, groups=groups, dtype=torch.float32)
    layer, finding = factorized(conv, scheme)
    assert finding.rank == len(layer.branches) == 2
    depthwise = [part for part in layer.convolutions if part.kernel_size == (3, 3)]
    # Multiplier 1: as many kernels of one input channel as channels.
    assert all(part.in_channels == part.out_channels == part.groups for part in depthwise)
    assert [part.bias is not None for part in layer.convolutions] == [False, False, False, True]
    outputs = [branch(INPUTS) for branch in layer.branches]
    assert all(output.abs().max() > 1e-3 for output in outputs)
    torch.testing.assert_close(sum(outputs), conv(INPUTS), rtol=1e-5, atol=1e-4)


def test_weight_is_differentiable(layer):
    target = torch.randn(layer.weight.shape)
    (layer.weight * target).sum().backward()
    first, second = layer.convolutions
    # W[o,c,i,j] = Σ_r H[o,r,j] V[r,c,i]
    expected = torch.einsum("ocij,orj->rci", target, second.weight.detach()[:, :, 0])
    torch.testing.assert_close(first.weight.grad[..., 0], expected, rtol=1e-4, atol=1e-4)
    expected = torch.einsum("ocij,rci->orj", target, first.weight.detach()[..., 0])
    torch.testing.assert_close(second.weight.grad[:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_weight_follows_the_factors_and_cannot_be_set(layer):
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.convolutions[0].weight *= 2
    torch.testing.assert_close(layer.weight, 2 * before)
    for name in ("weight", "bias", "stride"):
        with pytest.raises((AttributeError, TypeError, KeyError)):
            setattr(layer, name, nn.Parameter(torch.zeros(1)))


def test_copies_are_the_same_and_independent(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),  # noqa: S301
        torch.load(buffer, weights_only=False),
    ]
    expected = layer(INPUTS)
    for other in copies:
        assert type(other) is FactorizedConv2d
        assert torch.equal(other(INPUTS), expected)
        assert (other.spec, other.scheme, other.rank, other.border) == (
            layer.spec, layer.scheme, layer.rank, layer.border,
        )  # fmt: skip
        with torch.no_grad():
            other.convolutions[0].weight.zero_()
    assert torch.equal(layer(INPUTS), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_state_dict_round_trip(bias, fixed):
    conv = planted_conv("spatial-vh", padding=1, dtype=torch.float32, bias=bias)
    layer, _ = factorized(conv, "spatial-vh", fixed=fixed)
    state = layer.state_dict()
    assert set(state) == {"branches.0.0.weight", "branches.0.1.weight"} | (
        {"branches.0.1.bias"} if bias else set()
    )
    other, _ = factorized(
        planted_conv("spatial-vh", padding=1, dtype=torch.float32, bias=bias, seed=1), "spatial-vh"
    )
    assert not torch.equal(other(INPUTS), layer(INPUTS))
    other.load_state_dict(state)
    assert torch.equal(other(INPUTS), layer(INPUTS))
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes(layer, dtype):
    moved = copy.deepcopy(layer).to(dtype)
    assert moved.weight.dtype == moved.bias.dtype == dtype
    output = moved(INPUTS.to(dtype))
    assert output.dtype == dtype
    difference = (output.double() - layer.double()(INPUTS.double())).abs().max()
    assert difference < 1e3 * max(ROUNDOFF[dtype], ROUNDOFF[torch.float32])


def test_fixed_filters_are_buffers_and_frozen_ones_want_no_gradient(conv):
    fixed, _ = factorized(conv, "spatial-vh", fixed=True)
    assert list(fixed.parameters()) == []
    assert {name for name, _ in fixed.named_buffers()} == {
        "branches.0.0.weight",
        "branches.0.1.weight",
        "branches.0.1.bias",
    }
    frozen, _ = factorized(conv, "spatial-vh", frozen=("weight", "bias"))
    assert len(list(frozen.parameters())) == 3
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for layer in (fixed, frozen):
        assert not layer.weight.requires_grad
        assert_computes_the_same(conv, layer, INPUTS)
        assert torch.equal(copy.deepcopy(layer)(INPUTS), layer(INPUTS))


def test_factors_are_copied(conv):
    analysis = analyse(spec_of(conv), conv.weight, [(12, 11)])
    factorization = factorize(analysis, analysis.findings[1], conv.weight)
    for fixed in (True, False):
        layer = FactorizedConv2d(spec_of(conv), "spatial-vh", 2, Border())
        layer.set_factors(factorization.weights, conv.bias, fixed=fixed)
        with torch.no_grad():
            layer.convolutions[0].weight.zero_()
            layer.bias.zero_()
        assert factorization.weights[0].any()
        assert conv.bias.any()


@pytest.mark.parametrize(
    "scheme", ["spatial-vh", "spatial-hv", "depthwise-pointwise", "input-subspace", ZERO_BORDER]
)
def test_an_empty_layer_lies_on_the_meta_device_and_has_its_geometry(scheme):
    spec = ConvSpec(6, 10, (4, 3), (1, 1), ((1, 2), (1, 1)), (1, 1), 2, "reflect", bias=True)
    layer = FactorizedConv2d(spec, scheme, 2, Border())
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    output = layer(torch.empty(2, 6, 9, 8, device="meta"))
    assert output.shape == (2, 10, 9, 8)
    assert layer.weight.shape == (10, 3, 4, 3)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        layer.set_factors([*layer.factors, layer.factors[0]], None)


def test_training_flag_and_hooks_work_as_on_any_module(layer):
    assert not layer.eval().training
    assert not layer.branches[0][0].training
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(INPUTS)
    assert seen == [(2, 10, 6, 6)]
