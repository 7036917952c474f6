"""Exact structure: which unfoldings of a kernel have low rank, the factors, and the proof.

Everything is decided in float64; the factors are cast once, to the dtype of the kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sepconvert.factorize.border import Border, zero_border
from sepconvert.factorize.rounding import rounding_noise, unit_roundoff
from sepconvert.factorize.structures import BY_NAME, FORMS, STRUCTURES, Structure
from sepconvert.spec import ConvSpec, Pair, chain_macs, chain_params

ZERO_BORDER = "zero-border"

# One output channel may carry this many times its own share of rounding noise, because the factors
# are fitted to all channels together.
_CHANNEL_SHARE = 8.0

# Up to this rank factors are also built from rows and columns of the kernel itself, which keeps the
# small integers of fixed filters.
_SKELETON_RANK = 16

# A filter's integers are looked for up to what bfloat16 holds, the smallest of them up to this.
_LARGEST_INTEGER = 256
_SMALLEST_INTEGER = 16

_OVERSAMPLING = 8


@dataclass(frozen=True)
class Finding:
    """What one structure has to say about one kernel.

    Rank, tolerance and singular values are those of the kernel with every output channel scaled to
    unit norm: rank does not depend on that scale, but a threshold does, and the layers that follow
    (BatchNorm above all) undo it. `best_error` is that of the kernel itself.
    """

    scheme: str
    rank: int  # smallest inner dimension that reproduces the kernel; for a zero border, taps kept
    full_rank: int
    holds: bool  # rank is so low that the factors have fewer weights than the kernel
    macs: int  # of the factors at this rank, over all calls of one forward pass
    paying_rank: int  # largest inner dimension with fewer MACs than the dense layer
    best_error: float  # smallest ‖ΔW‖_F / ‖W‖_F at inner dimension max(paying_rank, 1)
    tolerance: float  # relative Frobenius error that still counts as exact
    spectrum: tuple[float, ...]  # root sum of squares over the matrices, the whole having norm 1


@dataclass(frozen=True)
class Analysis:
    """All findings for one kernel, in the order of the table, the zero border first if there is one."""

    spec: ConvSpec
    border: Border
    dense_macs: int
    findings: tuple[Finding, ...]

    def holding(self) -> list[Finding]:
        """The structures that the kernel has, cheapest first."""
        return sorted(
            (finding for finding in self.findings if finding.holds), key=lambda finding: finding.macs
        )


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a kernel in one structure, as in `Finding`, and how many of them are kept.

    Of a layer that is not replaced, `cut` is how many could be kept for less work, if that is known.
    """

    scheme: str
    values: tuple[float, ...]
    cut: int | None


@dataclass(frozen=True)
class Certificate:
    """Proof that a chain of convolutions is the dense layer, ΔW being the difference of the kernels."""

    relative_error: float  # ‖ΔW‖_F / ‖W‖_F
    worst_channel_error: float  # max over output channels o of ‖ΔW_o‖ / ‖W_o‖ (see `_channel_scale`)
    channel_tolerance: float  # what rounding of the kernel and of its factors explains, same measure
    operator_norm: float  # ‖Δy‖₂ ≤ operator_norm · ‖x‖₂ for every (padded) input x
    exact: bool  # no channel is off by more than rounding explains, whatever tolerance was asked for
    bitwise: bool  # ΔW = 0
    kept: tuple[float, ...]  # singular values just above the cut (see `Finding.spectrum`)
    dropped: tuple[float, ...]  # and just below it

    @property
    def holds(self) -> bool:
        """Is the difference explained by rounding?"""
        return self.worst_channel_error <= self.channel_tolerance


@dataclass(frozen=True)
class Factorization:
    """Convolutions that, applied one after another, replace a dense one."""

    scheme: str
    rank: int
    border: Border
    specs: tuple[ConvSpec, ...]
    weights: tuple[Tensor, ...]  # in the dtype of the dense kernel
    certificate: Certificate


