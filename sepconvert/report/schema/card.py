"""Types of the model card in report.json: what a reader of the converted model has to know of it."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sepconvert.report.schema.profile import Bytes, Count, MetricDrop, Milliseconds, Positive, Sha256, Speedup


class CardModel(Struct, frozen=True):
    """The model that was converted."""

    name: Annotated[str | None, Meta(description="of its file or in its library; null if called from Python")]
    source: Annotated[str | None, Meta(description="path of the file, or the name")]
    sha256: Sha256 | None
    weights: Annotated[str | UnsetType, Meta(description="where a library built the model")] = UNSET


class CardMaking(Struct, frozen=True):
    """The way in which the converted model was made."""

    mode: Literal["exact", "approx", "auto"]
    budget: Annotated[dict[str, float], Meta(description="demands that were made, by their names")]
    form: Annotated[str, Meta(description="in which it is deployed: the dtype of the ONNX file, or int8")]
    converted: Annotated[Count, Meta(description="convolutions that were replaced or merged")]
    convolutions: Count
    finetuned_epochs: Count
    command: str | None
    seed: int
    versions: Annotated[dict[str, str], Meta(description="of the packages that made and ran it")]


class CardData(Struct, frozen=True):
    """Samples that had a part in the conversion."""

    use: Literal["evaluation", "calibration", "held-out calibration", "int8 ranges"]
    samples: Positive
    source: Annotated[str | UnsetType, Meta(description="as the command line names it")] = UNSET
    sha256: Annotated[Sha256 | UnsetType, Meta(description="of the file, if it is one")] = UNSET


class CardResults(Struct, frozen=True):
    """Measurements before and after."""

    metric: MetricDrop | None
    latency_ms: Annotated[tuple[Milliseconds, Milliseconds] | None, Meta(description="medians")]
    speedup: Speedup | None
    macs: tuple[Count, Count]
    params: tuple[Count, Count]
    onnx_bytes: tuple[Bytes, Bytes] | None
    max_abs_diff: Annotated[float, Meta(description="of outputs, converted from original, in torch")]


class Card(Struct, frozen=True):
    """A model card; all but the names and hashes of the data follows from the rest of the report."""

    model: CardModel
    made: CardMaking
    data: tuple[CardData, ...]
    results: CardResults
    intended_use: tuple[str, ...]
    limits: tuple[str, ...]
