"""The original's outputs at sampled positions, recorded once for all fits."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.network.calls import ConvolutionInterceptor
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import fresh
from sepconvert.network.trace import ConvSite

PATCHES = 12
"""For each unknown of an output, that are looked at in all images, or all there are."""


FEWEST_POSITIONS = 16
"""In each image, if it has as many."""


Kernel = tuple[Tensor, Tensor]
"""O × C/g × kh × kw and O: weight and bias of a converted layer."""


Place = tuple[str, int]


@dataclass(frozen=True)
class Answers:
    """The original's outputs at the positions that are looked at in each image."""

    images: int  # of all processes
    seed: int  # of the positions
    outputs: Mapping[tuple[Place, int], Tensor]  # N × P × O, by layer and number of batch


def record(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    *,
    images: int,
    seed: int,
) -> Answers:
    """What `calibrate` fits to.

    Args:
        model: the original; left as it is.
        batches: of images N × C × H × W by number; this process's share of them.
        sites: convolutions to look at, as `trace` found them; those without a `conv` are passed over.
        images: that all processes have.
        seed: of the positions.

    Raises:
        SepconvertError: the model cannot run on the images.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    outputs: dict[tuple[Place, int], Tensor] = {}
    if not places or not batches:
        return Answers(images, seed, outputs)
    private = quick_copy(model, next(iter(batches.values())))
    names = module_names(private)

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output, key = call(), (names[module], index)
        # One that only these images call again counts with its first call.
        if key in places and (key, number) not in outputs:
            most = most_positions(places[key], images)
            chosen = sampled_positions(
                batched(output).shape, most, position_generator(seed, places[key], number)
            )
            outputs[key, number] = _at(output, chosen).clone()
        return output

    with torch.no_grad(), ConvolutionInterceptor(private, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            run_on(private, batch)
    return Answers(images, seed, outputs)


def most_positions(site: ConvSite, images: int) -> int:
    """That are looked at in each of so many images, at most."""
    unknowns = math.prod(site.dense.spec.weight_shape[1:])
    return max(FEWEST_POSITIONS, math.ceil(PATCHES * unknowns / images))


def substitute(model: nn.Module, kernels: Mapping[Place, Kernel]) -> ConvolutionInterceptor:
    """Lets `model` run with other kernels: `with substitute(model, kernels).watching(): model(x)`."""
    names = module_names(model)

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        kernel = kernels.get((names[module], index))
        return call() if kernel is None else call_with(kernel, arguments, call)

    return ConvolutionInterceptor(model, on_call)


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def call_with(kernel: Kernel, arguments: Mapping[str, Any], call: Callable[..., Tensor]) -> Tensor:
    weight, bias = (each.to(arguments["weight"]) for each in kernel)
    return call(weight=weight, bias=bias)


def run_on(model: nn.Module, images: Tensor) -> None:
    try:
        model(fresh(images))
    except Exception as error:  # the user's code
        raise cannot_run(images, error) from error


def cannot_run(images: Tensor, error: Exception) -> SepconvertError:
    return SepconvertError(
        f"calibration: the model fails on images of shape {tuple(images.shape[1:])}: "
        f"{first_line(error)}; use data of the shape that it takes"
    )


def position_generator(seed: int, site: ConvSite, batch: int) -> torch.Generator:
    """Positions depend on layer and batch alone, not on what ran before or on which process."""
    digest = hashlib.sha256(f"{seed}/{site.name}/{batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batched(value: Tensor) -> Tensor:
    return value if value.ndim == 4 else value[None]


def sampled_positions(shape: torch.Size, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """N × P rows and columns of the output, drawn without replacement for every image."""
    images, _, height, width = shape
    chosen = torch.rand(images, height * width, generator=generator).argsort(1)[:, :most]
    return chosen // width, chosen % width


def _at(output: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """N × P × O, of N × O × H × W."""
    output, (rows, columns) = batched(output), positions
    return output[torch.arange(len(output))[:, None], :, rows, columns]