def analyse(spec: ConvSpec, weight: Tensor, sizes: Sequence[Pair], tol: float | None = None) -> Analysis:
    """Measure how near a kernel is to each structure.

    Args:
        spec: geometry of the dense layer.
        weight: O × C/g × kh × kw, finite, in its stored dtype.
        sizes: height and width of the input at each call of the layer in one forward pass.
        tol: relative error that counts as exact, instead of the rounding of the stored dtype.
    """
    noise = _noise(weight, 1, tol)
    scale = _channel_scale(weight)
    scaled = weight.double() / scale
    border = zero_border(scaled, _channel_norms(noise) / scale)
    trimmed_spec = border.trim_spec(spec)
    dense_macs = _macs((spec,), sizes)
    scaled = border.trim(scaled)
    largest = float(weight.abs().max()) or 1.0  # squares of the largest float64 would overflow
    dense = border.trim(weight.double() / largest)
    findings = (
        [_border_finding(spec, weight, border, sizes, dense_macs, noise)] if max(spec.kernel_size) > 1 else []
    )
    for structure in STRUCTURES:
        if structure.applies(trimmed_spec):
            terms = structure.full_rank(trimmed_spec)
            trimmed_noise = border.trim(_noise(weight, terms, tol) / scale)
            findings.append(
                _finding(structure, trimmed_spec, dense, scaled, trimmed_noise, sizes, dense_macs)
            )
    return Analysis(spec, border, dense_macs, tuple(findings))


def spectrum(spec: ConvSpec, weight: Tensor, scheme: str, cut: int | None) -> Spectrum:
    """Of a kernel O × C/g × kh × kw in a structure that applies to it; of a nested one, in the outer."""
    form = FORMS[scheme]
    structure = form if isinstance(form, Structure) else form.outer
    values = _singular_values(structure.unfold(spec, weight.double() / _channel_scale(weight)))
    norm = float(torch.linalg.vector_norm(values)) or 1.0
    return Spectrum(scheme, tuple((torch.linalg.vector_norm(values, dim=0) / norm).tolist()), cut)


def may_separate(spec: ConvSpec, weight: Tensor) -> bool:
    """Whether any unfolding has so many singular values that nearly vanish as those that `analyse` finds.

    By Gram matrices, which is many times faster, and loses half of the digits.
    """
    nothing = max(1e-3, 8 * unit_roundoff(weight.dtype))
    for structure in STRUCTURES:
        if structure.applies(spec):
            matrices = structure.unfold(spec, weight.double())
            short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
            values = torch.linalg.eigvalsh(short @ short.mT).flip(-1)
            most = (math.prod(spec.weight_shape) - 1) // _unit_params(structure, spec)
            if most >= values.shape[-1] or (values[..., most] <= nothing**2 * values[..., 0]).all():
                return True
    return False


def factorize(
    analysis: Analysis, finding: Finding, weight: Tensor, tol: float | None = None
) -> Factorization:
    """The factors of `weight` in the structure and at the rank of `finding`, with their certificate."""
    border = analysis.border
    spec = border.trim_spec(analysis.spec)
    if finding.scheme == ZERO_BORDER:
        trimmed = border.trim(weight).contiguous()
        certificate = _certify(
            weight, border.restore(trimmed), torch.zeros_like(weight).double(), finding, tol
        )
        return Factorization(finding.scheme, finding.rank, border, (spec,), (trimmed,), certificate)
    structure = BY_NAME[finding.scheme]
    rank = max(finding.rank, 1)
    dense = border.trim(weight).double()
    scale = _channel_scale(weight)
    options = [_skeleton(structure, spec, dense, rank)] if rank <= _SKELETON_RANK else []
    options.append(_truncated_svd(structure, spec, dense, scale, rank))
    stored = [_stored(*kernels, weight.dtype) for kernels in options]
    composed = [structure.compose(spec, first.double(), second.double()) for first, second in stored]
    errors = [(_channel_norms(kernel - dense) / scale).nan_to_num(math.inf).max() for kernel in composed]
    best = min(range(len(stored)), key=lambda index: float(errors[index]))
    first, second = stored[best]
    # Casting moves each weight by u relative, each product of two by 2u.
    casting = (
        2 * unit_roundoff(weight.dtype) * structure.compose(spec, first.double().abs(), second.double().abs())
    )
    certificate = _certify(weight, border.restore(composed[best]), border.restore(casting), finding, tol)
    return Factorization(
        finding.scheme, rank, border, structure.split(spec, rank), (first, second), certificate
    )


