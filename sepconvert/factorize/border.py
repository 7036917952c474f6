"""Zero borders: a kernel whose outer rows or columns are zero equals a smaller kernel with less padding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconvert.factorize.geometry import ConvSpec


@dataclass(frozen=True)
class Border:
    """Numbers of rows and columns to cut from each side of a kernel."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def __bool__(self) -> bool:
        return any((self.top, self.bottom, self.left, self.right))

    def trim_spec(self, spec: ConvSpec) -> ConvSpec:
        """Return the geometry of the convolution without the border.

        Its padding is smaller by what is cut, times the dilation; negative padding crops the input.
        """
        (kh, kw), (dh, dw) = spec.kernel_size, spec.dilation
        (pad_top, pad_bottom), (pad_left, pad_right) = spec.padding
        return replace(
            spec,
            kernel_size=(kh - self.top - self.bottom, kw - self.left - self.right),
            padding=(
                (pad_top - dh * self.top, pad_bottom - dh * self.bottom),
                (pad_left - dw * self.left, pad_right - dw * self.right),
            ),
        )

    def trim(self, weight: Tensor) -> Tensor:
        """Return a kernel … × kh × kw without its border."""
        kh, kw = weight.shape[-2:]
        return weight[..., self.top : kh - self.bottom, self.left : kw - self.right]

    def restore(self, weight: Tensor) -> Tensor:
        """Return a trimmed kernel … × kh × kw with its border of zeros; the inverse of `trim`."""
        return F.pad(weight, (self.left, self.right, self.top, self.bottom))


def zero_border(weight: Tensor, allowance: Tensor) -> Border:
    """Return the widest border that can be cut, leaving at least one tap.

    Args:
        weight: kernel O × C/g × kh × kw.
        allowance: Frobenius norm that may be cut from each output channel, O or broadcastable to it.
    """
    energy = weight.double().square().sum(dim=1)
    budget = allowance.double().square()
    border = Border()
    for side in ("top", "bottom", "left", "right"):
        while True:
            wider = replace(border, **{side: getattr(border, side) + 1})
            kept = wider.trim(energy)
            # Cut and kept taps are separated before they are summed: a difference of sums would leave a
            # rounding error where the cut part is zero.
            if kept.numel() == 0 or bool(torch.any((energy - wider.restore(kept)).sum(dim=(1, 2)) > budget)):
                break
            border = wider
    return border
