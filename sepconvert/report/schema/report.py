"""Types of report.json.

Pairs are (before, after): of the original and of the converted model or layer.
"""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sepconvert.base.notes import ReasonCode
from sepconvert.base.options.values import Divergence as DivergenceKind
from sepconvert.report.schema.card import Card
from sepconvert.report.schema.execution import LayerExecution, ModelExecution, Stages
from sepconvert.report.schema.forms import Forms
from sepconvert.report.schema.profile import (
    Accuracy,
    AccuracyDrop,
    Count,
    Drop,
    Environment,
    MetricDrop,
    Model,
    Positive,
    Profile,
    Share,
    Speedup,
)

# Layers --------------------------------------------------------------------------------------------


class Kernel(Struct, frozen=True):
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


class Factor(Kernel, frozen=True, kw_only=True):
    """One of the convolutions in a row that replace a layer.

    A depthwise factor of rank R is one convolution of R filters a channel here, and may be laid out as R.
    """

    macs: Annotated[Count, Meta(description="of one sample, over all calls of the layer")]


class Approximation(Struct, frozen=True):
    """Errors of an approximated layer, relative, as the calibration images showed them."""

    weight_error: float
    output_error: Annotated[float, Meta(description="as delivered")]
    output_error_of_weight_fit: Annotated[float, Meta(description="if it were fitted to the weights")]
    output_error_alone: Annotated[float, Meta(description="if no other layer were replaced")]
    sensitivity: Annotated[
        float | None, Meta(description="divergence of the model's output over the squared output error")
    ]
    sweeps: Count


class Spectrum(Struct, frozen=True):
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


class Certificate(Struct, frozen=True):
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


class Check(Struct, frozen=True):
    """The dense layer against its factors, on the input that it had in the model."""

    max_abs_diff_float64: float
    max_abs_diff: float
    output_error: float
    bound_float64: float
    kernel_error: float
    kernel_tolerance: float
    holds: bool


class StructureFinding(Struct, frozen=True):
    """Distance of a kernel from one exact structure."""

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


class Layer(Struct, frozen=True, kw_only=True):
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
    factors: Annotated[
        tuple[Factor, ...] | UnsetType,
        Meta(description="in the order of execution; version 0.1.0 lacks them"),
    ] = UNSET
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


class Overlap(Struct, frozen=True):
    """Scored images that are also among those to fit to, or to train on."""

    images: Annotated[Positive, Meta(description="to fit to or to train on")]
    compared: Annotated[Positive, Meta(description="of them, with the scored images")]
    scored: Annotated[Count, Meta(description="scored images that are among those compared")]


class SeenTwice(Struct, frozen=True):
    """Scored images that are also among the calibration images, or the training images."""

    calib: Overlap
    train: Annotated[Overlap | None, Meta(description="null without fine-tuning")]


class CalibrationSet(Struct, frozen=True):
    """Images that factors were fitted to, and that plans were compared on."""

    origin: str
    images: Count
    heldout: Count
    patches_per_unknown: float
    seen_twice: Annotated[SeenTwice | None, Meta(description="null if no data are scored")]


class Budget(Struct, frozen=True):
    """Demands on the conversion; null where nothing was demanded."""

    rank: int | None
    target_macs: float | None
    target_params: float | None
    min_speedup: float | None
    max_drop: float | None
    confidence: float | None


class Divergence(Struct, frozen=True):
    """A model against the original on the held-out images."""

    divergence: float
    agreement: Share | None
    accuracy: Share | None
    label_loss: float | None


class CurvePoint(Struct, frozen=True, kw_only=True):
    """One plan on the trade-off curve; null for what was not measured."""

    macs: Count
    macs_ratio: float | None
    converted: Count
    cost: Annotated[float, Meta(description="in the unit of the approximation")]
    expected_divergence: float
    lower_bound: float
    heldout: Divergence | None
    batchnorm_reestimated: bool
    drop: Drop | UnsetType | None = UNSET
    accuracy_drop_pp: Annotated[AccuracyDrop | None, Meta(description="the same, of top-1 accuracy alone")]
    predicted_speedup: float | None
    latency_speedup: Speedup | None
    delivered: bool
    ranks: Annotated[dict[str, tuple[str, int]], Meta(description="scheme and rank by layer")]