def compose(spec: ConvSpec, scheme: str, border: Border, weights: Sequence[Tensor]) -> Tensor:
    """The dense kernel O × C/g × kh × kw that the factors of a layer of geometry `spec` amount to."""
    if scheme == ZERO_BORDER:
        return border.restore(weights[0])
    return border.restore(FORMS[scheme].compose(border.trim_spec(spec), *weights))


def split(spec: ConvSpec, scheme: str, rank: int, border: Border) -> tuple[ConvSpec, ...]:
    """Geometry of the convolutions that replace a dense one."""
    trimmed = border.trim_spec(spec)
    return (trimmed,) if scheme == ZERO_BORDER else FORMS[scheme].split(trimmed, rank)


def branches(spec: ConvSpec, scheme: str, rank: int, border: Border) -> tuple[tuple[ConvSpec, ...], ...]:
    """Geometry of the convolutions as they are laid out: chains, the outputs of which are summed."""
    if scheme == ZERO_BORDER or not FORMS[scheme].parallel:
        return (split(spec, scheme, rank, border),)
    unbiased = split(replace(spec, bias=False), scheme, 1, border)
    return (unbiased,) * (rank - 1) + (split(spec, scheme, 1, border),)


def channel_errors(composed: Tensor, weight: Tensor) -> Tensor:
    """‖ΔW_o‖ / ‖W_o‖ for each output channel of a stored kernel, O × 1 × 1 × 1 (see `_channel_scale`)."""
    return _channel_norms(composed.double() - weight.double()) / _channel_scale(weight)


def _noise(weight: Tensor, terms: int, tol: float | None) -> Tensor:
    return rounding_noise(weight, terms) if tol is None else tol * weight.double().abs()


def _channel_norms(weight: Tensor) -> Tensor:
    """Frobenius norm of each output channel, O × 1 × 1 × 1."""
    weight = weight.double()
    # Squares of the largest and the smallest float64 would leave the range.
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms: Tensor = largest * torch.linalg.vector_norm(weight / largest, dim=(1, 2, 3), keepdim=True)
    return norms


def _channel_scale(weight: Tensor) -> Tensor:
    """What each output channel of a stored kernel is divided by to have unit norm.

    A channel of subnormal numbers stays below: as large as the others, its rounding noise would drown
    them.
    """
    norms = _channel_norms(weight)
    return norms.clamp(min=torch.finfo(weight.dtype).smallest_normal * math.sqrt(weight[0].numel()))


def _macs(chain: tuple[ConvSpec, ...], sizes: Sequence[Pair]) -> int:
    return sum(chain_macs(chain, size) for size in sizes)


def _singular_values(matrices: Tensor) -> Tensor:
    # LAPACK is several times faster on tall matrices than on wide ones.
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.svdvals(tall)
    return values


