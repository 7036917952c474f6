"""Results on the terminal and on disk, and the log."""

import contextlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from sepconvert.base.documents import sha256_of_file
from sepconvert.base.errors import SepconvertError
from sepconvert.cli.config import repeats
from sepconvert.cli.options import Options, in_flags
from sepconvert.files.models.names import stem_of
from sepconvert.files.results import check_result_directory, result_directory

_LOG = logging.getLogger("sepconvert")

# The first line of a log, by which an earlier one is told from a file that must not be replaced.
_LOGGED = re.compile(rb"[-0-9]{10} [:,0-9]{12} INFO sepconvert ")


def command_line() -> str:
    """Return the command line, as a shell would take it."""
    return shlex.join(["sepconvert", *sys.argv[1:]])


def relaxed(demands: Mapping[str, float]) -> str:
    """Return the command line with other values of some demands."""
    words = ["sepconvert", *sys.argv[1:]]
    for name, value in demands.items():
        flag = f"--{name.replace('_', '-')}"
        kept = list[str]()
        for word, before in zip(words, ["", *words], strict=False):
            if word != flag and before != flag and not word.startswith(f"{flag}="):
                kept.append(word)
        words = [*kept, flag, f"{value:g}"]
    return shlex.join(words)


def out_of(options: Options) -> Path:
    """Return the directory that --out names, or the one named after the model or the demo."""
    stem = stem_of(options["model"]) if "model" in options else "demo"
    return options["out"] or Path(f"{stem}-sepconvert")


def checkpoint_of(options: Options) -> Path:
    """Return the file that --checkpoint names, or the one beside the result directory."""
    out = out_of(options)
    return options["checkpoint"] or out.with_name(f"{out.name}.checkpoint")


def check_place(options: Options) -> None:
    """Raise `SepconvertError` if the result directory cannot be made."""
    check_result_directory(out_of(options), force=_may_replace(options), inputs=_made_from(options))


def result_directory_of(options: Options, out: Path) -> contextlib.AbstractContextManager[Path]:
    """Return a context that yields the result directory, which must not replace what it is made from."""
    resumed = options.get("resume", False)
    return result_directory(out, force=_may_replace(options), inputs=_made_from(options), resumed=resumed)


def _may_replace(options: Options) -> bool:
    """Return whether an existing result may be replaced: --force says so, or its own run.toml is repeated."""
    return options["force"] or repeats(out_of(options))


def data_of(options: Options) -> dict[str, dict[str, str]]:
    """Return what the options name as data, with the SHA-256 of files, for the report."""
    named = {name: str(options[name]) for name in ("data", "calib") if options.get(name) is not None}
    return {
        name: {"source": spec, **({"sha256": sha256_of_file(Path(spec))} if Path(spec).is_file() else {})}
        for name, spec in named.items()
    }


def _made_from(options: Options) -> list[Path]:
    """Return the files that the options name as inputs."""
    names = ("model", "plan", "data", "calib", "train")
    return [Path(options[name]) for name in names if options.get(name) is not None]


@contextlib.contextmanager
def recorded(options: Options) -> Iterator[None]:
    """Record the command line, and the steps and errors in the block, as --verbose and --log-file say.

    Raises:
        SepconvertError: the log cannot be written, or would replace a file that is not a log.
    """
    handlers, before = list[logging.Handler](), _LOG.level
    if options.get("verbose"):
        handlers.append(_handler(logging.StreamHandler(), logging.INFO, "%(asctime)s %(message)s"))
    if (path := options.get("log_file")) is not None:
        handlers.append(_handler(_log_file(path), logging.DEBUG, "%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        _LOG.addHandler(handler)
        _LOG.setLevel(min(handler.level, _LOG.level or handler.level))
    _LOG.info("%s", command_line())
    try:
        yield
    except SepconvertError as error:
        _LOG.error("%s", in_flags(str(error)))
        raise
    finally:
        _LOG.setLevel(before)
        for handler in handlers:
            _LOG.removeHandler(handler)
            handler.close()


def _handler(handler: logging.Handler, level: int, style: str) -> logging.Handler:
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(style))
    return handler


def _log_file(path: Path) -> logging.Handler:
    """Return a handler that writes to a new file, or over an earlier log."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(64)
            if head and not _LOGGED.match(head):
                raise SepconvertError(
                    f"--log-file: {path} exists and is not a log of sepconvert; pass another file"
                )
        return logging.FileHandler(path, "w", encoding="utf-8")
    except OSError as error:
        raise SepconvertError(
            f"--log-file: {path} cannot be written: {error.strerror}; pass another file"
        ) from error


def show(options: Options, document: Mapping[str, Any], first: str, *others: str) -> None:
    """Print the document under --json, the first sentence under --brief, or all text unless --quiet.

    The first sentence is the answer; the other texts give the details.
    """
    _LOG.info("%s", in_flags(first))
    if options.get("brief") and not options["as_json"]:
        click.echo(in_flags(first))
        return
    from sepconvert.report.text.numbers import fold  # which imports torch

    show_page(options, document, "\n".join([fold(first), *others]))


def show_page(options: Options, document: Mapping[str, Any], text: str) -> None:
    """Print the document under --json, else a text as it is, unless --quiet."""
    if options["as_json"]:
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    elif not options.get("quiet"):
        click.echo(in_flags(text))
