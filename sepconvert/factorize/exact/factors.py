"""Factors of a kernel that has an exact structure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Analysis, Finding
from sepconvert.factorize.exact.certificate import OVERSAMPLING, Certificate, certify
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.rounding import channel_norms, channel_scale, unit_roundoff
from sepconvert.factorize.structures import BY_NAME, FORMS, Structure

# Up to this rank factors are also built from rows and columns of the kernel itself, which keeps the
# small integers of fixed filters.
_SKELETON_RANK = 16


# A filter's integers are looked for up to what bfloat16 holds, the smallest of them up to this.
_LARGEST_INTEGER = 256


_SMALLEST_INTEGER = 16


@dataclass(frozen=True)
class Factorization:
    """Convolutions that, applied one after another, replace a dense one."""

    scheme: str
    rank: int
    border: Border
    specs: tuple[ConvSpec, ...]
    weights: tuple[Tensor, ...]  # in the dtype of the dense kernel
    certificate: Certificate


def factorize(
    analysis: Analysis, finding: Finding, weight: Tensor, tol: float | None = None
) -> Factorization:
    """The factors of `weight` in the structure and at the rank of `finding`, with their certificate."""
    border = analysis.border
    spec = border.trim_spec(analysis.spec)
    if finding.scheme == ZERO_BORDER:
        trimmed = border.trim(weight).contiguous()
        certificate = certify(
            weight, border.restore(trimmed), torch.zeros_like(weight).double(), finding, tol
        )
        return Factorization(finding.scheme, finding.rank, border, (spec,), (trimmed,), certificate)
    structure = BY_NAME[finding.scheme]
    rank = max(finding.rank, 1)
    dense = border.trim(weight).double()
    scale = channel_scale(weight)
    options = [_skeleton(structure, spec, dense, rank)] if rank <= _SKELETON_RANK else []
    options.append(_truncated_svd(structure, spec, dense, scale, rank))
    stored = [_stored(*kernels, weight.dtype) for kernels in options]
    composed = [structure.compose(spec, first.double(), second.double()) for first, second in stored]
    errors = [(channel_norms(kernel - dense) / scale).nan_to_num(math.inf).max() for kernel in composed]
    best = min(range(len(stored)), key=lambda index: float(errors[index]))
    first, second = stored[best]
    # Casting moves each weight by u relative, each product of two by 2u.
    casting = (
        2 * unit_roundoff(weight.dtype) * structure.compose(spec, first.double().abs(), second.double().abs())
    )
    certificate = certify(weight, border.restore(composed[best]), border.restore(casting), finding, tol)
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


def _truncated_svd(
    structure: Structure, spec: ConvSpec, dense: Tensor, scale: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    matrices = structure.unfold(spec, dense / scale)
    if 2 * (rank + OVERSAMPLING) < min(matrices.shape[-2:]):
        # Of a matrix known to have this rank, a random projection finds the range to rounding (Halko,
        # Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), theorem 10.6).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrices, q=rank + OVERSAMPLING, niter=2)
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
