"""Kernels and images that the HTML page shows in addition to the document, as tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sepconvert.base.modules import submodule
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.planning.conversion import LayerReport
from sepconvert.report.pictures.samples import ChangedSamples

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
    """Kernels, and samples that changed.

    `images` are those whose predicted class changed, by index in the data set, C × H × W as the model takes
    them; `changed` are samples of models that are no classifiers.
    """

    kernels: tuple[KernelPair, ...] = ()
    images: Mapping[int, Tensor] = field(default_factory=dict)
    changed: ChangedSamples = field(default_factory=ChangedSamples)


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
