"""Forward passes that stop at a convolution and go on later, each in a thread of its own."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.footprint import footprint
from sepconvert.calibration.record import Kernel, Place, call_with, module_names, run_on
from sepconvert.network.calls import ConvolutionInterceptor
from sepconvert.network.copies import private_copy


class _CancelledError(BaseException):
    """Unwinds a pass that is not wanted any more; no `except Exception` of the user's stops it."""


class _Pass(threading.Thread):
    """One batch through the network, in a thread of its own that runs only from `go` until it has `come`.

    As many run at once as there are threads for operators, each of which then has one to itself: a team of
    workers for every pass would get in each other's way (2 cores, 20 batches: half as slow again).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Tensor,
        stops: Set[Place],
        kernels: Mapping[Place, Kernel | None],
        turns: threading.Semaphore,
        threads: int,
    ) -> None:
        super().__init__(daemon=True)
        self._turns, self._threads = turns, threads
        self._model, self._batch, self._stops, self._kernels = private_copy(model), batch, stops, kernels
        self._go: SimpleQueue[None] = SimpleQueue()
        self._came: SimpleQueue[Place | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._cancelled = False
        self._names = module_names(self._model)
        self.seen: Mapping[str, Any]  # arguments of the convolution at which it waits

    def go(self) -> None:
        """On to the next convolution to stop at."""
        if not self.is_alive():
            self.start()
        else:
            self._go.put(None)

    def come(self) -> Place | None:
        """Wait for it; None at the end."""
        key = self._came.get()
        if self._error is not None:
            raise self._error
        return key

    def cancel(self) -> None:
        """Unwind, if it has begun and not ended."""
        if self.is_alive():
            self._cancelled = True
            self._go.put(None)
            self.join()

    def run(self) -> None:
        """The forward pass."""
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
            self._came.put(None)

    def _on_call(
        self,
        module: nn.Module,
        index: int,
        function: str,
        arguments: dict[str, Any],
        call: Callable[..., Tensor],
    ) -> Tensor:
        key = self._names[module], index
        if key in self._stops:
            self.seen = arguments
            # A forward that catches everything may come here again.
            if not self._cancelled:
                self._turns.release()
                self._came.put(key)
                self._go.get()
                self._turns.acquire()
            if self._cancelled:
                raise _CancelledError
            del self.seen
        kernel = self._kernels.get(key)
        return call() if kernel is None else call_with(kernel, arguments, call)


def passes_at_once(batches: Mapping[int, Tensor]) -> int:
    """Batches that run at the same time."""
    return min(torch.get_num_threads(), len(batches))


class Passes:
    """All batches on their way; those for which there is no room to wait begin anew for each convolution."""

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[int, Tensor],
        stops: Set[Place],
        kernels: Mapping[Place, Kernel | None],
        room: float,
    ) -> None:
        """`stops` and `kernels` are read again at each step; `room` is in bytes."""
        self._at_once = passes_at_once(batches)
        turns, threads = threading.Semaphore(self._at_once), torch.get_num_threads() // self._at_once
        self._begin = partial(_Pass, model, stops=stops, kernels=kernels, turns=turns, threads=threads)
        self._batches, self._stops = batches, stops
        self._begun: dict[int, _Pass] = {}
        first = next(iter(batches.values()))
        self._footprint = footprint(model, (first[:1],))
        self._room = room - self._at_once * len(first) * self._footprint.peak

    def arrivals(self) -> Iterator[tuple[int, Place | None, Mapping[str, Any]]]:
        """Each batch where it stops next, None at the end, and what the convolution there is given."""
        numbers, waiting = list(self._batches), self._most_waiting()
        self._cancel(numbers[waiting:])
        yield from self._advance(numbers[:waiting])
        for start in range(waiting, len(numbers), self._at_once):
            some = numbers[start : start + self._at_once]
            yield from self._advance(some)
            self._cancel(some)

    def _most_waiting(self) -> int:
        """Batches that may wait at the next stop."""
        held = next((size for key, size in self._footprint.held.items() if key in self._stops), 0)
        each = held * len(next(iter(self._batches.values())))
        return len(self._batches) if not each else int(max(0, min(self._room // each, len(self._batches))))

    def _advance(self, numbers: Sequence[int]) -> Iterator[tuple[int, Place | None, Mapping[str, Any]]]:
        for number in numbers:
            if number not in self._begun:
                self._begun[number] = self._begin(self._batches[number])
        passes = {number: self._begun[number] for number in numbers}
        for each in passes.values():
            each.go()
        arrived = {number: each.come() for number, each in passes.items()}
        for number, key in arrived.items():
            yield number, key, {} if key is None else passes[number].seen

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._begun:
                self._begun.pop(number).cancel()

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel(list(self._begun))
