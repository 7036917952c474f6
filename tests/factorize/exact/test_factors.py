"""The proof that "exact" means exact, and that nothing else is called so."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import (
    DTYPES,
    PLANTS,
    ROUNDOFF,
    SCHEMES,
    distinct_schemes,
    geometries,
    numbered,
    plant,
    planted,
    spec_of,
    spectra,
    unfolded,
)
from torch.nn import functional as F

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, analyse, may_separate, spectrum
from sepconvert.factorize.exact.certificate import _operator_norm
from sepconvert.factorize.exact.factors import compose, factorize, split
from sepconvert.factorize.geometry import ConvSpec, chain_macs

SIZE = (32, 32)


def dense(weight, groups=1):
    """Plain geometry of a kernel."""
    out_channels, in_per_group, kh, kw = weight.shape
    return ConvSpec(groups * in_per_group, out_channels, (kh, kw), groups=groups)


def analysed(weight, groups=1, tol=None):
    analysis = analyse(dense(weight, groups), weight, [SIZE], tol)
    return analysis, {finding.scheme: finding for finding in analysis.findings}


def kernel_of(factorization, spec):
    """The dense kernel that the factors make, in float64, by numpy's einsum."""
    factors = [weight.double().numpy() for weight in factorization.weights]
    border = factorization.border
    if factorization.scheme == ZERO_BORDER:
        core = factors[0]
    else:
        left, right = PLANTS[factorization.scheme].split("->")[0].split(",")
        sizes = {
            "g": spec.groups,
            "o": spec.out_channels // spec.groups,
            "c": spec.in_channels // spec.groups,
            "i": spec.kernel_size[0] - border.top - border.bottom,
            "j": spec.kernel_size[1] - border.left - border.right,
            "r": factorization.rank,
        }
        shaped = [
            factor.reshape([sizes[axis] for axis in subscripts])
            for factor, subscripts in zip(factors, (left, right), strict=True)
        ]
        core = np.einsum(PLANTS[factorization.scheme], *shaped)
        core = core.reshape(spec.out_channels, sizes["c"], sizes["i"], sizes["j"])
    pads = (border.top, border.bottom), (border.left, border.right)
    return np.pad(core, ((0, 0), (0, 0), *pads))


def channel_errors(factorization, spec, weight):
    """‖ΔW_o‖ / ‖W_o‖ by numpy."""
    weight = weight.double().numpy()
    norms = np.sqrt((weight**2).sum(axis=(1, 2, 3)))
    errors = np.sqrt(((kernel_of(factorization, spec) - weight) ** 2).sum(axis=(1, 2, 3)))
    return errors / np.where(norms > 0, norms, 1)


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
    composed = compose(spec, factorization.scheme, factorization.border, factorization.weights)
    assert composed.dtype == weight.dtype
    assert composed.shape == weight.shape
    return analysis, factorization


@numbered(500)
@given(planted())
def test_planted_structure_is_found_with_its_rank(case):
    assert_found(case)


@numbered(400)
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
    assert alone.specs == split(spec, ZERO_BORDER, border.rank, analysis.border)
    assert np.array_equal(kernel_of(alone, spec), case.conv.weight.double().numpy())


@numbered(300)
@given(geometries(least_kernel=2))
def test_random_kernels_are_refused(geometry):
    conv = geometry.conv()
    if geometry.axes["i"] * geometry.axes["j"] * geometry.axes["c"] * geometry.axes["o"] < 16:
        return  # so few numbers have structure by chance, to the 8 bits of bfloat16
    analysis = analyse(spec_of(conv), conv.weight, [geometry.size])
    assert {finding.scheme for finding in analysis.findings} == {
        ZERO_BORDER,
        *distinct_schemes(geometry.axes),
    }
    assert analysis.holding() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((64, 64, 3, 3), 1),
        ((256, 128, 3, 3), 1),
        ((48, 1, 7, 7), 48),
        ((32, 3, 7, 7), 1),
        ((64, 128, 1, 1), 1),
        ((96, 1, 5, 5), 32),
        ((64, 8, 3, 5), 8),
        ((10, 40, 1, 9), 1),
    ],
)
def test_random_kernels_of_real_sizes_are_refused(dtype, shape, groups):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    findings = analysed(weight, groups)[1]
    assert findings
    assert not any(finding.holds for finding in findings.values())
    assert all(finding.best_error > 10 * finding.tolerance for finding in findings.values())