class Step(Divergence, frozen=True):
    """The model after one step of the fit, on the held-out images."""

    name: str
    kind: Literal["weights", "data", "batchnorm", "reconstruction", "finetune", "int8"]
    kept: bool


class Epoch(Struct, frozen=True):
    """The tuned model after one epoch; epoch 0 is the start."""

    epoch: Count
    step: Count
    loss: float | None
    weights: Literal["start", "trained", "average"]
    heldout_loss: float
    divergence: float
    accuracy: Share | None
    seconds: float


class Attempt(Struct, frozen=True):
    """Drops of one plan before and after it was tuned, in the unit of the metric."""

    drop_before_pp: float
    drop_pp: float
    delivered: bool


class Finetune(Struct, frozen=True):
    """History and outcome of fine-tuning, or of reconstruction."""

    history: tuple[Epoch, ...]
    delivered: Epoch
    precision: str
    stopped: Annotated[str | None, Meta(description="why it ended early")]
    attempts: tuple[Attempt, ...]


class Merge(Struct, frozen=True):
    """Decision on a pair of convolutions with nothing but linear maps between them."""

    first: str
    second: str
    decision: Literal["merged", "kept"]
    reason: str
    reason_code: ReasonCode
    spec: Annotated[Kernel | None, Meta(description="of the dense convolution in place of both")]
    macs: tuple[Count, Count] | None
    speedup: Speedup | None


class Choice(Struct, frozen=True):
    """Drop that the delivered plan may have on unseen images, given how it was chosen."""

    plans: Annotated[Count, Meta(description="plans whose drop was measured")]
    images: Annotated[Count, Meta(description="images that the plan was chosen by")]
    confidence: Annotated[float | None, Meta(description="with which the drop was proven, if it was")]
    bound: Annotated[
        float,
        Meta(
            description="drop on unseen images, in the unit of the metric, exceeded with probability 1 - "
            "confidence, or 5 %"
        ),
    ]
    rest: Annotated[Drop | None, Meta(description="drop on images that had no part in the choice")]


class ModelApproximation(Struct, frozen=True):
    """Search and fit of an approximate conversion."""

    metric: Literal["weights", "data"]
    calibration: CalibrationSet | None
    divergence: Annotated[tuple[DivergenceKind, ...], Meta(description="what each output was compared by")]
    no_gradients: Annotated[str | None, Meta(description="why an ONNX file was not differentiated")]
    budget: Budget
    unit: Annotated[str, Meta(description="of costs: macs, params or milliseconds")]
    curve: tuple[CurvePoint, ...]
    plans_measured_on_data: Count
    modelled: Annotated[
        tuple[str, ...], Meta(description="layers whose forms have modelled times; no time was left")
    ]
    choice: Annotated[Choice | None, Meta(description="null without evaluation data")]
    steps: tuple[Step, ...]
    finetune: Finetune | None
    reconstruction: Finetune | UnsetType | None = UNSET
    merges: tuple[Merge, ...] | UnsetType = UNSET
    shortfall: Annotated[str | UnsetType, Meta(description="why the plan is only the nearest")] = UNSET


# Documents -----------------------------------------------------------------------------------------


class Delta(Struct, frozen=True, kw_only=True):
    """The converted model against the original; ratios are original over converted."""

    params_ratio: float | None
    macs_ratio: float | None
    latency_speedup: Speedup | None
    metric: MetricDrop | UnsetType | None = UNSET
    accuracy_drop_pp: Annotated[AccuracyDrop | None, Meta(description="of top-1 accuracy alone")]
    agreement: Annotated[Share | None, Meta(description="share of equal predictions, of classifiers")]


