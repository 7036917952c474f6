"""Exact structure: which unfoldings of a kernel have low rank, the factors, and the proof.

Everything is decided in float64; the factors are cast once, to the dtype of the kernel.
"""

import math

import torch
from torch import Tensor

# One output channel may carry this many times its own share of rounding noise, because the factors
# are fitted to all channels together.
CHANNEL_SHARE = 8.0


def kernel_noise(weight: Tensor, terms: int, tol: float | None) -> Tensor:
    return rounding_noise(weight, terms) if tol is None else tol * weight.double().abs()


def channel_norms(weight: Tensor) -> Tensor:
    """Frobenius norm of each output channel, O × 1 × 1 × 1."""
    weight = weight.double()
    # Squares of the largest and the smallest float64 would leave the range.
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms: Tensor = largest * torch.linalg.vector_norm(weight / largest, dim=(1, 2, 3), keepdim=True)
    return norms


def channel_scale(weight: Tensor) -> Tensor:
    """What each output channel of a stored kernel is divided by to have unit norm.

    A channel of subnormal numbers stays below: as large as the others, its rounding noise would drown
    them.
    """
    norms = channel_norms(weight)
    return norms.clamp(min=torch.finfo(weight.dtype).smallest_normal * math.sqrt(weight[0].numel()))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype` (half of its eps)."""
    return torch.finfo(dtype).eps / 2


def rounding_noise(weight: Tensor, terms: int) -> Tensor:
    """Elementwise bound on the error |stored − meant| of a stored kernel, in float64.

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
