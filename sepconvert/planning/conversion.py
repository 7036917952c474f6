"""Results of a conversion, layer by layer and for the whole model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import Analysis, Finding, Spectrum
from sepconvert.factorize.exact.certificate import Certificate
from sepconvert.factorize.exact.factors import factor_specs
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.measure.execution.layers import LayerExecution
from sepconvert.measure.latency import PairTiming, Speedup
from sepconvert.measure.verification.layer import LayerCheck
from sepconvert.measure.verification.outputs import OutputCheck, Reference
from sepconvert.network.rewrite import Replacement
from sepconvert.network.trace import ConvSite
from sepconvert.planning.plan import MERGED, LayerPlan, reason_json


@dataclass(frozen=True)
class Merge:
    """The decision on a linear pair. MACs are those of one sample."""

    first: str  # the convolution that takes both places
    second: str
    decision: Literal["merged", "kept"]
    reason: Reason
    spec: ConvSpec | None  # of the dense form; None where there is none
    macs: tuple[int, int] | None  # of the pair, and of the dense form
    speedup: Speedup | None  # of the dense form over the pair, where it was measured

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the report."""
        speedup = None if self.speedup is None else self.speedup.to_dict()
        return {**asdict(self), **reason_json(self.reason), "speedup": speedup}


_AROUND = 3  # singular values shown on either side of the cut


_VALUES = 64  # steps in which a spectrum is drawn


@dataclass(frozen=True)
class LayerApproximation:
    """Errors of the factors that approximate a layer, measured on the calibration images.

    Output errors are √(E‖y − ŷ‖² / E‖y − E y‖²), where y is the original's output.
    """

    weight_error: float
    output_error: float  # on the inputs from the converted network, as delivered
    output_error_of_weight_fit: float  # fitted to the weights, on the original's inputs
    output_error_alone: float  # fitted to the outputs, on the original's inputs
    sensitivity: float | None  # divergence of the model's output over squared output error, replaced alone
    sweeps: int


