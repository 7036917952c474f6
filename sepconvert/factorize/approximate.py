"""Approximate factors in the metric of the data: least output error over kernels of a structure.

With x the input patches of a layer in the network as converted so far, y its outputs in the original,
and e = y − (W x + b) what the original kernel would miss there, the kernel Ŵ minimises

    E‖y − ŷ‖² + ρ ‖W − Ŵ‖²  =  tr(Δ (S + ρI) Δᵀ) + 2 tr(Δ Eᵀ) + const,   Δ = W − Ŵ,

in centred moments S = Cov(x), E = Cov(e, x), means being the bias's business. Its unconstrained
minimum, W + E(S + ρI)⁻¹, is the ridge regression of y on x towards W. Everything is float64.

Where it is known how much each output matters to the network's answers, as a matrix G = LLᵀ, it is Lᵀ(y − ŷ)
that is made small: all structures but one mix outputs freely, so that W = L⁻ᵀ(LᵀW) carries the factors of LᵀW
over to W. With the Fisher information for G this is the Kronecker-factored metric of Martens and Grosse
(arXiv:1503.05671).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sepconvert.factorize.structures import BY_NAME, FORMS, Nested, Structure
from sepconvert.spec import ConvSpec

DEPTHWISE_POINTWISE = "depthwise-pointwise"
POINTWISE_DEPTHWISE = "pointwise-depthwise"

# ρ, as a share of the mean of S's diagonal: dead channels and fewer samples than unknowns leave S singular.
_RIDGE = 1e-3
# What is added to G, as a share of the mean of its diagonal: it is estimated, and second order alone.
_LEAST_IMPORTANCE = 0.5
_SWEEPS = 60
_ENOUGH = 5e-4  # stop when a sweep lowers the error by less than this share of it
_NOTHING = 1e-6  # or of the outputs' power: fewer patches than unknowns are fitted without end
# Multiply-adds of all sweeps of one fit, by which wide layers get fewer (a spatial pair of 256 → 256
# channels, 3×3, rank 64: about 36; of 512 → 512: four): most of what there is to gain comes with the first,
# and after 12 sweeps the error of a ResNet-9's layers was within 0.1 % of where it settles.
_WORK, _FEWEST_SWEEPS = 5e10, 4
_ROUNDING = 1e-15
_CG_STEPS = 12
_CG_ENOUGH = 1e-16  # share of the preconditioned residual's square
_FEW_CG_STEPS = 6  # where each costs a product with all of S
# Of V, whose start is the V before: more lower the error of 12 sweeps by 0.1 % at most (ResNet-9).
_PAIR_CG_STEPS = 2


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
        by_group = _by_group(spec, weight.double())
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
        solve = _SOLVERS.get(scheme, _fit_pair)
        if self.is_closed(scheme):
            basis, sweeps = None, 1
        if basis is not None:  # it may have been kept in single precision
            basis = torch.linalg.qr(basis.double().mT).Q.mT
        weights, filtered, basis, objective = solve(problem, scheme, rank, sweeps, basis)
        *others, last = weights
        last = problem.unweighted(last.reshape(*problem.half.shape[:2], -1)).reshape(last.shape)
        kernel = form.compose(spec, *others, last)
        difference = _by_group(spec, self.weight.double() - kernel)
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
    def _mixed(self) -> "_Weighted":
        return self._weighted(_half(self.spec, self.importance))

    @functools.cached_property
    def _separate(self) -> "_Weighted":
        half = _half(self.spec, self.importance)
        return self._weighted(half.square().sum(-1).sqrt().diag_embed())

    def _weighted(self, half: Tensor) -> "_Weighted":
        spec, moments = self.spec, self.moments
        scale = float(moments.covariance.diagonal(dim1=-2, dim2=-1).mean())
        spread, cross = scale, moments.cross
        metric = torch.eye(moments.covariance.shape[-1], dtype=torch.float64)
        if scale <= torch.finfo(torch.float32).eps ** 2 * float(moments.mean.square().mean()):
            # Images that are all alike vary by rounding alone, of which there is nothing to learn.
            scale, spread, cross = 1.0, 0.0, torch.zeros_like(cross)
            metric = metric.repeat(spec.groups, 1, 1)
        else:
            metric = moments.covariance / scale + _RIDGE * metric
        dense = half.mT @ _by_group(spec, self.weight.double())
        importance = half @ half.mT
        return _Weighted(
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
    difference = _by_group(spec, weight.double() - kernel.double())
    return math.sqrt(moments.error(difference, difference @ moments.covariance) / (moments.power or 1.0))


def _half(spec: ConvSpec, importance: Tensor | None) -> Tensor:
    """L, lower triangular, g × O × O, of an importance LLᵀ; the identity where there is none."""
    ones = torch.eye(spec.out_channels // spec.groups, dtype=torch.float64).expand(spec.groups, -1, -1)
    mean = 0.0 if importance is None else float(importance.diagonal(dim1=-2, dim2=-1).mean())
    if importance is None or not 0 < mean < math.inf:
        return ones
    half: Tensor = torch.linalg.cholesky(importance / mean + _LEAST_IMPORTANCE * ones)
    return half


def _by_group(spec: ConvSpec, weight: Tensor) -> Tensor:
    """A kernel as g × O × C·K."""
    return rearrange(weight, "(g o) c i j -> g o (c i j)", g=spec.groups)


def _trace(matrices: Tensor) -> float:
    return float(matrices.diagonal(dim1=-2, dim2=-1).sum())


_Eigen = tuple[Tensor, Tensor]
"""Eigenvalues and eigenvectors of symmetric matrices."""


@dataclass(frozen=True)
class _Weighted:
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
        return dense @ self.metric - _RIDGE * dense

    @functools.cached_property
    def target(self) -> Tensor:
        """W(S + ρI) + E, in the shape of W."""
        return _product(self.dense, self.metric) + self.cross.view(self.dense.shape)

    @functools.cached_property
    def start(self) -> float:
        """The objective without any kernel."""
        return float((self.dense * (self.target + self.cross.view(self.dense.shape))).sum()) + self.constant

    @functools.cached_property
    def unconstrained(self) -> Tensor:
        """The best kernel of all, in the shape of W."""
        return self.dense + _solve(self.metric, self.cross.mT).mT.view(self.dense.shape)

    @functools.cached_property
    def bases(self) -> dict[str, Tensor]:
        """Of full rank, for each structure that has been begun with: those of lower rank begin them."""
        return {}

    @functools.cached_property
    def eigen(self) -> dict[str, _Eigen]:
        """Of S as far as it concerns the rows of a structure, for those that have been needed."""
        return {}


_Solution = tuple[tuple[Tensor, ...], Tensor, Tensor, list[float]]
"""Kernels of the convolutions, ŴS, g × O × C·K, the basis, and the objective after each sweep."""


# W[o,c,k] = Σ_m P[o,c,m] D[c,m,k], for each group: D acts on every channel by itself.


def _fit_depthwise_pointwise(
    problem: _Weighted, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> _Solution:
    dense, metric = problem.dense, problem.metric
    groups, _, channels, taps = dense.shape
    cross = problem.cross.view(dense.shape)
    by_channel = metric.view(groups * channels, taps, channels * taps)
    diagonal = (
        metric.view(groups, channels, taps, channels, taps).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    )
    target, start = problem.target, problem.start
    depthwise = _leading_rows(dense.transpose(1, 2), diagonal, rank) if basis is None else basis
    along = _eigen(diagonal)
    objective: list[float] = []
    inner = channels * rank
    sweeps = _affordable(sweeps, groups * inner * (dense[0].numel() + inner**2 / 3))

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
        if len(objective) >= sweeps or rank == taps or _settled(objective, start):
            break
        # D by conjugate gradients on its own.
        by_pairs = (pointwise.flatten(2).mT @ pointwise.flatten(2)).view(
            groups, channels, rank, channels, rank
        )
        wanted = torch.einsum("gocm,gock->gcmk", pointwise, target)

        def hessian(step: Tensor, by_pairs: Tensor = by_pairs) -> Tensor:
            return torch.einsum("gcmbn,gbnck->gcmk", by_pairs, filtered(step))

        blocks = by_pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        correction = _conjugate_gradients(
            hessian,
            _kronecker_inverse(_eigen(blocks), along),
            wanted - hessian(depthwise),
            (1, 2, 3),
            _CG_STEPS,
        )
        depthwise = torch.linalg.qr((depthwise + correction).mT).Q.mT
    right = rearrange(pointwise, "g o c m -> (g c) m o")
    kernels = BY_NAME[scheme].kernels(problem.spec, depthwise.mT.flatten(0, 1), right)
    rows.diagonal(dim1=1, dim2=3).sub_(_RIDGE * depthwise.permute(0, 2, 3, 1))
    return kernels, pointwise.flatten(2) @ rows.flatten(3).flatten(1, 2), depthwise, objective


# W[o,c,k] = Σ_m P[o,c,m] D[o,m,k]: every output channel by itself, under one metric.


def _fit_pointwise_depthwise(
    problem: _Weighted, scheme: str, rank: int, sweeps: int, basis: Tensor | None
) -> _Solution:
    dense, metric = problem.dense, problem.metric
    groups, outputs, channels, taps = dense.shape
    cross = problem.cross.view(dense.shape)
    target = _product(dense, metric) + cross
    start = float((dense * (target + cross)).sum()) + problem.constant
    by_tap = metric.view(groups, channels, taps, channels, taps)
    over_channels = torch.einsum("gckcl->gkl", by_tap)[:, None] / channels
    over_taps = torch.einsum("gakbk->gab", by_tap) / taps
    depthwise = _leading_rows(dense, over_channels, rank) if basis is None else basis
    pointwise = dense @ depthwise.mT
    inverse = torch.linalg.pinv(over_taps, rtol=_negligible(over_taps), hermitian=True)
    objective: list[float] = []

    def precondition(step: Tensor) -> Tensor:
        # One product for all outputs: a batched one would copy C × C numbers for each of them.
        return torch.einsum("gab,gobm->goam", inverse, step)

    while True:

        def hessian(step: Tensor, depthwise: Tensor = depthwise) -> Tensor:
            return _product(step @ depthwise, metric) @ depthwise.mT

        # P by conjugate gradients: its C·M normal equations differ from output to output.
        rest = _product(dense - pointwise @ depthwise, metric) + cross
        correction = _conjugate_gradients(hessian, precondition, rest @ depthwise.mT, (2, 3), _FEW_CG_STEPS)
        pointwise = pointwise + correction
        kernel = pointwise @ depthwise
        image = _product(kernel, metric)
        objective.append(start - float((kernel * (2 * target - image)).sum()))
        if len(objective) >= sweeps or _settled(objective, start):
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
    kernels = BY_NAME[scheme].kernels(problem.spec, pointwise.flatten(0, 1), depthwise.flatten(0, 1))
    return kernels, (image - _RIDGE * kernel).flatten(2), depthwise, objective


# W[o,a,b] = Σ_r H[o,r,b] V[r,a]: the first factor acts on some axes of a patch, the second on the others.
# Spatial pairs (a = c i, b = j, or a = c j, b = i), channel subspaces (a = c, b = i j, or a = c i j, no b).


def _fit_pair(problem: _Weighted, scheme: str, rank: int, sweeps: int, basis: Tensor | None) -> _Solution:
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
            problem.bases[structure.name] = _leading_rows(matrices, over_rows, structure.full_rank(spec))
        basis = problem.bases[structure.name][:, :rank]

    def along() -> _Eigen:
        if structure.name not in problem.eigen:
            problem.eigen[structure.name] = _eigen(over_rows)
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
    along: Callable[[], _Eigen],
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
    sweeps = _affordable(sweeps, (_PAIR_CG_STEPS + 2) * rank * metric.numel())
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
        h = projected + _solve(gram, missing.mT).mT.view(projected.shape)
        onto = torch.einsum("goab,gra->gorb", target, v)
        if inner is None or inner >= outputs:
            objective.append(start - float((h * onto).sum()))
        else:
            h = _reduced(h.flatten(2), gram, inner).view(h.shape)
            quadratic = (h.flatten(2) @ gram * h.flatten(2)).sum()
            objective.append(start - float(2 * (h * onto).sum() - quadratic))
        if len(objective) >= sweeps or full or _settled(objective, start):
            break
        # V by conjugate gradients, as a correction.
        by_pairs = h.flatten(2).mT @ h.flatten(2)
        pairs = by_pairs.view(groups, rank, columns, rank * columns)
        between = by_pairs.view(groups, rank, columns, rank, columns).diagonal(dim1=2, dim2=4).sum(-1)
        lacking = torch.einsum("gorb,goab->gra", h, target) - torch.einsum("grbm,gmab->gra", pairs, seen)
        size, pairs = lacking.abs().max().clamp(min=torch.finfo(torch.float64).tiny), pairs.float()

        def hessian(step: Tensor, pairs: Tensor = pairs) -> Tensor:
            return torch.einsum("grbm,gmab->gra", pairs, filtered(step))

        precondition = _kronecker_inverse(_in_single(_eigen(between)), _in_single(along()))
        correction = _conjugate_gradients(
            hessian, precondition, (lacking / size).float(), (1, 2), _PAIR_CG_STEPS
        )
        v = torch.linalg.qr((v + size * correction.double()).mT).Q.mT
    seen.view(groups, rank, columns, rows, columns).diagonal(dim1=2, dim2=4).sub_(_RIDGE * v[..., None])
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


_SOLVERS: dict[str, Callable[[_Weighted, str, int, int, Tensor | None], _Solution]] = {
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


def _affordable(sweeps: int, work: float) -> int:
    """Of so many sweeps, those that `_WORK` pays for at `work` multiply-adds each."""
    return min(sweeps, max(_FEWEST_SWEEPS, int(_WORK / work)))


def _settled(objective: list[float], start: float) -> bool:
    if objective[-1] <= _ROUNDING * start:  # what is fitted is the rounding of a perfect fit
        return True
    enough = max(_ENOUGH * abs(objective[-1]), _NOTHING * start)
    return len(objective) > 1 and objective[-2] - objective[-1] <= enough


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """The symmetric positive semidefinite system; where it is singular, some solution."""
    gram = (gram + gram.mT) / 2
    ridge = torch.finfo(gram.dtype).eps * gram.shape[-1] * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    solution: Tensor = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return solution


def _kronecker_inverse(left: _Eigen, right: _Eigen) -> Callable[[Tensor], Tensor]:
    """X ↦ the pseudo-inverse of (left ⊗ right) on X, of … × m × k."""
    left_values, left_vectors = left
    right_values, right_vectors = right
    values = left_values.clamp(min=0)[..., :, None] * right_values.clamp(min=0)[..., None, :]
    threshold = _negligible(values) * values.amax((-2, -1), keepdim=True)
    inverse = torch.where(values > threshold, 1 / values, torch.zeros_like(values))

    def apply(x: Tensor) -> Tensor:
        rotated = left_vectors.mT @ x @ right_vectors
        return left_vectors @ (rotated * inverse) @ right_vectors.mT

    return apply


def _negligible(values: Tensor) -> float:
    """The share of the largest eigenvalue below which others are rounding."""
    return float(torch.finfo(values.dtype).eps ** 0.75)


def _eigen(matrix: Tensor) -> _Eigen:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _conjugate_gradients(
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


def _in_single(eigen: _Eigen) -> _Eigen:
    values, vectors = eigen
    return values.float(), vectors.float()
