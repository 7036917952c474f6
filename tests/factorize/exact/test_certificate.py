"""Certificates admit rounding and refuse everything else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_kernels import analysed, kernel_of, rank_four
from hypothesis import given
from strategies import (
    ROUNDOFF,
    geometries,
    spectra,
)
from torch.nn import functional as F

from sepconvert.factorize.exact.certificate import operator_norm_bound
from sepconvert.factorize.exact.factors import factorize


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


@given(geometries(dtypes=(torch.float64,)))
def test_operator_norm_bounds_every_output(geometry):
    conv = geometry.conv()
    bound = operator_norm_bound(conv.weight)
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
    assert operator_norm_bound(weight) == pytest.approx(7)
    mean = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    x = torch.ones(1, 1, 300, 300, dtype=torch.float64)
    assert F.conv2d(x, mean).norm() / x.norm() == pytest.approx(operator_norm_bound(mean), rel=0.01)


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
