"""The geometry and cost of a convolution as plain values, independent of torch."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

MAX_INPUT_ELEMENTS = 2**26  # 256 MiB of float32 for one sample: a larger shape is taken for a typing error


PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvSpec:
    """A two-dimensional convolution `in_channels → out_channels`, as `torch.nn.Conv2d` defines it.

    Axes are (vertical, horizontal). `padding` is (before, after) for each axis, since 'same' is asymmetric
    for even kernels; a negative entry crops.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    bias: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The shape of the kernel, O × C/groups × kh × kw."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """The number of weights, including the bias."""
        return prod(self.weight_shape) + self.bias * self.out_channels

    def output_size(self, size: Pair) -> Pair:
        """Return the height and width of the output for an input of height and width `size`."""
        vertical, horizontal = (
            (size[a] + sum(self.padding[a]) - self.dilation[a] * (self.kernel_size[a] - 1) - 1)
            // self.stride[a]
            + 1
            for a in (0, 1)
        )
        return vertical, horizontal

    def macs(self, size: Pair) -> int:
        """Return the MACs of one sample of height and width `size`, as fvcore counts: without the bias."""
        return prod(self.output_size(size)) * prod(self.weight_shape)

    def with_channels(self, in_channels: int, out_channels: int, groups: int, *, bias: bool) -> "ConvSpec":
        """Return the same geometry between other numbers of channels."""
        return replace(self, in_channels=in_channels, out_channels=out_channels, groups=groups, bias=bias)

    def restricted_to(self, axes: tuple[bool, bool]) -> "ConvSpec":
        """Return the part of the geometry along `axes` (vertical, horizontal), the identity along others.

        Stride, padding, every padding mode and dilation act on each axis separately.
        """
        vertical, horizontal = axes
        return replace(
            self,
            kernel_size=(self.kernel_size[0] if vertical else 1, self.kernel_size[1] if horizontal else 1),
            stride=(self.stride[0] if vertical else 1, self.stride[1] if horizontal else 1),
            padding=(self.padding[0] if vertical else (0, 0), self.padding[1] if horizontal else (0, 0)),
            dilation=(self.dilation[0] if vertical else 1, self.dilation[1] if horizontal else 1),
        )


def chain_macs(chain: tuple[ConvSpec, ...], size: Pair) -> int:
    """Return the MACs of one sample of height and width `size` through convolutions in a row."""
    total = 0
    for spec in chain:
        total += spec.macs(size)
        size = spec.output_size(size)
    return total


def chain_params(chain: tuple[ConvSpec, ...]) -> int:
    """Return the number of weights of convolutions in a row, including biases."""
    return sum(spec.params for spec in chain)
