"""Types of the history that `sepconvert compare --baseline` reads, and adds to with `--update-baseline`."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from sepconvert.report.schema.profile import Count, Environment, Positive, Profile, Sha256, Speedup


class BaselineModel(Struct, frozen=True, kw_only=True):
    """One model of a run."""

    name: Annotated[str, Meta(description="path as it was given; later runs find the model by it")]
    sha256: Annotated[Sha256 | None, Meta(description="of the file")]
    profile: Profile
    speedup: Annotated[
        Speedup | None,
        Meta(description="over the first model of the run, in the same rounds; null for that model itself"),
    ]


class BaselineEntry(Struct, frozen=True, kw_only=True):
    """One run of `sepconvert compare`."""

    date: Annotated[str, Meta(description="of the end of the run: ISO 8601, UTC")]
    environment: Environment
    batch: Positive
    runs: Annotated[Count, Meta(description="timed rounds")]
    task: Annotated[
        dict[str, str | int | None],
        Meta(description="how outputs were scored: metric, output, postprocess …"),
    ]
    data_sha256: Annotated[
        Sha256 | None, Meta(description="of all batches of --data, as they were run; null without data")
    ]
    models: Annotated[
        tuple[BaselineModel, ...],
        Meta(min_length=1, description="the first is the reference, whose latency is that of the speed-ups"),
    ]


class BaselineDocument(Struct, frozen=True, kw_only=True):
    """Earlier runs, the last one at the end."""

    schema: Literal["sepconvert.baseline/1"]
    entries: tuple[BaselineEntry, ...]
