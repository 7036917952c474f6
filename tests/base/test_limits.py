"""Limits of reading: real memory, real processor time, real crashes."""

import os
import signal
import sys
import threading
import warnings

import pytest
import torch

from sepconvert.base import limits
from sepconvert.base.errors import SepconvertError
from sepconvert.base.limits import check_cost

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set only on Linux")


def compute():
    while True:
        pass


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("read", "match"),
    [
        (lambda: bytearray(2**31), "label: refused, its pickle asks for gigabytes"),
        (compute, "label: refused, its pickle is not read within 1 s"),
        (crash, "label: refused, its pickle crashes the process"),
    ],
)
def test_what_is_refused(monkeypatch, read, match):
    monkeypatch.setattr(limits, "_PROCESSOR_SECONDS", 1)
    with pytest.raises(SepconvertError, match=match):
        check_cost(read, 0, "label")


def test_what_a_large_file_may_take():
    def read():  # memory that is claimed and not touched
        torch.empty(3 * 2**30, dtype=torch.uint8)

    with pytest.raises(SepconvertError, match="asks for gigabytes"):
        check_cost(read, 2**29, "label")
    check_cost(read, 3 * 2**29, "label")


def test_ordinary_errors_are_left_to_the_caller():
    check_cost(lambda: 1 / 0, 0, "label")
    check_cost(lambda: sys.exit(7), 0, "label")


def test_a_child_that_waits_for_ever_refuses_nothing(monkeypatch):
    """As one does for a lock that another thread held during the fork."""
    monkeypatch.setattr(limits, "_MOST_WAITING", 1)
    lock = threading.Lock()
    lock.acquire()
    check_cost(lock.acquire, 0, "label")


@pytest.mark.parametrize("reaction", [signal.SIG_IGN, lambda *_: None])
def test_limits_hold_whatever_the_parent_does_with_signals(monkeypatch, reaction):
    monkeypatch.setattr(limits, "_PROCESSOR_SECONDS", 1)
    before = signal.signal(signal.SIGXCPU, reaction)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
    try:
        with pytest.raises(SepconvertError, match="is not read within 1 s"):
            check_cost(compute, 0, "label")
        assert signal.SIGXCPU in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGXCPU})
        signal.signal(signal.SIGXCPU, before)


def test_a_parent_that_ignores_its_children():
    """The kernel then discards their exit status, and a check does not depend on it."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        check_cost(lambda: 1, 0, "label")
        with pytest.raises(SepconvertError, match="asks for gigabytes"):
            check_cost(lambda: bytearray(2**31), 0, "label")
        with pytest.raises(SepconvertError, match="or crashes the process"):
            check_cost(crash, 0, "label")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_where_no_process_can_be_started_nothing_is_refused(monkeypatch):
    def fork():
        raise BlockingIOError("the limit of processes is reached")

    monkeypatch.setattr(os, "fork", fork)
    check_cost(crash, 0, "label")


def test_the_child_says_nothing(capfd):
    def read():
        print("once")
        print("twice", file=sys.stderr, flush=True)
        warnings.warn("thrice", stacklevel=1)
        os.write(1, b"four times")

    check_cost(read, 0, "label")
    assert capfd.readouterr() == ("", "")


def test_after_torch_has_computed_in_threads():
    """OpenMP's threads are gone in the child, where a parallel sum must not wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        numbers = torch.ones(10**6)
        assert numbers.sum() == 10**6
        with pytest.raises(SepconvertError, match="crashes the process"):  # the sum is done before
            check_cost(lambda: numbers.exp().sum() > 0 and crash(), 0, "label")
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_check_leaves_no_child_behind():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            check_cost(threading.Event().wait, 0, "label")
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_threads_may_check():
    caught = []

    def check():
        try:
            check_cost(lambda: bytearray(2**31), 0, "label")
        except SepconvertError as error:
            caught.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert len(caught) == 1
