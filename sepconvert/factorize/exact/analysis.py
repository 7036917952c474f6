"""The analysis of a kernel: which exact structures it has, by the singular values of its unfoldings.

`sepconvert.factorize.rounding` defines the tolerance of "exact".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sepconvert.factorize.border import Border, zero_border
from sepconvert.factorize.geometry import ConvSpec, Pair, chain_macs, chain_params
from sepconvert.factorize.rounding import channel_norms, channel_scale, tolerated_error, unit_roundoff
from sepconvert.factorize.structures import FORMS, STRUCTURES, Structure

ZERO_BORDER = "zero-border"


@dataclass(frozen=True)
class Finding:
    """The result of comparing one kernel with one structure.

    Rank, tolerance and singular values are those of the kernel with every output channel scaled to
    unit norm: rank does not depend on that scale, but a threshold does, and the layers that follow
    (BatchNorm above all) undo it. `best_error` is that of the kernel itself.

    A zero border has no inner dimension. Its "ranks" are numbers of taps: `rank` those inside the border,
    `full_rank` all of the kernel, `paying_rank` those without one row or column. Plans and reports record
    them under the same names.
    """

    scheme: str
    rank: int  # smallest inner dimension that reproduces the kernel (taps for a zero border)
    full_rank: int  # inner dimension that reproduces every kernel (taps for a zero border)
    holds: bool  # whether the rank is so low that the factors have fewer weights than the kernel
    macs: int  # of the factors at this rank, over all calls in one forward pass
    paying_rank: int  # largest inner dimension with fewer MACs than the dense layer (taps for a zero border)
    best_error: float  # smallest ‖ΔW‖_F / ‖W‖_F at inner dimension max(paying_rank, 1)
    tolerance: float  # relative Frobenius error that still counts as exact
    # Singular values, root sum of squares over the matrices, of norm 1 together; empty for a zero border.
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class Analysis:
    """The findings for one kernel: the zero border, unless it has one tap, then structures in table order.

    The structures are those of the kernel inside its border.
    """

    spec: ConvSpec
    border: Border  # the widest that counts as zero
    dense_macs: int  # over all calls in one forward pass
    findings: tuple[Finding, ...]

    def holding(self) -> list[Finding]:
        """Return the findings of the structures that the kernel has, in ascending order of MACs."""
        return sorted(
            (finding for finding in self.findings if finding.holds), key=lambda finding: finding.macs
        )


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a kernel in one structure, as in `Finding`, and how many of them are kept."""

    scheme: str
    values: tuple[float, ...]
    cut: int | None  # for a layer that is not replaced, how many would still cost less work, if known


def analyse(spec: ConvSpec, weight: Tensor, sizes: Sequence[Pair], tol: float | None = None) -> Analysis:
    """Measure how near a kernel is to each structure.

    Args:
        spec: geometry of the dense layer.
        weight: kernel O × C/g × kh × kw, finite, in its stored dtype.
        sizes: height and width of the input at each call of the layer in one forward pass.
        tol: relative error that counts as exact, instead of the rounding of the stored dtype.
    """
    noise = tolerated_error(weight, 1, tol)
    scale = channel_scale(weight)
    scaled = weight.double() / scale
    border = zero_border(scaled, channel_norms(noise) / scale)
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
            trimmed_noise = border.trim(tolerated_error(weight, terms, tol) / scale)
            findings.append(
                _finding(structure, trimmed_spec, dense, scaled, trimmed_noise, sizes, dense_macs)
            )
    return Analysis(spec, border, dense_macs, tuple(findings))


def kernel_spectrum(spec: ConvSpec, weight: Tensor, scheme: str, cut: int | None) -> Spectrum:
    """Return the singular values of a kernel in one form.

    Args:
        spec: geometry of the layer.
        weight: its kernel O × C/g × kh × kw.
        scheme: name of a form that applies to it; a nested form has the spectrum of its outer structure.
        cut: how many singular values are kept, if known.
    """
    form = FORMS[scheme]
    structure = form if isinstance(form, Structure) else form.outer
    values = _singular_values(structure.unfold(spec, weight.double() / channel_scale(weight)))
    norm = float(torch.linalg.vector_norm(values)) or 1.0
    return Spectrum(scheme, tuple((torch.linalg.vector_norm(values, dim=0) / norm).tolist()), cut)


def may_separate(spec: ConvSpec, weight: Tensor) -> bool:
    """Return whether `analyse` could find a structure of a kernel O × C/g × kh × kw that has no zero border.

    It is a quick filter, generous enough not to miss a structure that is exact up to rounding: it computes
    singular values by Gram matrices, which is many times faster but loses half of the digits.
    """
    negligible = max(1e-3, 8 * unit_roundoff(weight.dtype))
    for structure in STRUCTURES:
        if structure.applies(spec):
            matrices = structure.unfold(spec, weight.double())
            short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
            values = torch.linalg.eigvalsh(short @ short.mT).flip(-1)
            most = (math.prod(spec.weight_shape) - 1) // _unit_params(structure, spec)
            if most >= values.shape[-1] or (values[..., most] <= negligible**2 * values[..., 0]).all():
                return True
    return False


