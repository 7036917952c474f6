"""How far a stored kernel may lie from the kernel that was meant: the tolerance of every "exact"."""

import math

import torch
from torch import Tensor


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
