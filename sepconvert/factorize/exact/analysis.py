"""Which exact structures a kernel has, decided by the singular values of its unfoldings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sepconvert.factorize.border import Border, zero_border
from sepconvert.factorize.geometry import ConvSpec, Pair, chain_macs, chain_params
from sepconvert.factorize.rounding import channel_norms, channel_scale, kernel_noise, unit_roundoff
from sepconvert.factorize.structures import FORMS, STRUCTURES, Structure

ZERO_BORDER = "zero-border"


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


def analyse(spec: ConvSpec, weight: Tensor, sizes: Sequence[Pair], tol: float | None = None) -> Analysis:
    """Measure how near a kernel is to each structure.

    Args:
        spec: geometry of the dense layer.
        weight: O × C/g × kh × kw, finite, in its stored dtype.
        sizes: height and width of the input at each call of the layer in one forward pass.
        tol: relative error that counts as exact, instead of the rounding of the stored dtype.
    """
    noise = kernel_noise(weight, 1, tol)
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
            trimmed_noise = border.trim(kernel_noise(weight, terms, tol) / scale)
            findings.append(
                _finding(structure, trimmed_spec, dense, scaled, trimmed_noise, sizes, dense_macs)
            )
    return Analysis(spec, border, dense_macs, tuple(findings))


def spectrum(spec: ConvSpec, weight: Tensor, scheme: str, cut: int | None) -> Spectrum:
    """Of a kernel O × C/g × kh × kw in a structure that applies to it; of a nested one, in the outer."""
    form = FORMS[scheme]
    structure = form if isinstance(form, Structure) else form.outer
    values = _singular_values(structure.unfold(spec, weight.double() / channel_scale(weight)))
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