def _macs(chain: tuple[ConvSpec, ...], sizes: Sequence[Pair]) -> int:
    """Return the MACs of a chain over inputs of all sizes."""
    return sum(chain_macs(chain, size) for size in sizes)


def _singular_values(matrices: Tensor) -> Tensor:
    """Return the singular values B × min(m, n) of matrices B × m × n, in descending order."""
    # LAPACK is several times faster on tall matrices than on wide ones.
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.svdvals(tall)
    return values


def _squared_singular_values(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of the Gram matrices, in descending order, and how far each may be off.

    They take a half of the time of singular values, or less. Products err by the roundoff times the length
    of the sums, and eigenvalues by a small multiple of the roundoff times the largest (Golub and Van Loan,
    Matrix Computations, sections 2.7.6 and 8.6); one bound that is generous for both is returned.

    Args:
        matrices: B × m × n.

    Returns:
        B × min(m, n), and B.
    """
    short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    squares = torch.linalg.eigvalsh(short @ short.mT).flip(-1).clamp(min=0)
    lengths = matrices.shape[-2] + matrices.shape[-1]
    return squares, torch.finfo(matrices.dtype).eps * lengths * squares[:, 0]


def _rough_singular_values(matrices: Tensor, rank: int) -> Tensor:
    """Return singular values whose tail beyond a rank has three digits at least."""
    squares, error = _squared_singular_values(matrices)
    clear = squares[:, rank:].sum(-1) > 1e3 * error * squares.shape[-1]
    return squares.sqrt() if bool(clear.all()) else _singular_values(matrices)


def _spectrum(matrices: Tensor, least: Tensor) -> Tensor:
    """Return singular values, to three digits at least if all of them clearly exceed a norm, else exactly."""
    squares, error = _squared_singular_values(matrices)
    clear = squares[:, -1] > 4 * least.square() + 1e3 * error
    return squares.sqrt() if bool(clear.all()) else _singular_values(matrices)


def _finding(
    structure: Structure,
    spec: ConvSpec,
    dense: Tensor,
    scaled: Tensor,
    noise: Tensor,
    sizes: Sequence[Pair],
    dense_macs: int,
) -> Finding:
    """Return what the singular values say of a kernel in one structure.

    Args:
        structure: one that applies to the layer.
        spec: geometry of the layer inside its border.
        dense: kernel inside its border, O × C/g × kh × kw, on the scale at which `best_error` is measured.
        scaled: the same with every output channel scaled to unit norm.
        noise: elementwise tolerated error of `scaled`.
        sizes: height and width of the input at each call.
        dense_macs: MACs of the dense layer over all calls.
    """
    matrices = structure.unfold(spec, scaled)
    noise_norms = torch.linalg.vector_norm(structure.unfold(spec, noise), dim=(-2, -1))
    values = _spectrum(matrices, noise_norms)
    full_rank, tails = values.shape[-1], _tails(values)
    svd_roundoff = torch.finfo(torch.float64).eps * max(matrices.shape[-2:]) * values[:, 0]
    tolerances = noise_norms + svd_roundoff
    rank = int((tails > tolerances[:, None]).sum(-1).max())
    norm = float(torch.linalg.vector_norm(values)) or 1.0
    unit = structure.split(spec, 1)
    unit_macs = _macs(unit, sizes)
    paying_rank = min(full_rank, (dense_macs - 1) // unit_macs)
    # If the structure is exact at this rank, the rest is rounding on either scale.
    reached = max(paying_rank, 1) >= rank
    errors = tails if reached else _tails(_rough_singular_values(structure.unfold(spec, dense), paying_rank))
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
    """Return the number of weights of the factors for each unit of rank."""
    return chain_params(structure.split(spec, 1)) - spec.bias * spec.out_channels


def _tails(values: Tensor) -> Tensor:
    """Return the Frobenius distances to the nearest matrices of rank 0, 1, … k (Eckart, Young and Mirsky).

    Args:
        values: singular values, B × k.

    Returns:
        B × (k + 1).
    """
    squares = values.square().flip(-1).cumsum(-1).flip(-1)
    return torch.cat([squares.sqrt(), squares.new_zeros(len(values), 1)], dim=1)


def _border_finding(
    spec: ConvSpec, weight: Tensor, border: Border, sizes: Sequence[Pair], dense_macs: int, noise: Tensor
) -> Finding:
    """Return the finding for a zero border, its ranks being numbers of taps; `best_error` cuts one line.

    Args:
        spec: geometry of the dense layer.
        weight: kernel O × C/g × kh × kw in its stored dtype.
        border: the widest that counts as zero.
        sizes: height and width of the input at each call.
        dense_macs: MACs of the dense layer over all calls.
        noise: elementwise tolerated error of `weight`.
    """
    kept = border.trim_spec(spec)
    taps, all_taps = math.prod(kept.kernel_size), math.prod(spec.kernel_size)
    scale = channel_scale(weight)
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
