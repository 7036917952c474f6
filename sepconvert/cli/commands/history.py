"""History of `compare --baseline`: the run as an entry, what changed, and what cannot be judged."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import msgspec

from sepconvert.base.environment import environment
from sepconvert.base.errors import SepconvertError
from sepconvert.cli.conditions import QUANTITIES, Demand
from sepconvert.cli.inputs import timing_of
from sepconvert.cli.options import Options
from sepconvert.measure.comparison import Comparison
from sepconvert.report.baseline import ModelChanges, write_baseline
from sepconvert.report.schema.baseline import BaselineDocument, BaselineEntry

_SCORING = ("metric", "postprocess", "output", "ignore_index", "batch_dim")  # options that values depend on


def entry_of(options: Options, found: Comparison, hashes: Sequence[str | None]) -> BaselineEntry:
    """Return a run as an entry of a history; `hashes` are the SHA-256 of the models."""
    speedups = [None, *(delta.speedup for delta in found.deltas)]
    models = [
        {
            "name": name,
            "sha256": sha256,
            "profile": profile.to_json(),
            "speedup": None if speedup is None else speedup.to_dict(),
        }
        for name, sha256, profile, speedup in zip(found.names, hashes, found.profiles, speedups, strict=True)
    ]
    document: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(timing_of(options).runtime),
        "batch": options["batch"],
        "runs": options["runs"],
        "task": {name: options[name] for name in _SCORING},
        "data_sha256": found.data_sha256,
        "models": models,
    }
    return msgspec.convert(document, BaselineEntry)


def check_judged(demands: Sequence[Demand], models: Sequence[ModelChanges], *, updated: bool) -> None:
    """Tell which conditions cannot be judged, as no earlier run allows the comparison.

    Where the history is updated, the next run can judge them: that is reported, and is no error.

    Raises:
        SepconvertError: a condition cannot be judged, nor will it be.
    """
    if demands and not models and not updated:
        raise SepconvertError("--baseline: holds no run yet; pass --update-baseline to begin with this one")
    for demand in demands:
        for model in models:
            reason = model.missing.get(QUANTITIES[demand.metric])
            if reason is None:
                continue
            message = f"--fail-if {demand.text!r}: {model.name} cannot be judged: {reason}"
            if not updated:
                raise SepconvertError(
                    f"{message}; pass --update-baseline, and later runs are judged by this one"
                )
            click.echo(f"sepconvert: {message}; later runs are judged by this one", err=True)


def update(path: Path, history: BaselineDocument, entry: BaselineEntry, *, quiet: bool) -> None:
    """Add a run to a history, and tell so."""
    number = write_baseline(path, history, entry)
    if not quiet:
        text = f"holds {number} runs now" if history.entries else "begun; later runs are judged by this one"
        click.echo(f"sepconvert: {path}: {text}", err=True)
