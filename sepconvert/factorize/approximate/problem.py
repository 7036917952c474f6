"""The fit of a layer in any structure, in the metric of its data.

The notation and the objective are those of `weighted`; a solver for each structure is in `depthwise` and
`pairs`.
"""

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
    flatten_by_group,
    importance_factor,
)
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS, Nested, Structure

_SWEEPS = 60


@dataclass(frozen=True)
class Approximation:
    """Factors of a kernel in one form, and how near to the layer they come. Tensors are float64."""

    scheme: str
    rank: int
    weights: tuple[Tensor, ...]  # kernels of the convolutions, first to last
    kernel: Tensor  # g·O × C × kh × kw, composed of the factors
    bias_shift: Tensor  # g·O, to be added to the layer's bias
    basis: Tensor  # orthonormal rows, from which the fit can be resumed
    weight_error: float  # ‖W − Ŵ‖ / ‖W‖
    output_error: float  # √(E‖y − ŷ‖² / E‖y − E y‖²)
    weighted_error: float | None  # E (y − ŷ)ᵀ G (y − ŷ); None without G
    objective: tuple[float, ...]  # after each sweep, as a share of E‖Lᵀ(y − E y)‖²


@dataclass(frozen=True)
class Problem:
    """A layer that is to be fitted in several forms.

    Args:
        spec: geometry of the dense layer.
        weight: its kernel, g·O × C × kh × kw.
        moments: of the layer's data.
        importance: G of the outputs, g × O × O, positive semidefinite; None if all matter alike.
    """

    spec: ConvSpec
    weight: Tensor
    moments: Moments
    importance: Tensor | None = None

    def fit(
        self, scheme: str, rank: int, sweeps: int = _SWEEPS, basis: Tensor | None = None
    ) -> Approximation:
        """Fit factors of one form by alternating least squares, in which no sweep raises the objective.

        A wide layer, whose sweeps would take minutes, gets fewer of them.

        Args:
            scheme: name of a form that applies to the layer.
            rank: from 1 to `full_rank`, at which every kernel has the form.
            sweeps: at most this many.
            basis: that of an earlier fit in the same form and rank, to resume it.
        """
        spec, moments = self.spec, self.moments
        form = FORMS[scheme]
        # Factors of their own for each output cannot represent a mixture of outputs, as Lᵀ W is one.
        separate = isinstance(form, Structure) and "o" in form.axes[0]
        problem = self._separate if separate else self._mixed
        solve = _SOLVERS.get(scheme, fit_pair)
        if self.is_closed(scheme):
            basis, sweeps = None, 1
        if basis is not None:  # may have been stored in single precision
            basis = torch.linalg.qr(basis.double().mT).Q.mT
        weights, product, basis, objective = solve(problem, scheme, rank, sweeps, basis)
        *others, last = weights
        last = problem.unweighted(last.reshape(*problem.importance_factor.shape[:2], -1)).reshape(last.shape)
        kernel = form.compose(spec, *others, last)
        difference = flatten_by_group(spec, self.weight.double() - kernel)
        product = problem.spread * problem.unweighted(problem.product - product)
        norm = float(self.weight.double().square().sum()) or 1.0
        return Approximation(
            scheme=scheme,
            rank=rank,
            weights=(*others, last),
            kernel=kernel,
            bias_shift=moments.residual_mean + (difference @ moments.mean[..., None]).flatten(),
            basis=basis,
            weight_error=float(difference.square().sum() / norm) ** 0.5,
            output_error=math.sqrt(moments.error(difference, product) / (moments.power or 1.0)),
            weighted_error=None
            if self.importance is None
            else moments.error(difference, product, self.importance),
            objective=tuple(value * problem.scale / (problem.power or 1.0) for value in objective),
        )

    def is_closed(self, scheme: str) -> bool:
        """Return whether the optimum is known in closed form, so that one sweep reaches it.

        It is for pairs whose second convolution is pointwise, by reduced-rank regression (Izenman, 1975).
        """
        form = FORMS[scheme]
        if isinstance(form, Nested) or form.parallel or "o" in form.axes[0]:
            return False
        taps = {"i": self.spec.kernel_size[0], "j": self.spec.kernel_size[1]}
        return "c" not in form.axes[2] and all(taps.get(axis, 1) == 1 for axis in form.axes[2])

    @functools.cached_property
    def _mixed(self) -> WeightedProblem:
        """The weighted problem with outputs mixed by Lᵀ."""
        return self._weighted(importance_factor(self.spec, self.importance))

    @functools.cached_property
    def _separate(self) -> WeightedProblem:
        """The weighted problem in which the diagonal of LLᵀ alone weights the outputs."""
        factor = importance_factor(self.spec, self.importance)
        return self._weighted(factor.square().sum(-1).sqrt().diag_embed())

    def _weighted(self, factor: Tensor) -> WeightedProblem:
        """Return the problem with outputs weighted by Lᵀ; `factor` is L, g × O × O."""
        spec, moments = self.spec, self.moments
        scale = float(moments.covariance.diagonal(dim1=-2, dim2=-1).mean())
        spread, cross = scale, moments.cross
        metric = torch.eye(moments.covariance.shape[-1], dtype=torch.float64)
        if scale <= torch.finfo(torch.float32).eps ** 2 * float(moments.mean.square().mean()):
            # Identical images vary by rounding alone, which is not to be fitted.
            scale, spread, cross = 1.0, 0.0, torch.zeros_like(cross)
            metric = metric.repeat(spec.groups, 1, 1)
        else:
            metric = moments.covariance / scale + RIDGE * metric
        dense = factor.mT @ flatten_by_group(spec, self.weight.double())
        importance = factor @ factor.mT
        return WeightedProblem(
            spec=spec,
            importance_factor=factor,
            scale=scale,
            spread=spread,
            power=float((importance * moments.output_covariance).sum()),
            dense=dense.view(spec.groups, *dense.shape[1:2], spec.weight_shape[1], -1),
            metric=metric,
            cross=factor.mT @ cross / scale,
            constant=float((importance * moments.residual_covariance).sum()) / scale,
        )


def nearest(spec: ConvSpec, weight: Tensor, scheme: str, rank: int) -> Tensor:
    """Return a kernel that has a form and is near to another in its weights, by truncated SVD; float64.

    It is the nearest one if the form is a structure (Eckart and Young). For a nested form the SVD of the
    outer structure is truncated first, then that of the inner one.

    Args:
        spec: geometry of the layer.
        weight: its kernel, g·O × C × kh × kw.
        scheme: name of a form that applies to the layer.
        rank: from 1 to `full_rank`.
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
    """Return √(E‖y − ŷ‖² / E‖y − E y‖²) for another kernel in the place of `weight`, the bias being refitted.

    Args:
        spec: geometry of the layer.
        weight: its kernel, g·O × C × kh × kw.
        kernel: the other kernel, of the same shape.
        moments: of the layer's data.
    """
    difference = flatten_by_group(spec, weight.double() - kernel.double())
    return math.sqrt(moments.error(difference, difference @ moments.covariance) / (moments.power or 1.0))


_SOLVERS: dict[str, Callable[[WeightedProblem, str, int, int, Tensor | None], Solution]] = {
    DEPTHWISE_POINTWISE: fit_depthwise_pointwise,
    POINTWISE_DEPTHWISE: fit_pointwise_depthwise,
}
