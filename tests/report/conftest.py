"""A report as the pipeline makes it, with numbers that are easy to recognise."""

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
import torch

from sepconvert.base.environment import Runtime
from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import Analysis, Finding, Spectrum
from sepconvert.factorize.exact.certificate import Certificate
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.files.onnx.export import ExportNote
from sepconvert.measure.execution.layers import LayerExecution, ModelExecution
from sepconvert.measure.latency import Latency, PairTiming, Speedup
from sepconvert.measure.metrics.classes import Accuracy, ChangedPrediction, ChangedPredictions
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import Discordant
from sepconvert.measure.profiling import Profile
from sepconvert.measure.statistics import Interval
from sepconvert.measure.verification.layer import LayerCheck
from sepconvert.measure.verification.outputs import OutputCheck
from sepconvert.network.trace import ConvSite, DenseConv
from sepconvert.planning.conversion import LayerApproximation, LayerReport, Verification
from sepconvert.planning.plan import kept
from sepconvert.report.document import Report, report_document

SPEC = ConvSpec(8, 16, (3, 3), padding=((1, 1), (1, 1)))
SPEEDUP = Speedup(1.5, Interval(1.4, 1.6), noise_floor=Interval(0.98, 1.02))


def site(name: str, macs: int, params: int = 100) -> ConvSite:
    dense = DenseConv(SPEC, torch.ones(SPEC.weight_shape), None, torch.ones(1, 8, 4, 4), torch.device("cpu"))
    return ConvSite(
        name, aliases=(), kind="Conv2d", owner=name, index=None, calls=1, sizes=((4, 4),), macs=macs,
        params=params, frozen=frozenset(), conv=dense, owner_inputs=None, obstacle=None,
    )  # fmt: skip


def analysis(rank: int, error: float, *, holds: bool) -> Analysis:
    finding = Finding(
        "spatial-vh", rank, full_rank=24, holds=holds, macs=1, paying_rank=2, best_error=error,
        tolerance=1e-6, spectrum=(0.5, 0.25, 1.5e-9),
    )  # fmt: skip
    return Analysis(SPEC, Border(), 1, (finding,))


def latency(milliseconds: float) -> Latency:
    quantiles = tuple(milliseconds * (0.9 + n / 100) for n in range(21))
    interval = Interval(0.9 * milliseconds, 1.1 * milliseconds)
    return Latency(milliseconds, interval, quantiles, runs=50, threads=2, batch=1)


def profile(params: int, macs: int, milliseconds: float, top1: float) -> Profile:
    return Profile(
        params, macs, onnx_bytes=5 * params, weight_bytes=4 * params, latency=latency(milliseconds),
        accuracy=Accuracy(top1, None, 2000), uncounted_ops={"aten::add": 3, "aten::mul": 1},
        metric=MetricValue("top1", "pp", True, 100 * top1, 2000),
    )  # fmt: skip


class Known(Discordant):
    """Counts with an interval that is easy to recognise."""

    def interval(self, confidence: float) -> Interval:
        return Interval(-0.05, 0.55)


STEM = LayerReport(
    kept(site("stem.conv", 12_345), Reason(ReasonCode.FULL_RANK, "no exact structure")),
    site("stem.conv", 12_345),
    analysis(24, 0.125, holds=False),
    spectrum=Spectrum("spatial-vh", (0.75, *(0.5,) * 22, 0.125), cut=6),
)
LARGE = LayerReport(
    replace(
        kept(site("large.conv", 2_000_000), Reason(ReasonCode.SEPARATES, "rank 2 of 24")),
        decision="converted", scheme="spatial-vh", rank=2, macs=(2_000_000, 500_000),
    ),
    site("large.conv", 2_000_000),
    analysis(2, 6.5e-9, holds=True),
    Certificate(4.5e-8, 4.5e-8, 1e-6, 1e-7, exact=True, bitwise=False, kept=(0.5, 0.25), dropped=(1.5e-9,)),
    LayerCheck(1e-8, 1e-7, 2.5e-8, 1e-6, 4.5e-8, 1e-6),
    latency=PairTiming(latency(0.25), latency(0.125), SPEEDUP),
    spectrum=Spectrum("spatial-vh", (0.75, 0.5, *(1e-9,) * 22), cut=2),
    execution=LayerExecution(
        (0.5, 0.25), (1, 2), (2**20, 2**19),
        (("direct, blocked layout",), ("grouped, im2col and GEMM",)), "memory is slow",
    ),
)  # fmt: skip


