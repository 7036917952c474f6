"""The certificate of exact factors: how far they are from the kernel, and how much of it rounding explains.

`sepconvert.factorize.rounding` defines the tolerance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sepconvert.factorize.exact.analysis import Finding
from sepconvert.factorize.rounding import (
    CHANNEL_SHARE,
    channel_norms,
    channel_scale,
    rounding_noise,
    tolerated_error,
)


@dataclass(frozen=True)
class Certificate:
    """Proof that a chain of convolutions equals the dense layer; ΔW is the difference of the kernels."""

    relative_error: float  # ‖ΔW‖_F / ‖W‖_F
    worst_channel_error: float  # max over output channels o of ‖ΔW_o‖ / ‖W_o‖ (see `channel_scale`)
    channel_tolerance: float  # the part of it that rounding of the kernel and of its factors explains
    operator_norm: float  # ‖Δy‖₂ ≤ operator_norm · ‖x‖₂ for every (padded) input x
    exact: bool  # whether rounding explains the errors of all channels, whatever tolerance was asked for
    bitwise: bool  # whether ΔW = 0
    kept: tuple[float, ...]  # singular values just above the cut (see `Finding.spectrum`)
    dropped: tuple[float, ...]  # those just below it

    @property
    def holds(self) -> bool:
        """Whether the tolerance explains the difference."""
        return self.worst_channel_error <= self.channel_tolerance


def channel_errors(composed: Tensor, weight: Tensor) -> Tensor:
    """Return ‖ΔW_o‖ / ‖W_o‖ for each output channel of a stored kernel, O × 1 × 1 × 1.

    Args:
        composed: kernel of the factors, O × C/g × kh × kw.
        weight: the dense kernel in its stored dtype; `channel_scale` takes its norms.
    """
    return channel_norms(composed.double() - weight.double()) / channel_scale(weight)


def certify(
    weight: Tensor, composed: Tensor, casting: Tensor, finding: Finding, tol: float | None
) -> Certificate:
    """Return the certificate of factors.

    Args:
        weight: the dense kernel, O × C/g × kh × kw, in its stored dtype.
        composed: the kernel that the stored factors make, of the same shape, in float64.
        casting: elementwise bound on what rounding of the factors changes in it, in float64.
        finding: the structure and rank of the factors.
        tol: relative error that counts as exact, instead of the rounding of the stored dtype.
    """
    dense = weight.double()
    difference = composed.double() - dense
    scale, terms = channel_scale(weight), finding.full_rank
    explained, by_rounding = (
        (CHANNEL_SHARE * channel_norms(noise) + channel_norms(casting)) / scale
        for noise in (tolerated_error(weight, terms, tol), rounding_noise(weight, terms))
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
        operator_norm=operator_norm_bound(difference),
        exact=bool((errors <= by_rounding).all()),
        bitwise=not bool(difference.any()),
        kept=finding.spectrum[max(cut - 3, 0) : cut],
        dropped=finding.spectrum[cut : cut + 3],
    )


def operator_norm_bound(weight: Tensor) -> float:
    """Return an upper bound on ‖x ↦ conv(x)‖₂ for any stride and dilation, where x is padded already.

    A convolution is a sum of kh·kw shifted 1×1 convolutions, each of norm ‖W[:,:,i,j]‖₂. It is also
    the O × C·kh·kw matrix applied to patches, in which each pixel occurs at most kh·kw times. Both bounds
    hold with groups, since the stacked matrix of all groups has at least the norm of each of them.

    Args:
        weight: kernel O × C/g × kh × kw in float64.
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
    """Return the largest singular values, B, of matrices B × m × n, or that of one matrix.

    The smaller Gram matrix gives them quickly, and precisely enough for the largest.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    largest: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)[..., -1]
    return largest.clamp(min=0).sqrt()
