"""Several processes that do one job: `accelerate launch -m sepconvert …` or `torchrun -m sepconvert …`.

All of them calibrate, each on its share of the images, and train. Measurements that decide something are
taken in the main process alone, so that all decide alike; it alone writes and prints.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def join() -> None:
    """Join the other processes, if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # Otherwise Accelerate treats CPU-only processes as unrelated runs.
        PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """Return the number of this process; 0 is the main one."""
    return distributed.get_rank() if _joined() else 0


def processes() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _joined() else 1


def gather(value: T) -> list[T]:
    """Return the values that all processes hold, by rank; all of them must call this."""
    if not _joined():
        return [value]
    everyone: list[Any] = [None] * processes()
    distributed.all_gather_object(everyone, value)
    return everyone


def once(function: Callable[[], T]) -> T:
    """Call `function` in the main process, and return its result or raise its error in all."""
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
