"""Approximate factors in the metric of the data: least output error over kernels of a structure.

With x the input patches of a layer in the network as converted so far, y its outputs in the original,
and e = y − (W x + b) what the original kernel would miss there, the kernel Ŵ minimises

    E‖y − ŷ‖² + ρ ‖W − Ŵ‖²  =  tr(Δ (S + ρI) Δᵀ) + 2 tr(Δ Eᵀ) + const,   Δ = W − Ŵ,

in centred moments S = Cov(x), E = Cov(e, x), means being the bias's business. Its unconstrained
minimum, W + E(S + ρI)⁻¹, is the ridge regression of y on x towards W. Everything is float64.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.structures import BY_NAME, Structure
from sepconvert.spec import ConvSpec

DEPTHWISE_POINTWISE = "depthwise-pointwise"
POINTWISE_DEPTHWISE = "pointwise-depthwise"

# ρ, as a share of the mean of S's diagonal: dead channels and fewer samples than unknowns leave S singular.
_RIDGE = 1e-3
_SWEEPS = 60
_ENOUGH = 5e-4  # stop when a sweep lowers the error by less than this share of it
_CG_STEPS = 12
_CG_ENOUGH = 1e-16  # share of the preconditioned residual's square
_FEW_CG_STEPS = 6  # where each costs a product with all of S


@dataclass(frozen=True)
class Moments:
    """Centred second moments of a layer's data, for each of its g groups (C and O per group, K = kh·kw).

    x are input patches, y the original's outputs, e = y − (W x + b).
    """

    count: int  # patches seen
    covariance: Tensor  # g × C·K × C·K, Cov(x)
    cross: Tensor  # g × O × C·K, Cov(e, x)
    mean: Tensor  # g × C·K, of x
    missed: Tensor  # g·O, mean of e
    missed_power: float  # E‖e − E e‖²
    power: float  # E‖y − E y‖²

    @classmethod
    def of_weights(cls, spec: ConvSpec, weight: Tensor) -> "Moments":
        """Those of white noise, with which output error is weight error: for want of data."""
        o, c = spec.out_channels // spec.groups, spec.in_channels // spec.groups
        size = c * spec.kernel_size[0] * spec.kernel_size[1]
        zeros = torch.zeros(spec.groups, o, size, dtype=torch.float64)
        return cls(
            count=0,
            covariance=torch.eye(size, dtype=torch.float64).expand(spec.groups, -1, -1),
            cross=zeros,
            mean=zeros[:, 0],
            missed=zeros[..., 0].flatten(),
            missed_power=0.0,
            power=float(weight.double().square().sum()),
        )


@dataclass(frozen=True)
class Approximation:
    """Factors of a kernel, and how near they come."""

    scheme: str
    rank: int
    weights: tuple[Tensor, Tensor]  # float64, as the structure's table has them
    kernel: Tensor  # O × C × kh × kw, float64: what the factors amount to
    bias_shift: Tensor  # O: what the bias must be raised by
    weight_error: float  # ‖W − Ŵ‖ / ‖W‖
    output_error: float  # √(E‖y − ŷ‖² / E‖y − E y‖²)
    objective: tuple[float, ...]  # after each sweep, as a share of E‖y − E y‖²


def approximate(
    spec: ConvSpec, weight: Tensor, moments: Moments, scheme: str, rank: int, sweeps: int = _SWEEPS
) -> Approximation:
    """Fit factors of `rank` by alternating least squares; no sweep raises the objective.

    Args:
        spec: geometry of the dense layer.
        weight: O × C/g × kh × kw.
        moments: of the layer's data.
        scheme: name of a structure that applies to `spec`.
        rank: from 1 to `full_rank`, at which every kernel has the form.
        sweeps: at most so many.
    """
    dense = rearrange(weight.double(), "(g o) c i j -> g o c (i j)", g=spec.groups)
    scale = float(moments.covariance.diagonal(dim1=-2, dim2=-1).mean())
    metric, cross = torch.eye(moments.covariance.shape[-1], dtype=torch.float64), moments.cross
    if scale <= torch.finfo(torch.float32).eps ** 2 * float(moments.mean.square().mean()):
        # Images that are all alike vary by rounding alone, of which there is nothing to learn.
        scale, metric, cross = 1.0, metric.repeat(spec.groups, 1, 1), torch.zeros_like(cross)
    else:
        metric = moments.covariance / scale + _RIDGE * metric
    structure = BY_NAME[scheme]
    fit = _SOLVERS.get(scheme, functools.partial(_fit_pair, structure, spec))
    left, right, objective = fit(dense, metric, cross / scale, moments.missed_power / scale, rank, sweeps)
    weights = structure.kernels(spec, left, right)
    kernel = structure.compose(spec, *weights)
    difference = rearrange(weight.double() - kernel, "(g o) c i j -> g o (c i j)", g=spec.groups)
    norm = float(dense.square().sum()) or 1.0
    return Approximation(
        scheme=scheme,
        rank=rank,
        weights=weights,
        kernel=kernel,
        bias_shift=moments.missed + (difference @ moments.mean[..., None]).flatten(),
        weight_error=float(difference.square().sum() / norm) ** 0.5,
        output_error=output_error(spec, weight, kernel, moments),
        objective=tuple(value * scale / (moments.power or 1.0) for value in objective),
    )


def output_error(spec: ConvSpec, weight: Tensor, kernel: Tensor, moments: Moments) -> float:
    """√(E‖y − ŷ‖² / E‖y − E y‖²) of another kernel in the place of `weight`, the bias being refitted."""
    difference = rearrange(weight.double() - kernel.double(), "(g o) c i j -> g o (c i j)", g=spec.groups)
    error = (
        (difference @ moments.covariance * difference).sum()
        + 2 * (difference * moments.cross).sum()
        + moments.missed_power
    )
    relative = float(error) / (moments.power or 1.0)
    return math.sqrt(max(relative, 0.0))


# W[o,c,k] = Σ_m P[o,c,m] D[c,m,k], for each group: D acts on every channel by itself.


def _fit_depthwise_pointwise(
    dense: Tensor, metric: Tensor, cross: Tensor, constant: float, rank: int, sweeps: int
) -> tuple[Tensor, Tensor, list[float]]:
    groups, _, channels, taps = dense.shape
    cross = cross.view(dense.shape)
    by_channel = metric.view(groups * channels, taps, channels * taps)
    diagonal = (
        metric.view(groups, channels, taps, channels, taps).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    )
    target = _product(dense, metric) + cross
    start = float((dense * (target + cross)).sum()) + constant
    depthwise = _leading_rows(dense.transpose(1, 2), diagonal, rank)
    objective: list[float] = []

    def filtered(depthwise: Tensor) -> Tensor:
        """B(D) S as g × C × M × C × K."""
        rows = depthwise.reshape(groups * channels, rank, taps) @ by_channel
        return rows.view(groups, channels, rank, channels, taps)

    while True:
        # P by its normal equations, as a correction of the projection of W: at full rank, of nothing.
        rows = filtered(depthwise)
        gram = torch.einsum("gbmak,gank->gbman", rows, depthwise).reshape(groups, channels * rank, -1)
        projected = torch.einsum("gock,gcmk->gocm", dense, depthwise)
        rest = dense - torch.einsum("gocm,gcmk->gock", projected, depthwise)
        missing = rest.flatten(2) @ rows.flatten(3).flatten(1, 2).mT
        missing = missing + torch.einsum("gock,gcmk->gocm", cross, depthwise).flatten(2)
        pointwise = projected + _solve(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("gock,gcmk->gocm", target, depthwise)
        objective.append(start - float((pointwise * onto).sum()))
        if len(objective) >= sweeps or rank == taps or _settled(objective):
            break
        # D by conjugate gradients on its own.
        by_pairs = (pointwise.flatten(2).mT @ pointwise.flatten(2)).view(
            groups, channels, rank, channels, rank
        )
        wanted = torch.einsum("gocm,gock->gcmk", pointwise, target)

        def hessian(step: Tensor, by_pairs: Tensor = by_pairs) -> Tensor:
            return torch.einsum("gcmbn,gbnck->gcmk", by_pairs, filtered(step))

        blocks = by_pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        solution = _conjugate_gradients(
            hessian, _kronecker_inverse(blocks, diagonal), wanted, depthwise, (1, 2, 3), _CG_STEPS
        )
        depthwise = torch.linalg.qr(solution.mT).Q.mT
    left = depthwise.mT.flatten(0, 1)
    return left, rearrange(pointwise, "g o c m -> (g c) m o"), objective


# W[o,c,k] = Σ_m P[o,c,m] D[o,m,k]: every output channel by itself, under one metric.


def _fit_pointwise_depthwise(
    dense: Tensor, metric: Tensor, cross: Tensor, constant: float, rank: int, sweeps: int
) -> tuple[Tensor, Tensor, list[float]]:
    groups, outputs, channels, taps = dense.shape
    target = _product(dense, metric) + cross.view(dense.shape)
    start = float((dense * (target + cross.view(dense.shape))).sum()) + constant
    by_tap = metric.view(groups, channels, taps, channels, taps)
    over_channels = torch.einsum("gckcl->gkl", by_tap)[:, None] / channels
    over_taps = torch.einsum("gakbk->gab", by_tap)[:, None] / taps
    ones = torch.eye(rank, dtype=torch.float64).expand(groups, outputs, -1, -1)
    depthwise = _leading_rows(dense, over_channels, rank)
    pointwise = dense @ depthwise.mT
    precondition = _kronecker_inverse(over_taps, ones)
    objective: list[float] = []
    while True:

        def hessian(step: Tensor, depthwise: Tensor = depthwise) -> Tensor:
            return _product(step @ depthwise, metric) @ depthwise.mT

        # P by conjugate gradients: its C·M normal equations differ from output to output.
        rest = _product(dense - pointwise @ depthwise, metric) + cross.view(dense.shape)
        correction = _conjugate_gradients(
            hessian, precondition, rest @ depthwise.mT, torch.zeros_like(pointwise), (2, 3), _FEW_CG_STEPS
        )
        pointwise = pointwise + correction
        kernel = pointwise @ depthwise
        objective.append(start - float((kernel * (2 * target - _product(kernel, metric))).sum()))
        if len(objective) >= sweeps or _settled(objective):
            break
        # D by its M·K normal equations.
        rows = rearrange(pointwise, "g o c m -> g (o m) c") @ rearrange(by_tap, "g a k b l -> g b (k a l)")
        gram = torch.einsum(
            "gomkal,goan->gomlnk", rows.view(groups, outputs, rank, taps, channels, taps), pointwise
        ).reshape(groups, outputs, rank * taps, rank * taps)
        wanted = pointwise.mT @ target
        solution = _solve(gram, wanted.flatten(2)[..., None]).view(depthwise.shape)
        rows_of, mixing = torch.linalg.qr(solution.mT)
        depthwise, pointwise = rows_of.mT, pointwise @ mixing.mT
    return pointwise.flatten(0, 1), depthwise.flatten(0, 1), objective


# W[o,a,b] = Σ_r H[o,r,b] V[r,a]: the first factor acts on some axes of a patch, the second on the others.
# Spatial pairs (a = c i, b = j, or a = c j, b = i), channel subspaces (a = c, b = i j, or a = c i j, no b).


def _fit_pair(
    structure: Structure,
    spec: ConvSpec,
    dense: Tensor,
    metric: Tensor,
    cross: Tensor,
    constant: float,
    rank: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, list[float]]:
    batch, rows, columns = structure.axes
    sizes = {"g": spec.groups, "c": dense.shape[2], "i": spec.kernel_size[0], "j": spec.kernel_size[1]}
    first, second = " ".join(rows), " ".join(axis for axis in columns if axis != "o")
    outputs = "(g o) 1" if "o" in batch else "g o"
    dense, cross = (
        rearrange(
            each.view(spec.groups, -1, *spec.weight_shape[1:]),
            f"g o c i j -> {outputs} ({first}) ({second})",
        )
        for each in (dense, cross)
    )
    other = {"c": "d", "i": "k", "j": "l"}
    primed = [" ".join(other[axis] for axis in axes.split()) for axes in (first, second)]
    by_axes = rearrange(
        metric, f"g (c i j) (d k l) -> g ({first}) ({second}) ({primed[0]}) ({primed[1]})",
        **sizes, **{other[axis]: sizes[axis] for axis in "cij"},
    )  # fmt: skip
    if "o" in batch:
        by_axes = by_axes.repeat_interleave(spec.out_channels // spec.groups, 0)
    v, h, objective = _alternate_pair(dense, by_axes, cross, constant, rank, sweeps)
    return v.mT, rearrange(h, "g o r b -> g r (o b)"), objective


def _alternate_pair(
    dense: Tensor, metric: Tensor, cross: Tensor, constant: float, rank: int, sweeps: int
) -> tuple[Tensor, Tensor, list[float]]:
    """V, g × R × A, and H, g × O × R × B, for W, g × O × A × B, under S, g × A × B × A × B."""
    groups, outputs, rows, columns = dense.shape
    flat = metric.reshape(groups, rows * columns, -1)
    target = _product(dense, flat) + cross
    start = float((dense * (target + cross)).sum()) + constant
    over_rows = torch.einsum("gabcb->gac", metric) / columns
    by_row = metric.reshape(groups, rows, -1)
    best = dense + _solve(flat, cross.flatten(2).mT).mT.view(dense.shape)  # the kernel without a structure
    v = _leading_rows(rearrange(best, "g o a b -> g (o b) a"), over_rows, rank)
    objective: list[float] = []

    def filtered(v: Tensor) -> Tensor:
        """V S as g × R·B × A × B."""
        return (v @ by_row).view(groups, -1, rows, columns)

    while True:
        # H by its normal equations, as a correction of the projection of W: at full rank, of nothing.
        seen = filtered(v)
        gram = torch.einsum("gmcd,gsc->gmsd", seen, v).flatten(2)
        projected = torch.einsum("goab,gra->gorb", dense, v)
        rest = dense - torch.einsum("gorb,gra->goab", projected, v)
        missing = rest.flatten(2) @ seen.flatten(2).mT
        missing = missing + torch.einsum("goab,gra->gorb", cross, v).flatten(2)
        h = projected + _solve(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("goab,gra->gorb", target, v)
        objective.append(start - float((h * onto).sum()))
        if len(objective) >= sweeps or rank == min(rows, outputs * columns) or _settled(objective):
            break
        # V by conjugate gradients.
        by_pairs = h.flatten(2).mT @ h.flatten(2)
        wanted = torch.einsum("gorb,goab->gra", h, target)
        pairs = by_pairs.view(groups, rank, columns, rank * columns)

        def hessian(step: Tensor, pairs: Tensor = pairs) -> Tensor:
            return torch.einsum("grbm,gmab->gra", pairs, filtered(step))

        between = by_pairs.view(groups, rank, columns, rank, columns).diagonal(dim1=2, dim2=4).sum(-1)
        solution = _conjugate_gradients(
            hessian, _kronecker_inverse(between, over_rows), wanted, v, (1, 2), _FEW_CG_STEPS
        )
        v = torch.linalg.qr(solution.mT).Q.mT
    return v, h, objective


_SOLVERS: dict[str, Callable[..., tuple[Tensor, Tensor, list[float]]]] = {
    DEPTHWISE_POINTWISE: _fit_depthwise_pointwise,
    POINTWISE_DEPTHWISE: _fit_pointwise_depthwise,
}


def _product(dense: Tensor, metric: Tensor) -> Tensor:
    """W S, in the shape of W."""
    return (dense.flatten(2) @ metric).view(dense.shape)


def _leading_rows(matrices: Tensor, metric: Tensor, rank: int) -> Tensor:
    """… × m × K → … × rank × K, orthonormal: rows that span the best approximation under a metric K × K."""
    factor = torch.linalg.cholesky(metric)
    weighted = matrices @ factor
    rows = torch.linalg.svd(weighted, full_matrices=weighted.shape[-2] < rank).Vh[..., :rank, :]
    spanning = torch.linalg.solve_triangular(factor, rows.contiguous(), upper=False, left=False)
    basis: Tensor = torch.linalg.qr(spanning.mT).Q
    return basis.mT


def _settled(objective: list[float]) -> bool:
    return len(objective) > 1 and objective[-2] - objective[-1] <= _ENOUGH * abs(objective[-1])


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """The symmetric positive semidefinite system; where it is singular, some solution."""
    gram = (gram + gram.mT) / 2
    ridge = torch.finfo(gram.dtype).eps * gram.shape[-1] * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    solution: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return solution


def _kronecker_inverse(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """X ↦ the pseudo-inverse of (left ⊗ right) on X, of … × m × k: both are symmetric."""
    left_values, left_vectors = _eigen(left)
    right_values, right_vectors = _eigen(right)
    values = left_values.clamp(min=0)[..., :, None] * right_values.clamp(min=0)[..., None, :]
    threshold = 1e-12 * values.amax((-2, -1), keepdim=True)
    inverse = torch.where(values > threshold, 1 / values, torch.zeros_like(values))

    def apply(x: Tensor) -> Tensor:
        rotated = left_vectors.mT @ x @ right_vectors
        return left_vectors @ (rotated * inverse) @ right_vectors.mT

    return apply


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _conjugate_gradients(
    hessian: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    dims: tuple[int, ...],
    steps: int,
) -> Tensor:
    """Some steps towards hessian(X) = right from `start`; each lowers the quadratic objective.

    `dims` are those of the unknowns of one system; the others count systems.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a > 0) & (b > 0), a / b, torch.zeros_like(a))

    solution, residual = start, right - hessian(start)
    direction = precondition(residual)
    size = first = inner(residual, direction)
    for _ in range(steps):
        size = torch.where(size > _CG_ENOUGH * first, size, torch.zeros_like(size))
        if not size.any():
            break
        image = hessian(direction)
        length = ratio(size, inner(direction, image))
        solution = solution + length * direction
        residual = residual - length * image
        step = precondition(residual)
        previous, size = size, inner(residual, step)
        direction = step + ratio(size, previous) * direction
    return solution