def stage(name: str, seconds: float, gigabytes: float = 1.0, **parts: float) -> dict[str, Any]:
    """Return a stage of a conversion on two cores."""
    return {
        "stage": name, "wall_s": seconds, "cpu_s": 2 * seconds, "peak_bytes": int(1e9 * gigabytes),
        "parts": parts,
    }  # fmt: skip


STAGES = (
    stage("start", 8.0, 0.75), stage("rest", 16.0), stage("trace", 0.25), stage("timing", 64.0, 2.5),
    stage("survey", 72.0, 3.25, stem=24.5, large=40.25), stage("export", 40.0), stage("report", 0.0),
)  # fmt: skip
EXACT = Report(
    name="net.pt",
    created=datetime(2026, 7, 17, 12, 34, 56, tzinfo=timezone.utc),
    input_shapes=((1, 8, 4, 4),),
    mode="exact",
    source={"path": "models/net.pt", "sha256": "0123456789abcdef" * 4},
    command="sepconvert models/net.pt --data 'a b'",
    runtime=Runtime(2),
    seed=0,
    dtype="float32",
    original=profile(4000, 2_012_345, 1.5, 0.9675),
    converted=profile(1000, 1_006_172, 1.0, 0.965),
    speedup=SPEEDUP,
    accuracy=MetricDelta(named("top1"), 96.75, 96.5, 0.25, Known(lost=8, won=3, n=2000), agreement=0.995),
    changed=ChangedPredictions(10, lost=6, won=1, shown=(ChangedPrediction(31, 7, 7, 2),)),
    layers=(STEM, LARGE),
    verification=Verification(
        OutputCheck(3.5e-8, 4.5e-6, "float64"), OutputCheck(6.5e-8, 5.5e-6, "float32"), None,
        {"large.conv": LARGE.check},
    ),
    export=ExportNote(dynamic_batch=True, onnx_dtype="float32", reason=None),
    execution=ModelExecution(
        converted=(1.0, 0.5), kept=(0.25, 0.25), layout=(0.0, 0.125), other=(0.125, 0.125),
        operators=(4, 6), layout_changes=(0, 1),
    ),
    data={
        "labels": {
            "classes": 10, "smallest": 0, "largest": 9, "missing": 0, "missing_shown": (),
            "missing_by_chance": 0.0, "chance": 0.125,
        },
        "calibration_accuracy": None,
        "values": {"example": (-2.0, 2.0), "scored": (-2.0, 2.0), "calibration": None},
        "repeated": 0,
    },
    stages=STAGES,
)  # fmt: skip
BARE = replace(
    EXACT,
    name="Net",
    source=None,
    command=None,
    original=replace(EXACT.original, latency=None, accuracy=None, metric=None, uncounted_ops={}),
    converted=replace(EXACT.converted, macs=0, latency=None, accuracy=None, metric=None, uncounted_ops={}),
    speedup=None,
    accuracy=None,
    changed=None,
    data=None,
    stages=(),
    layers=(STEM, replace(LARGE, latency=None, execution=None)),
    verification=replace(EXACT.verification, onnx=None, onnx_reason="no kernel"),
    execution=None,
)


# As of a machine that these tests may not run on.
MACHINE = {
    "cpu": "AMD EPYC", "instruction_sets": ["AVX2", "FMA"], "cores": 8, "clock_mhz": 2445,
    "load_average": 0.5, "onnxruntime": "1.32.0",
}  # fmt: skip


def documented(report: Report) -> dict[str, Any]:
    document = report_document(report)
    return {**document, "environment": document["environment"] | MACHINE}


def point(macs: int, ratio: float, converted: int, drop: dict[str, Any] | None) -> dict[str, Any]:
    top1 = drop and {**{key: drop[key] for key in ("value", "ci95", "n")}, "mcnemar_p": 0.125}
    return {
        "macs": macs, "macs_ratio": ratio, "converted": converted, "cost": macs,
        "expected_divergence": 0.5, "lower_bound": 0.25, "predicted_speedup": None,
        "heldout": {
            "divergence": 0.0625 * converted, "agreement": 0.9, "accuracy": None, "label_loss": None,
        },
        "batchnorm_reestimated": False, "drop": drop, "accuracy_drop_pp": top1, "latency_speedup": None,
        "delivered": converted == 1, "ranks": {},
    }  # fmt: skip


