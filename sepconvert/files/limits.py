"""Limits of memory and time for files whose reading costs more than their size suggests.

torch's restricted unpickler runs no code, but a few bytes suffice to make it allocate gigabytes
(`bytearray(9_000_000_000)`), or hash a tuple that holds one tuple twice, and so on, 40 levels deep.
"""

import faulthandler
import os
import pickletools
import signal
import sys
import warnings
from collections.abc import Callable
from typing import BinaryIO, NoReturn

import psutil
import torch

from sepconvert.base.errors import SepconvertError

_MOST_INSTRUCTIONS = 2 * 10**6  # some seconds
_MEMORY = 2**30  # bytes, beyond twice the size of the file
_PROCESSOR_SECONDS = 5
_BYTES_PER_SECOND = 2**26
_MOST_WAITING = 60  # seconds, after which the child process is given up and nothing is refused

_ENDS_WELL, _NEEDS_MORE_MEMORY = 0, 3


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
    apply to the child alone, so nothing has to be restored and any thread may call this. On other systems,
    where forking is unsafe or the address space cannot be limited, nothing is checked.

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
    with warnings.catch_warnings():
        # Python 3.12 warns that locks of other threads stay locked in the child: _MOST_WAITING is for these.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _read_within_limits(read, 2 * size + _MEMORY, seconds)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # Ctrl-C
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if status == _NEEDS_MORE_MEMORY:
        problem = "asks for gigabytes of memory more than the file has"
    elif status == -signal.SIGXCPU:
        problem = f"is not read within {seconds} s"
    elif status not in (_ENDS_WELL, -signal.SIGALRM):
        problem = "crashes the process that reads it"
    else:
        return
    raise SepconvertError(
        f"{label}: refused, its pickle {problem}, as no saved model does; save the state_dict anew"
    )


def _read_within_limits(read: Callable[[], object], memory: int, seconds: int) -> NoReturn:
    """End this process, a child, with a status that says how reading went."""
    import resource  # which Windows does not have

    status = _ENDS_WELL
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # warnings appear when the parent reads the file
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        faulthandler.disable()  # the parent reports a crash
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: see torch's DataLoader
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_MOST_WAITING)
        taken = psutil.Process().memory_info().vms
        for limit, most in (
            (resource.RLIMIT_AS, taken + memory),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        read()
    except BaseException as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch raises a RuntimeError
            status = _NEEDS_MORE_MEMORY
    finally:
        os._exit(status)
