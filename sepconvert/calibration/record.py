"""The original's outputs at sampled positions, recorded once for all fits."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.network.calls import Call, ConvolutionInterceptor, Place
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import ConvSite

PATCHES = 12
"""Sampled positions in all images, for each unknown of an output channel; fewer if there are not as many."""


FEWEST_POSITIONS = 16
"""Least number of sampled positions in each image, if it has as many."""


@dataclass(frozen=True)
class Sampling:
    """A seeded choice of output positions, as many as the fit of a layer needs."""

    images: int  # of all processes
    seed: int

    def most(self, site: ConvSite) -> int:
        """Return how many positions of each image are sampled at most."""
        unknowns = math.prod(site.dense.spec.weight_shape[1:])
        return max(FEWEST_POSITIONS, math.ceil(PATCHES * unknowns / self.images))

    def positions(self, site: ConvSite, number: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return rows and columns, each N × P, of an output N × O × H × W, drawn without replacement.

        They depend on the layer and the number of the batch alone, not on the process or on earlier draws.
        """
        digest = hashlib.sha256(f"{self.seed}/{site.name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        images, _, height, width = shape
        chosen = torch.rand(images, height * width, generator=generator).argsort(1)[:, : self.most(site)]
        return chosen // width, chosen % width


@dataclass(frozen=True)
class RecordedOutputs:
    """The original's outputs at the sampled positions of each image."""

    sampling: Sampling
    outputs: Mapping[tuple[Place, int], Tensor]  # N × P × O, by layer and number of the batch


def record(
    model: nn.Module,
    batches: Mapping[int, InputBatch],
    sites: Sequence[ConvSite],
    *,
    images: int,
    seed: int,
) -> RecordedOutputs:
    """Record the outputs that `calibrate` compares with.

    Args:
        model: the original; left as it is.
        batches: samples by number; this process's share of them.
        sites: convolutions to look at, as `trace` found them; those without a `conv` are skipped.
        images: number of images of all processes.
        seed: of the positions.

    Raises:
        SepconvertError: the model cannot run on the images.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    sampling = Sampling(images, seed)
    outputs: dict[tuple[Place, int], Tensor] = {}
    if not places:
        return RecordedOutputs(sampling, outputs)
    private = quick_copy(model, next(iter(batches.values())))

    def on_call(call: Call) -> Tensor:
        output, site = call.run(), places.get(call.place)
        # A layer that only these images call several times counts with its first call.
        if site is not None and (call.place, number) not in outputs:
            images_of_output = batched(output)
            rows, columns = sampling.positions(site, number, images_of_output.shape)
            image = torch.arange(len(images_of_output))[:, None]
            outputs[call.place, number] = images_of_output[image, :, rows, columns].clone()
        return output

    with torch.no_grad(), ConvolutionInterceptor(private, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            run_on(private, batch)
    return RecordedOutputs(sampling, outputs)


def batched(value: Tensor) -> Tensor:
    """Return N × C × H × W, for C × H × W with a batch dimension of 1."""
    return value if value.ndim == 4 else value[None]


def run_on(model: nn.Module, samples: InputBatch) -> None:
    """Run the model on a batch.

    Raises:
        SepconvertError: the model raises an error.
    """
    try:
        samples.run(model)
    except Exception as error:  # the user's code
        raise cannot_run(samples, error) from error


def cannot_run(samples: InputBatch, error: Exception) -> SepconvertError:
    """Return the error that says which images the model fails on."""
    return SepconvertError(
        f"calibration: the model fails on samples of shape {', '.join(map(str, samples.shapes))}: "
        f"{first_line(error)}; use data of the shape that it takes"
    )