def step(kind: str, name: str, divergence: float, agreement: float, accuracy: float | None, kept: bool):
    return {
        "name": name, "kind": kind, "divergence": divergence, "agreement": agreement,
        "accuracy": accuracy, "label_loss": None, "kept": kept,
    }  # fmt: skip


@pytest.fixture
def report() -> Report:
    """The value that `document` is made of."""
    return EXACT


@pytest.fixture
def document() -> dict[str, Any]:
    """Two layers, one converted; 2 × fewer MACs, 4 × fewer parameters, 1.5 × as fast, 0.25 pp worse."""
    return documented(EXACT)


@pytest.fixture
def bare() -> dict[str, Any]:
    """The same without latency, accuracy, source and ONNX Runtime, and with no MACs left."""
    return documented(BARE)


@pytest.fixture
def approximate() -> dict[str, Any]:
    """The same as an approximate conversion, on a curve of two plans."""
    errors = LayerApproximation(
        weight_error=1.25, output_error=0.375, output_error_of_weight_fit=0.875, output_error_alone=0.5,
        sensitivity=2.5, sweeps=7,
    )  # fmt: skip
    large = replace(
        LARGE,
        plan=replace(
            LARGE.plan,
            reason=Reason(ReasonCode.FITTED, "rank 1 of 9"),
            scheme="depthwise-pointwise",
            rank=1,
        ),
        certificate=None,
        check=None,
        approximation=errors,
    )
    drop = {"value": 0.25, "unit": "pp", "ci95": [-0.05, 0.55], "n": 2000}
    approximation = {
        "metric": "data",
        "divergence": ["kl"],
        "no_gradients": None,
        "calibration": {"origin": "`calib`", "images": 768, "heldout": 256, "patches_per_unknown": 12,
                        "seen_twice": None},
        "budget": {
            "rank": None, "target_macs": None, "target_params": None, "min_speedup": None, "max_drop": 1.0,
            "confidence": None,
        },
        "unit": "macs",
        "curve": [point(2_012_345, 1.0, 0, None), point(1_006_172, 2.0, 1, drop)],
        "plans_measured_on_data": 1,
        "modelled": [],
        "choice": {"plans": 1, "images": 2000, "confidence": None, "bound": 0.75, "rest": None},
        "steps": [
            step("weights", "fit the weights", 9.5, 0.15, 0.125, kept=False),
            step("data", "follow the drift, correct the bias", 0.0625, 0.9, 0.875, kept=True),
            step("batchnorm", "re-estimate BatchNorm", 0.75, 0.5, None, kept=False),
        ],
        "finetune": None,
    }  # fmt: skip
    verification = replace(EXACT.verification, torch=OutputCheck(3.5e-8, None, "float64"), layers={})
    return documented(
        replace(
            EXACT, mode="approx", layers=(STEM, large), verification=verification,
            approximation=approximation,
        )
    )  # fmt: skip


RESTORED = {
    "name": "psnr", "unit": "dB", "higher_is_better": True, "original": 28.2, "converted": 28.102,
    "drop": 0.098, "ci95": [0.0901, 0.106], "n": 300,
}  # fmt: skip


@pytest.fixture
def restored(approximate) -> dict[str, Any]:
    """The same as of a model that restores pictures: 0.098 dB of PSNR are lost, of at most 0.1."""
    drop = {"value": 0.098, "unit": "dB", "ci95": [0.0901, 0.106], "n": 300}
    approximate["delta"] |= {"metric": {**RESTORED}, "accuracy_drop_pp": None, "agreement": None}
    for side in ("original", "converted"):
        value = {key: RESTORED[key] for key in ("name", "unit", "higher_is_better", "n")}
        approximate[side] |= {"accuracy": None, "metric": value | {"value": RESTORED[side]}}
    approximate["data"]["labels"] = approximate["changed_predictions"] = None
    approximation = approximate["approximation"]
    approximation["budget"]["max_drop"] = 0.1
    approximation["curve"][1] |= {"drop": drop, "accuracy_drop_pp": None}
    approximation["choice"] |= {"images": 300, "bound": 0.1043}
    approximation["steps"] = []
    return approximate
