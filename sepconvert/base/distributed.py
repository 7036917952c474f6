"""Several processes that do one job: `accelerate launch -m sepconvert …` or `torchrun -m sepconvert …`.

All of them calibrate, on a share of the images each, and train; what a decision hangs on is measured in
the main process alone, so that all decide alike. It alone writes and prints.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def join() -> None:
    """Meet the other processes, if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # Unless it is told, Accelerate takes several processes without GPUs for strangers.
        PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """Number of this process; 0 is the main one."""
    return distributed.get_rank() if _joined() else 0


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if _joined() else 1


def gather(value: T) -> list[T]:
    """What each process holds, by rank; all must call it."""
    if not _joined():
        return [value]
    everyone: list[Any] = [None] * processes()
    distributed.all_gather_object(everyone, value)
    return everyone


def once(function: Callable[[], T]) -> T:
    """Call `function` in the main process, and give its result, or raise its error, in all."""
    if not _joined():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # the others wait for it
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
