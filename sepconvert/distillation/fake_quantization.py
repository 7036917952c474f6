"""Fake quantization of a model in training, by torch's own modules, as its int8 form will have it.

Kernels of convolutions and matrix products are rounded for each output channel, and their inputs as a whole:
behind the activation before them, where a runtime rounds them too. BatchNorms stay: one behind a convolution
multiplies its output channels, which have scales of their own in any case.
"""

from collections.abc import Collection

from torch import Tensor, nn, per_channel_symmetric, per_tensor_affine, qint8, quint8
from torch.ao.quantization import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.nn.utils import parametrize

from sepconvert.base.modules import unshadowed
from sepconvert.network.copies import duplicate
from sepconvert.network.tensors import InputBatch

_ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_ORIGINAL = "parametrizations.weight.original"  # where a kernel is kept


_INPUT = "sepconvert_input"  # name of the part of a module that rounds its input


def with_fake_quantization(
    model: nn.Module, levels: int, example: InputBatch, kept: Collection[str] = ()
) -> nn.Module:
    """Return a copy that computes with kernels and inputs rounded to int8, and is differentiable.

    Args:
        model: left as it is.
        levels: steps of a weight on either side of 0: 127, or 64 in a reduced range.
        example: inputs, by which ranges begin; they follow those of training.
        kept: names of modules that stay in floating point.
    """
    copied = duplicate(model)
    for name, module in unshadowed(copied).named_modules():
        if name not in kept and isinstance(module, _ROUNDED) and not parametrize.is_parametrized(module):
            nn.Module.register_module(module, _INPUT, _of_values())
            nn.Module.register_forward_pre_hook(module, _round_input)
            parametrize.register_parametrization(module, "weight", _of_weights(levels), unsafe=True)
    example.on(copied).run(copied)
    return copied


def without_fake_quantization(trained: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of a model with the weights that its fake-quantized copy has been trained to."""
    # Not by `remove_parametrizations`: the class that it restores is shared by all copies of the trained one.
    copied = duplicate(model)
    found = unshadowed(trained).state_dict()
    plain = unshadowed(copied)
    plain.load_state_dict(
        {
            name: found[name] if name in found else found[_ORIGINAL.join(name.rsplit("weight", 1))]
            for name in plain.state_dict()
        }
    )
    return copied


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *others = inputs
    return (module._modules[_INPUT](first), *others)  # type: ignore[misc]


def _of_values() -> FusedMovingAvgObsFakeQuantize:
    return FusedMovingAvgObsFakeQuantize(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=quint8,
        qscheme=per_tensor_affine,
    )  # fmt: skip


def _of_weights(levels: int) -> FakeQuantize:
    # Not the fused one, whose scales of symmetric integers are 0.4 % too large.
    return FakeQuantize(  # type: ignore[no-untyped-call]
        observer=MovingAveragePerChannelMinMaxObserver, quant_min=-levels, quant_max=levels, dtype=qint8,
        qscheme=per_channel_symmetric, ch_axis=0, averaging_constant=1.0,
    )  # fmt: skip
