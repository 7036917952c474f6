"""Types of layers, in reports and in plans, and of plan.json."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sepconvert.base.errors import MAX_SEED
from sepconvert.base.notes import ReasonCode
from sepconvert.base.options.values import Gate, Mode
from sepconvert.factorize.border import Border
from sepconvert.report.schema.profile import Bytes, Count, Milliseconds, Positive, Sha256, Speedup

Tolerance = Annotated[float, Meta(ge=0)]


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


class LayerExecution(Struct, frozen=True):
    """Execution of a layer by ONNX Runtime, before and after."""

    milliseconds: tuple[Milliseconds, Milliseconds]
    operators: tuple[Count, Count]
    bytes_moved: tuple[Bytes, Bytes]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]
    cause: Annotated[str | None, Meta(description="why the gain is much less than the ratio of MACs")]


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


class PlannedLayer(Struct, frozen=True):
    """The decision on one convolution. MACs are those of one sample over all its calls."""

    name: str
    kind: Annotated[str, Meta(description="class of the module, or the functional call")]
    decision: Literal["converted", "kept"]
    reason: str
    reason_code: ReasonCode
    spec: Annotated[Kernel | None, Meta(description="of the dense layer")]
    scheme: Annotated[str | None, Meta(description="null for a layer that is kept")]
    rank: Count | None
    border: Border
    bias: Annotated[bool, Meta(description="of the replacement")]
    macs: Annotated[tuple[Count, Count], Meta(description="before, after")]
    params: tuple[Count, Count]
    tolerance: Annotated[
        Tolerance | None,
        Meta(description="relative error that is permitted in the kernel of an output channel"),
    ]


class PlanDocument(Struct, frozen=True, kw_only=True):
    """The content of plan.json."""

    schema: Literal["sepconvert.plan/1"]
    mode: Mode
    gate: Gate
    tol: Tolerance | None
    seed: Annotated[int, Meta(ge=-(2**63), le=MAX_SEED)]
    model_sha256: Annotated[Sha256 | None, Meta(description="as in the report's model")]
    weights_sha256: Annotated[Sha256 | None, Meta(description="of the tensors beside the plan")]
    input_shapes: Annotated[tuple[tuple[Positive, ...], ...], Meta(description="with batch dimension")]
    layers: tuple[PlannedLayer, ...]
    merges: Annotated[
        tuple[tuple[str, str], ...],
        Meta(description="done before any layer is replaced, the second into the first"),
    ]
    checksum: Annotated[Sha256, Meta(description="of everything else, as JSON with sorted keys")]
