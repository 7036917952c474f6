"""The report as a value, and as the JSON document that other programs read."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sepconvert.environment import Runtime, environment
from sepconvert.export import ExportNote
from sepconvert.factorize.exact import Analysis, Certificate, Finding, Spectrum
from sepconvert.measure.accuracy import AccuracyDelta, ChangedPredictions
from sepconvert.measure.execution import LayerExecution, ModelExecution
from sepconvert.measure.latency import Latency, Speedup
from sepconvert.plan import MERGED, LayerPlan
from sepconvert.profiling import Profile
from sepconvert.trace import ConvSite
from sepconvert.verify import Comparison, LayerCheck

SCHEMA = "sepconvert.report/1"

# Singular values shown on either side of the cut.
_AROUND = 3
# Steps in which a spectrum is drawn.
_VALUES = 64


@dataclass(frozen=True)
class LayerApproximation:
    """How near depthwise and pointwise factors come to a layer, as calibration saw it.

    Output errors are √(E‖y − ŷ‖² / E‖y − E y‖²), y being the original's output.
    """

    weight_error: float
    output_error: float  # on the inputs from the converted network, as delivered
    output_error_of_weight_fit: float  # fitted to the weights, on the original's inputs
    output_error_alone: float  # fitted to the outputs, on the original's inputs
    sensitivity: float | None  # divergence of the model's output over squared output error, replaced alone
    sweeps: int


@dataclass(frozen=True)
class LayerReport:
    """Everything known of one convolution."""

    plan: LayerPlan
    site: ConvSite
    analysis: Analysis | None = None
    certificate: Certificate | None = None
    check: LayerCheck | None = None
    latency: tuple[Latency, Latency, Speedup] | None = None
    approximation: LayerApproximation | None = None
    spectrum: Spectrum | None = None
    execution: LayerExecution | None = None

    @property
    def weight_error(self) -> float | None:
        """‖ΔW‖ / ‖W‖ of a converted layer."""
        if self.approximation is not None:
            return self.approximation.weight_error
        return None if self.certificate is None else self.certificate.relative_error

    @property
    def output_error(self) -> float | None:
        """‖Δy‖ / ‖y‖ of a converted layer."""
        if self.approximation is not None:
            return self.approximation.output_error
        return None if self.check is None else self.check.output_error

    def to_json(self) -> dict[str, Any]:
        """One entry of `layers`."""
        plan, conv = self.plan, self.site.conv
        return {
            "name": plan.name,
            "aliases": list(self.site.aliases),
            "kind": plan.kind,
            "kernel": None if conv is None else asdict(conv.spec),
            "calls": self.site.calls,
            "decision": plan.decision,
            "reason": plan.reason,
            "scheme": plan.scheme,
            "rank": plan.rank,
            "exact": plan.scheme == MERGED or (self.certificate is not None and self.certificate.exact),
            "macs": list(plan.macs),
            "params": list(plan.params),
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "approximation": None if self.approximation is None else asdict(self.approximation),
            "latency_ms": None if self.latency is None else [each.median_ms for each in self.latency[:2]],
            "latency_speedup": None if self.latency is None else self.latency[2].to_dict(),
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
    """Whole-model and per-layer checks."""

    torch: Comparison
    onnx: Comparison | None
    onnx_reason: str | None  # why the runtime could not be asked
    layers: Mapping[str, LayerCheck]

    @property
    def holds(self) -> bool:
        """Did every check that ran pass?"""
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
        """The `verification` object."""
        return {
            "torch_max_abs_diff": self.torch.max_abs_diff,
            "torch_tolerance": self.torch.tolerance,
            "torch_dtype": self.torch.dtype,
            "onnx_max_abs_diff": None if self.onnx is None else self.onnx.max_abs_diff,
            "onnx_tolerance": None if self.onnx is None else self.onnx.tolerance,
            "onnx_dtype": None if self.onnx is None else self.onnx.dtype,
            "onnx_reason": self.onnx_reason,
            "passed": self.holds,
            "worst_layer": self.worst_layer,
        }


@dataclass(frozen=True)
class Report:
    """A conversion from beginning to end."""

    mode: str
    source: dict[str, Any] | None
    command: str | None  # that asked for it
    runtime: Runtime
    seed: int
    dtype: str
    original: Profile
    converted: Profile
    speedup: Speedup | None
    accuracy: AccuracyDelta | None
    changed: ChangedPredictions | None
    layers: tuple[LayerReport, ...]
    verification: Verification
    export: ExportNote
    execution: ModelExecution | None = None
    approximation: Mapping[str, Any] | None = None


def report_document(report: Report) -> dict[str, Any]:
    """The JSON document, schema `SCHEMA`: plain dictionaries, lists, numbers and strings."""
    accuracy = (
        report.accuracy.to_dict()
        if report.accuracy is not None
        else {"accuracy_drop_pp": None, "agreement": None}
    )
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "mode": report.mode,
        "model": report.source,
        "environment": environment(report.runtime),
        "seed": report.seed,
        "dtype": report.dtype,
        "original": report.original.to_json(),
        "converted": report.converted.to_json(),
        "delta": {
            "params_ratio": _ratio(report.original.params, report.converted.params),
            "macs_ratio": _ratio(report.original.macs, report.converted.macs),
            "latency_speedup": None if report.speedup is None else report.speedup.to_dict(),
            **accuracy,
        },
        "changed_predictions": None if report.changed is None else report.changed.to_dict(),
        "execution": None if report.execution is None else report.execution.to_dict(),
        "layers": [layer.to_json() for layer in report.layers],
        "verification": report.verification.to_json(),
        "export": asdict(report.export),
        "approximation": report.approximation,
        "command": report.command,
    }
    plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return plain


def finding_json(finding: Finding) -> dict[str, Any]:
    """One structure of one layer, the spectrum reduced to what lies around the cut."""
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
    """With some of many singular values, the first and the last among them: number (from 1) and value."""
    count = len(spectrum.values)
    numbers = sorted({round(1 + (count - 1) * step / _VALUES) for step in range(_VALUES + 1)})
    return {
        "scheme": spectrum.scheme,
        "cut": spectrum.cut,
        "full_rank": count,
        "values": [[number, spectrum.values[number - 1]] for number in numbers],
    }


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None
