"""Results on the terminal and on disk."""

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sepconvert.cli.options import Options, in_flags
from sepconvert.files.results import result_directory


def command_line() -> str:
    """Return the command line, as a shell would take it."""
    return shlex.join(["sepconvert", *sys.argv[1:]])


def out_of(options: Options) -> Path:
    """Return the directory that --out names, or the one named after the model."""
    return options["out"] or Path(f"{options['model'].stem}-sepconvert")


def result_directory_of(options: Options, out: Path) -> contextlib.AbstractContextManager[Path]:
    """Return a context that yields the result directory, which must not replace what it is made from."""
    names = ("model", "plan", "data", "calib", "train")
    inputs = [Path(options[name]) for name in names if options.get(name) is not None]
    resumed = options.get("resume", False)
    return result_directory(out, force=options["force"], inputs=inputs, resumed=resumed)


def show(options: Options, document: Mapping[str, Any], *text: str) -> None:
    """Print the document under --json, else the text unless --quiet."""
    if options["as_json"]:
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    elif not options["quiet"]:
        click.echo(in_flags("\n".join(text)))
