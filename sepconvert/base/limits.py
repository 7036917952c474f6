"""Limits of memory and time for files whose reading costs more than their size suggests.

torch's restricted unpickler runs no code, but a few bytes suffice to make it allocate gigabytes
(`bytearray(9_000_000_000)`), or hash a tuple that holds one tuple twice, and so on, 40 levels deep.
"""

import contextlib
import faulthandler
import mmap
import os
import pickletools
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

import psutil
import torch

from sepconvert.base.errors import SepconvertError

_MOST_INSTRUCTIONS = 2 * 10**6  # some seconds
_MEMORY = 2**30  # bytes, beyond twice the size of the file
_PROCESSOR_SECONDS = 5
_BYTES_PER_SECOND = 2**26
_MOST_WAITING = 60  # seconds, after which the child process is given up and nothing is refused

# Outcomes that the child writes to memory that it shares with its parent.
_UNFINISHED, _FINISHED, _NEEDS_MORE_MEMORY = 0, 1, 2


def check_length(pickled: bytes | BinaryIO, label: str) -> None:
    """Raise `SepconvertError`, beginning with `label`, for a pickle of more than two million instructions.

    A file is read from its position to the end of the pickle that begins there.
    """
    for count, _ in enumerate(pickletools.genops(pickled)):
        if count == _MOST_INSTRUCTIONS:
            raise SepconvertError(
                f"{label}: refused, its pickle has more than {_MOST_INSTRUCTIONS:,} instructions, as no "
                "saved model has; save the state_dict anew"
            )


def check_cost(read: Callable[[], object], size: int, label: str) -> None:
    """Raise `SepconvertError` if reading a file costs memory or time out of all proportion to its size.

    On Linux a forked child process reads the file first, within limits that the kernel enforces. A signal
    handler of Python could not stop the hash of a nested tuple: it waits for C code to return. The limits
    apply to the child alone, so nothing has to be restored and any thread may call this. Nothing is checked
    on other systems, where forking is unsafe or the address space cannot be limited, or where no further
    process can be started.

    Args:
        read: opens and reads the file, and has no effects outside the process. If it raises an ordinary
            exception, the check passes: the caller, who reads the file next, meets the same exception.
        size: bytes of the file. Reading may take twice as much memory plus 1 GiB, and 5 s of processor time
            plus 1 s for each 64 MiB.
        label: beginning of the error message.
    """
    if sys.platform != "linux":
        return
    seconds = _PROCESSOR_SECONDS + size // _BYTES_PER_SECOND
    with mmap.mmap(-1, 1) as outcome:  # shared
        ended_by = _run_child(lambda: _read_within_limits(read, 2 * size + _MEMORY, seconds, outcome))
        status = outcome[0]
    if status == _NEEDS_MORE_MEMORY:
        problem = "asks for gigabytes of memory more than the file has"
    elif status == _FINISHED or ended_by == signal.SIGALRM:
        return
    elif ended_by == signal.SIGXCPU:
        problem = f"is not read within {seconds} s"
    elif ended_by is None:
        problem = f"is not read within {seconds} s, or crashes the process that reads it"
    else:
        problem = "crashes the process that reads it"
    raise SepconvertError(
        f"{label}: refused, its pickle {problem}, as no saved model does; save the state_dict anew"
    )


def _run_child(run: Callable[[], NoReturn]) -> int | None:
    """Call `run` in a forked child process and return the signal that ended it.

    The result is 0 if no signal did, `SIGALRM` if no process could be started, and None if the exit status
    is lost: the kernel discards it if this process ignores SIGCHLD, and another thread may collect it.
    """
    child = 0
    # Ctrl-C between the fork and `run` would otherwise unwind the caller's stack in the child as well.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns that locks of other threads stay locked in the child, hence _MOST_WAITING.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            run()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return max(0, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    except ChildProcessError:
        return None
    except BaseException as error:
        if child:  # Ctrl-C
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        elif isinstance(error, OSError):
            return signal.SIGALRM
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read_within_limits(
    read: Callable[[], object], memory: int, seconds: int, outcome: mmap.mmap
) -> NoReturn:
    """Read within limits, write to `outcome` how that went, and end this process, a child."""
    import resource  # which Windows does not have

    try:
        # Signals that end the child must do so even if the parent handles, ignores or blocks them. Ctrl-C
        # reaches both processes: the parent decides, and kills the child.
        for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
        signal.alarm(_MOST_WAITING)
        # Warnings appear when the parent reads the file, and the parent reports a crash.
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        sys.stdout = sys.stderr = nowhere
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        faulthandler.disable()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: see torch's DataLoader
        taken = psutil.Process().memory_info().vms
        for limit, most in (
            (resource.RLIMIT_AS, taken + memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        read()
        outcome[0] = _FINISHED
    except BaseException as error:
        # torch raises a RuntimeError.
        lacking = isinstance(error, MemoryError) or "allocate memory" in str(error)
        outcome[0] = _NEEDS_MORE_MEMORY if lacking else _FINISHED
    finally:
        os._exit(0)
