"""Networks whose classes use names of `nn.Module` for themselves, and that torch runs all the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Without `forward`, which torch calls: a value there would stop the model itself.
NAMES = [name for name in dir(nn.Module) if not name.startswith("_") and name != "forward"]
OTHERS = ["name", "device", "dtype", "T", "training_step", "hparams"]


class Shadowing(nn.Module):
    """Layers, and values of its own under the given names, which its forward reads."""

    def __init__(self, layers: dict[str, nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        self._modules.update(layers)
        self.own = tuple(names)
        for name in names:
            setattr(self, name, [name])

    def forward(self, x: Tensor) -> Tensor:
        assert all(getattr(self, name) == [name] for name in self.own)
        for layer in self._modules.values():
            x = layer(x)
        return x


class Compared(Shadowing):
    """A class without a hash, that is empty and false, and equal to everything."""

    def __init__(self, layers: dict[str, nn.Module] | None = None, names: Sequence[str] = ()) -> None:
        super().__init__(layers or {}, names)

    def __eq__(self, other: object) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(())


class AnswersAll(Compared):
    """A class that has every attribute."""

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return "anything"


def shadowing_net(
    names: Sequence[str], outer: type[Shadowing] = Shadowing, inner: type[Shadowing] = Shadowing
) -> Shadowing:
    """A network in eval mode whose convolutions `stem` and `block.conv` have separable kernels 5×5."""
    torch.manual_seed(0)
    block = inner({"conv": separable(8, 8), "norm": nn.BatchNorm2d(8), "act": nn.ReLU()}, names)
    layers = {"stem": separable(3, 8), "block": block, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    model = outer({**layers, "head": nn.Linear(8, 4)}, names)
    for module in (model, block, *model._modules.values(), *block._modules.values()):
        module.training = False  # not eval(), which may be shadowed
    return model


def all_shadowed() -> Shadowing:
    """The network of which both classes shadow every name at once."""
    return shadowing_net([*NAMES, *OTHERS])


def separable(channels: int, filters: int) -> nn.Conv2d:
    """A convolution whose kernel is a product of one vector for each axis."""
    conv = nn.Conv2d(channels, filters, 5, padding=2)
    vectors = [torch.randn(size) / size**0.5 for size in conv.weight.shape]
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("o,c,i,j->ocij", *vectors))
    return conv
