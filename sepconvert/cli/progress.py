"""Progress on a terminal or in a log file."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import click
import onnxruntime
from tqdm import tqdm

from sepconvert.base.progress import Progress, silent
from sepconvert.cli.options import Options
from sepconvert.distillation.results import TrainingStep

T = TypeVar("T")


_LINE_EVERY = 10.0  # seconds between lines that show progress where there is no terminal


def progress_for(options: Options) -> Progress:
    """Return a bar for each loop on a terminal, else a line from time to time."""
    if options["quiet"] or sys.stderr is None:
        return silent
    return _progress_bar if sys.stderr.isatty() else _progress_lines()


def _progress_bar(items: Iterable[T], description: str, /) -> Iterable[T]:
    # Without nrows, tqdm shows no bar on a terminal that does not report its size.
    bar: Iterable[T] = tqdm(items, description, file=sys.stderr, leave=False, nrows=2)
    return bar


def _progress_lines() -> Progress:
    due = time.monotonic() + _LINE_EVERY

    def progress(items: Iterable[T], description: str, /) -> Iterable[T]:
        nonlocal due
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        for number, item in enumerate(items, start=1):
            if time.monotonic() >= due:
                click.echo(f"{description}: {number}{total}", err=True)
                due = time.monotonic() + _LINE_EVERY
            yield item

    return progress


def training_progress(options: Options) -> Callable[[TrainingStep], None]:
    """Return what shows steps, loss and time left of fine-tuning: a bar on a terminal, else ten lines."""
    if options["quiet"] or sys.stderr is None:
        return lambda step: None
    if not sys.stderr.isatty():
        return _training_line
    bar: tqdm[Any] | None = None

    def show(step: TrainingStep) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(None, "fine-tuning", step.steps, file=sys.stderr, leave=False, nrows=2)
        bar.set_postfix(epoch=step.epoch, loss=f"{step.loss:.3f}", refresh=False)
        bar.update(step.step - bar.n)

    return show


def _training_line(step: TrainingStep) -> None:
    if step.step * 10 // step.steps > (step.step - 1) * 10 // step.steps:
        click.echo(
            f"fine-tuning: step {step.step} of {step.steps}, epoch {step.epoch}, loss {step.loss:.3f}, "
            f"{step.seconds_left:.0f} s left",
            err=True,
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the warnings of libraries, and redirect to standard error what the user's code prints.

    Our own warnings are notes in the report, and standard output is for our tables and JSON alone.
    """
    logging.getLogger("torch").setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(4)  # fatal errors only; what fails is raised, too
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
