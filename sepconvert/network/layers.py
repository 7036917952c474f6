"""Modules that hold the factors of a convolution and stand in its place."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.factors import branches, compose_factors
from sepconvert.factorize.geometry import ConvSpec, PaddingMode

_PADS: dict[PaddingMode, type[nn.Module]] = {
    "zeros": nn.ZeroPad2d,
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}


class FactorizedConv2d(nn.Module):
    """Small convolutions in the place of a dense `nn.Conv2d`.

    The input is N×C×H×W or C×H×W, the output that of the dense layer: the sum of `branches`, each a chain of
    plain torch modules. The attributes of `nn.Conv2d` that real models read describe the dense layer;
    `weight` is composed from the factors on each access, differentiable and read-only.
    """

    transposed = False
    output_padding = (0, 0)

    def __init__(self, spec: ConvSpec, scheme: str, rank: int, border: Border) -> None:
        super().__init__()
        self.spec = spec
        self.scheme = scheme
        self.rank = rank
        self.border = border
        self.branches = nn.ModuleList(
            nn.Sequential(*(module for factor in chain for module in _modules(factor)))
            for chain in branches(spec, scheme, rank, border)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches' outputs for the input `x`."""
        first, *others = self.branches
        output: Tensor = first(x)
        for branch in others:
            output = output + branch(x)
        return output

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The factors, branch by branch in order of application."""
        return [module for branch in self.branches for module in _convolutions(branch)]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The kernels of all branches joined, in the shapes that the structure defines."""
        kernels = [[convolution.weight for convolution in _convolutions(branch)] for branch in self.branches]
        # The inner dimension, over which branches are summed, is the last part of the first kernel's
        # output channels and of the second's input channels.
        return tuple(
            torch.stack(parts, 1 + position).flatten(position, 1 + position)
            for position, parts in enumerate(zip(*kernels, strict=True))
        )

    def set_factors(
        self,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        *,
        fixed: bool = False,
        frozen: Collection[str] = (),
    ) -> None:
        """Copy kernels and bias into the convolutions.

        Args:
            weights: kernels as in `factors`.
            bias: of the last convolution.
            fixed: make them buffers, for a dense kernel that was no parameter of the model.
            frozen: "weight" and "bias", as far as they are to be parameters without gradient.
        """

        def set_tensor(convolution: nn.Conv2d, name: str, value: Tensor) -> None:
            value = value.clone(memory_format=torch.contiguous_format)
            delattr(convolution, name)
            if fixed:
                convolution.register_buffer(name, value)
            else:
                setattr(convolution, name, nn.Parameter(value, requires_grad=name not in frozen))

        count = len(self.branches)
        for index, branch in enumerate(self.branches):
            parts = (
                weight[(slice(None),) * position + (slice(index, None, count),)]
                for position, weight in enumerate(weights)
            )
            for convolution, weight in zip(_convolutions(branch), parts, strict=True):
                set_tensor(convolution, "weight", weight)
        if bias is not None:
            set_tensor(self.convolutions[-1], "bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense kernel O × C/groups × kh × kw that the factors compose."""
        return compose_factors(self.spec, self.scheme, self.border, self.factors)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the last factor."""
        return self.convolutions[-1].bias

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.spec.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.spec.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Extent of the dense kernel."""
        return self.spec.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        """Stride of the dense layer."""
        return self.spec.stride

    @property
    def padding(self) -> tuple[int, int] | str:
        """Padding of the dense layer, 'same' where it is not the same on both sides."""
        (top, bottom), (left, right) = self.spec.padding
        return (top, left) if (top, left) == (bottom, right) else "same"

    @property
    def dilation(self) -> tuple[int, int]:
        """Dilation of the dense layer."""
        return self.spec.dilation

    @property
    def groups(self) -> int:
        """Groups of the dense layer."""
        return self.spec.groups

    @property
    def padding_mode(self) -> str:
        """Padding mode of the dense layer."""
        return self.spec.padding_mode

    def extra_repr(self) -> str:
        """Return the name of the structure and the rank, for `repr`."""
        return f"{self.scheme}, rank={self.rank}"


class Conv(nn.Conv2d):
    """A convolution of an ONNX graph, with further names that it goes by there."""

    labels: tuple[str, ...] = ()


class ListedConvolution(nn.Module):
    """Stands for a convolution that another runtime runs, and says why it cannot be replaced.

    Attributes:
        operator: its kind there.
        obstacle: the reason.
        params: number of its weights.
        macs: those of one sample, where they are known.
    """

    macs = 0

    def __init__(self, operator: str, obstacle: str, params: int) -> None:
        super().__init__()
        self.operator = operator
        self.obstacle = obstacle
        self.params = params


def _convolutions(branch: nn.Module) -> list[nn.Conv2d]:
    return [module for module in branch._modules.values() if isinstance(module, nn.Conv2d)]


def _modules(spec: ConvSpec) -> list[nn.Module]:
    pads = _pads(spec)
    return [*pads, _convolution(spec, padded=bool(pads))]


def _pads(spec: ConvSpec) -> list[nn.Module]:
    """Modules for padding that `nn.Conv2d` cannot express: asymmetric, or negative where a border was cut."""
    (top, bottom), (left, right) = spec.padding
    if top == bottom >= 0 and left == right >= 0:
        return []
    widths = (left, right, top, bottom)
    # Padding comes before cropping: a circular margin is taken from the far side of the whole input.
    pads: list[nn.Module] = []
    if any(width > 0 for width in widths):
        pads.append(_PADS[spec.padding_mode]((max(left, 0), max(right, 0), max(top, 0), max(bottom, 0))))
    if any(width < 0 for width in widths):
        pads.append(nn.ZeroPad2d((min(left, 0), min(right, 0), min(top, 0), min(bottom, 0))))
    return pads


def _convolution(spec: ConvSpec, *, padded: bool) -> nn.Conv2d:
    return nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=0 if padded else (spec.padding[0][0], spec.padding[1][0]),
        dilation=spec.dilation,
        groups=spec.groups,
        bias=spec.bias,
        padding_mode="zeros" if padded else spec.padding_mode,
        device="meta",
    )
