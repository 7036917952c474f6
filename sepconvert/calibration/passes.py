"""Forward passes that stop at a convolution and go on later, each in a thread of its own.

Threads, and not greenlets or generators, since the stack of modes through which calls are intercepted belongs
to the thread: a pass that is suspended in the thread of others would leave its interceptor to them.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from queue import SimpleQueue

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.footprint import footprint
from sepconvert.calibration.record import run_on
from sepconvert.network.calls import Call, ConvolutionInterceptor, Kernel, Place
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch


class _CancelledError(BaseException):
    """Raised to unwind a pass that is no longer needed; no `except Exception` of the user's stops it."""


class _Pass(threading.Thread):
    """A forward pass of one batch, in a thread that runs from `go` until it stops at a convolution or ends.

    As many passes run at once as there are threads for operators, and each then has one of them: teams of
    worker threads, one for every pass, would compete (2 cores, 20 batches: 1.5 times as slow).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: InputBatch,
        stops: Set[Place],
        kernels: Mapping[Place, Kernel | None],
        turns: threading.Semaphore,
        threads: int,
    ) -> None:
        super().__init__(daemon=True)
        self._turns, self._threads = turns, threads
        self._model, self._batch, self._stops, self._kernels = private_copy(model), batch, stops, kernels
        self._go: SimpleQueue[None] = SimpleQueue()
        self._arrived: SimpleQueue[Call | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._cancelled = False

    def go(self) -> None:
        """Start, or go on, to the next convolution to stop at."""
        if not self.is_alive():
            self.start()
        else:
            self._go.put(None)

    def arrive(self) -> Call | None:
        """Wait until the pass stops; return the call that it stops at, or None at the end.

        Raises:
            SepconvertError: the model cannot run on the batch.
        """
        call = self._arrived.get()
        if self._error is not None:
            raise self._error
        return call

    def cancel(self) -> None:
        """Unwind the pass, if it has started and not ended."""
        if self.is_alive():
            self._cancelled = True
            self._go.put(None)
            self.join()

    def run(self) -> None:
        """Run the forward pass; called by `Thread.start`."""
        interceptor = ConvolutionInterceptor(self._model, self._on_call)
        self._turns.acquire()
        torch.get_num_threads()  # the first call in a thread sets their number
        try:
            with (
                threadpool_limits(self._threads, "openmp"),
                torch.no_grad(),
                interceptor.watching(),
            ):
                run_on(self._model, self._batch)
        except _CancelledError:
            pass
        except SepconvertError as error:
            self._error = error
        finally:
            self._turns.release()
            self._arrived.put(None)

    def _on_call(self, call: Call) -> Tensor:
        if call.place in self._stops:
            # A forward that catches everything may come here again.
            if not self._cancelled:
                self._turns.release()
                self._arrived.put(call)
                self._go.get()
                self._turns.acquire()
            if self._cancelled:
                raise _CancelledError
        return call.run_with(self._kernels.get(call.place))


def passes_at_once(batches: Mapping[int, InputBatch]) -> int:
    """Return how many batches run at the same time."""
    return min(torch.get_num_threads(), len(batches))


class Passes:
    """The passes of all batches; those for which there is no room to wait start again for each convolution.

    Args:
        model: a copy that no one else uses.
        batches: images by number.
        stops: places to stop at; read again at each step.
        kernels: kernels by place; read again at each step.
        room: bytes for the activations of passes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[int, InputBatch],
        stops: Set[Place],
        kernels: Mapping[Place, Kernel | None],
        room: float,
    ) -> None:
        self._at_once = passes_at_once(batches)
        turns, threads = threading.Semaphore(self._at_once), torch.get_num_threads() // self._at_once
        self._begin = partial(_Pass, model, stops=stops, kernels=kernels, turns=turns, threads=threads)
        self._batches, self._stops = batches, stops
        self._begun: dict[int, _Pass] = {}
        first = next(iter(batches.values()))
        self._footprint = footprint(model, first[:1].inputs)
        self._room = room - self._at_once * len(first) * self._footprint.peak

    def arrivals(self) -> Iterator[tuple[int, Call | None]]:
        """Yield the number of each batch with the call that it stops at next, or with None at the end."""
        numbers, waiting = list(self._batches), self._most_waiting()
        self._cancel(numbers[waiting:])
        yield from self._advance(numbers[:waiting])
        for start in range(waiting, len(numbers), self._at_once):
            some = numbers[start : start + self._at_once]
            yield from self._advance(some)
            self._cancel(some)

    def _most_waiting(self) -> int:
        """Return how many batches may wait at the next stop."""
        held = next((size for place, size in self._footprint.held.items() if place in self._stops), 0)
        bytes_held = held * len(next(iter(self._batches.values())))
        if not bytes_held:
            return len(self._batches)
        return int(max(0, min(self._room // bytes_held, len(self._batches))))

    def _advance(self, numbers: Sequence[int]) -> Iterator[tuple[int, Call | None]]:
        for number in numbers:
            if number not in self._begun:
                self._begun[number] = self._begin(self._batches[number])
        passes = {number: self._begun[number] for number in numbers}
        for running in passes.values():
            running.go()
        # All have arrived before the first is reported: what is done with it needs the processor.
        yield from {number: running.arrive() for number, running in passes.items()}.items()

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._begun:
                self._begun.pop(number).cancel()

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel(list(self._begun))
