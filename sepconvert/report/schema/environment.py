"""Type of the document that `sepconvert env` prints."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from sepconvert.report.schema.profile import Bytes, Positive


class EnvironmentDocument(Struct, frozen=True, kw_only=True):
    """Versions and machine, for reports of bugs."""

    schema: Literal["sepconvert.environment/1"]
    sepconvert: str
    python: str
    platform: str
    cpu: Annotated[str, Meta(description="name of the processor")]
    instruction_sets: Annotated[
        tuple[str, ...], Meta(description="those that convolutions gain from; empty if unknown")
    ]
    missing_instruction_sets: Annotated[
        tuple[str, ...], Meta(description="those of the architecture that it lacks; empty if unknown")
    ]
    cores: Positive
    available_cores: Annotated[Positive, Meta(description="that the process may use")]
    clock_mhz: Annotated[Positive | None, Meta(description="mean of the cores at the time; null if unknown")]
    load_average: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="mean number of busy processes in the minute before; null if unknown"),
    ]
    memory_bytes: Bytes
    free_memory_bytes: Bytes
    onnxruntime: Annotated[str | None, Meta(description="version; null if it cannot be imported")]
    onnxruntime_error: Annotated[str | None, Meta(description="why it cannot be imported; null if it can")]
    providers: Annotated[tuple[str, ...], Meta(description="execution providers of ONNX Runtime")]
    packages: Annotated[dict[str, str | None], Meta(description="versions; null if not installed")]
