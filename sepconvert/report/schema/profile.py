"""Types of measurements, and of the document that `sepconvert profile` writes."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Milliseconds = Annotated[float, Meta(ge=0)]
Bytes = Annotated[int, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Interval = Annotated[tuple[float, float], Meta(description="95 % interval: lower and upper bound")]


class Latency(Struct, frozen=True):
    """Time of one run of a model, in milliseconds for the whole batch."""

    median: Milliseconds
    ci95: Interval
    p90: Milliseconds
    quantiles: Annotated[
        tuple[float, ...],
        Meta(
            min_length=21, max_length=21, description="from the fastest run to the slowest, in steps of 5 %"
        ),
    ]
    runs: Positive
    threads: Positive
    batch: Positive


class GridLatency(Latency, frozen=True):
    """Latency with one number of threads and one batch size."""

    per_second: Annotated[float, Meta(ge=0, description="samples per second")]


class Speedup(Struct, frozen=True):
    """Ratio of latencies, original over converted: above 1 the converted model is faster."""

    median: float
    ci95: Interval
    significant: Annotated[bool, Meta(description="whether noise cannot explain the difference")]
    noise_floor: Annotated[Interval, Meta(description="95 % interval of the original against itself")]


class Accuracy(Struct, frozen=True):
    """Shares of correct predictions among `n` samples."""

    top1: Share
    top5: Annotated[Share | None, Meta(description="null for five classes or fewer")]
    n: Positive


class AccuracyDrop(Struct, frozen=True):
    """Top-1 accuracy lost, in percentage points; negative if accuracy was gained."""

    value: float
    ci95: Interval
    mcnemar_p: Annotated[Share, Meta(description="p-value of McNemar's test")]
    n: Annotated[Positive, Meta(description="images that it was measured on")]


class MetricValue(Struct, frozen=True):
    """Value of a metric on `n` samples, in its unit: for "pp", which is that of differences, in percent."""

    name: Annotated[str, Meta(description="as --metric calls it")]
    unit: Annotated[str, Meta(description='such as "pp" or "dB"; "" for numbers without one')]
    higher_is_better: bool
    value: float
    n: Positive


class Drop(Struct, frozen=True):
    """Loss of a metric, in its unit; negative if it gained."""

    value: float
    unit: Annotated[str, Meta(description="of the metric")]
    ci95: Interval
    n: Annotated[Positive, Meta(description="samples that it was measured on")]


class MetricDrop(Struct, frozen=True):
    """Value of a metric before and after, and what it lost, all in its unit (see `MetricValue`)."""

    name: str
    unit: str
    higher_is_better: bool
    original: float
    converted: float
    drop: Annotated[float, Meta(description="lost; negative if the metric became better")]
    ci95: Annotated[Interval, Meta(description="of the drop")]
    n: Annotated[Positive, Meta(description="samples that it was measured on")]


class Startup(Struct, frozen=True):
    """Medians over new sessions in one process."""

    session_ms: Milliseconds
    first_run_ms: Milliseconds
    sessions: Positive


class Operator(Struct, frozen=True):
    """One operator as ONNX Runtime runs it."""

    name: str
    layer: Annotated[str | None, Meta(description="the module that it belongs to, if known")]
    operator: Annotated[str, Meta(description="type of the operator, such as Conv")]
    kernel: Annotated[str | None, Meta(description="code path of a convolution")]
    milliseconds: Milliseconds
    bytes_moved: Bytes


class Anatomy(Struct, frozen=True):
    """Details of how an ONNX file runs."""

    peak_activation_bytes: Annotated[Bytes | None, Meta(description="null if shapes are not known")]
    startup: Startup
    latencies_ms: tuple[GridLatency, ...]
    operators: Annotated[tuple[Operator, ...], Meta(description="in the order of execution")]


class Profile(Struct, frozen=True, kw_only=True):
    """Costs of one sample, latency and accuracy of one model."""

    params: Count
    macs: Annotated[Count, Meta(description="fvcore's count: a fused multiply-add is 1")]
    flops: Annotated[Count, Meta(description="2 × macs")]
    onnx_bytes: Bytes | None
    weight_bytes: Annotated[Bytes | None, Meta(description="of the weights in the ONNX file")]
    latency_ms: Latency | None
    accuracy: Annotated[Accuracy | None, Meta(description="of classifiers")]
    metric: Annotated[
        MetricValue | UnsetType | None, Meta(description="null without data; version 0.1.0 lacks it")
    ] = UNSET
    uncounted_ops: Annotated[dict[str, Positive], Meta(description="operators that fvcore does not count")]
    anatomy: Anatomy | UnsetType = UNSET


class Environment(Struct, frozen=True, kw_only=True):
    """Versions, machine, and settings of ONNX Runtime; files of version 0.1.0 lack some of them."""

    python: str
    platform: str
    cpu: Annotated[str, Meta(description="name of the processor")]
    instruction_sets: Annotated[
        tuple[str, ...] | UnsetType, Meta(description="those that convolutions gain from, such as AVX2")
    ] = UNSET
    cores: Positive
    clock_mhz: Annotated[
        Positive | UnsetType | None, Meta(description="mean of the cores at the time; null if unknown")
    ] = UNSET
    load_average: Annotated[
        Annotated[float, Meta(ge=0)] | UnsetType | None,
        Meta(description="mean number of busy processes in the minute before; null if unknown"),
    ] = UNSET
    threads: Annotated[Positive, Meta(description="within one operator")]
    spinning: Annotated[
        Literal["off", "on"] | UnsetType,
        Meta(description="whether worker threads of the provider cpu keep cores busy while they wait"),
    ] = UNSET
    execution_mode: Annotated[
        Literal["sequential"] | UnsetType, Meta(description="one operator after the other")
    ] = UNSET
    inter_op_threads: Positive | UnsetType = UNSET
    graph_optimization: Literal["all", "extended", "basic", "none"]
    provider: Annotated[str, Meta(description="execution provider, in lower case")]
    provider_options: Annotated[
        dict[str, str] | UnsetType, Meta(description="its number of threads included, if it takes one")
    ] = UNSET
    provider_takes_threads: Annotated[
        bool | UnsetType, Meta(description="if not, `threads` run what the provider leaves to the CPU")
    ] = UNSET
    onnxruntime: str
    sepconvert: str
    torch: str
    onnx: str
    onnxscript: str
    fvcore: str
    numpy: str


class Model(Struct, frozen=True):
    """The file that a model was read from, or the name of one that a library or a factory built."""

    path: str
    sha256: Annotated[
        Sha256 | None,
        Meta(description="of the file; for a name, of the bytes of the tensors in the model's state_dict"),
    ]
    weights: Annotated[
        str | UnsetType,
        Meta(description="where a library built the model: the name of its weights, or random"),
    ] = UNSET


class ProfileDocument(Profile, frozen=True, kw_only=True):
    """The document that `sepconvert profile` prints and writes."""

    schema: Literal["sepconvert.profile/1"]
    model: Model
    environment: Environment
