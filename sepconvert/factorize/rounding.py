"""The tolerance of "exact": how much of a kernel, and of its factors, rounding explains.

A stored kernel W is a rounded one. `rounding_noise` bounds the rounding of each weight by

    |E| ≤ (u + √n·w)|W| + η/2,

with u the unit roundoff of the stored dtype, w that of the precision in which the kernel was computed, n the
length of the inner products that made it (at most the full rank of a structure) and η the smallest subnormal
number. Three tests use it:

- the rank of an unfolding is the smallest at which the residual of each of its matrices has at most the
  Frobenius norm ‖E‖_F plus the roundoff of the SVD (`exact.analysis`);
- a border counts as zero if in no output channel o its norm exceeds ‖E_o‖ (`border`, with n = 1);
- factors are certified if in no output channel o they differ from W by more than 8‖E_o‖ (`CHANNEL_SHARE`)
  plus 2u times the product of their magnitudes, for their own rounding (`exact.certificate`).

Norms are taken with every output channel scaled to unit norm, so that channels of any scale count alike. A
tolerance that the user asks for (`tol`) takes the place of the bound: E = tol·|W|.

Everything is computed in float64; the factors are rounded once, to the dtype of the kernel.
"""

import math

import torch
from torch import Tensor

# Multiple of its own share of rounding noise that one output channel may carry, since the factors are fitted
# to all channels together.
CHANNEL_SHARE = 8.0


def tolerated_error(weight: Tensor, terms: int, tol: float | None) -> Tensor:
    """Return the elementwise error that still counts as exact, in float64 and in the shape of the kernel.

    Args:
        weight: kernel O × C/g × kh × kw in its stored dtype.
        terms: length of the inner products that made it (see `rounding_noise`).
        tol: relative error instead of the bound on rounding, or None.
    """
    return rounding_noise(weight, terms) if tol is None else tol * weight.double().abs()


def rounding_noise(weight: Tensor, terms: int) -> Tensor:
    """Return an elementwise bound on the error |stored − meant| of a stored kernel, in float64.

    `|E| ≤ (u + √n·w)|W| + η/2`: one rounding to the stored dtype (unit roundoff u, smallest
    subnormal η), and before it an inner product of n = `terms` numbers in the working precision w
    that built the kernel: float32, or float64 for kernels stored so. √n is the probabilistic bound
    of N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J.
    Sci. Comput. 41 (2019), theorem 2.4.

    A bare `eps · max(m, n) · σ₁` would call every large bfloat16 matrix zero.
    """
    stored = torch.finfo(weight.dtype)
    working = min(unit_roundoff(weight.dtype), unit_roundoff(torch.float32))
    relative = unit_roundoff(weight.dtype) + math.sqrt(terms) * working
    return relative * weight.double().abs() + stored.smallest_normal * stored.eps / 2


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to `dtype`, half of its eps."""
    return torch.finfo(dtype).eps / 2


def channel_norms(weight: Tensor) -> Tensor:
    """Return the Frobenius norm of each output channel of O × C/g × kh × kw, as O × 1 × 1 × 1 in float64."""
    weight = weight.double()
    # Squares of the largest and the smallest float64 would leave the range.
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms: Tensor = largest * torch.linalg.vector_norm(weight / largest, dim=(1, 2, 3), keepdim=True)
    return norms


def channel_scale(weight: Tensor) -> Tensor:
    """Return the divisors O × 1 × 1 × 1 that give each output channel of a stored kernel unit norm.

    Channels of zeros or of subnormal numbers are divided by more than their norm and stay below one:
    scaled up to the others, their rounding noise would hide the structure.
    """
    norms = channel_norms(weight)
    return norms.clamp(min=torch.finfo(weight.dtype).smallest_normal * math.sqrt(weight[0].numel()))
