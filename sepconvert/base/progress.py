"""Progress of loops and phases, and a clock of the stages that the time of a job goes to."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

import psutil

from sepconvert.base.errors import SepconvertError, quoted

T = TypeVar("T")


_SAMPLED = 0.1  # seconds between two looks at the process's memory


class Progress(Protocol):
    """Wrapper of a loop that shows its progress."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items."""
        ...


def silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    """Return the items; show nothing."""
    return items


def progress_of(wanted: bool | Progress) -> Progress:
    """Return what shows the progress of loops: bars in a terminal or notebook, nothing, or what is given.

    Raises:
        SepconvertError: it is neither a truth value nor a function.
    """
    if callable(wanted):
        return wanted
    if not isinstance(wanted, bool):
        raise SepconvertError(f"`progress`: expected True, False or a function, got {quoted(wanted)}")
    return _bars if wanted else silent


def _bars(items: Iterable[T], description: str, /) -> Iterable[T]:
    from tqdm.auto import tqdm  # which asks whether this is a notebook

    bar: Iterable[T] = tqdm(items, description, leave=False)
    return bar


class Phase(str, Enum):
    """A part of a conversion as a user sees it; parts follow one another in this order."""

    CHECKS = "checking the original"
    ANALYSIS = "analysing kernels"
    TIMES = "timing forms of layers"
    SURVEY = "fitting forms of layers"
    SEARCH = "searching for a plan"
    FILES = "writing and verifying files"
    MEASUREMENT = "measuring the files"


class Watcher(Protocol):
    """A listener that is told of the phases of a conversion."""

    def expect(self, phases: Sequence[Phase]) -> None:
        """Note the phases that a conversion is going to have."""
        ...

    def begin(self, phase: Phase) -> None:
        """Note that a phase begins, and that the one before it has ended."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of the phases of conversions in the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def expect(phases: Sequence[Phase]) -> None:
    """Tell the watcher, if there is one, what phases there will be."""
    if (watcher := _watcher.get()) is not None:
        watcher.expect(phases)


def begin(phase: Phase) -> None:
    """Tell the watcher, if there is one, that a phase begins."""
    if (watcher := _watcher.get()) is not None:
        watcher.begin(phase)


class Stage(str, Enum):
    """A kind of work, whose time is counted together wherever it is done."""

    START = "start"  # of the process, and imports
    LOAD = "load"  # of the model and of data that are read at once
    TRACE = "trace"
    CHECKS = "checks"  # of the model and the data, before the long work
    ACCURACY = "accuracy"  # or another metric
    MERGING = "merging"
    CALIBRATION = "calibration"  # what the original does on the calibration images
    SURVEY = "survey"
    MOMENTS = "moments"  # of layers' inputs, in the original and in plans
    FITS = "fits"
    DIVERGENCE = "divergence"  # on held-out images
    EXPORT = "export"
    QUANTIZATION = "quantization"
    TIMING = "timing"
    TRAINING = "training"
    VERIFICATION = "verification"
    REPORT = "report"
    REST = "rest"


@dataclass
class StageTime:
    """Time and memory of a stage, without the stages within it."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of all threads
    peak_bytes: int = 0  # largest resident memory of the process that was seen meanwhile
    parts: dict[str, float] = field(default_factory=dict)  # wall seconds of layers, for instance, by name


class StageClock:
    """Divides the time of a job, from its making on, among stages; one is running at each moment."""

    def __init__(self) -> None:
        self.times: dict[Stage, StageTime] = {}
        self._running: list[tuple[Stage, str | None]] = [(Stage.REST, None)]
        self._since = time.perf_counter(), time.process_time()
        self._process = psutil.Process(os.getpid())
        self._peak = self._process.memory_info().rss

    def change(self, stage: tuple[Stage, str | None] | None) -> None:
        """Begin a stage, or a part of it, within the running one; None ends the running one."""
        self.count()
        if stage is None:
            self._running.pop()
        else:
            self._running.append(stage)

    def count(self) -> None:
        """Count the time until now."""
        now = time.perf_counter(), time.process_time()
        name, part = self._running[-1]
        found = self.times.setdefault(name, StageTime())
        wall = now[0] - self._since[0]
        found.wall_s += wall
        found.cpu_s += now[1] - self._since[1]
        if part is not None:
            found.parts[part] = found.parts.get(part, 0.0) + wall
        self.look()
        found.peak_bytes, self._peak = max(found.peak_bytes, self._peak), 0
        self._since = now

    def look(self) -> None:
        """Note the memory that the process has now."""
        self._peak = max(self._peak, self._process.memory_info().rss)

    def count_start(self) -> None:
        """Count what the process did before this clock was made."""
        wall = time.time() - self._process.create_time() - (time.perf_counter() - self._since[0])
        # The system's record of when a process began is coarse, and moves with the clock of the wall.
        self.times[Stage.START] = StageTime(max(wall, 0.0), self._since[1], self._peak)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the report's `stages`, in the order in which they began."""
        self.count()
        return [
            {
                "stage": name.value,
                "wall_s": found.wall_s,
                "cpu_s": found.cpu_s,
                "peak_bytes": found.peak_bytes,
                "parts": found.parts,
            }
            for name, found in self.times.items()
        ]


_clock: ContextVar[StageClock | None] = ContextVar("clock", default=None)


@contextmanager
def stage_clock() -> Iterator[StageClock]:
    """Yield the clock of the stages in the block: a new one, or that of the block around it.

    The memory is looked at by a thread of its own, which does nothing else.
    """
    around = _clock.get()
    if around is not None:
        yield around
        return
    clock, ended = StageClock(), threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLED):
            clock.look()

    token = _clock.set(clock)
    threading.Thread(target=watch, name="memory", daemon=True).start()
    try:
        yield clock
    finally:
        ended.set()
        _clock.reset(token)


def stages_so_far() -> list[dict[str, Any]]:
    """Return the report's `stages`; none without a clock."""
    clock = _clock.get()
    return [] if clock is None else clock.to_json()


@contextmanager
def stage(name: Stage, part: str | None = None) -> Iterator[None]:
    """Count the time of the block for a stage, and for a part of it; without a clock, do nothing."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.change((name, part))
    try:
        yield
    finally:
        clock.change(None)
