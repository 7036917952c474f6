"""Linear algebra of the fits: normal equations, conjugate gradients, preconditioners, stopping rules."""

from collections.abc import Callable

import torch
from torch import Tensor

# A fit has converged when a sweep lowers the objective by less than this share of it, ...
_RELATIVE_PROGRESS = 5e-4

# ... or of the power of the outputs: with fewer patches than unknowns the objective falls forever.
_POWER_PROGRESS = 1e-6

# Objective, as a share of the power of the outputs, that is the rounding of a perfect fit.
_ROUNDING = 1e-15

# Multiply-adds that all sweeps of one fit may take together; wide layers get fewer sweeps (a spatial pair of
# 256 → 256 channels, 3×3, rank 64: about 36; of 512 → 512: four). The first sweeps gain most: after 12 of
# them the error of a ResNet-9's layers was within 0.1 % of its limit.
_WORK, _FEWEST_SWEEPS = 5e10, 4

# Conjugate gradients stop at this share of the first preconditioned residual's square.
_CG_TOLERANCE = 1e-16


Eigen = tuple[Tensor, Tensor]
"""Eigenvalues, … × m in ascending order, and eigenvectors, … × m × m in columns, of symmetric matrices."""


def apply_metric(kernel: Tensor, metric: Tensor) -> Tensor:
    """Return W S in the shape of W, for a kernel W, g × O × C × K, and a metric S, g × C·K × C·K."""
    return (kernel.flatten(2) @ metric).view(kernel.shape)


def leading_rows(matrices: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Return orthonormal rows that span the best approximation of rank `rank` in a metric.

    With the metric LLᵀ and A the matrices, the leading right singular vectors of A L span that of A after
    multiplication by L⁻¹.

    Args:
        matrices: … × m × K.
        metric: … × K × K, symmetric positive definite.
        rank: at most K; rows beyond the rank of the matrices complete the basis.

    Returns:
        … × rank × K.
    """
    factor = torch.linalg.cholesky(metric)
    weighted = matrices @ factor
    rows = torch.linalg.svd(weighted, full_matrices=weighted.shape[-2] < rank).Vh[..., :rank, :]
    spanning = torch.linalg.solve_triangular(factor, rows.contiguous(), upper=False, left=False)
    basis: Tensor = torch.linalg.qr(spanning.mT).Q
    return basis.mT


def affordable_sweeps(sweeps: int, work: float) -> int:
    """Return how many of `sweeps` sweeps, of `work` multiply-adds each, a fit may make."""
    return min(sweeps, max(_FEWEST_SWEEPS, int(_WORK / work)))


def has_converged(objective: list[float], start: float) -> bool:
    """Return whether further sweeps are not worth their time.

    Args:
        objective: its value after each sweep so far, at least one.
        start: the objective of a kernel of zeros.
    """
    if objective[-1] <= _ROUNDING * start:
        return True
    enough = max(_RELATIVE_PROGRESS * abs(objective[-1]), _POWER_PROGRESS * start)
    return len(objective) > 1 and objective[-2] - objective[-1] <= enough


def solve_semidefinite(gram: Tensor, right: Tensor) -> Tensor:
    """Return X with G X = B for symmetric positive semidefinite G; if G is singular, one solution of many.

    A ridge of eps · m times the mean of the diagonal makes every G definite.

    Args:
        gram: G, … × m × m.
        right: B, … × m × n.

    Returns:
        X, … × m × n.
    """
    gram = (gram + gram.mT) / 2
    ridge = torch.finfo(gram.dtype).eps * gram.shape[-1] * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    solution: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return solution


def symmetric_eigen(matrices: Tensor) -> Eigen:
    """Return the eigenvalues and eigenvectors of symmetric matrices … × m × m."""
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def to_single(eigen: Eigen) -> Eigen:
    """Return eigenvalues and eigenvectors in float32."""
    values, vectors = eigen
    return values.float(), vectors.float()


def eigenvalue_cutoff(values: Tensor) -> float:
    """Return the share of the largest eigenvalue, eps^¾ of the dtype, below which the others are rounding."""
    return float(torch.finfo(values.dtype).eps ** 0.75)


def kronecker_inverse(left: Eigen, right: Eigen) -> Callable[[Tensor], Tensor]:
    """Return the function X ↦ A⁺ X B⁺, the pseudo-inverse of A ⊗ B applied to matrices X, … × m × k.

    Args:
        left: of A, … × m × m, positive semidefinite.
        right: of B, … × k × k, positive semidefinite.
    """
    left_values, left_vectors = left
    right_values, right_vectors = right
    values = left_values.clamp(min=0)[..., :, None] * right_values.clamp(min=0)[..., None, :]
    threshold = eigenvalue_cutoff(values) * values.amax((-2, -1), keepdim=True)
    inverse = torch.where(values > threshold, 1 / values, torch.zeros_like(values))

    def apply(x: Tensor) -> Tensor:
        rotated = left_vectors.mT @ x @ right_vectors
        return left_vectors @ (rotated * inverse) @ right_vectors.mT

    return apply


def conjugate_gradients(
    hessian: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    residual: Tensor,
    dims: tuple[int, ...],
    steps: int,
) -> Tensor:
    """Approximate X with hessian(X) = residual by preconditioned conjugate gradients started at zero.

    Every step lowers the quadratic objective. Singular systems are admitted: a direction of no curvature is
    not followed.

    Args:
        hessian: a symmetric positive semidefinite linear map.
        precondition: an approximate inverse of it, symmetric positive semidefinite.
        residual: right sides of one system or more.
        dims: dimensions of `residual` that hold the unknowns of one system; the others count systems.
        steps: at most this many, each of which applies `hessian` once.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a > 0) & (b > 0), a / b, torch.zeros_like(a))

    solution, direction = torch.zeros_like(residual), precondition(residual)
    size = first = inner(residual, direction)
    for left in reversed(range(steps)):
        size = torch.where(size > _CG_TOLERANCE * first, size, torch.zeros_like(size))
        if not size.any():
            break
        image = hessian(direction)
        length = ratio(size, inner(direction, image))
        solution = solution + length * direction
        if left:
            residual = residual - length * image
            step = precondition(residual)
            previous, size = size, inner(residual, step)
            direction = step + ratio(size, previous) * direction
    return solution