INTEGER = {
    "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    "laplacian of eight": [[1, 1, 1], [1, -8, 1], [1, 1, 1]],
    "emboss": [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]],
    "identity matrix": np.eye(5).tolist(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integer_kernels_without_structure_are_refused(name, dtype):
    weight = torch.tensor(INTEGER[name], dtype=dtype)[None, None]
    for kernel, groups in ((weight, 1), (weight.repeat(3, 1, 1, 1), 3)):
        analysis, findings = analysed(kernel, groups)
        rank = np.linalg.matrix_rank(np.array(INTEGER[name]))
        assert findings["channelwise-spatial-vh"].rank == rank
        assert analysis.holding() == []


def test_a_full_layer_of_one_laplacian_has_only_the_channels_own_structure():
    weight = torch.tensor(INTEGER["laplacian"], dtype=torch.float32).repeat(4, 4, 1, 1)
    findings = analysed(weight)[1]
    assert findings["spatial-vh"].rank == findings["spatial-hv"].rank == 2
    assert findings["depthwise-pointwise"].rank == findings["output-subspace"].rank == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_misses_are_refused_with_the_error_of_eckart_and_young(scheme, dtype):
    groups = 2
    axes = {"g": groups, "o": 6, "c": 1 if scheme.startswith("channelwise") else 8, "i": 5, "j": 5}
    rng = np.random.default_rng(1)
    core = plant(scheme, axes, 2, rng)
    core /= np.sqrt((core**2).sum(axis=(1, 2, 3), keepdims=True))
    for relative in (1e-12 if dtype == torch.float64 else 50 * ROUNDOFF[dtype], 0.2):
        noise = rng.standard_normal(core.shape)
        noise *= relative / np.sqrt((noise**2).sum(axis=(1, 2, 3), keepdims=True))
        weight = torch.from_numpy((core + noise) * 10.0 ** rng.uniform(-2, 2, (len(core), 1, 1, 1))).to(dtype)
        finding = analysed(weight, groups)[1][scheme]
        assert finding.rank > 2
        assert not (finding.holds and finding.rank == 2)
        values = spectra(scheme, weight.double().numpy(), groups)
        assert finding.full_rank == values.shape[1]
        cut = min(max(finding.paying_rank, 1), finding.full_rank)
        whole = np.sqrt((values**2).sum())
        # the error is that of the kernel itself, the spectrum that of the scaled one
        own = np.linalg.svd(unfolded(scheme, weight.double().numpy(), groups), compute_uv=False)
        assert finding.best_error == pytest.approx(
            np.sqrt((own[:, cut:] ** 2).sum() / (own**2).sum()), rel=1e-6, abs=1e-14
        )
        np.testing.assert_allclose(
            finding.spectrum, np.sqrt((values**2).sum(axis=0)) / whole, rtol=1e-6, atol=1e-14
        )


def test_best_error_is_the_one_at_the_largest_rank_that_pays():
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    spec = ConvSpec(8, 16, (3, 3), stride=(2, 2), padding=((1, 1), (1, 1)))
    findings = {finding.scheme: finding for finding in analyse(spec, weight, [(20, 24)]).findings}
    # 3×1 at 10 × 24, then 1×3 at 10 × 12; dense 10 × 12
    one = 10 * 24 * 8 * 3 + 10 * 12 * 16 * 3
    whole = 10 * 12 * 16 * 8 * 9
    assert findings["spatial-vh"].paying_rank == (whole - 1) // one
    assert findings["spatial-vh"].macs == findings["spatial-vh"].rank * one
    # twice the calls cost twice as much and leave the choice as it is
    twice = {finding.scheme: finding for finding in analyse(spec, weight, [(20, 24)] * 2).findings}
    assert twice["spatial-vh"].paying_rank == findings["spatial-vh"].paying_rank
    assert twice["spatial-vh"].macs == 2 * findings["spatial-vh"].macs
    assert analyse(spec, weight, [(20, 24)] * 2).dense_macs == 2 * whole


@pytest.mark.parametrize(("shape", "groups"), [((16, 8, 3, 3), 1), ((8, 1, 5, 5), 8), ((12, 5, 1, 1), 2)])
def test_the_spectrum_of_one_structure_is_that_of_the_findings(shape, groups):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = ConvSpec(shape[1] * groups, shape[0], shape[2:], groups=groups)
    findings = [each for each in analyse(spec, weight, [(9, 9)]).findings if each.spectrum]
    assert findings
    for finding in findings:
        found = spectrum(spec, weight, finding.scheme, 3)
        assert (found.scheme, found.cut) == (finding.scheme, 3)
        np.testing.assert_allclose(found.values, finding.spectrum, rtol=1e-12)


def test_the_spectrum_of_a_nested_structure_is_that_of_the_outer():
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    found = spectrum(ConvSpec(6, 8, (3, 3)), weight, "channel-subspace", None)
    scaled = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
    values = np.linalg.svd(scaled.permute(1, 0, 2, 3).reshape(6, -1).numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values, values / np.linalg.norm(values), rtol=1e-12)


def rank_four(out_channels, dtype=torch.float32, rank=4):
    axes = {"g": 1, "o": out_channels, "c": 16, "i": 3, "j": 3}
    weight = plant("spatial-vh", axes, rank, np.random.default_rng(0))
    return torch.from_numpy(weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))).to(dtype)


