"""Types of plan.json."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from sepconvert.base.errors import MAX_SEED
from sepconvert.base.notes import ReasonCode
from sepconvert.base.options.values import Gate, Mode
from sepconvert.factorize.border import Border
from sepconvert.report.schema.profile import Count, Positive, Sha256
from sepconvert.report.schema.report import Kernel

Tolerance = Annotated[float, Meta(ge=0)]


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
