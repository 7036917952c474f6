"""Alternating least squares for depthwise → pointwise and pointwise → depthwise factors."""

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import (
    affordable,
    conjugate_gradients,
    kronecker_inverse,
    leading_rows,
    metric_product,
    negligible,
    settled,
    solve_semidefinite,
    symmetric_eigen,
)
from sepconvert.factorize.approximate.weighted import RIDGE, Solution, WeightedProblem
from sepconvert.factorize.structures import BY_NAME

_CG_STEPS = 12


_FEW_CG_STEPS = 6  # where each costs a product with all of S


# W[o,c,k] = Σ_m P[o,c,m] D[c,m,k], for each group: D acts on every channel by itself.


def fit_depthwise_pointwise(
    problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> Solution:
    dense, metric = problem.dense, problem.metric
    groups, _, channels, taps = dense.shape
    cross = problem.cross.view(dense.shape)
    by_channel = metric.view(groups * channels, taps, channels * taps)
    diagonal = (
        metric.view(groups, channels, taps, channels, taps).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    )
    target, start = problem.target, problem.start
    depthwise = leading_rows(dense.transpose(1, 2), diagonal, rank) if basis is None else basis
    along = symmetric_eigen(diagonal)
    objective: list[float] = []
    inner = channels * rank
    sweeps = affordable(sweeps, groups * inner * (dense[0].numel() + inner**2 / 3))

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
        pointwise = projected + solve_semidefinite(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("gock,gcmk->gocm", target, depthwise)
        objective.append(start - float((pointwise * onto).sum()))
        if len(objective) >= sweeps or rank == taps or settled(objective, start):
            break
        # D by conjugate gradients on its own.
        by_pairs = (pointwise.flatten(2).mT @ pointwise.flatten(2)).view(
            groups, channels, rank, channels, rank
        )
        wanted = torch.einsum("gocm,gock->gcmk", pointwise, target)

        def hessian(step: Tensor, by_pairs: Tensor = by_pairs) -> Tensor:
            return torch.einsum("gcmbn,gbnck->gcmk", by_pairs, filtered(step))

        blocks = by_pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        correction = conjugate_gradients(
            hessian,
            kronecker_inverse(symmetric_eigen(blocks), along),
            wanted - hessian(depthwise),
            (1, 2, 3),
            _CG_STEPS,
        )
        depthwise = torch.linalg.qr((depthwise + correction).mT).Q.mT
    right = rearrange(pointwise, "g o c m -> (g c) m o")
    kernels = BY_NAME[scheme].kernels(problem.spec, depthwise.mT.flatten(0, 1), right)
    rows.diagonal(dim1=1, dim2=3).sub_(RIDGE * depthwise.permute(0, 2, 3, 1))
    return kernels, pointwise.flatten(2) @ rows.flatten(3).flatten(1, 2), depthwise, objective


# W[o,c,k] = Σ_m P[o,c,m] D[o,m,k]: every output channel by itself, under one metric.


def fit_pointwise_depthwise(
    problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> Solution:
    dense, metric = problem.dense, problem.metric
    groups, outputs, channels, taps = dense.shape
    cross = problem.cross.view(dense.shape)
    target = metric_product(dense, metric) + cross
    start = float((dense * (target + cross)).sum()) + problem.constant
    by_tap = metric.view(groups, channels, taps, channels, taps)
    over_channels = torch.einsum("gckcl->gkl", by_tap)[:, None] / channels
    over_taps = torch.einsum("gakbk->gab", by_tap) / taps
    depthwise = leading_rows(dense, over_channels, rank) if basis is None else basis
    pointwise = dense @ depthwise.mT
    inverse = torch.linalg.pinv(over_taps, rtol=negligible(over_taps), hermitian=True)
    objective: list[float] = []

    def precondition(step: Tensor) -> Tensor:
        # One product for all outputs: a batched one would copy C × C numbers for each of them.
        return torch.einsum("gab,gobm->goam", inverse, step)

    while True:

        def hessian(step: Tensor, depthwise: Tensor = depthwise) -> Tensor:
            return metric_product(step @ depthwise, metric) @ depthwise.mT

        # P by conjugate gradients: its C·M normal equations differ from output to output.
        rest = metric_product(dense - pointwise @ depthwise, metric) + cross
        correction = conjugate_gradients(hessian, precondition, rest @ depthwise.mT, (2, 3), _FEW_CG_STEPS)
        pointwise = pointwise + correction
        kernel = pointwise @ depthwise
        image = metric_product(kernel, metric)
        objective.append(start - float((kernel * (2 * target - image)).sum()))
        if len(objective) >= sweeps or settled(objective, start):
            break
        # D by its M·K normal equations.
        rows = rearrange(pointwise, "g o c m -> g (o m) c") @ rearrange(by_tap, "g a k b l -> g b (k a l)")
        gram = torch.einsum(
            "gomkal,goan->gomlnk", rows.view(groups, outputs, rank, taps, channels, taps), pointwise
        ).reshape(groups, outputs, rank * taps, rank * taps)
        wanted = pointwise.mT @ target
        solution = solve_semidefinite(gram, wanted.flatten(2)[..., None]).view(depthwise.shape)
        rows_of, mixing = torch.linalg.qr(solution.mT)
        depthwise, pointwise = rows_of.mT, pointwise @ mixing.mT
    kernels = BY_NAME[scheme].kernels(problem.spec, pointwise.flatten(0, 1), depthwise.flatten(0, 1))
    return kernels, (image - RIDGE * kernel).flatten(2), depthwise, objective