@pytest.mark.parametrize("out_channels", [8, 64, 512])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_single_channel_that_breaks_the_structure_is_seen(out_channels, scale):
    weight = rank_four(out_channels)
    broken = torch.randn(16, 3, 3, generator=torch.Generator().manual_seed(1))
    weight[3] = (weight[3] + 1e-4 * broken / broken.norm()) * scale
    finding = analysed(weight)[1]["spatial-vh"]
    assert finding.rank > 4
    # At rank 4, which must not pass, the certificate says so as well.
    analysis = analysed(weight)[0]
    forced = factorize(analysis, replace(finding, rank=4), weight)
    assert not forced.certificate.holds


def test_a_break_that_drowns_in_the_rounding_of_many_channels_fails_the_certificate():
    """Of 512 channels one could carry 22 times its share of the whole matrix's rounding."""
    u = ROUNDOFF[torch.float32]
    weight = rank_four(512)
    broken = torch.randn(16, 3, 3, generator=torch.Generator().manual_seed(1))
    weight[3] = weight[3].double() + 130 * u * broken / broken.norm()
    analysis, findings = analysed(weight)
    finding = findings["spatial-vh"]
    assert finding.rank == 4
    assert not factorize(analysis, finding, weight).certificate.holds


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


# Small, empty and extreme


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


def test_kernels_of_one_tap_and_of_one_channel():
    assert analysed(torch.ones(1, 1, 1, 1))[1] == {}
    assert analysed(torch.randn(5, 1, 1, 1))[1] == {}
    assert set(analysed(torch.randn(5, 3, 1, 1))[1]) == {"output-subspace"}
    low = torch.outer(torch.arange(1.0, 9), torch.arange(2.0, 8))[..., None, None]
    finding = analysed(low)[1]["output-subspace"]
    assert (finding.rank, finding.holds) == (1, True)
    line = torch.randn(1, 1, 1, 7, generator=torch.Generator().manual_seed(0))
    assert set(analysed(line)[1]) == {ZERO_BORDER}
    one = torch.outer(torch.arange(1.0, 4), torch.arange(2.0, 5))[None, None]
    assert analysed(one)[1]["channelwise-spatial-hv"].holds


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


@numbered(100)
@given(geometries(dtypes=(torch.float64, torch.float32)))
def test_every_structure_at_full_rank_is_the_kernel(geometry):
    conv = geometry.conv()
    spec, weight = spec_of(conv), conv.weight
    analysis = analyse(spec, weight, [geometry.size])
    for finding in analysis.findings:
        factorization = factorize(analysis, replace(finding, rank=finding.full_rank), weight)
        assert channel_errors(factorization, spec, weight).max() < 16 * ROUNDOFF[weight.dtype]
        assert factorization.certificate.holds


# Fixed filters

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


# Tolerance by request


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


