"""The factors of a kernel that has an exact structure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Analysis, Finding
from sepconvert.factorize.exact.certificate import Certificate, certify
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.rounding import channel_norms, channel_scale, unit_roundoff
from sepconvert.factorize.structures import BY_NAME, FORMS, Structure

# Up to this rank factors are also built from rows and columns of the kernel itself, which keeps the
# small integers of fixed filters.
_SKELETON_RANK = 16

# Integers of a filter are sought up to the largest that bfloat16 holds, the smallest of them up to this.
_LARGEST_INTEGER = 256
_SMALLEST_INTEGER = 16

# Columns beyond the rank in a randomised SVD.
_OVERSAMPLING = 8


@dataclass(frozen=True)
class Factorization:
    """Convolutions in a row that replace a dense one."""

    scheme: str
    rank: int  # at least 1; the taps kept if the scheme is a zero border
    border: Border  # cut from the kernel before it was split
    specs: tuple[ConvSpec, ...]  # geometries of the convolutions
    weights: tuple[Tensor, ...]  # their kernels, in the dtype of the dense one
    certificate: Certificate


def factorize(
    analysis: Analysis, finding: Finding, weight: Tensor, tol: float | None = None
) -> Factorization:
    """Return the factors of a kernel in the structure and at the rank of a finding, with their certificate.

    Factors made of rows and columns of the kernel compete with those of the SVD; the smaller worst error of a
    channel wins.

    Args:
        analysis: of the kernel.
        finding: the structure, and the rank, which need not be that of the analysis.
        weight: kernel O × C/g × kh × kw in its stored dtype.
        tol: the tolerance that the analysis had.
    """
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
    # Casting changes each weight by a relative error of u, and each product of two by 2u.
    casting = (
        2 * unit_roundoff(weight.dtype) * structure.compose(spec, first.double().abs(), second.double().abs())
    )
    certificate = certify(weight, border.restore(composed[best]), border.restore(casting), finding, tol)
    return Factorization(
        finding.scheme, rank, border, structure.split(spec, rank), (first, second), certificate
    )


def compose_factors(spec: ConvSpec, scheme: str, border: Border, weights: Sequence[Tensor]) -> Tensor:
    """Return the dense kernel O × C/g × kh × kw that equals the factors of a layer.

    Args:
        spec: geometry of the dense layer.
        scheme: a zero border, a structure or a nested form.
        border: cut from the kernel before it was split.
        weights: kernels of the convolutions, first to last.
    """
    if scheme == ZERO_BORDER:
        return border.restore(weights[0])
    return border.restore(FORMS[scheme].compose(border.trim_spec(spec), *weights))


def factor_specs(spec: ConvSpec, scheme: str, rank: int, border: Border) -> tuple[ConvSpec, ...]:
    """Return the geometries of the convolutions in a row that replace a dense one."""
    trimmed = border.trim_spec(spec)
    return (trimmed,) if scheme == ZERO_BORDER else FORMS[scheme].split(trimmed, rank)


def branches(spec: ConvSpec, scheme: str, rank: int, border: Border) -> tuple[tuple[ConvSpec, ...], ...]:
    """Return the geometries of the convolutions as they are laid out: chains whose outputs are summed.

    Parallel structures have a chain for each unit of rank, of which the last carries the bias; others have
    one chain.
    """
    if scheme == ZERO_BORDER or not FORMS[scheme].parallel:
        return (factor_specs(spec, scheme, rank, border),)
    unbiased = factor_specs(replace(spec, bias=False), scheme, 1, border)
    return (unbiased,) * (rank - 1) + (factor_specs(spec, scheme, 1, border),)


def _truncated_svd(
    structure: Structure, spec: ConvSpec, dense: Tensor, scale: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the kernels of the best factors by SVD, in float64.

    Args:
        structure: one that applies to the kernel.
        spec: geometry of the layer inside its border.
        dense: kernel inside its border, O × C/g × kh × kw, in float64.
        scale: divisors O × 1 × 1 × 1 that give every output channel the same weight in the fit.
        rank: inner dimension.
    """
    matrices = structure.unfold(spec, dense / scale)
    if 2 * (rank + _OVERSAMPLING) < min(matrices.shape[-2:]):
        # A random projection finds the range of a matrix known to have this rank up to rounding (Halko,
        # Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), theorem 10.6).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrices, q=rank + _OVERSAMPLING, niter=2)
    else:
        left, values, right_h = torch.linalg.svd(matrices, full_matrices=False)
        right = right_h.mT
    left, right, root = left[..., :rank], right[..., :rank], values[:, None, :rank].sqrt()
    rows, columns = left * root, right * root
    # One refinement by least squares: the rounding of the SVD itself, some hundred units in the last
    # place, is more than a float64 kernel tolerates.
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    columns = columns + (matrices - rows @ columns.mT).mT @ left * inverse
    first, second = structure.kernels(spec, rows, columns.mT)
    # Output channels are the first axis of the second kernel in every structure.
    return first, second * scale


def _skeleton(structure: Structure, spec: ConvSpec, dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors by cross approximation with complete pivoting, in float64.

    They are columns of the unfolded kernel, and its rows divided by the pivot. Unlike singular vectors they
    keep small integers, so that a Sobel or a binomial filter is reproduced to the last bit.

    Args:
        structure: one that applies to the kernel.
        spec: geometry of the layer inside its border.
        dense: kernel inside its border, O × C/g × kh × kw, in float64.
        rank: inner dimension.
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
    """Return the rows of B × m, each divided by a number that makes small integers of it, if there is one.

    The pivot is not that number: a binomial filter, n/256, is no multiple of its largest element.
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
    """Return both kernels in `dtype`, moving a power of two to the other if one would overflow."""
    peaks = float(first.abs().max()), float(second.abs().max())
    if torch.finfo(dtype).max / 2 < max(peaks) < math.inf:
        shift = 2.0 ** round(math.log2(peaks[1] / peaks[0]) / 2)
        first, second = first * shift, second / shift
    return first.to(dtype).contiguous(), second.to(dtype).contiguous()
