"""Second moments of a layer's inputs, accumulated over sampled output positions.

The products of a batch are summed in the precision of the model, those of all batches in double precision. A
sum of n products in single precision is off by at most n ε of the norms of its factors: for the thousand or
so positions of a batch, 6e-5 of the variances, and about √n ε = 2e-6 as roundings happen. The fits add a
thousandth of the mean variance to all of them (`RIDGE`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.record import Sampling, batched
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.network.calls import Call
from sepconvert.network.trace import ConvSite

_BLOCKS = 4


@dataclass
class Accumulator:
    """Moments over batches, each centred on its own mean and then merged, so that large means cancel nothing.

    (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979.)
    """

    site: ConvSite
    sampling: Sampling
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    _products: dict[int, Tensor] = field(default_factory=dict)  # memory of products, by block of rows

    @torch.no_grad()
    def add(self, call: Call, number: int, expected: Tensor | None = None) -> None:
        """Add the sampled positions of a batch.

        Args:
            call: of the layer, with the batch as its input x.
            number: of the batch.
            expected: outputs N × P × O of the original at these positions; None if they are W x + b.

        Raises:
            SepconvertError: inputs or outputs hold NaN or Inf.
        """
        groups, spec, inputs = self.site.dense.spec.groups, call.spec, batched(call.arguments["input"])
        shape = len(inputs), spec.out_channels, *spec.output_size((inputs.shape[2], inputs.shape[3]))
        read = _patches(inputs, spec, *self.sampling.positions(self.site, number, shape))
        patches = rearrange(read, "n p i j (g c) -> g (n p) (i j c)", g=groups)
        precise = torch.promote_types(patches.dtype, torch.float32)
        x, dense = patches.to(precise).cpu(), _convolved(patches, call).to(precise).cpu()
        outputs = dense if expected is None else expected.flatten(0, 1).to(precise).cpu()
        residual = outputs - dense
        means = {
            "x": x.mean(1, dtype=torch.float64),
            "residual": residual.mean(0, dtype=torch.float64),
            "outputs": outputs.mean(0, dtype=torch.float64),
        }
        if not all(mean.isfinite().all() for mean in means.values()):
            raise SepconvertError(
                f"calibration: NaN or Inf reaches the layer {self.site.name}; check the images and the model"
            )
        x = x - means["x"].to(precise)[:, None]
        by_group, of_outputs = (
            rearrange(value - means[name].to(precise), "m (g o) -> g o m", g=groups)
            for name, value in (("residual", residual), ("outputs", outputs))
        )
        if not self.sums:
            self._begin(groups, by_group.shape[1], x.shape[-1])
        self._add_gram(x)
        if by_group.any():
            self.sums["cross"] += by_group @ x
        self.sums["residual"] += by_group @ by_group.mT
        self.sums["outputs"] += of_outputs @ of_outputs.mT
        self._move(x.shape[1], means)

    def _begin(self, groups: int, outputs: int, unknowns: int) -> None:
        shapes = {"covariance": (unknowns, unknowns), "cross": (outputs, unknowns)}
        shapes |= dict.fromkeys(("residual", "outputs"), (outputs, outputs))
        self.sums = {name: torch.zeros(groups, *shape, dtype=torch.float64) for name, shape in shapes.items()}

    def _add_gram(self, x: Tensor) -> None:
        """Add XᵀX to the lower triangle of the covariance; most of the upper one is not computed.

        It is computed by blocks, since the threads of another library's routine (BLAS's syrk) would compete
        with torch's. The products have memory of their own: to take new pages of it from the system for each
        batch takes as long as to compute them.
        """
        for rows in torch.arange(x.shape[2]).tensor_split(_BLOCKS):
            if len(rows):
                first, end = int(rows[0]), int(rows[-1]) + 1
                shape = len(x), x.shape[2] - first, end - first
                if first not in self._products:
                    self._products[first] = x.new_empty(shape)
                product = torch.bmm(x[..., first:].mT, x[..., first:end], out=self._products[first])
                self.sums["covariance"][:, first:, first:end] += product

    def _combine(self, count: int, sums: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        if not self.count:
            self.count, self.sums, self.means = count, dict(sums), dict(means)
            return
        for name, value in sums.items():
            self.sums[name] += value
        self._move(count, means)

    def _move(self, count: int, means: Mapping[str, Tensor]) -> None:
        """Take the means of `count` more positions, whose centred products are in the sums already."""
        if not self.count:
            self.count, self.means = count, dict(means)
            return
        total = self.count + count
        moved = {name: means[name] - self.means[name] for name in means}
        x = moved["x"]
        residual, outputs = (moved[name].view(len(x), -1) for name in ("residual", "outputs"))
        for name, left, right in (
            ("covariance", x, x),
            ("cross", residual, x),
            ("residual", residual, residual),
            ("outputs", outputs, outputs),
        ):
            self.sums[name].baddbmm_(left[:, :, None], right[:, None, :], alpha=self.count * count / total)
        for name, value in moved.items():
            self.means[name] = self.means[name] + count / total * value
        self.count = total

    def moments(self) -> Moments:
        """Return the moments of all positions added, in all processes; each of them must call it."""
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
            residual_mean=self.means["residual"],
            residual_covariance=self.sums["residual"] / self.count,
            output_covariance=self.sums["outputs"] / self.count,
        )


def _convolved(patches: Tensor, call: Call) -> Tensor:
    """Return W x + b for patches g × M × (i j c), as M × O."""
    weight, bias = call.arguments["weight"], call.arguments.get("bias")
    by_group = rearrange(weight, "(g o) c i j -> g (i j c) o", g=len(patches))
    precise = torch.promote_types(weight.dtype, torch.float32)
    products: Tensor = rearrange(patches.to(precise) @ by_group.to(precise), "g m o -> m (g o)")
    return products if bias is None else products + bias.to(precise)


def _patches(inputs: Tensor, spec: ConvSpec, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what the convolution reads at output positions N × P, as N × P × kh × kw × C."""
    (top, bottom), (left, right) = spec.padding
    padded = F.pad(inputs, (left, right, top, bottom))
    height, width = spec.kernel_size
    down = rows[..., None] * spec.stride[0] + torch.arange(height) * spec.dilation[0]
    across = columns[..., None] * spec.stride[1] + torch.arange(width) * spec.dilation[1]
    images = torch.arange(len(inputs))[:, None, None, None]
    # Advanced indices on both sides of the channels come first: N × P × kh × kw × C.
    found: Tensor = padded[images, :, down[..., :, None], across[..., None, :]]
    return found
