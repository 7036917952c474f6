"""Progress on a terminal or in a log file: the phase, what is being worked on, and the time left."""

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import onnxruntime
from tqdm import tqdm

from sepconvert.base.progress import Phase, watched
from sepconvert.cli.options import Options
from sepconvert.distillation.results import TrainingStep
from sepconvert.report.text.numbers import duration_text

T = TypeVar("T")

_LOG = logging.getLogger("sepconvert.progress")

_TICK = 1.0  # seconds between two changes of the line on a terminal

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal

_RECORDED = 100  # items of a loop from which on a log does not name each


# Usual shares of the time of a conversion, without fine-tuning, on a ResNet-9 and a ResNet-20. They are for
# the estimate of the time left alone. Exact mode has ANALYSIS where the others have TIMES, SURVEY and SEARCH,
# so the shares of a conversion's own phases do not add up to 1.
_SHARES = {
    Phase.CHECKS: 0.15,
    Phase.ANALYSIS: 0.3,
    Phase.TIMES: 0.15,
    Phase.SURVEY: 0.25,
    Phase.SEARCH: 0.35,
    Phase.FILES: 0.05,
    Phase.MEASUREMENT: 0.05,
}


class Display:
    """Shows the progress of a command: call it on a loop, tell it of phases and of steps of training.

    Attributes:
        title: what the phases belong to, where a command makes several conversions.
    """

    def __init__(self, *, on_terminal: bool, shown: bool) -> None:
        self.title = ""
        self._shown, self._on_terminal = shown, on_terminal
        self._phases: Sequence[Phase] = ()
        self._began: dict[Phase, float] = {}
        self._doing: dict[object, str] = {}  # what loops work on, the innermost last
        self._start, self._ended = time.monotonic(), threading.Event()
        self._line: tqdm[Any] | None = None

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items of a loop; what is being worked on is its description, and the item's name."""
        count = len(items) if isinstance(items, Sized) else None
        total, recorded = (f" of {count}", count < _RECORDED) if count is not None else ("", False)
        _LOG.info("%s", description if count is None else f"{description}: {count}")
        loop = object()
        try:
            for number, item in enumerate(items, start=1):
                self._doing[loop] = f"{description}: {_named(item)}{number}{total}"
                if recorded:
                    _LOG.debug("%s", self._doing[loop])
                yield item
        finally:
            self._doing.pop(loop, None)

    def expect(self, phases: Sequence[Phase]) -> None:
        """Note the phases that a conversion is going to have."""
        self._phases, self._began = phases, {}

    def begin(self, phase: Phase) -> None:
        """Note that a phase begins."""
        self._began.setdefault(phase, time.monotonic())
        _LOG.info("%s", self._where())

    def train(self, step: TrainingStep) -> None:
        """Note a step of fine-tuning."""
        text = (
            f"fine-tuning: step {step.step} of {step.steps}, epoch {step.epoch}, loss {step.loss:.3f}, "
            f"{duration_text(step.seconds_left)} of it left"
        )
        self._doing[TrainingStep] = text
        if step.step * 10 // step.steps > (step.step - 1) * 10 // step.steps:
            _LOG.info("%s", text)
        if step.step == step.steps:
            del self._doing[TrainingStep]

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress in the block, in which conversions tell of their phases."""
        ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        with watched(self):
            if self._shown:
                ticker.start()
            try:
                yield
            finally:
                self._ended.set()
                if ticker.is_alive():
                    ticker.join()
                if self._line is not None:
                    self._line.close()

    def text(self) -> str:
        """Return the phase, what is being worked on, the time since the start, and that left if known."""
        left = self._left()
        times = duration_text(time.monotonic() - self._start)
        if left is not None:
            times += f", about {duration_text(left)} left"
        doing = [*self._doing.values()][-1:]
        where = [part for part in (self._where(), *doing) if part] or ["working"]
        return " · ".join([*where, times])

    def _where(self) -> str:
        """Return the number and the name of the phase."""
        if not self._began:
            return self.title
        phase = next(reversed(self._began))
        title = f"{self.title} " if self.title else ""
        return f"{title}[{self._phases.index(phase) + 1}/{len(self._phases)}] {phase.value}"

    def _left(self) -> float | None:
        """Return the seconds left, supposing that phases take their usual shares.

        None in the first two, and in one that takes longer than that.
        """
        phases = [phase for phase in self._phases if phase in self._began]
        if len(phases) < 3:
            return None
        done, current = phases[:-1], phases[-1]
        since = self._began[current]
        pace = (since - self._began[phases[0]]) / sum(_SHARES[phase] for phase in done)
        rest = sum(_SHARES[phase] for phase in self._phases[self._phases.index(current) + 1 :])
        here = pace * _SHARES[current] - (time.monotonic() - since)
        return None if here < 0 else pace * rest + here  # no estimate is better than one that is overdue

    def _tick(self) -> None:
        """Show the line from time to time, until the command ends."""
        while not self._ended.wait(_TICK if self._on_terminal else _LINE_EVERY):
            if self._on_terminal:
                if self._line is None:
                    # Without nrows, tqdm shows nothing on a terminal that does not report its size.
                    self._line = tqdm(
                        bar_format="{desc}", file=sys.stderr, leave=False, dynamic_ncols=True, nrows=2
                    )
                self._line.set_description_str(self.text())
            else:
                sys.stderr.write(f"{self.text()}\n")
                sys.stderr.flush()


def display_for(options: Options) -> Display:
    """Return the display of a command: a line on a terminal, lines from time to time elsewhere, or nothing.

    Under --verbose the log takes its place.
    """
    stream = sys.stderr
    shown = not options["quiet"] and not options["verbose"] and stream is not None
    return Display(on_terminal=shown and stream.isatty(), shown=shown)


def _named(item: Any) -> str:
    """Return the name of what a loop works on, if it has one: a layer, or the first of a pair."""
    found = item[0] if isinstance(item, tuple) and item else item
    name = found if isinstance(found, str) else getattr(found, "name", None)
    return f"{name}, " if isinstance(name, str) else ""


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