def test_tol_admits_a_border_that_is_almost_zero():
    weight = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    weight[:, :, 0] *= 1e-3
    assert analyse(dense(weight), weight, [SIZE], 1e-2).border == Border(top=1)
    assert analyse(dense(weight), weight, [SIZE]).border == Border()
    weight[2, :, 0] *= 1e3
    assert analyse(dense(weight), weight, [SIZE], 1e-2).border == Border()


# Bound of the function


@numbered(150)
@given(geometries(dtypes=(torch.float64,)))
def test_operator_norm_bounds_every_output(geometry):
    conv = geometry.conv()
    bound = _operator_norm(conv.weight)
    kh, kw = (d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    size = kh + geometry.size[0], kw + geometry.size[1]
    generator = torch.Generator().manual_seed(geometry.seed)
    x = torch.randn(1, geometry.in_channels, *size, generator=generator, dtype=torch.float64)

    def apply(x):
        return F.conv2d(x, conv.weight, None, conv.stride, 0, conv.dilation, conv.groups)

    for _ in range(15):  # power iteration on AᵀA
        x /= x.norm()
        y = apply(x)
        assert y.norm() <= bound * (1 + 1e-12)
        x = torch.autograd.functional.vjp(apply, x, y)[1]
        if not x.any():
            break


def test_operator_norm_is_attained():
    """Kernels of one tap, and of constant sign on a constant image."""
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    weight[..., 1, 2] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 7.0], dtype=torch.float64))
    assert _operator_norm(weight) == pytest.approx(7)
    mean = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    x = torch.ones(1, 1, 300, 300, dtype=torch.float64)
    assert F.conv2d(x, mean).norm() / x.norm() == pytest.approx(_operator_norm(mean), rel=0.01)


def test_certificates_bound_the_difference_of_the_outputs():
    weight = torch.randn(12, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    analysis = analysed(weight, groups=2)[0]
    for finding in analysis.findings[1:]:
        half = factorize(analysis, replace(finding, rank=max(finding.full_rank // 2, 1)), weight)
        difference = torch.from_numpy(kernel_of(half, analysis.spec)) - weight
        x = torch.randn(1, 12, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        moved = F.conv2d(x, difference, groups=2).norm() / x.norm()
        assert 0.01 < moved <= half.certificate.operator_norm
        assert half.certificate.relative_error == pytest.approx(float(difference.norm() / weight.norm()))
        assert not half.certificate.holds
        assert not half.certificate.bitwise


def test_certificates_show_the_singular_values_around_the_cut():
    weight = rank_four(24)
    analysis, findings = analysed(weight)
    certificate = factorize(analysis, findings["spatial-vh"], weight).certificate
    values = np.sqrt((spectra("spatial-vh", weight.double().numpy(), 1) ** 2).sum(axis=0))
    values /= np.sqrt((values**2).sum())
    np.testing.assert_allclose(certificate.kept, values[1:4], rtol=1e-6)
    np.testing.assert_allclose(certificate.dropped, values[4:7], rtol=1e-4)
    assert min(certificate.kept) > 1e4 * max(certificate.dropped)


def test_macs_are_those_of_the_chain():
    weight = rank_four(24)
    spec = ConvSpec(16, 24, (3, 3), padding=((1, 1), (1, 1)))
    analysis = analyse(spec, weight, [(9, 7), (20, 30)])
    for finding in analysis.findings:
        parts = split(spec, finding.scheme, finding.rank, analysis.border)
        assert finding.macs == chain_macs(parts, (9, 7)) + chain_macs(parts, (20, 30))
    assert [finding.macs for finding in analysis.holding()] == sorted(
        f.macs for f in analysis.findings if f.holds
    )


@numbered(150)
@given(planted())
def test_a_glance_overlooks_nothing(case):
    spec, weight = spec_of(case.conv), case.conv.weight.detach()
    found = analyse(spec, weight, [case.geometry.size])
    if not found.border and any(each.scheme != ZERO_BORDER for each in found.holding()):
        assert may_separate(spec, weight)


def test_a_glance_spares_most_kernels_the_analysis():
    spec = ConvSpec(16, 16, (3, 3))
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    assert not may_separate(spec, weight)
    assert may_separate(spec, weight[:, :, :1].expand(-1, -1, 3, -1) * 1.0)
