"""Kernels and images that the HTML page shows in addition to the document, as tensors."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from sepconvert.base.modules import submodule
from sepconvert.files.data import Batch
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.planning.conversion import LayerReport

_LAYERS = 4


_FILTERS = 12  # of each layer


@dataclass(frozen=True, eq=False)
class KernelPair:
    """Some filters of a layer before and after conversion.

    Both are N × kh × kw: for N output channels, the slice of the input channel with the largest norm.
    """

    layer: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True, eq=False)
class Exhibits:
    """Kernels, and `images` by their index in the data set, each C × H × W as the model takes it."""

    kernels: tuple[KernelPair, ...] = ()
    images: Mapping[int, Tensor] = field(default_factory=dict)


def kernel_pairs(layers: Iterable[LayerReport], converted: nn.Module) -> tuple[KernelPair, ...]:
    """Return the filters of largest norm of the layers whose weights changed most."""
    pairs = []
    changed = [layer for layer in layers if layer.weight_error is not None and layer.site.conv is not None]
    for layer in sorted(changed, key=lambda layer: -(layer.weight_error or 0.0)):
        dense = layer.site.dense.weight.detach().double().cpu()
        module = submodule(converted, layer.plan.name)
        if max(dense.shape[2:]) == 1 or not isinstance(module, FactorizedConv2d):
            continue
        after = module.weight.detach().double().cpu()
        if after.shape != dense.shape:  # another layer was merged into it
            continue
        inputs = torch.linalg.vector_norm(dense, dim=(2, 3)).argmax(1)
        outputs = torch.linalg.vector_norm(dense, dim=(1, 2, 3)).argsort(descending=True)[:_FILTERS]
        shown = outputs, inputs[outputs]
        pairs.append(KernelPair(layer.plan.name, dense[shown], after[shown]))
        if len(pairs) == _LAYERS:
            break
    return tuple(pairs)


def images_at(data: Iterable[Batch], indices: Iterable[int]) -> dict[int, Tensor]:
    """Return samples of a data set by index; if it can be indexed, no others are read."""
    wanted = set(indices)
    if (
        isinstance(data, DataLoader)
        and type(data.sampler) is SequentialSampler
        and type(data.batch_sampler) is BatchSampler
    ):
        return {index: data.collate_fn([data.dataset[index]])[0][0] for index in sorted(wanted)}
    samples = itertools.chain.from_iterable(x for x, *_ in data)
    first = itertools.islice(samples, max(wanted, default=-1) + 1)
    return {index: image for index, image in enumerate(first) if index in wanted}
