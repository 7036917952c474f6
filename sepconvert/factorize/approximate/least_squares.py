"""Linear algebra of the fits: normal equations, conjugate gradients, preconditioners, stopping rules."""

from collections.abc import Callable

import torch
from torch import Tensor

_ENOUGH = 5e-4  # stop when a sweep lowers the error by less than this share of it


_NOTHING = 1e-6  # or of the outputs' power: fewer patches than unknowns are fitted without end


# Multiply-adds of all sweeps of one fit, by which wide layers get fewer (a spatial pair of 256 → 256
# channels, 3×3, rank 64: about 36; of 512 → 512: four): most of what there is to gain comes with the first,
# and after 12 sweeps the error of a ResNet-9's layers was within 0.1 % of where it settles.
_WORK, _FEWEST_SWEEPS = 5e10, 4


_ROUNDING = 1e-15


_CG_ENOUGH = 1e-16  # share of the preconditioned residual's square


Eigen = tuple[Tensor, Tensor]
"""Eigenvalues and eigenvectors of symmetric matrices."""


def metric_product(dense: Tensor, metric: Tensor) -> Tensor:
    """W S, in the shape of W."""
    return (dense.flatten(2) @ metric).view(dense.shape)


def leading_rows(matrices: Tensor, metric: Tensor, rank: int) -> Tensor:
    """… × m × K → … × rank × K, orthonormal: rows that span the best approximation under a metric K × K."""
    factor = torch.linalg.cholesky(metric)
    weighted = matrices @ factor
    rows = torch.linalg.svd(weighted, full_matrices=weighted.shape[-2] < rank).Vh[..., :rank, :]
    spanning = torch.linalg.solve_triangular(factor, rows.contiguous(), upper=False, left=False)
    basis: Tensor = torch.linalg.qr(spanning.mT).Q
    return basis.mT


def affordable(sweeps: int, work: float) -> int:
    """Of so many sweeps, those that `_WORK` pays for at `work` multiply-adds each."""
    return min(sweeps, max(_FEWEST_SWEEPS, int(_WORK / work)))


def settled(objective: list[float], start: float) -> bool:
    if objective[-1] <= _ROUNDING * start:  # what is fitted is the rounding of a perfect fit
        return True
    enough = max(_ENOUGH * abs(objective[-1]), _NOTHING * start)
    return len(objective) > 1 and objective[-2] - objective[-1] <= enough


def solve_semidefinite(gram: Tensor, right: Tensor) -> Tensor:
    """The symmetric positive semidefinite system; where it is singular, some solution."""
    gram = (gram + gram.mT) / 2
    ridge = torch.finfo(gram.dtype).eps * gram.shape[-1] * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    solution: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return solution


def kronecker_inverse(left: Eigen, right: Eigen) -> Callable[[Tensor], Tensor]:
    """X ↦ the pseudo-inverse of (left ⊗ right) on X, of … × m × k."""
    left_values, left_vectors = left
    right_values, right_vectors = right
    values = left_values.clamp(min=0)[..., :, None] * right_values.clamp(min=0)[..., None, :]
    threshold = negligible(values) * values.amax((-2, -1), keepdim=True)
    inverse = torch.where(values > threshold, 1 / values, torch.zeros_like(values))

    def apply(x: Tensor) -> Tensor:
        rotated = left_vectors.mT @ x @ right_vectors
        return left_vectors @ (rotated * inverse) @ right_vectors.mT

    return apply


def negligible(values: Tensor) -> float:
    """The share of the largest eigenvalue below which others are rounding."""
    return float(torch.finfo(values.dtype).eps ** 0.75)


def symmetric_eigen(matrix: Tensor) -> Eigen:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def conjugate_gradients(
    hessian: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    residual: Tensor,
    dims: tuple[int, ...],
    steps: int,
) -> Tensor:
    """Some steps from nothing towards hessian(X) = residual; each lowers the quadratic objective.

    `dims` are those of the unknowns of one system; the others count systems.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a > 0) & (b > 0), a / b, torch.zeros_like(a))

    solution, direction = torch.zeros_like(residual), precondition(residual)
    size = first = inner(residual, direction)
    for left in reversed(range(steps)):
        size = torch.where(size > _CG_ENOUGH * first, size, torch.zeros_like(size))
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


def eigen_in_single(eigen: Eigen) -> Eigen:
    values, vectors = eigen
    return values.float(), vectors.float()
