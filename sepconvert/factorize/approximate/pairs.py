"""Alternating least squares for pairs of factors that act on different axes of a patch.

Notation and objective are those of `weighted`. The axes of a patch, C × kh × kw, are sorted into A, those
that the first factor acts on, and B, those of the second: for spatial pairs A = (c, i) and B = (j), or
A = (c, j) and B = (i); for channel subspaces A = (c) and B = (i, j), or A = (c, i, j) and B is empty.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.approximate.least_squares import (
    Eigen,
    affordable_sweeps,
    conjugate_gradients,
    has_converged,
    kronecker_inverse,
    leading_rows,
    solve_semidefinite,
    symmetric_eigen,
    to_single,
)
from sepconvert.factorize.approximate.weighted import RIDGE, Solution, WeightedProblem
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS, Nested, Structure

# Steps of conjugate gradients for V in each sweep, each sweep starting from the V before. More of them lower
# the error of 12 sweeps by 0.1 % at most (ResNet-9).
_CG_STEPS = 2


def fit_pair(problem: WeightedProblem, scheme: str, rank: int, sweeps: int, basis: Tensor | None) -> Solution:
    """Fit W[o,a,b] ≈ Σ_r H[o,r,b] V[r,a], and for a nested form H[o,r,b] = Σ_s Q[o,s] K[s,r,b] as well.

    A sweep solves the normal equations of H, reduced to its rank over the outputs for a nested form, then
    lowers the objective in V by conjugate gradients.

    Args:
        problem: W as g × O × C × K.
        scheme: name of the structure or nested form.
        rank: R, the inner dimension.
        sweeps: at most this many.
        basis: V to start from, g × R × A with orthonormal rows; None starts from the best kernel of all.
    """
    form = FORMS[scheme]
    structure = form.outer if isinstance(form, Nested) else form
    axes = _PatchAxes.of(problem.spec, structure)
    metric = axes.sort_metric(problem.metric)
    over_rows = torch.einsum("gabcb->gac", metric) / metric.shape[2]

    def row_eigen() -> Eigen:
        if structure.name not in problem.row_eigen:
            problem.row_eigen[structure.name] = symmetric_eigen(over_rows)
        return problem.row_eigen[structure.name]

    pair = _PairProblem(
        dense=axes.sort(problem.dense),
        metric=metric,
        cross=axes.sort(problem.cross),
        target=axes.sort(problem.target),
        start=problem.start,
        row_eigen=row_eigen,
        inner=form.inner_rank(problem.spec, rank) if isinstance(form, Nested) else None,
    )
    if basis is None:
        basis = _starting_basis(problem, structure, axes, over_rows)[:, :rank]
    v, h, product, objective = _alternate(pair, basis, sweeps)
    kernels: tuple[Tensor, ...] = structure.kernels(problem.spec, v.mT, rearrange(h, "g o r b -> g r (o b)"))
    if isinstance(form, Nested):
        kernels = (kernels[0], *_split_second(form, problem.spec, rank, kernels[1]))
    filtered = (h.flatten(2) @ product.flatten(2)).view(pair.dense.shape)
    return Solution(kernels, axes.restore(filtered), v, objective)


@dataclass(frozen=True)
class _PatchAxes:
    """Sorting of a patch's axes c, i, j into A, those of a pair's first factor, and B, those of the second.

    If each output channel has its own factors (channelwise structures), it counts as a group: g then stands
    for g·O below, and O for 1.
    """

    spec: ConvSpec
    first: str  # einops names of the axes in A
    second: str  # and in B
    channelwise: bool

    @classmethod
    def of(cls, spec: ConvSpec, structure: Structure) -> "_PatchAxes":
        """Return the axes that the unfolding of a structure makes rows and columns of."""
        batch, rows, columns = structure.axes
        second = " ".join(axis for axis in columns if axis != "o")
        return cls(spec, " ".join(rows), second, channelwise="o" in batch)

    @property
    def outputs(self) -> str:
        """The einops pattern of groups and outputs."""
        return "(g o) 1" if self.channelwise else "g o"

    def sort(self, kernel: Tensor) -> Tensor:
        """Return a kernel, g × O × C × K or flat, as g × O × A × B."""
        by_output = kernel.view(self.spec.groups, -1, *self.spec.weight_shape[1:])
        return rearrange(by_output, f"g o c i j -> {self.outputs} ({self.first}) ({self.second})")

    def restore(self, kernel: Tensor) -> Tensor:
        """Return a kernel g × O × A × B as g × O × C·K, the inverse of `sort`."""
        taps = {"i": self.spec.kernel_size[0], "j": self.spec.kernel_size[1]}
        pattern = f"{self.outputs} ({self.first}) ({self.second}) -> g o (c i j)"
        return rearrange(kernel, pattern, g=self.spec.groups, **taps)

    def sort_metric(self, metric: Tensor) -> Tensor:
        """Return a metric g × C·K × C·K as g × A × B × A × B."""
        groups, channels, (kh, kw) = self.spec.groups, self.spec.weight_shape[1], self.spec.kernel_size
        sizes = {"g": groups, "c": channels, "i": kh, "j": kw, "d": channels, "k": kh, "l": kw}
        primed = str.maketrans("cij", "dkl")
        rows = f"({self.first}) ({self.second})"
        metric = rearrange(metric, f"g (c i j) (d k l) -> g {rows} {rows.translate(primed)}", **sizes)
        return metric.repeat_interleave(self.spec.out_channels // groups, 0) if self.channelwise else metric


@dataclass(frozen=True)
class _PairProblem:
    """Least-squares problem W[o,a,b] ≈ Σ_r H[o,r,b] V[r,a] with V, g × R × A, and H, g × O × R × B."""

    dense: Tensor  # W, g × O × A × B
    metric: Tensor  # S + ρI, g × A × B × A × B
    cross: Tensor  # E, g × O × A × B
    target: Tensor  # W(S + ρI) + E, g × O × A × B
    start: float  # the objective of a kernel of zeros
    row_eigen: Callable[[], Eigen]  # of S + ρI averaged over B, g × A × A: preconditions the search for V
    inner: int | None  # largest rank of H over the outputs, for nested forms

    def is_full(self, rank: int) -> bool:
        """Return whether every kernel has the form at this rank, so that one sweep gives it."""
        _, outputs, rows, columns = self.dense.shape
        return rank == min(rows, outputs * columns) and self.inner in (None, outputs)

    def product(self, v: Tensor) -> Tensor:
        """Return V(S + ρI), g × R·B × A × B, in the precision of V, g × R × A."""
        groups, rows, columns = self.metric.shape[:3]
        by_row = self._by_row if v.dtype == self._by_row.dtype else self._by_row_single
        return (v @ by_row).view(groups, -1, rows, columns)

    @functools.cached_property
    def _by_row(self) -> Tensor:
        return self.metric.reshape(*self.metric.shape[:2], -1)

    @functools.cached_property
    def _by_row_single(self) -> Tensor:
        return self._by_row.float()

    def best_second(self, v: Tensor, product: Tensor) -> tuple[Tensor, float]:
        """Solve the normal equations of H, g × O × R × B, for a given V; return it and the objective.

        They are solved as a correction to the projection of W onto the rows of V, which is zero at full rank.

        Args:
            v: V, g × R × A with orthonormal rows.
            product: V(S + ρI), g × R·B × A × B.
        """
        gram = torch.einsum("gmcd,gsc->gmsd", product, v).flatten(2)
        projected = torch.einsum("goab,gra->gorb", self.dense, v)
        rest = self.dense - torch.einsum("gorb,gra->goab", projected, v)
        missing = rest.flatten(2) @ product.flatten(2).mT
        missing = missing + torch.einsum("goab,gra->gorb", self.cross, v).flatten(2)
        h = projected + solve_semidefinite(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("goab,gra->gorb", self.target, v)
        if self.inner is None or self.inner >= self.dense.shape[1]:
            return h, self.start - float((h * onto).sum())
        h = _reduce_rank(h.flatten(2), gram, self.inner).view(h.shape)
        quadratic = (h.flatten(2) @ gram * h.flatten(2)).sum()
        return h, self.start - float(2 * (h * onto).sum() - quadratic)

    def improved_first(self, v: Tensor, h: Tensor, product: Tensor) -> Tensor:
        """Return V, g × R × A with orthonormal rows, improved for a given H by conjugate gradients.

        The steps are taken in single precision, at half the price: whatever V is, H and the objective are
        found for it in double precision.

        Args:
            v: V before, g × R × A.
            h: H, g × O × R × B.
            product: V(S + ρI), g × R·B × A × B.
        """
        groups, _, rank, columns = h.shape
        by_pairs = h.flatten(2).mT @ h.flatten(2)
        pairs = by_pairs.view(groups, rank, columns, rank * columns)
        between = by_pairs.view(groups, rank, columns, rank, columns).diagonal(dim1=2, dim2=4).sum(-1)
        wanted = torch.einsum("gorb,goab->gra", h, self.target)
        lacking = wanted - torch.einsum("grbm,gmab->gra", pairs, product)
        size = lacking.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        in_single = pairs.float()

        def hessian(step: Tensor) -> Tensor:
            return torch.einsum("grbm,gmab->gra", in_single, self.product(step))

        precondition = kronecker_inverse(to_single(symmetric_eigen(between)), to_single(self.row_eigen()))
        correction = conjugate_gradients(hessian, precondition, (lacking / size).float(), (1, 2), _CG_STEPS)
        improved: Tensor = torch.linalg.qr((v + size * correction.double()).mT).Q.mT
        return improved


def _alternate(pair: _PairProblem, v: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Improve H and V in turn, from a V of orthonormal rows, until the objective settles.

    Returns V, g × R × A; H, g × O × R × B; VS, g × R·B × A × B; and the objective after each sweep.
    """
    groups, rank, rows = v.shape
    columns = pair.dense.shape[3]
    sweeps = affordable_sweeps(sweeps, (_CG_STEPS + 2) * rank * pair.metric.numel())
    objective: list[float] = []
    while True:
        product = pair.product(v)
        h, value = pair.best_second(v, product)
        objective.append(value)
        if len(objective) >= sweeps or pair.is_full(rank) or has_converged(objective, pair.start):
            break
        v = pair.improved_first(v, h, product)
    product.view(groups, rank, columns, rows, columns).diagonal(dim1=2, dim2=4).sub_(RIDGE * v[..., None])
    return v, h, product, objective


