"""Progress on a terminal, in a log file, and none."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from command_line import SHAPE, listing, start

from sepconvert.base.progress import Phase, begin, expect
from sepconvert.cli import progress
from sepconvert.cli.progress import Display
from sepconvert.distillation.results import TrainingStep


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """The master and the slave of a pseudo terminal of 24 × 80."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        yield master, slave
    finally:
        os.close(master)


def read_until(master: int, text: bytes | None) -> bytes:
    """What appears on a terminal, up to `text` or its end."""
    seen = b""
    with contextlib.suppress(OSError):  # the end of a pseudo terminal is an error
        while (text is None or text not in seen) and (part := os.read(master, 4096)):
            seen += part
    return seen


@pytest.mark.slow
def test_progress_on_a_terminal_until_ctrl_c(here):
    before = listing(here.parent)
    with terminal() as (master, slave):
        process = start("net.pt", *SHAPE, "--runs", "100000", stderr=slave)
        os.close(slave)
        seen = read_until(master, b"] measuring the files")
        process.send_signal(signal.SIGINT)
        rest = read_until(master, None)
        assert process.communicate()[0] == b""
    assert b"[4/4] measuring the files" in seen
    assert process.returncode == 130
    assert rest.count(b"sepconvert: interrupted\r\n") == 1
    assert b"Traceback" not in rest
    assert listing(here.parent) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("arguments", "expected"), [([], True), (["--json"], True), (["--quiet"], False)])
def test_progress_unless_quiet(here, run, monkeypatch, arguments, expected):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_TICK", 1e-3)
    assert run("inspect", "net.pt", *SHAPE, *arguments).code == 0
    assert ("analysing kernels" in stream.getvalue()) is expected


def test_progress_in_lines_where_there_is_no_terminal(here, run, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 1e-3)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Display(on_terminal=False, shown=True)
    with shown.shown():
        for _ in shown(["stem"], "analysing kernels"):
            while "stem" not in stream.getvalue():
                time.sleep(1e-3)
    assert re.search(r"^analysing kernels: stem, 1 of 1 · [\d.]+ s$", stream.getvalue(), re.MULTILINE)
    assert run("inspect", "net.pt", *SHAPE, "--quiet").err == ""


def display(monkeypatch, **settings):
    """A display, and a clock that tests set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return Display(on_terminal=False, shown=False, **settings), clock


PHASES = [Phase.CHECKS, Phase.SURVEY, Phase.SEARCH, Phase.FILES, Phase.MEASUREMENT]


def test_the_time_left_is_that_of_the_phases_to_come(monkeypatch):
    shown, clock = display(monkeypatch)
    with shown.shown():
        expect(PHASES)
        begin(Phase.CHECKS)
        clock.now = 15.0
        begin(Phase.SURVEY)
        assert shown.text() == "[2/5] fitting forms of layers · 15 s"
        clock.now = 40.0
        begin(Phase.SEARCH)
        assert shown.text() == "[3/5] searching for a plan · 40 s, about 45 s left"  # one second a hundredth
        clock.now = 50.0
        assert shown.text().endswith("50 s, about 35 s left")
        clock.now = 500.0  # it takes longer than usual
        assert shown.text().endswith("· 500 s")
    begin(Phase.FILES)  # outside the block, nobody is told
    assert shown.text().startswith("[3/5]")


def test_loops_within_loops_and_training(monkeypatch):
    shown, _ = display(monkeypatch)
    shown.title = "auto"
    outer = iter(shown([SimpleNamespace(name="stem"), ("head", 2), 3], "fitting"))
    next(outer)
    assert shown.text() == "auto · fitting: stem, 1 of 3 · 0.0 s"
    for number in shown(iter("ab"), "scoring"):
        assert f"scoring: {number}, " in shown.text()
    next(outer)
    assert "fitting: head, 2 of 3" in shown.text()
    shown.train(TrainingStep(1, 2, 1, 0.5, 90.0))
    assert "fine-tuning: step 1 of 2, epoch 1, loss 0.500, 90 s of it left" in shown.text()
    shown.train(TrainingStep(2, 2, 1, 0.5, 0.0))
    next(outer)
    assert "fitting: 3 of 3" in shown.text()
    outer.close()
    assert shown.text() == "auto · 0.0 s"


def test_a_log_holds_steps_and_errors(here, run, monkeypatch):
    assert run("net.pt", *SHAPE, "--runs", "0", "--log-file", "log.txt", "--quiet").code == 0
    log = (here / "log.txt").read_text(encoding="utf-8")
    assert "INFO [1/4] checking the original" in log
    assert "DEBUG analysing kernels: stem, 1 of 2" in log
    assert "1 of 2 convolutions converted" in log
    assert run("net.pt", *SHAPE, "--runs", "0", "--log-file", "log.txt", "--max-drop", "1").code == 2
    assert "ERROR --mode: budgets" in (here / "log.txt").read_text(encoding="utf-8")
    outcome = run("net.pt", *SHAPE, "--log-file", "no/log.txt")
    assert outcome.code == 2
    assert "no/log.txt cannot be written: No such file or directory; pass another file" in outcome.err


def test_a_log_replaces_an_earlier_log_and_nothing_else(here, run):
    model = (here / "net.pt").read_bytes()
    outcome = run("inspect", "net.pt", *SHAPE, "--log-file", "net.pt")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "sepconvert: --log-file: net.pt exists and is not a log of sepconvert; pass another file\n"
    )
    assert (here / "net.pt").read_bytes() == model
    (here / "log.txt").touch()
    for _ in range(2):
        assert run("inspect", "net.pt", *SHAPE, "--log-file", "log.txt").code == 0
        assert (here / "log.txt").read_text(encoding="utf-8").count("INFO sepconvert inspect net.pt") == 1


def test_a_file_of_options_asks_for_one_log(here, run):
    (here / "run.toml").write_text('verbose = true\nlog-file = "log.txt"\n', encoding="utf-8")
    err = run("inspect", "net.pt", *SHAPE, "--config", "run.toml").err
    assert err.count("analysing kernels: 2\n") == 1
    assert (here / "log.txt").read_text(encoding="utf-8").count("analysing kernels: 2\n") == 1


def test_verbose_prints_each_step(here, run):
    before = logging.getLogger("sepconvert").level
    err = run("inspect", "net.pt", *SHAPE, "-v").err
    assert "analysing kernels: 2\n" in err
    assert "[0" not in err
    assert logging.getLogger("sepconvert").level == before
