"""Memory: what a forward pass takes, how many images may pass at once, and what there is to take."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import psutil
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.network.calls import ConvolutionInterceptor
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, fresh, tensors_in

AT_ONCE = 2**29
"""Bytes of activations alive at once that a batch is cut to, whatever memory the machine has."""


_SHARE = 0.5  # of the memory that is free


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations of one sample, its input included.

    `held`, in the order of execution, are those alive where a convolution is about to be called, by path of
    the module that calls it and position among its calls; what it was called last counts.
    """

    peak: int  # alive at once
    total: int  # of all that is made, which a backward pass may need
    held: Mapping[tuple[str, int], int]

    def differentiated(self, most: int) -> int:
        """Samples that pass at once, forwards and backwards, within `AT_ONCE`, at most."""
        return max(1, min(most, AT_ONCE // max(self.total, 1)))


def footprint(model: nn.Module, inputs: Inputs) -> Footprint:
    """Of `inputs`, a batch of one; raises whatever the forward pass raises."""
    private = private_copy(model)
    names = {module: name for name, module in private.named_modules()}
    given = sum(value.numel() * value.element_size() for value in tensors_in(inputs))
    held: dict[tuple[str, int], int] = {}

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        held[names[module], index] = given + counter.live
        return call()

    counter, values = _LiveBytes(), fresh(inputs)
    with torch.no_grad(), counter, ConvolutionInterceptor(private, on_call).watching():
        private(*values)
    return Footprint(given + counter.peak, given + counter.total, held)


def images_at_once(model: nn.Module, inputs: Inputs, most: int) -> int:
    """Samples that pass at once within `AT_ONCE`, at most; `inputs` are any batch."""
    first = pytree.tree_map_only(Tensor, lambda value: value[:1] if value.ndim else value, inputs)
    return max(1, min(most, AT_ONCE // max(footprint(model, first).peak, 1)))


def allowance(memory: float | None) -> int:
    """Bytes that may be taken: what `memory` leaves beside what the process has, or half of what is free."""
    free = psutil.virtual_memory().available
    if memory is None:
        return int(_SHARE * free)
    return max(0, min(int(memory) - psutil.Process().memory_info().rss, free))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Bytes of the tensors made in here: alive now, the most alive at once, and all of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._known: set[int] = set()
        self.live = self.peak = self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = set(_storages(args))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.total += storage.nbytes()
                    finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(values: Any) -> Iterable[int]:
    return (
        value.untyped_storage()._cdata for value in pytree.tree_leaves(values) if isinstance(value, Tensor)
    )
