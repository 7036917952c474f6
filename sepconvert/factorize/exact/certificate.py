"""Certificates: how far composed factors are from the kernel, and what rounding explains of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sepconvert.factorize.exact.analysis import Finding
from sepconvert.factorize.rounding import (
    CHANNEL_SHARE,
    channel_norms,
    channel_scale,
    kernel_noise,
    rounding_noise,
)

OVERSAMPLING = 8


@dataclass(frozen=True)
class Certificate:
    """Proof that a chain of convolutions is the dense layer, ΔW being the difference of the kernels."""

    relative_error: float  # ‖ΔW‖_F / ‖W‖_F
    worst_channel_error: float  # max over output channels o of ‖ΔW_o‖ / ‖W_o‖ (see `_channel_scale`)
    channel_tolerance: float  # what rounding of the kernel and of its factors explains, same measure
    operator_norm: float  # ‖Δy‖₂ ≤ operator_norm · ‖x‖₂ for every (padded) input x
    exact: bool  # no channel is off by more than rounding explains, whatever tolerance was asked for
    bitwise: bool  # ΔW = 0
    kept: tuple[float, ...]  # singular values just above the cut (see `Finding.spectrum`)
    dropped: tuple[float, ...]  # and just below it

    @property
    def holds(self) -> bool:
        """Is the difference explained by rounding?"""
        return self.worst_channel_error <= self.channel_tolerance


def channel_errors(composed: Tensor, weight: Tensor) -> Tensor:
    """‖ΔW_o‖ / ‖W_o‖ for each output channel of a stored kernel, O × 1 × 1 × 1 (see `channel_scale`)."""
    return channel_norms(composed.double() - weight.double()) / channel_scale(weight)


def certify(
    weight: Tensor, composed: Tensor, casting: Tensor, finding: Finding, tol: float | None
) -> Certificate:
    dense = weight.double()
    difference = composed.double() - dense
    scale, terms = channel_scale(weight), finding.full_rank
    explained, by_rounding = (
        (CHANNEL_SHARE * channel_norms(noise) + channel_norms(casting)) / scale
        for noise in (kernel_noise(weight, terms, tol), rounding_noise(weight, terms))
    )
    errors = channel_errors(composed, weight)
    worst = int((errors - explained).argmax())
    largest = float(dense.abs().max()) or 1.0  # squares of the largest float64 would overflow
    relative_error = torch.linalg.vector_norm(difference / largest) / (
        torch.linalg.vector_norm(dense / largest) or 1.0
    )
    cut = max(finding.rank, 1) if finding.spectrum else 0
    return Certificate(
        relative_error=float(relative_error),
        worst_channel_error=float(errors.flatten()[worst]),
        channel_tolerance=float(explained.flatten()[worst]),
        operator_norm=_operator_norm(difference),
        exact=bool((errors <= by_rounding).all()),
        bitwise=not bool(difference.any()),
        kept=finding.spectrum[max(cut - 3, 0) : cut],
        dropped=finding.spectrum[cut : cut + 3],
    )


def _operator_norm(weight: Tensor) -> float:
    """An upper bound on ‖x ↦ conv(x)‖₂, for any stride and dilation, x being padded already.

    A convolution is a sum of kh·kw shifted 1×1 convolutions, each of norm ‖W[:,:,i,j]‖₂; and it is
    the O × C·kh·kw matrix applied to patches, in which each pixel occurs at most kh·kw times. With
    groups this is an upper bound too, the matrix of all groups stacked having the larger norm.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return largest
    weight = weight / largest  # squares of the largest float64 would overflow, of the smallest vanish
    taps = weight.flatten(2).permute(2, 0, 1)
    by_shifts = _spectral_norms(taps).sum()
    by_patches = math.sqrt(taps.shape[0]) * _spectral_norms(weight.flatten(1))
    return largest * float(torch.minimum(by_shifts, by_patches))


def _spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular values, by the smaller Gram matrix: exact enough for the largest, and quick."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    largest: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)[..., -1]
    return largest.clamp(min=0).sqrt()
