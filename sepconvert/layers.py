"""Factors → modules."""

from collections.abc import Sequence

from torch import Tensor, nn

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import compose, split
from sepconvert.spec import ConvSpec, PaddingMode

_PADS: dict[PaddingMode, type[nn.Module]] = {
    "zeros": nn.ZeroPad2d,
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}


class FactorizedConv2d(nn.Sequential):
    """Convolutions, applied one after another, that stand where a dense `nn.Conv2d` stood.

    Input N×C×H×W or C×H×W, output as the dense layer's. All parts are plain torch modules. The
    attributes of `nn.Conv2d` that real models read answer for the dense layer; `weight` is composed
    from the factors on each access, differentiable and read-only.
    """

    transposed = False
    output_padding = (0, 0)

    def __init__(self, spec: ConvSpec, scheme: str, rank: int, border: Border) -> None:
        super().__init__()
        self.spec = spec
        self.scheme = scheme
        self.rank = rank
        self.border = border
        for factor in split(spec, scheme, rank, border):
            pads = _pads(factor)
            self.extend(pads)
            self.append(_convolution(factor, padded=bool(pads)))

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The factors, in order of application."""
        return [module for module in self if isinstance(module, nn.Conv2d)]

    def set_factors(
        self, weights: Sequence[Tensor], bias: Tensor | None, *, fixed: bool = False, frozen: bool = False
    ) -> None:
        """Copy the factors' kernels, and the bias of the last.

        `fixed` filters become buffers, as the dense kernel was none of the model's parameters;
        `frozen` ones parameters without gradient.
        """

        def set_tensor(convolution: nn.Conv2d, name: str, value: Tensor) -> None:
            delattr(convolution, name)
            if fixed:
                convolution.register_buffer(name, value.clone())
            else:
                setattr(convolution, name, nn.Parameter(value.clone(), requires_grad=not frozen))

        for convolution, weight in zip(self.convolutions, weights, strict=True):
            set_tensor(convolution, "weight", weight)
        if bias is not None:
            set_tensor(self.convolutions[-1], "bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense kernel O × C/groups × kh × kw that the factors amount to."""
        weights = [convolution.weight for convolution in self.convolutions]
        return compose(self.spec, self.scheme, self.border, weights)

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
        """Name of the structure."""
        return f"{self.scheme}, rank={self.rank}"


def _pads(spec: ConvSpec) -> list[nn.Module]:
    """Padding that `nn.Conv2d` cannot express: asymmetric, or negative where a border was cut."""
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
