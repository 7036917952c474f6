"""The weighted least-squares problem that all fits share: moments of the data and their metric."""

import functools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import Eigen, metric_product, solve_semidefinite
from sepconvert.factorize.geometry import ConvSpec

DEPTHWISE_POINTWISE = "depthwise-pointwise"


POINTWISE_DEPTHWISE = "pointwise-depthwise"


# ρ, as a share of the mean of S's diagonal: dead channels and fewer samples than unknowns leave S singular.
RIDGE = 1e-3


# What is added to G, as a share of the mean of its diagonal: it is estimated, and second order alone.
_LEAST_IMPORTANCE = 0.5


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
    missed_covariance: Tensor  # g × O × O, Cov(e)
    output_covariance: Tensor  # g × O × O, Cov(y)

    @classmethod
    def of_weights(cls, spec: ConvSpec, weight: Tensor) -> "Moments":
        """Those of white noise, with which output error is weight error: for want of data."""
        o, c = spec.out_channels // spec.groups, spec.in_channels // spec.groups
        size = c * spec.kernel_size[0] * spec.kernel_size[1]
        by_group = kernel_by_group(spec, weight.double())
        zeros = torch.zeros(spec.groups, o, size, dtype=torch.float64)
        return cls(
            count=0,
            covariance=torch.eye(size, dtype=torch.float64).expand(spec.groups, -1, -1),
            cross=zeros,
            mean=zeros[:, 0],
            missed=zeros[..., 0].flatten(),
            missed_covariance=torch.zeros(spec.groups, o, o, dtype=torch.float64),
            output_covariance=by_group @ by_group.mT,
        )

    @property
    def power(self) -> float:
        """E‖y − E y‖²."""
        return _trace(self.output_covariance)

    def error(self, difference: Tensor, filtered: Tensor, importance: Tensor | None = None) -> float:
        """E tr(G (y − ŷ)(y − ŷ)ᵀ), centred, of a kernel W − Δ; G is the identity where it is None.

        Δ and ΔS are g × O × C·K.
        """
        weighted = difference if importance is None else importance @ difference
        missed = self.missed_covariance
        rest = _trace(missed) if importance is None else float((importance * missed).sum())
        return max(float((weighted * (filtered + 2 * self.cross)).sum()) + rest, 0.0)


def importance_half(spec: ConvSpec, importance: Tensor | None) -> Tensor:
    """L, lower triangular, g × O × O, of an importance LLᵀ; the identity where there is none."""
    ones = torch.eye(spec.out_channels // spec.groups, dtype=torch.float64).expand(spec.groups, -1, -1)
    mean = 0.0 if importance is None else float(importance.diagonal(dim1=-2, dim2=-1).mean())
    if importance is None or not 0 < mean < math.inf:
        return ones
    half: Tensor = torch.linalg.cholesky(importance / mean + _LEAST_IMPORTANCE * ones)
    return half


def kernel_by_group(spec: ConvSpec, weight: Tensor) -> Tensor:
    """A kernel as g × O × C·K."""
    return rearrange(weight, "(g o) c i j -> g o (c i j)", g=spec.groups)


def _trace(matrices: Tensor) -> float:
    return float(matrices.diagonal(dim1=-2, dim2=-1).sum())


@dataclass(frozen=True)
class WeightedProblem:
    """What to fit to, outputs weighted by Lᵀ, and all moments divided by one scale."""

    spec: ConvSpec
    half: Tensor  # L, g × O × O
    scale: float
    spread: float  # the scale again, or none where there is nothing to learn of S
    power: float  # E‖Lᵀ(y − E y)‖², not scaled
    dense: Tensor  # LᵀW, g × O × C × K
    metric: Tensor  # S + ρI, g × C·K × C·K
    cross: Tensor  # LᵀE, g × O × C·K
    constant: float  # E‖Lᵀ(e − E e)‖²

    def unweighted(self, rows: Tensor) -> Tensor:
        """L⁻ᵀ times what is g × O × …."""
        found: Tensor = torch.linalg.solve_triangular(self.half.mT, rows, upper=True)
        return found

    @functools.cached_property
    def filtered(self) -> Tensor:
        """WS, g × O × C·K.

        Here and in the factors, it is S + ρI that multiplies, and what ρ contributes to each number is taken
        off: of inputs that do not vary nothing is left then, not even rounding.
        """
        dense = self.dense.flatten(2)
        return dense @ self.metric - RIDGE * dense

    @functools.cached_property
    def target(self) -> Tensor:
        """W(S + ρI) + E, in the shape of W."""
        return metric_product(self.dense, self.metric) + self.cross.view(self.dense.shape)

    @functools.cached_property
    def start(self) -> float:
        """The objective without any kernel."""
        return float((self.dense * (self.target + self.cross.view(self.dense.shape))).sum()) + self.constant

    @functools.cached_property
    def unconstrained(self) -> Tensor:
        """The best kernel of all, in the shape of W."""
        return self.dense + solve_semidefinite(self.metric, self.cross.mT).mT.view(self.dense.shape)

    @functools.cached_property
    def bases(self) -> dict[str, Tensor]:
        """Of full rank, for each structure that has been begun with: those of lower rank begin them."""
        return {}

    @functools.cached_property
    def eigen(self) -> dict[str, Eigen]:
        """Of S as far as it concerns the rows of a structure, for those that have been needed."""
        return {}


Solution = tuple[tuple[Tensor, ...], Tensor, Tensor, list[float]]
"""Kernels of the convolutions, ŴS, g × O × C·K, the basis, and the objective after each sweep."""
