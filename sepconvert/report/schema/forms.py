"""Types of the four forms of a conversion to int8."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sepconvert.report.schema.profile import AccuracyDrop, MetricDrop, Positive, Profile, Share, Speedup


class FormDelta(Struct, frozen=True, kw_only=True):
    """A form against the original in floating point; ratios are original over form."""

    latency_speedup: Annotated[Speedup | None, Meta(description="over the original in floating point")]
    latency_speedup_over_int8: Annotated[
        Speedup | None, Meta(description="over the original in int8, of the converted model's forms")
    ]
    metric: MetricDrop | UnsetType | None = UNSET
    accuracy_drop_pp: AccuracyDrop | None
    agreement: Share | None


class Form(Profile, frozen=True, kw_only=True):
    """Profile of a form, and its differences from the original in floating point."""

    delta: FormDelta


class Int8File(Struct, frozen=True):
    """An int8 file as ONNX Runtime runs it, on calibration images; errors are root mean squares."""

    deviation: Annotated[
        float, Meta(description="of outputs from those in floating point, over their standard deviation")
    ]
    rounding: Annotated[
        float,
        Meta(
            description="how far integer kernels are off the file's definition, over how far they may be: as "
            "that is off floating point, or a step of the outputs"
        ),
    ]


class Quantization(Struct, frozen=True):
    """The way in which both int8 files were made."""

    method: Annotated[Literal["minmax", "entropy", "percentile"], Meta(description="of measuring ranges")]
    images: Annotated[Positive, Meta(description="calibration images that ranges were measured on")]
    activations: Literal["uint8", "int8"]
    weights: str
    opset: Positive
    ir_version: Positive
    files: Annotated[dict[str, Int8File], Meta(description="by name")]


class Forms(Struct, frozen=True):
    """The original and the converted model in floating point and in int8, measured in the same rounds."""

    quantization: Quantization
    float: Form
    int8: Form
    converted: Form
    converted_int8: Form
