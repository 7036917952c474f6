"""Types of the stages that the time of a conversion went to."""

from typing import Annotated

from msgspec import Meta, Struct, UnsetType

from sepconvert.base.progress import Stage
from sepconvert.report.schema.profile import Bytes

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
