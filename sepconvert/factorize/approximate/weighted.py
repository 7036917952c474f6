"""The weighted least-squares problem that all fits share: moments of a layer's data and their metric.

Notation, for each of g groups, O, C, K = kh·kw being output channels, input channels and taps of a group:

    W     kernel, O × C·K                       x   input patch, C·K
    Ŵ     kernel composed of factors            y   output of the original network, O
    S     Cov(x), C·K × C·K                     e   y − (W x + b), what the kernel itself misses
    E     Cov(e, x), O × C·K                    G   importance of the outputs, O × O; L with G = LLᵀ
    ρ     ridge, (`RIDGE`)

With Δ = W − Ŵ and the bias refitted, a fit minimises

    E‖Lᵀ(y − ŷ)‖² + ρ‖LᵀΔ‖² = tr G (Δ(S + ρI)Δᵀ + 2ΔEᵀ + Cov(e)).

In code "covariance" and "cross" are S and E, "metric" is S + ρI, and "product" is a kernel times S.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import Eigen, apply_metric, solve_semidefinite
from sepconvert.factorize.geometry import ConvSpec

DEPTHWISE_POINTWISE = "depthwise-pointwise"
POINTWISE_DEPTHWISE = "pointwise-depthwise"

# ρ, as a share of the mean of S's diagonal: dead channels and fewer samples than unknowns leave S singular.
RIDGE = 1e-3

# Added to G, as a share of the mean of its diagonal, because G is an estimate and of second order alone.
_LEAST_IMPORTANCE = 0.5


@dataclass(frozen=True)
class Moments:
    """Centred second moments of a layer's data, for each of its g groups (C and O per group, K = kh·kw).

    x are input patches, y the original network's outputs, e = y − (W x + b). All are float64.
    """

    count: int  # patches seen
    covariance: Tensor  # g × C·K × C·K, Cov(x)
    cross: Tensor  # g × O × C·K, Cov(e, x)
    mean: Tensor  # g × C·K, of x
    residual_mean: Tensor  # g·O, mean of e
    residual_covariance: Tensor  # g × O × O, Cov(e)
    output_covariance: Tensor  # g × O × O, Cov(y)

    @classmethod
    def of_weights(cls, spec: ConvSpec, weight: Tensor) -> "Moments":
        """Return the moments of white noise, under which output error is weight error.

        They serve where there is no data.

        Args:
            spec: geometry of the layer.
            weight: its kernel, g·O × C × kh × kw.
        """
        o, c = spec.out_channels // spec.groups, spec.in_channels // spec.groups
        size = c * spec.kernel_size[0] * spec.kernel_size[1]
        by_group = flatten_by_group(spec, weight.double())
        zeros = torch.zeros(spec.groups, o, size, dtype=torch.float64)
        return cls(
            count=0,
            covariance=torch.eye(size, dtype=torch.float64).expand(spec.groups, -1, -1),
            cross=zeros,
            mean=zeros[:, 0],
            residual_mean=zeros[..., 0].flatten(),
            residual_covariance=torch.zeros(spec.groups, o, o, dtype=torch.float64),
            output_covariance=by_group @ by_group.mT,
        )

    @property
    def power(self) -> float:
        """The variance of the outputs, E‖y − E y‖²."""
        return _trace(self.output_covariance)

    def error(self, difference: Tensor, product: Tensor, importance: Tensor | None = None) -> float:
        """Return E (y − ŷ)ᵀ G (y − ŷ), centred, for a kernel Ŵ = W − Δ, as tr G (ΔSΔᵀ + 2ΔEᵀ + Cov(e)).

        Args:
            difference: Δ, g × O × C·K.
            product: ΔS, g × O × C·K.
            importance: G, g × O × O; None means the identity.
        """
        weighted = difference if importance is None else importance @ difference
        residual = self.residual_covariance
        rest = _trace(residual) if importance is None else float((importance * residual).sum())
        return max(float((weighted * (product + 2 * self.cross)).sum()) + rest, 0.0)


def importance_factor(spec: ConvSpec, importance: Tensor | None) -> Tensor:
    """Return L, g × O × O lower triangular, with LLᵀ the regularised importance of the outputs.

    G is divided by the mean of its diagonal and half an identity is added. L is the identity if G is None,
    zero or not finite.

    Args:
        spec: geometry of the layer.
        importance: G, g × O × O, positive semidefinite.
    """
    ones = torch.eye(spec.out_channels // spec.groups, dtype=torch.float64).expand(spec.groups, -1, -1)
    mean = 0.0 if importance is None else float(importance.diagonal(dim1=-2, dim2=-1).mean())
    if importance is None or not 0 < mean < math.inf:
        return ones
    factor: Tensor = torch.linalg.cholesky(importance / mean + _LEAST_IMPORTANCE * ones)
    return factor


def flatten_by_group(spec: ConvSpec, weight: Tensor) -> Tensor:
    """Return a kernel g·O × C × kh × kw as g × O × C·K."""
    return rearrange(weight, "(g o) c i j -> g o (c i j)", g=spec.groups)


def _trace(matrices: Tensor) -> float:
    """Return the sum of the traces of … × m × m."""
    return float(matrices.diagonal(dim1=-2, dim2=-1).sum())


@dataclass(frozen=True)
class WeightedProblem:
    """A least-squares problem whose outputs are weighted by Lᵀ and whose moments are divided by one scale.

    In its fields and properties, and in the solvers, W and E stand for LᵀW and LᵀE.
    """

    spec: ConvSpec
    importance_factor: Tensor  # L, g × O × O
    scale: float  # mean of the diagonal of S, by which all moments are divided
    spread: float  # the same, or 0 where the data do not vary and S is replaced by the identity
    power: float  # E‖Lᵀ(y − E y)‖², not scaled
    dense: Tensor  # W, g × O × C × K
    metric: Tensor  # S + ρI, g × C·K × C·K
    cross: Tensor  # E, g × O × C·K
    constant: float  # E‖Lᵀ(e − E e)‖²

    def unweighted(self, rows: Tensor) -> Tensor:
        """Return L⁻ᵀ times `rows`, g × O × n."""
        found: Tensor = torch.linalg.solve_triangular(self.importance_factor.mT, rows, upper=True)
        return found

    @functools.cached_property
    def product(self) -> Tensor:
        """The product W S, g × O × C·K.

        Here and in the solvers S + ρI multiplies first and the share of ρ is subtracted from each number
        after it: for inputs that do not vary the result is zero, without even rounding.
        """
        dense = self.dense.flatten(2)
        return dense @ self.metric - RIDGE * dense

    @functools.cached_property
    def target(self) -> Tensor:
        """The right side of the normal equations, W(S + ρI) + E, g × O × C × K."""
        return apply_metric(self.dense, self.metric) + self.cross.view(self.dense.shape)

    @functools.cached_property
    def start(self) -> float:
        """The objective of a kernel of zeros."""
        return float((self.dense * (self.target + self.cross.view(self.dense.shape))).sum()) + self.constant

    @functools.cached_property
    def unconstrained(self) -> Tensor:
        """The kernel that minimises the objective among all kernels, g × O × C × K."""
        return self.dense + solve_semidefinite(self.metric, self.cross.mT).mT.view(self.dense.shape)

    @functools.cached_property
    def starting_bases(self) -> dict[str, Tensor]:
        """Bases of full rank by structure, the leading rows of which fits of lower rank start from.

        Solvers fill it.
        """
        return {}

    @functools.cached_property
    def row_eigen(self) -> dict[str, Eigen]:
        """Eigenvectors, by structure, of S + ρI averaged over the patch axes of its second factor.

        Solvers fill it.
        """
        return {}


class Solution(NamedTuple):
    """The factors that a solver found for a weighted problem."""

    kernels: tuple[Tensor, ...]  # of the convolutions, the last one still weighted by Lᵀ
    product: Tensor  # Ŵ S, g × O × C·K
    basis: (
        Tensor  # orthonormal rows of the factor that was solved for iteratively; a later fit can start here
    )
    objective: list[float]  # after each sweep