@dataclass(frozen=True)
class LayerReport:
    """Everything that is known of one convolution."""

    plan: LayerPlan
    site: ConvSite
    analysis: Analysis | None = None
    certificate: Certificate | None = None
    check: LayerCheck | None = None
    latency: PairTiming | None = None
    approximation: LayerApproximation | None = None
    spectrum: Spectrum | None = None
    execution: LayerExecution | None = None

    @property
    def weight_error(self) -> float | None:
        """The error ‖ΔW‖ / ‖W‖ of a converted layer."""
        if self.approximation is not None:
            return self.approximation.weight_error
        return None if self.certificate is None else self.certificate.relative_error

    @property
    def output_error(self) -> float | None:
        """The error ‖Δy‖ / ‖y‖ of a converted layer."""
        if self.approximation is not None:
            return self.approximation.output_error
        return None if self.check is None else self.check.output_error

    @property
    def factors(self) -> tuple[tuple[ConvSpec, int], ...]:
        """The convolutions in a row that replace the layer, and the MACs of each over all its calls."""
        plan = self.plan
        if not plan.is_replaced or plan.spec is None or plan.scheme is None or plan.rank is None:
            return ()
        specs = factor_specs(plan.spec, plan.scheme, plan.rank, plan.border)
        macs = [0] * len(specs)
        for size in self.site.sizes:
            for place, spec in enumerate(specs):
                macs[place] += spec.macs(size)
                size = spec.output_size(size)
        return tuple(zip(specs, macs, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the layer's entry in the report's `layers`."""
        plan, conv = self.plan, self.site.conv
        return {
            "name": plan.name,
            "aliases": list(self.site.aliases),
            "kind": plan.kind,
            "kernel": None if conv is None else asdict(conv.spec),
            "calls": self.site.calls,
            "decision": plan.decision,
            **reason_json(plan.reason),
            "scheme": plan.scheme,
            "rank": plan.rank,
            "factors": [{**asdict(spec), "macs": macs} for spec, macs in self.factors],
            "exact": plan.scheme == MERGED or (self.certificate is not None and self.certificate.exact),
            "macs": list(plan.macs),
            "params": list(plan.params),
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "approximation": None if self.approximation is None else asdict(self.approximation),
            "latency_ms": None
            if self.latency is None
            else [self.latency.original.median_ms, self.latency.converted.median_ms],
            "latency_speedup": None if self.latency is None else self.latency.speedup.to_dict(),
            "execution": None if self.execution is None else self.execution.to_dict(),
            "spectrum": None if self.spectrum is None else _spectrum_json(self.spectrum),
            "certificate": None
            if self.certificate is None
            else {**asdict(self.certificate), "holds": self.certificate.holds},
            "check": None if self.check is None else {**asdict(self.check), "holds": self.check.holds},
            "structures": [] if self.analysis is None else [finding_json(f) for f in self.analysis.findings],
        }


@dataclass(frozen=True)
class Verification:
    """Checks of the whole model and of each replaced layer."""

    torch: OutputCheck
    onnx: OutputCheck | None
    onnx_reason: str | None  # why the files were not run
    layers: Mapping[str, LayerCheck]
    original: OutputCheck | None = None  # of original.onnx against the original; a difference is a warning

    @property
    def holds(self) -> bool:
        """Whether every check that ran has passed."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """The first check that failed, with its numbers."""
        for name, check in self.layers.items():
            if not check.kernel_error <= check.kernel_tolerance:
                error, tolerance = check.kernel_error, check.kernel_tolerance
                return f"the kernel of {name} is off by {error:.3g} (relative), tolerance {tolerance:.3g}"
            if not check.holds:
                moved, explained = check.max_abs_diff_float64, check.bound_float64
                return f"the output of {name} moved by {moved:.3g} where {explained:.3g} is explained"
        for where, comparison in (("PyTorch", self.torch), ("ONNX Runtime", self.onnx)):
            if comparison is not None and not comparison.holds:
                difference = comparison.max_abs_diff
                return f"{where} outputs differ by {difference:.3g}, tolerance {comparison.tolerance:.3g}"
        return None

    @property
    def worst_layer(self) -> str | None:
        """The replaced layer whose output moved most, relative to its size."""
        moved = {
            n: c.output_error if not math.isnan(c.output_error) else math.inf for n, c in self.layers.items()
        }
        return max(moved, key=moved.__getitem__, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the report's `verification` object."""
        return {
            "torch_max_abs_diff": self.torch.max_abs_diff,
            "torch_tolerance": self.torch.tolerance,
            "torch_dtype": self.torch.dtype,
            "onnx_max_abs_diff": None if self.onnx is None else self.onnx.max_abs_diff,
            "onnx_tolerance": None if self.onnx is None else self.onnx.tolerance,
            "onnx_dtype": None if self.onnx is None else self.onnx.dtype,
            "onnx_reason": self.onnx_reason,
            "original_onnx_max_abs_diff": None if self.original is None else self.original.max_abs_diff,
            "original_onnx_tolerance": None if self.original is None else self.original.tolerance,
            "passed": self.holds,
            "worst_layer": self.worst_layer,
        }


def finding_json(finding: Finding) -> dict[str, Any]:
    """Return one structure of one layer, with the singular values on either side of the cut."""
    cut = max(finding.rank, 1)
    return {
        "scheme": finding.scheme,
        "rank": finding.rank,
        "full_rank": finding.full_rank,
        "holds": finding.holds,
        "macs": finding.macs,
        "paying_rank": finding.paying_rank,
        "best_relative_error": finding.best_error,
        "tolerance": finding.tolerance,
        "singular_values_kept": list(finding.spectrum[max(cut - _AROUND, 0) : cut]),
        "singular_values_dropped": list(finding.spectrum[cut : cut + _AROUND]),
    }


def _spectrum_json(spectrum: Spectrum) -> dict[str, Any]:
    """Return a spectrum, thinned to at most 65 pairs (number from 1, singular value) with both ends."""
    count = len(spectrum.values)
    numbers = sorted({round(1 + (count - 1) * step / _VALUES) for step in range(_VALUES + 1)})
    return {
        "scheme": spectrum.scheme,
        "cut": spectrum.cut,
        "full_rank": count,
        "values": [[number, spectrum.values[number - 1]] for number in numbers],
    }


@dataclass(frozen=True)
class Conversion:
    """A converted model, the decisions that led to it, and the checks that it passed."""

    model: nn.Module
    layers: tuple[LayerPlan, ...]  # one for each site
    replacements: Mapping[str, Replacement]
    reports: tuple[LayerReport, ...]
    expected: tuple[
        Reference, Reference | None
    ]  # of the original; of the converted where it is another function
    torch_check: OutputCheck
    checks: Mapping[str, LayerCheck] = field(default_factory=dict)
    approximation: Mapping[str, Any] | None = None  # for the report
    merges: tuple[tuple[str, str], ...] = ()  # of convolutions of the original, the second into the first

    def with_merges(self, sites: Sequence[ConvSite], merges: Sequence[Merge]) -> "Conversion":
        """Return the conversion of a merged model as that of the original, whose convolutions are `sites`."""
        merged = {each.second: each.first for each in merges if each.decision == "merged"}
        found = {each.plan.name: each for each in self.reports}
        reports = tuple(
            LayerReport(_merged_into(merged[site.name], site), site)
            if site.name in merged
            else _takes_in(
                [second for second, first in merged.items() if first == site.name], found[site.name], site
            )
            for site in sites
        )
        return replace(
            self,
            layers=tuple(report.plan for report in reports),
            reports=reports,
            # Factors of a dense form are not those of the layer that was there.
            replacements={k: v for k, v in self.replacements.items() if k not in merged.values()},
            approximation={**(self.approximation or {}), "merges": [each.to_json() for each in merges]},
            merges=tuple((first, second) for second, first in merged.items()),
        )


def _merged_into(first: str, site: ConvSite) -> LayerPlan:
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=Reason(ReasonCode.MERGED, f"merged into {first}"),
        spec=None if site.conv is None else site.conv.spec,
        scheme=MERGED,
        rank=None,
        border=Border(),
        bias=False,
        macs=(site.macs, 0),
        params=(site.params, 0),
        tolerance=None,
    )


def _takes_in(seconds: Sequence[str], report: LayerReport, site: ConvSite) -> LayerReport:
    """Return the report on a dense form as the report on the first convolution of its pair."""
    if not seconds:
        return report
    plan = report.plan
    scheme = plan.scheme if plan.decision == "converted" else MERGED
    plan = replace(
        plan,
        decision="converted",
        reason=Reason(ReasonCode.MERGED, f"takes in {', '.join(seconds)}; {plan.reason}"),
        scheme=scheme,
        macs=(site.macs, plan.macs[1]),
        params=(site.params, plan.params[1]),
    )
    return replace(report, plan=plan, site=site)
