"""Alternating least squares for depthwise → pointwise and pointwise → depthwise factors.

Notation and objective are those of `weighted`. Each function works on all groups at once.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import (
    Eigen,
    affordable_sweeps,
    apply_metric,
    conjugate_gradients,
    eigenvalue_cutoff,
    has_converged,
    kronecker_inverse,
    leading_rows,
    solve_semidefinite,
    symmetric_eigen,
)
from sepconvert.factorize.approximate.weighted import RIDGE, Solution, WeightedProblem
from sepconvert.factorize.structures import BY_NAME

# Steps of conjugate gradients in each sweep, for D of depthwise → pointwise ...
_DEPTHWISE_STEPS = 12

# ... and for P of pointwise → depthwise, where each step costs a product with all of S.
_POINTWISE_STEPS = 6


def fit_depthwise_pointwise(
    problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> Solution:
    """Fit W[o,c,k] ≈ Σ_m P[o,c,m] D[c,m,k]: M depthwise kernels D for each input channel, then pointwise P.

    A sweep solves the normal equations of P, then lowers the objective in D by conjugate gradients.

    Args:
        problem: W as g × O × C × K.
        scheme: name of the structure.
        rank: M, the channel multiplier.
        sweeps: at most this many.
        basis: D to start from, g × C × M × K with orthonormal rows; None starts from truncated SVDs.
    """
    groups, _, channels, _ = problem.dense.shape
    diagonal = _channel_blocks(problem)
    depthwise = leading_rows(problem.dense.transpose(1, 2), diagonal, rank) if basis is None else basis
    along = symmetric_eigen(diagonal)
    inner = channels * rank
    sweeps = affordable_sweeps(sweeps, groups * inner * (problem.dense[0].numel() + inner**2 / 3))
    full = rank == problem.dense.shape[3]
    objective: list[float] = []
    while True:
        product = _depthwise_product(problem, depthwise)
        pointwise, value = _best_pointwise(problem, depthwise, product)
        objective.append(value)
        if len(objective) >= sweeps or full or has_converged(objective, problem.start):
            break
        depthwise = _improved_depthwise(problem, depthwise, pointwise, along)
    right = rearrange(pointwise, "g o c m -> (g c) m o")
    kernels = BY_NAME[scheme].kernels(problem.spec, depthwise.mT.flatten(0, 1), right)
    product.diagonal(dim1=1, dim2=3).sub_(RIDGE * depthwise.permute(0, 2, 3, 1))
    return Solution(kernels, pointwise.flatten(2) @ _by_inner_channel(product), depthwise, objective)


def _channel_blocks(problem: WeightedProblem) -> Tensor:
    """Return the blocks of S + ρI on its diagonal, g × C × K × K: the metric of each input channel alone."""
    groups, _, channels, taps = problem.dense.shape
    by_channels = problem.metric.view(groups, channels, taps, channels, taps)
    return by_channels.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _depthwise_product(problem: WeightedProblem, depthwise: Tensor) -> Tensor:
    """Return B(D)(S + ρI) as g × C × M × C × K, for D, g × C × M × K.

    B(D), C·M × C·K, is the block-diagonal matrix that applies D to a patch.
    """
    groups, channels, rank, taps = depthwise.shape
    by_channel = problem.metric.view(groups * channels, taps, channels * taps)
    rows = depthwise.reshape(groups * channels, rank, taps) @ by_channel
    return rows.view(groups, channels, rank, channels, taps)


def _by_inner_channel(product: Tensor) -> Tensor:
    """Return B(D) S, g × C × M × C × K, as g × C·M × C·K."""
    return product.flatten(3).flatten(1, 2)


def _best_pointwise(problem: WeightedProblem, depthwise: Tensor, product: Tensor) -> tuple[Tensor, float]:
    """Solve B(D)(S + ρI)B(D)ᵀ Pᵀ = B(D)((S + ρI)Wᵀ + Eᵀ) for P, g × O × C × M; return it and the objective.

    It is solved as a correction to the projection of W onto the rows of D, which is zero at full rank.

    Args:
        problem: W as g × O × C × K.
        depthwise: D, g × C × M × K with orthonormal rows.
        product: B(D)(S + ρI), g × C × M × C × K.
    """
    dense, cross = problem.dense, problem.cross.view(problem.dense.shape)
    groups, channels, rank, _ = depthwise.shape
    gram = torch.einsum("gbmak,gank->gbman", product, depthwise).reshape(groups, channels * rank, -1)
    projected = torch.einsum("gock,gcmk->gocm", dense, depthwise)
    rest = dense - torch.einsum("gocm,gcmk->gock", projected, depthwise)
    missing = rest.flatten(2) @ _by_inner_channel(product).mT
    missing = missing + torch.einsum("gock,gcmk->gocm", cross, depthwise).flatten(2)
    pointwise = projected + solve_semidefinite(gram, missing.mT).mT.view(projected.shape)
    onto = torch.einsum("gock,gcmk->gocm", problem.target, depthwise)
    return pointwise, problem.start - float((pointwise * onto).sum())


def _improved_depthwise(
    problem: WeightedProblem, depthwise: Tensor, pointwise: Tensor, along: Eigen
) -> Tensor:
    """Return D, g × C × M × K, improved for a given P by conjugate gradients on its normal equations.

    The preconditioner is their block-diagonal part over the input channels, PᵀP ⊗ S for each.

    Args:
        problem: W as g × O × C × K.
        depthwise: D before, g × C × M × K.
        pointwise: P, g × O × C × M.
        along: eigenvectors of each channel's block of S + ρI.
    """
    groups, _, channels, rank = pointwise.shape
    by_pairs = (pointwise.flatten(2).mT @ pointwise.flatten(2)).view(groups, channels, rank, channels, rank)
    wanted = torch.einsum("gocm,gock->gcmk", pointwise, problem.target)

    def hessian(step: Tensor) -> Tensor:
        return torch.einsum("gcmbn,gbnck->gcmk", by_pairs, _depthwise_product(problem, step))

    blocks = by_pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    correction = conjugate_gradients(
        hessian,
        kronecker_inverse(symmetric_eigen(blocks), along),
        wanted - hessian(depthwise),
        (1, 2, 3),
        _DEPTHWISE_STEPS,
    )
    improved: Tensor = torch.linalg.qr((depthwise + correction).mT).Q.mT
    return improved


def fit_pointwise_depthwise(
    problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> Solution:
    """Fit W[o,c,k] ≈ Σ_m P[o,c,m] D[o,m,k]: pointwise P, then M depthwise kernels D for each output channel.

    Output channels are independent of one another under one metric. A sweep lowers the objective in P by
    conjugate gradients, since its C·M normal equations differ from output to output, then solves the M·K
    normal equations of D.

    Args:
        problem: W as g × O × C × K.
        scheme: name of the structure.
        rank: M, the number of inner channels for each output channel.
        sweeps: at most this many.
        basis: D to start from, g × O × M × K with orthonormal rows; None starts from truncated SVDs.
    """
    dense, metric = problem.dense, problem.metric
    channels = dense.shape[2]
    over_channels = torch.einsum("gckcl->gkl", _by_tap(problem))[:, None] / channels
    depthwise = leading_rows(dense, over_channels, rank) if basis is None else basis
    pointwise = dense @ depthwise.mT
    precondition = _channel_preconditioner(problem)
    objective: list[float] = []
    while True:
        pointwise = _improved_pointwise(problem, pointwise, depthwise, precondition)
        kernel = pointwise @ depthwise
        product = apply_metric(kernel, metric)
        objective.append(problem.start - float((kernel * (2 * problem.target - product)).sum()))
        if len(objective) >= sweeps or has_converged(objective, problem.start):
            break
        solution = _best_depthwise(problem, pointwise)
        orthonormal, mixing = torch.linalg.qr(solution.mT)
        depthwise, pointwise = orthonormal.mT, pointwise @ mixing.mT
    kernels = BY_NAME[scheme].kernels(problem.spec, pointwise.flatten(0, 1), depthwise.flatten(0, 1))
    return Solution(kernels, (product - RIDGE * kernel).flatten(2), depthwise, objective)


def _by_tap(problem: WeightedProblem) -> Tensor:
    """Return S + ρI as g × C × K × C × K."""
    groups, _, channels, taps = problem.dense.shape
    return problem.metric.view(groups, channels, taps, channels, taps)


def _channel_preconditioner(problem: WeightedProblem) -> Callable[[Tensor], Tensor]:
    """Return the function that multiplies P, g × O × C × M, by the inverse of S + ρI averaged over taps."""
    over_taps = torch.einsum("gakbk->gab", _by_tap(problem)) / problem.dense.shape[3]
    inverse = torch.linalg.pinv(over_taps, rtol=eigenvalue_cutoff(over_taps), hermitian=True)

    def precondition(step: Tensor) -> Tensor:
        # One product for all outputs: a batched one would copy C × C numbers for each of them.
        return torch.einsum("gab,gobm->goam", inverse, step)

    return precondition


def _improved_pointwise(
    problem: WeightedProblem,
    pointwise: Tensor,
    depthwise: Tensor,
    precondition: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return P, g × O × C × M, improved for a given D by conjugate gradients on its normal equations."""
    metric, cross = problem.metric, problem.cross.view(problem.dense.shape)

    def hessian(step: Tensor) -> Tensor:
        return apply_metric(step @ depthwise, metric) @ depthwise.mT

    rest = apply_metric(problem.dense - pointwise @ depthwise, metric) + cross
    return pointwise + conjugate_gradients(
        hessian, precondition, rest @ depthwise.mT, (2, 3), _POINTWISE_STEPS
    )


def _best_depthwise(problem: WeightedProblem, pointwise: Tensor) -> Tensor:
    """Solve the M·K normal equations of D, g × O × M × K, of each output for a given P, g × O × C × M."""
    groups, outputs, channels, rank = pointwise.shape
    taps = problem.dense.shape[3]
    by_input = rearrange(_by_tap(problem), "g a k b l -> g b (k a l)")
    rows = rearrange(pointwise, "g o c m -> g (o m) c") @ by_input
    gram = torch.einsum(
        "gomkal,goan->gomlnk", rows.view(groups, outputs, rank, taps, channels, taps), pointwise
    ).reshape(groups, outputs, rank * taps, rank * taps)
    wanted = pointwise.mT @ problem.target
    return solve_semidefinite(gram, wanted.flatten(2)[..., None]).view(groups, outputs, rank, taps)
