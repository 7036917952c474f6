"""Second moments of a layer's inputs, accumulated over sampled output positions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.record import batched, sampled_positions
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.geometry import Pair
from sepconvert.network.trace import ConvSite, resolve_padding

_BLOCKS = 4


@dataclass
class Accumulator:
    """Moments over batches, each centred by itself and then merged, so that large means cancel nothing.

    (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979.)
    """

    site: ConvSite
    positions: int  # in each image
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(
        self, arguments: Mapping[str, Any], generator: torch.Generator, answers: Tensor | None = None
    ) -> None:
        """Take a sample of positions of one batch: x and W x + b as seen, and y if it is another."""
        groups = self.site.dense.spec.groups
        positions = sampled_positions(_output_shape(arguments), self.positions, generator)
        patches = rearrange(_patches(arguments, *positions), "n p i j (g c) -> g (n p) (i j c)", g=groups)
        x, dense = patches.double().cpu(), _convolved(patches, arguments).double().cpu()
        outputs = dense if answers is None else answers.flatten(0, 1).double().cpu()
        missed = outputs - dense
        means = {"x": x.mean(1), "missed": missed.mean(0), "outputs": outputs.mean(0)}
        if not all(mean.isfinite().all() for mean in means.values()):
            raise SepconvertError(
                f"calibration: NaN or Inf reaches the layer {self.site.name}; check the images and the model"
            )
        x -= means["x"][:, None]
        by_group, of_outputs = (
            rearrange(each - means[name], "m (g o) -> g o m", g=groups)
            for name, each in (("missed", missed), ("outputs", outputs))
        )
        sums = {
            "covariance": _gram(x),
            "cross": by_group @ x if by_group.any() else x.new_zeros(groups, by_group.shape[1], x.shape[-1]),
            "missed": by_group @ by_group.mT,
            "outputs": of_outputs @ of_outputs.mT,
        }
        self._combine(x.shape[1], sums, means)

    def _combine(self, count: int, sums: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        if not self.count:
            self.count, self.sums, self.means = count, dict(sums), dict(means)
            return
        total = self.count + count
        moved = {name: means[name] - self.means[name] for name in means}
        x = moved["x"]
        missed, outputs = (moved[name].view(len(x), -1) for name in ("missed", "outputs"))
        for name, left, right in (
            ("covariance", x, x),
            ("cross", missed, x),
            ("missed", missed, missed),
            ("outputs", outputs, outputs),
        ):
            self.sums[name] += sums[name]
            self.sums[name].baddbmm_(left[:, :, None], right[:, None, :], alpha=self.count * count / total)
        for name, value in moved.items():
            self.means[name] = self.means[name] + count / total * value
        self.count = total

    def moments(self) -> Moments:
        """Of all that was added, in all processes."""
        everyone = gather((self.count, self.sums, self.means))
        self.count = 0
        for count, sums, means in everyone:
            if count:
                self._combine(count, sums, means)
        height, width = self.site.dense.spec.kernel_size

        def channels_first(value: Tensor) -> Tensor:
            return rearrange(value, "... (i j c) -> ... (c i j)", i=height, j=width)

        lower = self.sums["covariance"].tril() / self.count
        covariance = channels_first(channels_first(lower + lower.tril(-1).mT).mT)
        return Moments(
            count=self.count,
            covariance=covariance,
            cross=channels_first(self.sums["cross"]) / self.count,
            mean=channels_first(self.means["x"]),
            missed=self.means["missed"],
            missed_covariance=self.sums["missed"] / self.count,
            output_covariance=self.sums["outputs"] / self.count,
        )


def _gram(x: Tensor) -> Tensor:
    """The lower triangle of XᵀX for each of g × n × k; most of what is above it is not computed.

    By blocks, since a routine of another library (BLAS's syrk) brings threads that get in the way of torch's.
    """
    products = x.new_zeros(len(x), x.shape[2], x.shape[2])
    for rows in torch.arange(x.shape[2]).tensor_split(_BLOCKS):
        if len(rows):
            first, end = int(rows[0]), int(rows[-1]) + 1
            products[:, first:, first:end] = x[..., first:].mT @ x[..., first:end]
    return products


def _output_shape(arguments: Mapping[str, Any]) -> torch.Size:
    """N × O × H × W of what a convolution with these arguments returns."""
    inputs, weight = batched(arguments["input"]), arguments["weight"]
    stride, dilation, padding = _geometry(arguments)
    height, width = (
        (size + sum(around) - step * (kernel - 1) - 1) // pace + 1
        for size, around, step, kernel, pace in zip(
            inputs.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    )
    return torch.Size((len(inputs), len(weight), height, width))


def _convolved(patches: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """W x + b of patches g × M × (i j c), as M × O."""
    weight = rearrange(arguments["weight"], "(g o) c i j -> g (i j c) o", g=len(patches))
    precise = torch.promote_types(weight.dtype, torch.float32)
    products: Tensor = rearrange(patches.to(precise) @ weight.to(precise), "g m o -> m (g o)")
    return products if arguments.get("bias") is None else products + arguments["bias"].to(precise)


def _patches(arguments: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """What the convolution reads for these output positions: N × P × kh × kw × C."""
    inputs, weight = batched(arguments["input"]), arguments["weight"]
    size = tuple(weight.shape[2:])
    stride, dilation, ((top, bottom), (left, right)) = _geometry(arguments)
    padded = F.pad(inputs, (left, right, top, bottom))
    down = rows[..., None] * stride[0] + torch.arange(size[0]) * dilation[0]
    across = columns[..., None] * stride[1] + torch.arange(size[1]) * dilation[1]
    images = torch.arange(len(inputs))[:, None, None, None]
    # Advanced indices on both sides of the channels come first: N × P × kh × kw × C.
    found: Tensor = padded[images, :, down[..., :, None], across[..., None, :]]
    return found


def _geometry(arguments: Mapping[str, Any]) -> tuple[Pair, Pair, tuple[Pair, Pair]]:
    """Stride, dilation, and padding before and after, each down and across."""
    stride, dilation = (_pair(arguments.get(name, 1)) for name in ("stride", "dilation"))
    size = tuple(arguments["weight"].shape[2:])
    return stride, dilation, resolve_padding(arguments.get("padding", 0), size, dilation)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])