def _starting_basis(
    problem: WeightedProblem, structure: Structure, axes: _PatchAxes, over_rows: Tensor
) -> Tensor:
    """Return a V of full rank, g × R × A, whose leading rows are those of the best unconstrained kernel.

    Args:
        problem: keeps it for fits at other ranks.
        structure: that of the pair.
        axes: of the pair.
        over_rows: S + ρI averaged over B, g × A × A.
    """
    if structure.name not in problem.starting_bases:
        matrices = rearrange(axes.sort(problem.unconstrained), "g o a b -> g (o b) a")
        basis = leading_rows(matrices, over_rows, structure.full_rank(problem.spec))
        problem.starting_bases[structure.name] = basis
    return problem.starting_bases[structure.name]


def _split_second(form: Nested, spec: ConvSpec, rank: int, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two kernels of a nested form's inner structure that compose the second kernel.

    Nothing is cut off: H already has the inner rank over the outputs.
    """
    inner = form.inner_rank(spec, rank)
    _, within = form.outer.split(spec, rank)
    left, values, right = torch.linalg.svd(form.inner.unfold(within, second), full_matrices=False)
    return form.inner.kernels(within, left[..., :inner] * values[..., None, :inner], right[..., :inner, :])


def _reduce_rank(h: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return the matrices of rank `rank` nearest to H in a metric: reduced-rank regression.

    Source: A. J. Izenman, "Reduced-rank regression for the multivariate linear model", J. Multivariate
    Analysis 5 (1975).

    Args:
        h: H, g × O × M.
        gram: the metric, g × M × M.
        rank: at most O.
    """
    by_output = h @ gram @ h.mT
    vectors = torch.linalg.eigh((by_output + by_output.mT) / 2).eigenvectors[..., -rank:]
    reduced: Tensor = vectors @ (vectors.mT @ h)
    return reduced