def _finding(
    structure: Structure,
    spec: ConvSpec,
    dense: Tensor,
    scaled: Tensor,
    noise: Tensor,
    sizes: Sequence[Pair],
    dense_macs: int,
) -> Finding:
    matrices = structure.unfold(spec, scaled)
    values = _singular_values(matrices)
    full_rank, tails = values.shape[-1], _tails(values)
    svd_roundoff = torch.finfo(torch.float64).eps * max(matrices.shape[-2:]) * values[:, 0]
    tolerances = torch.linalg.vector_norm(structure.unfold(spec, noise), dim=(-2, -1)) + svd_roundoff
    rank = int((tails > tolerances[:, None]).sum(-1).max())
    norm = float(torch.linalg.vector_norm(values)) or 1.0
    unit = structure.split(spec, 1)
    unit_macs = _macs(unit, sizes)
    paying_rank = min(full_rank, (dense_macs - 1) // unit_macs)
    # Where the structure is exact at this rank, what is left is rounding on either scale.
    reached = max(paying_rank, 1) >= rank
    errors = tails if reached else _tails(_singular_values(structure.unfold(spec, dense)))
    best = torch.linalg.vector_norm(errors[:, max(paying_rank, 1)]) / (
        torch.linalg.vector_norm(errors[:, 0]) or 1.0
    )
    return Finding(
        scheme=structure.name,
        rank=rank,
        full_rank=full_rank,
        holds=max(rank, 1) * _unit_params(structure, spec) < math.prod(spec.weight_shape),
        macs=max(rank, 1) * unit_macs,
        paying_rank=paying_rank,
        best_error=float(best),
        tolerance=float(torch.linalg.vector_norm(tolerances)) / norm,
        spectrum=tuple((torch.linalg.vector_norm(values, dim=0) / norm).tolist()),
    )


def _unit_params(structure: Structure, spec: ConvSpec) -> int:
    """Weights of the factors for each unit of rank."""
    return chain_params(structure.split(spec, 1)) - spec.bias * spec.out_channels


def _tails(values: Tensor) -> Tensor:
    """B × k singular values → B × (k+1): Frobenius distance to the nearest matrix of rank 0, 1, … k.

    (Eckart–Young–Mirsky.)
    """
    squares = values.square().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([squares.sqrt(), squares.new_zeros(len(values), 1)], dim=1)


def _border_finding(
    spec: ConvSpec, weight: Tensor, border: Border, sizes: Sequence[Pair], dense_macs: int, noise: Tensor
) -> Finding:
    kept = border.trim_spec(spec)
    taps, all_taps = math.prod(kept.kernel_size), math.prod(spec.kernel_size)
    scale = _channel_scale(weight)
    norm = float(torch.linalg.vector_norm(weight.double() / scale)) or 1.0
    dense = weight.double() / (float(weight.abs().max()) or 1.0)
    lines = [
        Border(**{side: 1})
        for side, axis in (("top", 0), ("bottom", 0), ("left", 1), ("right", 1))
        if spec.kernel_size[axis] > 1
    ]
    errors = [float(torch.linalg.vector_norm(dense - line.restore(line.trim(dense)))) for line in lines]
    taps_without = [math.prod(line.trim_spec(spec).kernel_size) for line in lines]
    return Finding(
        scheme=ZERO_BORDER,
        rank=taps,
        full_rank=all_taps,
        holds=bool(border),
        macs=_macs((kept,), sizes),
        paying_rank=max(taps_without),
        best_error=min(errors) / (float(torch.linalg.vector_norm(dense)) or 1.0),
        tolerance=float(torch.linalg.vector_norm(noise / scale)) / norm,
        spectrum=(),
    )


def _truncated_svd(
    structure: Structure, spec: ConvSpec, dense: Tensor, scale: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    matrices = structure.unfold(spec, dense / scale)
    if 2 * (rank + _OVERSAMPLING) < min(matrices.shape[-2:]):
        # Of a matrix known to have this rank, a random projection finds the range to rounding (Halko,
        # Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), theorem 10.6).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrices, q=rank + _OVERSAMPLING, niter=2)
    else:
        left, values, right_h = torch.linalg.svd(matrices, full_matrices=False)
        right = right_h.mT
    left, right, root = left[..., :rank], right[..., :rank], values[:, None, :rank].sqrt()
    rows, columns = left * root, right * root
    # Refined once by least squares: the SVD's own rounding, some hundred units in the last place, is
    # more than a float64 kernel allows.
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    columns = columns + (matrices - rows @ columns.mT).mT @ left * inverse
    first, second = structure.kernels(spec, rows, columns.mT)
    # Output channels are the first axis of the second kernel in every structure.
    return first, second * scale


def _skeleton(structure: Structure, spec: ConvSpec, dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cross approximation with complete pivoting: columns of the kernel, and rows divided by the pivot.

    Unlike singular vectors these keep small integers, so that a Sobel or a binomial filter is
    reproduced to the last bit.
    """
    residual = structure.unfold(spec, dense).clone()
    batch, rows, columns = residual.shape
    index = torch.arange(batch)
    left = residual.new_zeros(batch, rows, rank)
    right = residual.new_zeros(batch, rank, columns)
    for r in range(rank):
        position = residual.abs().flatten(1).argmax(1)
        pivot_row, pivot_column = position // columns, position % columns
        column = _small_integers(residual[index, :, pivot_column])
        pivot = column[index, pivot_row]
        row = residual[index, pivot_row, :] / torch.where(pivot == 0, torch.ones_like(pivot), pivot)[:, None]
        left[:, :, r], right[:, r, :] = column, row
        residual -= column[:, :, None] * row[:, None, :]
    return structure.kernels(spec, left, right)


def _small_integers(columns: Tensor) -> Tensor:
    """Rows of B × m divided each by a number that leaves small integers, where there is one.

    Dividing by the pivot would not do: a binomial filter, n/256, is no multiple of its largest element.
    """
    magnitudes = columns.abs()
    smallest = magnitudes.where(magnitudes > 0, math.inf).amin(1, keepdim=True)
    found = columns
    for smallest_integer in range(_SMALLEST_INTEGER, 0, -1):
        scaled = columns * smallest_integer / smallest
        small = (scaled == scaled.round()) & (scaled.abs() <= _LARGEST_INTEGER)
        found = torch.where(small.all(1, keepdim=True), scaled, found)
    return found


def _stored(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kernels in `dtype`; if one would overflow, a power of two goes over to the other."""
    peaks = float(first.abs().max()), float(second.abs().max())
    if torch.finfo(dtype).max / 2 < max(peaks) < math.inf:
        shift = 2.0 ** round(math.log2(peaks[1] / peaks[0]) / 2)
        first, second = first * shift, second / shift
    return first.to(dtype).contiguous(), second.to(dtype).contiguous()


def _certify(
    weight: Tensor, composed: Tensor, casting: Tensor, finding: Finding, tol: float | None
) -> Certificate:
    dense = weight.double()
    difference = composed.double() - dense
    scale, terms = _channel_scale(weight), finding.full_rank
    explained, by_rounding = (
        (_CHANNEL_SHARE * _channel_norms(noise) + _channel_norms(casting)) / scale
        for noise in (_noise(weight, terms, tol), rounding_noise(weight, terms))
    )
    errors = channel_errors(composed, weight)
    worst = int((errors - explained).argmax())
    largest = float(dense.abs().max()) or 1.0  # squares of the largest float64 would overflow
    relative_error = torch.linalg.vector_norm(difference / largest) / (
        torch.linalg.vector_norm(dense / largest) or 1.0
    )
    cut = max(finding.rank, 1) if finding.spectrum else 0
    return Certificate(
        relative_error=float(relative_error),
        worst_channel_error=float(errors.flatten()[worst]),
        channel_tolerance=float(explained.flatten()[worst]),
        operator_norm=_operator_norm(difference),
        exact=bool((errors <= by_rounding).all()),
        bitwise=not bool(difference.any()),
        kept=finding.spectrum[max(cut - 3, 0) : cut],
        dropped=finding.spectrum[cut : cut + 3],
    )


def _operator_norm(weight: Tensor) -> float:
    """An upper bound on ‖x ↦ conv(x)‖₂, for any stride and dilation, x being padded already.

    A convolution is a sum of kh·kw shifted 1×1 convolutions, each of norm ‖W[:,:,i,j]‖₂; and it is
    the O × C·kh·kw matrix applied to patches, in which each pixel occurs at most kh·kw times. With
    groups this is an upper bound too, the matrix of all groups stacked having the larger norm.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return largest
    weight = weight / largest  # squares of the largest float64 would overflow, of the smallest vanish
    taps = weight.flatten(2).permute(2, 0, 1)
    by_shifts = _spectral_norms(taps).sum()
    by_patches = math.sqrt(taps.shape[0]) * _spectral_norms(weight.flatten(1))
    return largest * float(torch.minimum(by_shifts, by_patches))


def _spectral_norms(matrices: Tensor) -> Tensor:
    """Largest singular values, by the smaller Gram matrix: exact enough for the largest, and quick."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    largest: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)[..., -1]
    return largest.clamp(min=0).sqrt()
