"""Alternating least squares for pairs of factors that act on different axes of a patch."""

import functools
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import (
    Eigen,
    affordable,
    conjugate_gradients,
    eigen_in_single,
    kronecker_inverse,
    leading_rows,
    settled,
    solve_semidefinite,
    symmetric_eigen,
)
from sepconvert.factorize.approximate.weighted import RIDGE, Solution, WeightedProblem
from sepconvert.factorize.structures import FORMS, Nested

# Of V, whose start is the V before: more lower the error of 12 sweeps by 0.1 % at most (ResNet-9).
_PAIR_CG_STEPS = 2


# W[o,a,b] = Σ_r H[o,r,b] V[r,a]: the first factor acts on some axes of a patch, the second on the others.
# Spatial pairs (a = c i, b = j, or a = c j, b = i), channel subspaces (a = c, b = i j, or a = c i j, no b).


def fit_pair(problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None) -> Solution:
    spec, form = problem.spec, FORMS[scheme]
    structure = form.outer if isinstance(form, Nested) else form
    batch, rows, columns = structure.axes
    taps = {"i": spec.kernel_size[0], "j": spec.kernel_size[1]}
    sizes = {"g": spec.groups, "c": problem.dense.shape[2], **taps}
    first, second = " ".join(rows), " ".join(axis for axis in columns if axis != "o")
    outputs = "(g o) 1" if "o" in batch else "g o"

    def by_axes(kernel: Tensor) -> Tensor:
        by_output = kernel.view(spec.groups, -1, *spec.weight_shape[1:])
        return rearrange(by_output, f"g o c i j -> {outputs} ({first}) ({second})")

    dense, cross, target = (by_axes(each) for each in (problem.dense, problem.cross, problem.target))
    other = {"c": "d", "i": "k", "j": "l"}
    primed = [" ".join(other[axis] for axis in axes.split()) for axes in (first, second)]
    metric = rearrange(
        problem.metric, f"g (c i j) (d k l) -> g ({first}) ({second}) ({primed[0]}) ({primed[1]})",
        **sizes, **{other[axis]: sizes[axis] for axis in "cij"},
    )  # fmt: skip
    if "o" in batch:
        metric = metric.repeat_interleave(spec.out_channels // spec.groups, 0)
    inner = form.inner_rank(spec, rank) if isinstance(form, Nested) else None
    over_rows = torch.einsum("gabcb->gac", metric) / metric.shape[2]
    if basis is None:
        if structure.name not in problem.bases:
            matrices = rearrange(by_axes(problem.unconstrained), "g o a b -> g (o b) a")
            problem.bases[structure.name] = leading_rows(matrices, over_rows, structure.full_rank(spec))
        basis = problem.bases[structure.name][:, :rank]

    def along() -> Eigen:
        if structure.name not in problem.eigen:
            problem.eigen[structure.name] = symmetric_eigen(over_rows)
        return problem.eigen[structure.name]

    v, h, seen, objective = _alternate_pair(
        dense, metric, cross, target, problem.start, along, basis, inner, sweeps
    )
    filtered = (h.flatten(2) @ seen.flatten(2)).view(dense.shape)
    filtered = rearrange(filtered, f"{outputs} ({first}) ({second}) -> g o (c i j)", g=spec.groups, **taps)
    kernels: tuple[Tensor, ...] = structure.kernels(spec, v.mT, rearrange(h, "g o r b -> g r (o b)"))
    if isinstance(form, Nested):
        _, within = structure.split(spec, rank)
        # H has rank `inner` over outputs, so that nothing is cut off here.
        columns_of, values, rows_of = torch.linalg.svd(
            form.inner.unfold(within, kernels[1]), full_matrices=False
        )
        left = columns_of[..., :inner] * values[..., None, :inner]
        kernels = (kernels[0], *form.inner.kernels(within, left, rows_of[..., :inner, :]))
    return kernels, filtered, v, objective


def _alternate_pair(
    dense: Tensor,
    metric: Tensor,
    cross: Tensor,
    target: Tensor,
    start: float,
    along: Callable[[], Eigen],
    v: Tensor,
    inner: int | None,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """V, g × R × A, H, g × O × R × B, and VS, g × R·B × A × B, for W, g × O × A × B.

    S is g × A × B × A × B.

    With `inner`, H maps to a subspace of so many dimensions of the outputs. `along` has the eigenvectors of S
    as far as it concerns A alone, which conditions the search for V.
    """
    groups, outputs, rows, columns = dense.shape
    rank = v.shape[1]
    by_row = metric.reshape(groups, rows, -1)
    objective: list[float] = []
    sweeps = affordable(sweeps, (_PAIR_CG_STEPS + 2) * rank * metric.numel())
    full = rank == min(rows, outputs * columns) and inner in (None, outputs)

    # Steps towards V are taken in single precision, at half the price: whatever V is, H and the objective are
    # found for it in double precision.
    in_single = functools.cache(by_row.float)

    def filtered(v: Tensor) -> Tensor:
        """V S as g × R·B × A × B."""
        return (v @ (by_row if v.dtype == by_row.dtype else in_single())).view(groups, -1, rows, columns)

    while True:
        # H by its normal equations, as a correction of the projection of W: at full rank, of nothing.
        seen = filtered(v)
        gram = torch.einsum("gmcd,gsc->gmsd", seen, v).flatten(2)
        projected = torch.einsum("goab,gra->gorb", dense, v)
        rest = dense - torch.einsum("gorb,gra->goab", projected, v)
        missing = rest.flatten(2) @ seen.flatten(2).mT
        missing = missing + torch.einsum("goab,gra->gorb", cross, v).flatten(2)
        h = projected + solve_semidefinite(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("goab,gra->gorb", target, v)
        if inner is None or inner >= outputs:
            objective.append(start - float((h * onto).sum()))
        else:
            h = _reduced(h.flatten(2), gram, inner).view(h.shape)
            quadratic = (h.flatten(2) @ gram * h.flatten(2)).sum()
            objective.append(start - float(2 * (h * onto).sum() - quadratic))
        if len(objective) >= sweeps or full or settled(objective, start):
            break
        # V by conjugate gradients, as a correction.
        by_pairs = h.flatten(2).mT @ h.flatten(2)
        pairs = by_pairs.view(groups, rank, columns, rank * columns)
        between = by_pairs.view(groups, rank, columns, rank, columns).diagonal(dim1=2, dim2=4).sum(-1)
        lacking = torch.einsum("gorb,goab->gra", h, target) - torch.einsum("grbm,gmab->gra", pairs, seen)
        size, pairs = lacking.abs().max().clamp(min=torch.finfo(torch.float64).tiny), pairs.float()

        def hessian(step: Tensor, pairs: Tensor = pairs) -> Tensor:
            return torch.einsum("grbm,gmab->gra", pairs, filtered(step))

        precondition = kronecker_inverse(eigen_in_single(symmetric_eigen(between)), eigen_in_single(along()))
        correction = conjugate_gradients(
            hessian, precondition, (lacking / size).float(), (1, 2), _PAIR_CG_STEPS
        )
        v = torch.linalg.qr((v + size * correction.double()).mT).Q.mT
    seen.view(groups, rank, columns, rows, columns).diagonal(dim1=2, dim2=4).sub_(RIDGE * v[..., None])
    return v, h, seen, objective


def _reduced(h: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The nearest to H, g × O × M, of a rank under a metric M × M: reduced-rank regression.

    (A. J. Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5,
    1975.)
    """
    by_output = h @ gram @ h.mT
    vectors = torch.linalg.eigh((by_output + by_output.mT) / 2).eigenvectors[..., -rank:]
    reduced: Tensor = vectors @ (vectors.mT @ h)
    return reduced
