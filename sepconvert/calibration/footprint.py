"""Memory: what a forward pass needs, how many images fit into it at once, and how much is available."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import psutil
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.network.calls import Call, ConvolutionInterceptor, Place
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch, Inputs, fresh, tensors_in

AT_ONCE = 2**29
"""Bytes of activations alive at once to which batches are limited, whatever memory the machine has."""


_SHARE = 0.5  # of the free memory


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations of one sample, its input included.

    `held` gives, in the order of execution, the bytes alive when a convolution is about to be called; of
    several calls the last one counts.
    """

    peak: int  # most that is alive at once
    total: int  # of all activations, which a backward pass may need
    held: Mapping[Place, int]

    def differentiated(self, most: int) -> int:
        """Return how many samples, `most` at most, can pass forwards and backwards within `AT_ONCE`."""
        return max(1, min(most, AT_ONCE // max(self.total, 1)))


def footprint(model: nn.Module, inputs: Inputs) -> Footprint:
    """Measure a forward pass on `inputs`, a batch of one; raise whatever the forward pass raises."""
    private = private_copy(model)
    given = sum(value.numel() * value.element_size() for value in tensors_in(inputs))
    held: dict[Place, int] = {}

    def on_call(call: Call) -> Tensor:
        held[call.place] = given + counter.live
        return call.run()

    counter, values = _LiveBytes(), fresh(inputs)
    with torch.no_grad(), counter, ConvolutionInterceptor(private, on_call).watching():
        private(*values)
    return Footprint(given + counter.peak, given + counter.total, held)


def images_at_once(model: nn.Module, samples: InputBatch, most: int) -> int:
    """Return how many samples, `most` at most, can pass within `AT_ONCE`, going by the first of some.

    An ONNX file may fix the number.
    """
    if isinstance(model, OnnxNetwork) and model.batch is not None:
        return model.batch
    return max(1, min(most, AT_ONCE // max(footprint(model, samples[:1].inputs).peak, 1)))


def allowance(memory: float | None) -> int:
    """Return the bytes that may be used: `memory` less what the process holds, or half of the free ones."""
    free = psutil.virtual_memory().available
    if memory is None:
        return int(_SHARE * free)
    return max(0, min(int(memory) - psutil.Process().memory_info().rss, free))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of tensors made meanwhile: those alive now, the most alive at once, and all."""

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
