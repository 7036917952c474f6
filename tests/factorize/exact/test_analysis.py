"""Structure is found where there is some, and nowhere else."""

import numpy as np
import pytest
import torch
from exact_kernels import SIZE, analysed, dense, rank_four
from hypothesis import assume, given
from strategies import (
    DTYPES,
    ROUNDOFF,
    SCHEMES,
    distinct_schemes,
    geometries,
    plant,
    planted,
    spec_of,
    spectra,
    unfolded,
)

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import analysis
from sepconvert.factorize.exact.analysis import ZERO_BORDER, analyse, kernel_spectrum, may_separate
from sepconvert.factorize.exact.factors import factor_specs
from sepconvert.factorize.geometry import ConvSpec, chain_macs


@given(geometries(least_kernel=2))
def test_random_kernels_are_refused(geometry):
    # Fewer numbers have structure by chance, to the 8 bits of bfloat16.
    assume(geometry.axes["i"] * geometry.axes["j"] * geometry.axes["c"] * geometry.axes["o"] >= 16)
    conv = geometry.conv()
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


def test_tol_admits_a_border_that_is_almost_zero():
    weight = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    weight[:, :, 0] *= 1e-3
    assert analyse(dense(weight), weight, [SIZE], 1e-2).border == Border(top=1)
    assert analyse(dense(weight), weight, [SIZE]).border == Border()
    weight[2, :, 0] *= 1e3
    assert analyse(dense(weight), weight, [SIZE], 1e-2).border == Border()


def test_macs_are_those_of_the_chain():
    weight = rank_four(24)
    spec = ConvSpec(16, 24, (3, 3), padding=((1, 1), (1, 1)))
    analysis = analyse(spec, weight, [(9, 7), (20, 30)])
    for finding in analysis.findings:
        parts = factor_specs(spec, finding.scheme, finding.rank, analysis.border)
        assert finding.macs == chain_macs(parts, (9, 7)) + chain_macs(parts, (20, 30))
    assert [finding.macs for finding in analysis.holding()] == sorted(
        f.macs for f in analysis.findings if f.holds
    )


@pytest.mark.parametrize(("shape", "groups"), [((16, 8, 3, 3), 1), ((8, 1, 5, 5), 8), ((12, 5, 1, 1), 2)])
def test_the_spectrum_of_one_structure_is_that_of_the_findings(shape, groups):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = ConvSpec(shape[1] * groups, shape[0], shape[2:], groups=groups)
    findings = [each for each in analyse(spec, weight, [(9, 9)]).findings if each.spectrum]
    assert findings
    for finding in findings:
        found = kernel_spectrum(spec, weight, finding.scheme, 3)
        assert (found.scheme, found.cut) == (finding.scheme, 3)
        np.testing.assert_allclose(found.values, finding.spectrum, rtol=1e-12)


def test_the_spectrum_of_a_nested_structure_is_that_of_the_outer():
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    found = kernel_spectrum(ConvSpec(6, 8, (3, 3)), weight, "channel-subspace", None)
    scaled = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
    values = np.linalg.svd(scaled.permute(1, 0, 2, 3).reshape(6, -1).numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values, values / np.linalg.norm(values), rtol=1e-12)


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


@pytest.mark.parametrize(("shape", "rank"), [((24, 200), 12), ((60, 60), 40), ((60, 70), 0)])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.01])
def test_errors_beyond_a_rank_have_three_digits(shape, rank, decay):
    """Where quick methods do not reach that, as the kernel is near the rank, the values are exact."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in shape)
    values = decay ** np.arange(min(shape)) + 1e-12
    matrix = (left[:, : min(shape)] * values) @ right[: min(shape)]
    expected = np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())
    found = analysis._tails(analysis._rough_singular_values(torch.from_numpy(matrix)[None], rank))
    assert float(found[0, rank]) == pytest.approx(expected, rel=1e-3)
