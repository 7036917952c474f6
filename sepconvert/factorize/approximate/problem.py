"""Fit of a layer in any structure, in the metric of its data."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepconvert.factorize.approximate.depthwise import fit_depthwise_pointwise, fit_pointwise_depthwise
from sepconvert.factorize.approximate.pairs import fit_pair
from sepconvert.factorize.approximate.weighted import (
    DEPTHWISE_POINTWISE,
    POINTWISE_DEPTHWISE,
    RIDGE,
    Moments,
    Solution,
    WeightedProblem,
    importance_half,
    kernel_by_group,
)
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS, Nested, Structure

_SWEEPS = 60


@dataclass(frozen=True)
class Approximation:
    """Factors of a kernel, and how near they come."""

    scheme: str
    rank: int
    weights: tuple[Tensor, ...]  # float64, as the structure's table has them
    kernel: Tensor  # O × C × kh × kw, float64: what the factors amount to
    bias_shift: Tensor  # O: what the bias must be raised by
    basis: Tensor  # orthonormal rows, from which the fit can be taken up again
    weight_error: float  # ‖W − Ŵ‖ / ‖W‖
    output_error: float  # √(E‖y − ŷ‖² / E‖y − E y‖²)
    weighted_error: float | None  # E tr(G (y − ŷ)(y − ŷ)ᵀ), where G is known
    objective: tuple[float, ...]  # after each sweep, as a share of E‖Lᵀ(y − E y)‖²


@dataclass(frozen=True)
class Problem:
    """One layer, to be fitted in several forms.

    Args:
        spec: geometry of the dense layer.
        weight: O × C/g × kh × kw.
        moments: of the layer's data.
        importance: G of the outputs, g × O/g × O/g, positive semidefinite; None where all matter alike.
    """

    spec: ConvSpec
    weight: Tensor
    moments: Moments
    importance: Tensor | None = None

    def fit(
        self, scheme: str, rank: int, sweeps: int = _SWEEPS, basis: Tensor | None = None
    ) -> Approximation:
        """Factors of `rank` by alternating least squares; no sweep raises the objective.

        Fewer sweeps are made where a layer is so wide that they would take minutes.

        Args:
            scheme: name of a structure that applies to the layer.
            rank: from 1 to `full_rank`, at which every kernel has the form.
            sweeps: at most so many.
            basis: that of an earlier fit in the same form to start from.
        """
        spec, moments = self.spec, self.moments
        form = FORMS[scheme]
        # Which factors are given anew for each output cannot take up a mixture of outputs.
        separate = isinstance(form, Structure) and "o" in form.axes[0]
        problem = self._separate if separate else self._mixed
        solve = _SOLVERS.get(scheme, fit_pair)
        if self.is_closed(scheme):
            basis, sweeps = None, 1
        if basis is not None:  # it may have been kept in single precision
            basis = torch.linalg.qr(basis.double().mT).Q.mT
        weights, filtered, basis, objective = solve(problem, scheme, rank, sweeps, basis)
        *others, last = weights
        last = problem.unweighted(last.reshape(*problem.half.shape[:2], -1)).reshape(last.shape)
        kernel = form.compose(spec, *others, last)
        difference = kernel_by_group(spec, self.weight.double() - kernel)
        filtered = problem.spread * problem.unweighted(problem.filtered - filtered)
        norm = float(self.weight.double().square().sum()) or 1.0
        return Approximation(
            scheme=scheme,
            rank=rank,
            weights=(*others, last),
            kernel=kernel,
            bias_shift=moments.missed + (difference @ moments.mean[..., None]).flatten(),
            basis=basis,
            weight_error=float(difference.square().sum() / norm) ** 0.5,
            output_error=math.sqrt(moments.error(difference, filtered) / (moments.power or 1.0)),
            weighted_error=None
            if self.importance is None
            else moments.error(difference, filtered, self.importance),
            objective=tuple(value * problem.scale / (problem.power or 1.0) for value in objective),
        )

    def is_closed(self, scheme: str) -> bool:
        """Whether one sweep gives the best there is: reduced-rank regression, of pairs that end pointwise.

        (See `_reduced` for the source.)
        """
        form = FORMS[scheme]
        if isinstance(form, Nested) or form.parallel or "o" in form.axes[0]:
            return False
        taps = {"i": self.spec.kernel_size[0], "j": self.spec.kernel_size[1]}
        return "c" not in form.axes[2] and all(taps.get(axis, 1) == 1 for axis in form.axes[2])

    @functools.cached_property
    def _mixed(self) -> "WeightedProblem":
        return self._weighted(importance_half(self.spec, self.importance))

    @functools.cached_property
    def _separate(self) -> "WeightedProblem":
        half = importance_half(self.spec, self.importance)
        return self._weighted(half.square().sum(-1).sqrt().diag_embed())

    def _weighted(self, half: Tensor) -> "WeightedProblem":
        spec, moments = self.spec, self.moments
        scale = float(moments.covariance.diagonal(dim1=-2, dim2=-1).mean())
        spread, cross = scale, moments.cross
        metric = torch.eye(moments.covariance.shape[-1], dtype=torch.float64)
        if scale <= torch.finfo(torch.float32).eps ** 2 * float(moments.mean.square().mean()):
            # Images that are all alike vary by rounding alone, of which there is nothing to learn.
            scale, spread, cross = 1.0, 0.0, torch.zeros_like(cross)
            metric = metric.repeat(spec.groups, 1, 1)
        else:
            metric = moments.covariance / scale + RIDGE * metric
        dense = half.mT @ kernel_by_group(spec, self.weight.double())
        importance = half @ half.mT
        return WeightedProblem(
            spec=spec,
            half=half,
            scale=scale,
            spread=spread,
            power=float((importance * moments.output_covariance).sum()),
            dense=dense.view(spec.groups, *dense.shape[1:2], spec.weight_shape[1], -1),
            metric=metric,
            cross=half.mT @ cross / scale,
            constant=float((importance * moments.missed_covariance).sum()) / scale,
        )


def approximate(
    spec: ConvSpec, weight: Tensor, moments: Moments, scheme: str, rank: int, sweeps: int = _SWEEPS
) -> Approximation:
    """Fit a layer in one form; see `Problem`."""
    return Problem(spec, weight, moments).fit(scheme, rank, sweeps)


def nearest(spec: ConvSpec, weight: Tensor, scheme: str, rank: int) -> Tensor:
    """A kernel of a form near to another in its weights, by truncated SVD (Eckart and Young); float64.

    That of a nested form is truncated twice, outside first.
    """
    form = FORMS[scheme]
    structure = form.outer if isinstance(form, Nested) else form
    left, values, right = torch.linalg.svd(structure.unfold(spec, weight.double()), full_matrices=False)
    factors = left[..., :rank] * values[..., None, :rank], right[..., :rank, :]
    first, second = structure.kernels(spec, *factors)
    if isinstance(form, Nested):
        _, within = structure.split(spec, rank)
        second = nearest(within, second, form.inner.name, form.inner_rank(spec, rank))
    return structure.compose(spec, first, second)


def output_error(spec: ConvSpec, weight: Tensor, kernel: Tensor, moments: Moments) -> float:
    """√(E‖y − ŷ‖² / E‖y − E y‖²) of another kernel in the place of `weight`, the bias being refitted."""
    difference = kernel_by_group(spec, weight.double() - kernel.double())
    return math.sqrt(moments.error(difference, difference @ moments.covariance) / (moments.power or 1.0))


_SOLVERS: dict[str, Callable[[WeightedProblem, str, int, int, Tensor | None], Solution]] = {
    DEPTHWISE_POINTWISE: fit_depthwise_pointwise,
    POINTWISE_DEPTHWISE: fit_pointwise_depthwise,
}
