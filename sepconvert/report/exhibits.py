"""What the page shows besides the document: kernels and images, as tensors."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from sepconvert.files.data import Batch
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.planning.conversion import LayerReport

_LAYERS = 4


_FILTERS = 12


@dataclass(frozen=True, eq=False)
class KernelPair:
    """Some filters of a layer before and after, n × kh × kw: of n output channels the slice of one input."""

    layer: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True, eq=False)
class Exhibits:
    """Pictures in the making; `images` by their index in the data, C × H × W as the model takes them."""

    kernels: tuple[KernelPair, ...] = ()
    images: Mapping[int, Tensor] = field(default_factory=dict)


def kernel_pairs(layers: Iterable[LayerReport], converted: nn.Module) -> tuple[KernelPair, ...]:
    """Of the layers whose weights moved most: their filters of the largest norm."""
    found = []
    moved = [each for each in layers if each.weight_error is not None and each.site.conv is not None]
    for layer in sorted(moved, key=lambda each: -(each.weight_error or 0.0)):
        dense = layer.site.dense.weight.detach().double().cpu()
        module = converted.get_submodule(layer.plan.name)
        if max(dense.shape[2:]) == 1 or not isinstance(module, FactorizedConv2d):
            continue
        after = module.weight.detach().double().cpu()
        if after.shape != dense.shape:  # it has taken in another layer
            continue
        inputs = torch.linalg.vector_norm(dense, dim=(2, 3)).argmax(1)
        outputs = torch.linalg.vector_norm(dense, dim=(1, 2, 3)).argsort(descending=True)[:_FILTERS]
        found.append(
            KernelPair(layer.plan.name, *(each[outputs, inputs[outputs]] for each in (dense, after)))
        )
        if len(found) == _LAYERS:
            break
    return tuple(found)


def images_at(data: Iterable[Batch], indices: Iterable[int]) -> dict[int, Tensor]:
    """Samples of a data set by their index; only these are read where it can be indexed."""
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
