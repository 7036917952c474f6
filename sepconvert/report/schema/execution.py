"""Types of what time goes to: of the stages of a conversion, and of the execution of models."""

from typing import Annotated

from msgspec import Meta, Struct, UnsetType

from sepconvert.base.progress import Stage
from sepconvert.report.schema.profile import Bytes, Count, Milliseconds

Seconds = Annotated[float, Meta(ge=0)]


class StageTime(Struct, frozen=True):
    """Time and memory of one stage, without the stages within it: all walls add up to the whole time."""

    stage: Stage
    wall_s: Seconds
    cpu_s: Annotated[Seconds, Meta(description="of all threads of the process")]
    peak_bytes: Annotated[
        Bytes, Meta(description="most resident memory of the process meanwhile, as sampled")
    ]
    parts: Annotated[dict[str, Seconds], Meta(description="wall seconds by layer, where they are known")]


Stages = Annotated[
    tuple[StageTime, ...] | UnsetType,
    Meta(description="up to the writing of the report, in the order in which they began; 0.1.0 lacks them"),
]


class LayerExecution(Struct, frozen=True):
    """Execution of a layer by ONNX Runtime, before and after."""

    milliseconds: tuple[Milliseconds, Milliseconds]
    operators: tuple[Count, Count]
    bytes_moved: tuple[Bytes, Bytes]
    kernels: tuple[tuple[str, ...], tuple[str, ...]]
    cause: Annotated[str | None, Meta(description="why the gain is much less than the ratio of MACs")]


class ModelExecution(Struct, frozen=True):
    """Milliseconds of the profiler by kind of operator, before and after."""

    converted: tuple[Milliseconds, Milliseconds]
    kept: tuple[Milliseconds, Milliseconds]
    layout: Annotated[tuple[float, float], Meta(description="copies to other memory layouts")]
    other: tuple[Milliseconds, Milliseconds]
    operators: tuple[Count, Count]
    layout_changes: tuple[Count, Count]
