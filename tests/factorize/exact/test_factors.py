"""Factors of kernels with exact structure, multiplied out by numpy."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from exact_kernels import SIZE, analysed, channel_errors, dense, kernel_of, rank_four
from hypothesis import given
from strategies import (
    DTYPES,
    PLANTS,
    ROUNDOFF,
    SCHEMES,
    geometries,
    plant,
    planted,
    spec_of,
    spectra,
)
from torch.nn import functional as F

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, analyse
from sepconvert.factorize.exact.factors import compose_factors, factor_specs, factorize


def assert_found(case):
    """Found at its rank, and the factors, multiplied out by numpy, are the kernel."""
    spec, weight = spec_of(case.conv), case.conv.weight
    analysis = analyse(spec, weight, [case.geometry.size])
    findings = {finding.scheme: finding for finding in analysis.findings}
    assert analysis.border == Border(*case.border)
    finding = findings[case.scheme]
    assert finding.rank == case.rank
    assert finding.holds == (case.factor_params < weight[..., 0, 0].numel() * prod(case.kept))
    assert finding.best_error <= finding.tolerance or finding.paying_rank < finding.rank
    factorization = factorize(analysis, finding, weight)
    assert (factorization.scheme, factorization.rank) == (case.scheme, case.rank)
    assert sum(factor.numel() for factor in factorization.weights) == case.factor_params
    assert all(factor.dtype == weight.dtype for factor in factorization.weights)
    certificate = factorization.certificate
    assert certificate.holds
    u = ROUNDOFF[weight.dtype]
    errors = channel_errors(factorization, spec, weight)
    # Rounding of two factors and of their product's terms, some of which cancel.
    assert errors.max() <= 8 * u
    assert certificate.worst_channel_error <= errors.max() * (1 + 1e-6) + 4 * ROUNDOFF[torch.float64]
    assert errors.max() <= certificate.channel_tolerance <= 64 * u
    composed = compose_factors(spec, factorization.scheme, factorization.border, factorization.weights)
    assert composed.dtype == weight.dtype
    assert composed.shape == weight.shape
    return analysis, factorization


@given(planted())
def test_planted_structure_is_found_with_its_rank(case):
    assert_found(case)


@given(planted(bordered=True))
def test_planted_structure_is_found_inside_a_border_of_zeros(case):
    analysis, factorization = assert_found(case)
    spec = spec_of(case.conv)
    assert factorization.border == Border(*case.border)
    # the border by itself is the exact kernel, to the last bit
    border = analysis.findings[0]
    assert border.scheme == ZERO_BORDER
    assert border.holds
    assert border.rank == prod(case.kept)
    alone = factorize(analysis, border, case.conv.weight)
    assert alone.certificate.bitwise
    assert alone.certificate.holds
    assert alone.weights[0].shape[2:] == case.kept
    assert alone.specs == factor_specs(spec, ZERO_BORDER, border.rank, analysis.border)
    assert np.array_equal(kernel_of(alone, spec), case.conv.weight.double().numpy())


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.startswith("channelwise")])
@pytest.mark.parametrize("rank", [1, 8, 32, 64])
def test_kernels_built_in_float32_are_found_at_their_rank(scheme, rank):
    axes = {"g": 1, "o": 96, "c": 80, "i": 9, "j": 9}
    generator = torch.Generator().manual_seed(rank)
    sizes = axes | {"r": rank}
    factors = [
        torch.randn([sizes[axis] for axis in subscripts], generator=generator)
        for subscripts in PLANTS[scheme].split("->")[0].split(",")
    ]
    weight = torch.einsum(PLANTS[scheme], *factors).reshape(96, 80, 9, 9)
    analysis, findings = analysed(weight)
    finding = findings[scheme]
    assert finding.rank == rank
    factorization = factorize(analysis, finding, weight)
    assert factorization.certificate.holds
    errors = channel_errors(factorization, dense(weight), weight)
    assert errors.max() < 1e-6


@pytest.mark.parametrize("scheme", ["spatial-vh", "input-subspace", "output-subspace"])
@pytest.mark.parametrize("rank", [17, 32])
def test_float64_asks_for_more_than_an_svd_gives(scheme, rank):
    """Of 48 × 2400 the singular vectors alone are a hundred roundings off."""
    weight = torch.from_numpy(
        plant(scheme, {"g": 1, "o": 96, "c": 48, "i": 5, "j": 5}, rank, np.random.default_rng(0))
    )
    analysis, findings = analysed(weight)
    assert findings[scheme].rank == rank
    factorization = factorize(analysis, findings[scheme], weight)
    assert factorization.certificate.holds
    assert channel_errors(factorization, dense(weight), weight).max() < 16 * ROUNDOFF[torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 3, 3, 3), 1), ((4, 1, 5, 2), 4), ((1, 1, 3, 3), 1), ((4, 3, 1, 1), 1)]
)
def test_a_kernel_of_zeros_has_every_structure_at_rank_zero(dtype, shape, groups):
    weight = torch.zeros(shape, dtype=dtype)
    analysis, findings = analysed(weight, groups)
    assert analysis.border.trim(weight).shape[2:] == (1, 1)
    if max(shape[2:]) > 1:
        assert findings[ZERO_BORDER].holds
    for finding in findings.values():
        assert finding.best_error == 0
        assert finding.rank == (1 if finding.scheme == ZERO_BORDER else 0)
        factorization = factorize(analysis, finding, weight)
        assert factorization.certificate.bitwise
        assert factorization.certificate.holds
        assert all(not factor.any() for factor in factorization.weights[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_tap_is_a_1x1_convolution(dtype):
    weight = torch.zeros(6, 4, 3, 5, dtype=dtype)
    weight[:, :, 2, 1] = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    analysis, findings = analysed(weight)
    assert analysis.border == Border(2, 0, 1, 3)
    assert findings[ZERO_BORDER].rank == 1
    assert factorize(analysis, findings[ZERO_BORDER], weight).certificate.bitwise
    assert set(findings) == {ZERO_BORDER, "output-subspace"}
    assert not findings["output-subspace"].holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", ["outputs", "inputs", "both"])
def test_channels_of_zeros_change_nothing_and_stay_zero(dtype, empty):
    weight = rank_four(24, dtype)
    outputs = [0, 7, 23] if empty != "inputs" else []
    weight[outputs] = 0
    if empty != "outputs":
        weight[:, [1, 15]] = 0
    analysis, findings = analysed(weight)
    assert findings["spatial-vh"].rank == 4
    factorization = factorize(analysis, findings["spatial-vh"], weight)
    assert factorization.certificate.holds
    composed = kernel_of(factorization, dense(weight))
    assert not composed[outputs].any()
    assert channel_errors(factorization, dense(weight), weight).max() < 16 * ROUNDOFF[dtype]
    random = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    random[0] = 0
    random[:, 3] = 0
    # what is left is a kernel of 23 × 15 channels, and not of lower rank than that
    found = {finding.scheme: finding.rank for finding in analysed(random)[0].findings}
    assert (found["input-subspace"], found["output-subspace"]) == (15, 23)
    assert analysed(random)[0].holding() == []


SCALES = {
    "float64": (torch.float64, -30, 30),
    "far float64": (torch.float64, -280, 280),
    "float32": (torch.float32, -30, 30),
    "bfloat16": (torch.bfloat16, -30, 30),
    "float16": (torch.float16, -4, 4),
}


@pytest.mark.parametrize("name", SCALES)
def test_channels_of_very_different_scale(name):
    dtype, lowest, highest = SCALES[name]
    scales = 10.0 ** torch.linspace(lowest, highest, 24, dtype=torch.float64)
    scales = scales[torch.randperm(24, generator=torch.Generator().manual_seed(0))][:, None, None, None]
    weight = (rank_four(24, torch.float64) * scales).to(dtype)
    analysis, findings = analysed(weight)
    assert analysis.border == Border()
    assert findings["spatial-vh"].rank == 4
    factorization = factorize(analysis, findings["spatial-vh"], weight)
    assert factorization.certificate.holds
    assert np.isfinite(factorization.certificate.relative_error)
    # a float16 factor of 1e-4 is subnormal
    weight = weight.double() / scales
    composed = kernel_of(factorization, dense(weight)) / scales.numpy()
    assert np.abs(composed - weight.numpy()).max() < (
        1e-2 if dtype == torch.float16 else 16 * ROUNDOFF[dtype]
    )
    random = (torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0)) * scales).to(dtype)
    assert analysed(random)[0].holding() == []


@pytest.mark.parametrize("factor", [1e-170, 1e170, 1e300])
def test_float64_whose_squares_leave_its_range(factor):
    weight = F.pad(rank_four(24, torch.float64) * factor, (0, 1))
    analysis, findings = analysed(weight)
    assert analysis.border == Border(right=1)
    assert findings["spatial-vh"].rank == 4
    certificate = factorize(analysis, findings["spatial-vh"], weight).certificate
    assert certificate.holds
    assert certificate.relative_error < 16 * ROUNDOFF[torch.float64]
    assert 0 < certificate.operator_norm < 1e-12 * factor


@pytest.mark.parametrize("rank", [4, 17])
@pytest.mark.parametrize("factor", [3e-6, 6e4])
def test_float16_at_either_end_of_its_range(factor, rank):
    weight = rank_four(24, torch.float64, rank)
    weight = (weight / weight.abs().max() * factor).half()
    analysis, findings = analysed(weight)
    assert findings["spatial-vh"].rank == rank
    factorization = factorize(analysis, findings["spatial-vh"], weight)
    assert all(bool(factor.isfinite().all()) for factor in factorization.weights)
    assert factorization.certificate.holds
    assert channel_errors(factorization, dense(weight), weight).max() < (1e-1 if factor < 1 else 2e-3)
    random = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    assert analysed((random / random.abs().max() * factor).half())[0].holding() == []


@pytest.mark.parametrize("dead", [1e-5, 1e-6, 1e-7])
def test_dead_channels_of_float16_do_not_hide_the_structure_of_the_others(dead):
    """Subnormal numbers carry rounding noise as large as themselves."""
    weight = rank_four(24, torch.float64)
    weight[5] *= dead
    weight = weight.half()
    analysis, findings = analysed(weight)
    finding = findings["spatial-vh"]
    assert finding.rank == 4
    assert finding.tolerance < 4 * ROUNDOFF[torch.float16]
    factorization = factorize(analysis, finding, weight)
    assert factorization.certificate.holds
    errors = channel_errors(factorization, dense(weight), weight)
    assert np.delete(errors, 5).max() < 16 * ROUNDOFF[torch.float16]
    broken = weight.clone()
    broken[6] += 0.03 * torch.randn(16, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    assert analysed(broken)[1]["spatial-vh"].rank > 4


@given(geometries(dtypes=(torch.float64, torch.float32)))
def test_every_structure_at_full_rank_is_the_kernel(geometry):
    conv = geometry.conv()
    spec, weight = spec_of(conv), conv.weight
    analysis = analyse(spec, weight, [geometry.size])
    for finding in analysis.findings:
        factorization = factorize(analysis, replace(finding, rank=finding.full_rank), weight)
        assert channel_errors(factorization, spec, weight).max() < 16 * ROUNDOFF[weight.dtype]
        assert factorization.certificate.holds


SOBEL = np.outer([1, 2, 1], [-1, 0, 1])


SCHARR = np.outer([3, 10, 3], [-1, 0, 1])


PREWITT = np.outer([1, 1, 1], [-1, 0, 1])


BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["channelwise-spatial-vh", "channelwise-spatial-hv"])
@pytest.mark.parametrize(
    "filters",
    [[SOBEL], [SOBEL, SOBEL.T], [SCHARR, PREWITT.T], [BINOMIAL] * 3],
    ids=["sobel", "both sobels", "scharr, prewitt", "binomial"],
)
def test_fixed_filters_are_split_to_the_last_bit(filters, scheme, dtype):
    weight = torch.from_numpy(np.stack(filters)[:, None].astype(np.float64)).to(dtype)
    assert (weight.double().numpy()[:, 0] == np.stack(filters)).all()
    analysis, findings = analysed(weight, groups=len(filters))
    assert findings[scheme].rank == 1
    factorization = factorize(analysis, findings[scheme], weight)
    assert factorization.certificate.bitwise
    assert factorization.certificate.worst_channel_error == 0
    assert (kernel_of(factorization, dense(weight, len(filters))) == weight.double().numpy()).all()
    if filters[0] is SOBEL:
        assert all((factor == factor.round()).all() for factor in factorization.weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("taps", "sigma"), [(11, 1.5), (7, 1.0), (21, 3.0)])
def test_a_stored_gaussian_is_found_exact(taps, sigma, dtype):
    line = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * sigma**2))
    line /= line.sum()
    weight = torch.from_numpy(np.outer(line, line)).to(dtype).repeat(3, 1, 1, 1)
    analysis, findings = analysed(weight, groups=3)
    finding = findings["channelwise-spatial-vh"]
    assert (finding.rank, finding.holds) == (1, True)
    factorization = factorize(analysis, finding, weight)
    assert factorization.certificate.holds
    assert channel_errors(factorization, dense(weight, 3), weight).max() < 4 * ROUNDOFF[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tol_admits_relative_errors_up_to_it(scheme):
    axes = {"g": 2, "o": 6, "c": 1 if scheme.startswith("channelwise") else 8, "i": 5, "j": 5}
    rng = np.random.default_rng(0)
    core = plant(scheme, axes, 1, rng)
    noise = rng.standard_normal(core.shape)
    ratio = np.sqrt(
        ((core**2).sum(axis=(1, 2, 3), keepdims=True)) / (noise**2).sum(axis=(1, 2, 3), keepdims=True)
    )
    weight = torch.from_numpy(core + 1e-3 * ratio * noise)
    spec = dense(weight, 2)
    analysis = analyse(spec, weight, [SIZE], 1e-2)
    finding = next(finding for finding in analysis.findings if finding.scheme == scheme)
    assert (finding.rank, finding.holds) == (1, True)
    assert finding.tolerance == pytest.approx(1e-2, rel=1e-9)
    factorization = factorize(analysis, finding, weight, 1e-2)
    assert factorization.certificate.holds
    assert 1e-5 < channel_errors(factorization, spec, weight).max() < 4e-3
    # as near as any kernel of that rank, all channels weighing the same
    nearest = np.sqrt((spectra(scheme, weight.numpy(), 2)[:, 1:] ** 2).sum())
    assert np.linalg.norm(channel_errors(factorization, spec, weight)) <= 1.01 * nearest
    for tol in (None, 1e-5):
        analysis = analyse(spec, weight, [SIZE], tol)
        finding = next(finding for finding in analysis.findings if finding.scheme == scheme)
        assert not finding.holds
    # what was found under a tolerance is not certified without it
    assert not factorize(analysis, replace(finding, rank=1), weight).certificate.holds
