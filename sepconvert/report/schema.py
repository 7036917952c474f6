"""Types of the JSON documents: report.json, plan.json, and the profiles of `sepconvert profile`.

The JSON Schemas in docs/schemas are made from them:

    python -m sepconvert.report.schema docs/schemas

Readers may turn a document into these types, which checks it: `msgspec.convert(document, ReportDocument)`, or
`msgspec.json.decode(Path("report.json").read_bytes(), type=ReportDocument)`. Keys that a type does not have are
allowed, as later versions may add some.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from sepconvert.base.notes import ReasonCode
from sepconvert.planning.plan import ConversionPlan

# What comes in pairs is (before, after): of the original and of the converted model or layer.

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Milliseconds = Annotated[float, Meta(ge=0)]
Bytes = Annotated[int, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Interval = Annotated[tuple[float, float], Meta(description="95 % interval: lower and upper bound")]


class Document(Struct, frozen=True):
    """An object of a document."""


# Measurements --------------------------------------------------------------------------------------


class Latency(Document):
    """Time of one run of a model, in milliseconds for the whole batch."""

    median: Milliseconds
    ci95: Interval
    p90: Milliseconds
    quantiles: Annotated[
        tuple[float, ...],
        Meta(min_length=21, max_length=21, description="from the fastest run to the slowest, in steps of 5 %"),
    ]
    runs: Positive
    threads: Positive
    batch: Positive


class GridLatency(Latency):
    """Latency with one number of threads and one batch size."""

    per_second: Annotated[float, Meta(ge=0, description="samples per second")]


class Speedup(Document):
    """Ratio of latencies, original over converted: above 1 the converted model is faster."""

    median: float
    ci95: Interval
    significant: Annotated[bool, Meta(description="whether noise cannot explain the difference")]
    noise_floor: Annotated[Interval, Meta(description="95 % interval of the original against itself")]


class Accuracy(Document):
    """Shares of correct predictions among `n` samples."""

    top1: Share
    top5: Annotated[Share | None, Meta(description="null for five classes or fewer")]
    n: Positive


class AccuracyDrop(Document):
    """Top-1 accuracy lost, in percentage points; negative if accuracy was gained."""

    value: float
    ci95: Interval
    mcnemar_p: Annotated[Share, Meta(description="p-value of McNemar's test")]


class Startup(Document):
    """Medians over new sessions in one process."""

    session_ms: Milliseconds
    first_run_ms: Milliseconds
    sessions: Positive


class Operator(Document):
    """One operator as ONNX Runtime runs it."""

    name: str
    layer: Annotated[str | None, Meta(description="the module that it belongs to, if known")]
    operator: Annotated[str, Meta(description="type of the operator, such as Conv")]
    kernel: Annotated[str | None, Meta(description="code path of a convolution")]
    milliseconds: Milliseconds
    bytes_moved: Bytes


class Anatomy(Document):
    """How an ONNX file runs, in detail."""

    peak_activation_bytes: Annotated[Bytes | None, Meta(description="null if shapes are not known")]
    startup: Startup
    latencies_ms: tuple[GridLatency, ...]
    operators: Annotated[tuple[Operator, ...], Meta(description="in the order of execution")]


class Profile(Document, kw_only=True):
    """Costs of one sample, latency and accuracy of one model."""

    params: Count
    macs: Annotated[Count, Meta(description="fvcore's count: a fused multiply-add is 1")]
    flops: Annotated[Count, Meta(description="2 × macs")]
    onnx_bytes: Bytes | None
    weight_bytes: Annotated[Bytes | None, Meta(description="of the weights in the ONNX file")]
    latency_ms: Latency | None
    accuracy: Accuracy | None
    uncounted_ops: Annotated[dict[str, Positive], Meta(description="operators that fvcore does not count")]
    anatomy: Anatomy | UnsetType = UNSET


Environment = Annotated[
    dict[str, str | int],
    Meta(description="versions, processor, and the settings of ONNX Runtime: threads, provider, …"),
]


class Model(Document):
    """The file that a model was read from."""

    path: str
    sha256: Sha256 | None


class ProfileDocument(Profile, kw_only=True):
    """What `sepconvert profile` prints and writes."""

    schema: Literal["sepconvert.profile/1"]
    model: Model
    environment: Environment


# Layers --------------------------------------------------------------------------------------------


class Kernel(Document):
    """Geometry of a convolution; axes are (vertical, horizontal)."""

    in_channels: Positive
    out_channels: Positive
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Annotated[
        tuple[tuple[int, int], tuple[int, int]],
        Meta(description="(before, after) for each axis; negative numbers crop"),
    ]
    dilation: tuple[int, int]
    groups: Positive
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    bias: bool


class Approximation(Document):
    """Errors of an approximated layer, relative, as the calibration images showed them."""

    weight_error: float
    output_error: Annotated[float, Meta(description="as delivered")]
    output_error_of_weight_fit: Annotated[float, Meta(description="if it were fitted to the weights")]
    output_error_alone: Annotated[float, Meta(description="if no other layer were replaced")]
    sensitivity: Annotated[
        float | None, Meta(description="divergence of the model's output over the squared output error")
    ]
    sweeps: Count


class LayerExecution(Document):
    """How ONNX Runtime runs a layer, before and after."""

    milliseconds: tuple[Milliseconds, Milliseconds]
    operators: tuple[Count, Count]
    bytes_moved: tuple[Bytes, Bytes]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]
    cause: Annotated[str | None, Meta(description="why the gain is much less than the ratio of MACs")]


class Spectrum(Document):
    """Singular values of a kernel in one structure, normalised to a root sum of squares of 1."""

    scheme: str
    cut: Annotated[
        Count | None,
        Meta(description="how many are kept; for a layer that is kept, how many could be at a lower cost"),
    ]
    full_rank: Positive
    values: Annotated[
        tuple[tuple[Positive, float], ...], Meta(description="number, from 1, and value; some of many")
    ]


class Certificate(Document):
    """Proof that factors reproduce a kernel W up to a difference ΔW."""

    relative_error: Annotated[float, Meta(description="‖ΔW‖ / ‖W‖")]
    worst_channel_error: Annotated[float, Meta(description="largest ‖ΔW‖ / ‖W‖ of an output channel")]
    channel_tolerance: Annotated[float, Meta(description="what rounding explains")]
    operator_norm: Annotated[float, Meta(description="bound on ‖Δy‖ / ‖x‖ for every input x")]
    exact: bool
    bitwise: Annotated[bool, Meta(description="ΔW = 0")]
    kept: tuple[float, ...]
    dropped: tuple[float, ...]
    holds: bool


class Check(Document):
    """The dense layer against its factors, on the input that it had in the model."""

    max_abs_diff_float64: float
    max_abs_diff: float
    output_error: float
    bound_float64: float
    kernel_error: float
    kernel_tolerance: float
    holds: bool


class StructureFinding(Document):
    """How near a kernel is to one exact structure."""

    scheme: str
    rank: Count
    full_rank: Positive
    holds: bool
    macs: Count
    paying_rank: Annotated[int, Meta(description="largest rank with fewer MACs than the dense layer")]
    best_relative_error: Annotated[float, Meta(description="of the kernel, at max(paying_rank, 1)")]
    tolerance: float
    singular_values_kept: tuple[float, ...]
    singular_values_dropped: tuple[float, ...]


class Layer(Document):
    """One convolution: what was decided, why, and what it costs before and after."""

    name: str
    aliases: Annotated[tuple[str, ...], Meta(description="further paths of a shared module")]
    kind: Annotated[str, Meta(description="class of the module, or the functional call")]
    kernel: Kernel | None
    calls: Count
    decision: Literal["converted", "kept"]
    reason: str
    reason_code: ReasonCode
    scheme: str | None
    rank: Count | None
    exact: bool
    macs: Annotated[tuple[Count, Count], Meta(description="of one sample, over all calls")]
    params: tuple[Count, Count]
    weight_error: float | None
    output_error: float | None
    approximation: Approximation | None
    latency_ms: Annotated[tuple[float, float] | None, Meta(description="of the layer timed alone")]
    latency_speedup: Speedup | None
    execution: LayerExecution | None
    spectrum: Spectrum | None
    certificate: Certificate | None
    check: Check | None
    structures: tuple[StructureFinding, ...]


# Approximation -------------------------------------------------------------------------------------


class CalibrationSet(Document):
    """Images that factors were fitted to, and that plans were compared on."""

    origin: str
    images: Count
    heldout: Count
    patches_per_unknown: float


class Budget(Document):
    """What was demanded; null where nothing was."""

    rank: int | None
    target_macs: float | None
    target_params: float | None
    min_speedup: float | None
    max_drop: float | None


class Divergence(Document):
    """A model against the original on the held-out images."""

    divergence: float
    agreement: Share | None
    accuracy: Share | None
    label_loss: float | None


class CurvePoint(Document):
    """One plan on the trade-off curve; null for what was not measured."""

    macs: Count
    macs_ratio: float | None
    converted: Count
    cost: Annotated[float, Meta(description="in the unit of the approximation")]
    expected_divergence: float
    lower_bound: float
    heldout: Divergence | None
    batchnorm_reestimated: bool
    accuracy_drop_pp: AccuracyDrop | None
    predicted_speedup: float | None
    latency_speedup: Speedup | None
    delivered: bool
    ranks: Annotated[dict[str, tuple[str, int]], Meta(description="scheme and rank by layer")]


class Step(Divergence):
    """The model after one step of the fit, on the held-out images."""

    name: str
    kind: Literal["weights", "data", "batchnorm", "finetune"]
    kept: bool


class Epoch(Document):
    """The fine-tuned model after one epoch; epoch 0 is the start."""

    epoch: Count
    step: Count
    loss: float | None
    weights: Literal["start", "trained", "average"]
    heldout_loss: float
    divergence: float
    accuracy: Share | None
    seconds: float


class Attempt(Document):
    """Drops of one plan before and after fine-tuning, in percentage points."""

    drop_before_pp: float
    drop_pp: float
    delivered: bool


class Finetune(Document):
    """How fine-tuning went."""

    history: tuple[Epoch, ...]
    delivered: Epoch
    precision: str
    stopped: Annotated[str | None, Meta(description="why it ended early")]
    attempts: tuple[Attempt, ...]


class Merge(Document):
    """What became of a pair of convolutions with nothing but linear maps between them."""

    first: str
    second: str
    decision: Literal["merged", "kept"]
    reason: str
    reason_code: ReasonCode
    spec: Annotated[Kernel | None, Meta(description="of the dense convolution in place of both")]
    macs: tuple[Count, Count] | None
    speedup: Speedup | None


class ModelApproximation(Document):
    """How an approximate conversion came about."""

    metric: Literal["weights", "data"]
    calibration: CalibrationSet | None
    budget: Budget
    unit: Annotated[str, Meta(description="of costs: macs, params or milliseconds")]
    curve: tuple[CurvePoint, ...]
    plans_measured_on_data: Count
    steps: tuple[Step, ...]
    finetune: Finetune | None
    merges: tuple[Merge, ...] | UnsetType = UNSET


# Documents -----------------------------------------------------------------------------------------


class Delta(Document):
    """The converted model against the original; ratios are original over converted."""

    params_ratio: float | None
    macs_ratio: float | None
    latency_speedup: Speedup | None
    accuracy_drop_pp: AccuracyDrop | None
    agreement: Annotated[Share | None, Meta(description="share of equal predictions")]


class ChangedPrediction(Document):
    """A sample that the two models classify differently."""

    index: Count
    label: int
    original: int
    converted: int


class ChangedPredictions(Document):
    """How many predictions changed, and some of them."""

    count: Count
    lost: Annotated[Count, Meta(description="correct before, and wrong now")]
    won: Annotated[Count, Meta(description="wrong before, and correct now")]
    shown: tuple[ChangedPrediction, ...]


class ModelExecution(Document):
    """Where the profiler's milliseconds go, before and after."""

    converted: tuple[Milliseconds, Milliseconds]
    kept: tuple[Milliseconds, Milliseconds]
    layout: Annotated[tuple[float, float], Meta(description="copies to other memory layouts")]
    other: tuple[Milliseconds, Milliseconds]
    operators: tuple[Count, Count]
    layout_changes: tuple[Count, Count]