class Labels(Struct, frozen=True):
    """Labels of the scored images."""

    classes: Annotated[Positive, Meta(description="of the model")]
    smallest: Count
    largest: Count
    missing: Annotated[Count, Meta(description="classes that no label names")]
    missing_shown: Annotated[tuple[Count, ...], Meta(description="the first of them")]
    missing_by_chance: Annotated[
        float, Meta(description="number to expect of as many labels if all classes are equally frequent")
    ]
    chance: Annotated[
        Share, Meta(description="accuracy without looking: of the commonest label, at least of guessing")
    ]


class Values(Struct, frozen=True):
    """Smallest and largest value of the inputs; null where there are none."""

    example: tuple[float, float] | None
    scored: tuple[float, float] | None
    calibration: tuple[float, float] | None


class Data(Struct, frozen=True):
    """Facts that show whether results on the data mean anything."""

    labels: Labels | None
    calibration_accuracy: Annotated[
        Accuracy | None, Meta(description="of the original, on the labels of held-out calibration images")
    ]
    values: Values
    repeated: Annotated[Count, Meta(description="scored images that are equal to an earlier one")]


class ChangedPrediction(Struct, frozen=True):
    """A sample that the two models classify differently."""

    index: Count
    label: int
    original: int
    converted: int


class ChangedPredictions(Struct, frozen=True):
    """Number of changed predictions, and some of them."""

    count: Count
    lost: Annotated[Count, Meta(description="correct before, and wrong now")]
    won: Annotated[Count, Meta(description="wrong before, and correct now")]
    shown: tuple[ChangedPrediction, ...]


class Verification(Struct, frozen=True):
    """Largest differences of outputs, and their tolerances; null for what was not compared."""

    torch_max_abs_diff: float
    torch_tolerance: Annotated[float | None, Meta(description="null for approximate conversions")]
    torch_dtype: str
    onnx_max_abs_diff: float | None
    onnx_tolerance: float | None
    onnx_dtype: str | None
    onnx_reason: Annotated[str | None, Meta(description="why ONNX Runtime was not compared")]
    original_onnx_max_abs_diff: Annotated[float | None, Meta(description="of original.onnx from torch's")]
    original_onnx_tolerance: Annotated[
        float | None, Meta(description="what the runtime's arithmetic explains; more is a warning")
    ]
    passed: bool
    worst_layer: str | None


class Export(Struct, frozen=True):
    """Export of the models to ONNX."""

    dynamic_batch: bool
    onnx_dtype: str
    reason: Annotated[str | None, Meta(description="why the batch dimension is fixed")]
    missing: Annotated[dict[str, str], Meta(description="files that could not be written, and why")]


class ReportDocument(Struct, frozen=True, kw_only=True):
    """The content of report.json."""

    schema: Literal["sepconvert.report/1"]
    created: Annotated[datetime, Meta(tz=True, description="when the conversion ended")] | UnsetType = UNSET
    name: Annotated[str | UnsetType, Meta(description="of the model: of its file, or of its class")] = UNSET
    input_shapes: Annotated[
        tuple[tuple[Count, ...], ...] | UnsetType,
        Meta(description="that the models were run, verified and timed on, with the batch dimension"),
    ] = UNSET
    mode: Literal["exact", "approx", "auto"]
    model: Model | None
    environment: Environment
    seed: int
    dtype: str
    original: Profile
    converted: Profile
    delta: Delta
    data: Annotated[Data | None, Meta(description="null without data")]
    changed_predictions: ChangedPredictions | None
    execution: ModelExecution | None
    layers: Annotated[tuple[Layer, ...], Meta(description="every convolution, in the order of execution")]
    verification: Verification
    export: Export
    approximation: ModelApproximation | None
    command: str | None
    stages: Stages = UNSET
    model_card: Annotated[Card | UnsetType, Meta(description="0.1.0 lacks it")] = UNSET
    forms: Annotated[
        Forms | UnsetType,
        Meta(
            description="where models are deployed in int8; original, converted and delta are then those of "
            "the int8 files, but for the metric of the original, which is that in floating point"
        ),
    ] = UNSET
    int8_gain: Annotated[
        Speedup | UnsetType,
        Meta(description="of the original in int8 over floating point, where int8=auto decided by it"),
    ] = UNSET
