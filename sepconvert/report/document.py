"""The report as a value, and as the JSON document that other programs read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from sepconvert.base.environment import Runtime, environment
from sepconvert.files.onnx.export import ExportNote
from sepconvert.measure.execution.layers import ModelExecution
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.classes import ChangedPredictions
from sepconvert.measure.metrics.evaluation import NO_DELTA, MetricDelta
from sepconvert.measure.profiling import Profile
from sepconvert.planning.conversion import LayerReport, Verification
from sepconvert.report.card import model_card

SCHEMA = "sepconvert.report/1"


@dataclass(frozen=True)
class Report:
    """Everything that is known about a finished conversion; None for what was not measured."""

    mode: str
    source: dict[str, Any] | None  # path and SHA-256 of the model file
    command: str | None  # the command line; None if called from Python
    runtime: Runtime
    seed: int
    dtype: str
    original: Profile
    converted: Profile
    speedup: Speedup | None
    accuracy: MetricDelta | None
    changed: ChangedPredictions | None
    layers: tuple[LayerReport, ...]
    verification: Verification
    export: ExportNote
    execution: ModelExecution | None = None
    approximation: Mapping[str, Any] | None = None
    int8_gain: Speedup | None = None  # of int8 over floating point, where that decided about the form
    forms: Mapping[str, Any] | None = None  # of models that are deployed in int8
    stages: Sequence[Mapping[str, Any]] = ()  # that the time went to
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of the data, by option
    name: str | None = None  # of the model: of its file, or of its class
    created: datetime | None = None
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    data: Mapping[str, Any] | None = None  # facts that show whether results on the data mean anything


def report_document(report: Report) -> dict[str, Any]:
    """Return the content of report.json, as plain values.

    `sepconvert.report.schema.report.ReportDocument` describes it.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot express.
    """
    accuracy = NO_DELTA if report.accuracy is None else report.accuracy.to_dict()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        **_heading(report),
        "mode": report.mode,
        "model": report.source,
        "environment": environment(report.runtime),
        "seed": report.seed,
        "dtype": report.dtype,
        "original": report.original.to_json(),
        "converted": report.converted.to_json(),
        "delta": {
            "params_ratio": _ratio(report.original.params, report.converted.params),
            "macs_ratio": _ratio(report.original.macs, report.converted.macs),
            "latency_speedup": None if report.speedup is None else report.speedup.to_dict(),
            **accuracy,
        },
        "data": report.data,
        "changed_predictions": None if report.changed is None else report.changed.to_dict(),
        "execution": None if report.execution is None else report.execution.to_dict(),
        "layers": [layer.to_json() for layer in report.layers],
        "verification": report.verification.to_json(),
        "export": asdict(report.export),
        "approximation": report.approximation,
        **({} if report.forms is None else {"forms": report.forms}),
        **({} if report.int8_gain is None else {"int8_gain": report.int8_gain.to_dict()}),
        "stages": report.stages,
        "command": report.command,
    }
    document = json.loads(json.dumps(document, allow_nan=False))
    return {**document, "model_card": model_card(document, report.files)}


def _heading(report: Report) -> dict[str, Any]:
    """Return what the report is about, as far as it is known."""
    heading: dict[str, Any] = {"name": report.name, "input_shapes": report.input_shapes}
    if report.created is not None:
        heading["created"] = f"{report.created.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    return {key: value for key, value in heading.items() if value is not None}


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None