class Verification(Document):
    """Largest differences of outputs, and their tolerances; null for what was not compared."""

    torch_max_abs_diff: float
    torch_tolerance: Annotated[float | None, Meta(description="null for approximate conversions")]
    torch_dtype: str
    onnx_max_abs_diff: float | None
    onnx_tolerance: float | None
    onnx_dtype: str | None
    onnx_reason: Annotated[str | None, Meta(description="why ONNX Runtime was not compared")]
    passed: bool
    worst_layer: str | None


class Export(Document):
    """How the models were exported."""

    dynamic_batch: bool
    onnx_dtype: str
    reason: Annotated[str | None, Meta(description="why the batch dimension is fixed")]
    missing: Annotated[dict[str, str], Meta(description="files that could not be written, and why")]


class ReportDocument(Document):
    """The content of report.json."""

    schema: Literal["sepconvert.report/1"]
    mode: Literal["exact", "approx", "auto"]
    model: Model | None
    environment: Environment
    seed: int
    dtype: str
    original: Profile
    converted: Profile
    delta: Delta
    changed_predictions: ChangedPredictions | None
    execution: ModelExecution | None
    layers: Annotated[tuple[Layer, ...], Meta(description="every convolution, in the order of execution")]
    verification: Verification
    export: Export
    approximation: ModelApproximation | None
    command: str | None


@dataclass(frozen=True, kw_only=True)
class PlanDocument(ConversionPlan):
    """The content of plan.json."""

    schema: Literal["sepconvert.plan/1"]
    checksum: Sha256


DOCUMENTS: Mapping[str, type] = {"report": ReportDocument, "plan": PlanDocument, "profile": ProfileDocument}


def json_schema(kind: type) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of one of `DOCUMENTS`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}


def write_schemas(folder: Path) -> None:
    """Write the JSON Schema of each document to `<name>.schema.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in DOCUMENTS.items():
        text = json.dumps(json_schema(kind), indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
