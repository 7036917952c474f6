"""Progress on a terminal, in a log file, and none."""

import contextlib
import fcntl
import io
import itertools
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from command_line import SHAPE, listing, start

from sepconvert.cli import progress


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
        process = start("net.pt", *SHAPE, stderr=slave)
        os.close(slave)
        seen = read_until(master, b"exporting: ")
        process.send_signal(signal.SIGINT)
        rest = read_until(master, None)
        assert process.communicate()[0] == b""
    assert b"analysing kernels: " in seen
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
    assert run("inspect", "net.pt", *SHAPE, *arguments).code == 0
    assert ("analysing kernels" in stream.getvalue()) is expected


def test_progress_in_lines_where_there_is_no_terminal(here, run, monkeypatch):
    clock = itertools.count(step=60.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = run("inspect", "net.pt", *SHAPE).err.splitlines()
    assert lines[0].startswith("analysing kernels: 1 of ")
    assert run("inspect", "net.pt", *SHAPE, "--quiet").err == ""
