"""Calibration: the network converted so far, from convolution to convolution, and what the original answered.

The original runs once, and its outputs are kept at the positions that are looked at. Then every batch runs
through the network that is converted. Each forward pass stops at a convolution that is to be replaced until
all have come there; the moments of that layer are gathered, the layer is fitted, and the passes go on with
the new kernel. As many passes wait as memory has room for their activations; the others begin anew for each
layer, which changes nothing but time. That is needed in the first layers of a network, where activations are
large and the way is short. Beside them memory holds the outputs kept, and the moments of one layer.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.footprint import allowance, footprint
from sepconvert.calibration.moments import Accumulator
from sepconvert.calibration.passes import Passes, passes_at_once
from sepconvert.calibration.record import (
    Answers,
    Kernel,
    Place,
    cannot_run,
    module_names,
    most_positions,
    position_generator,
)
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.network.calls import ConvolutionInterceptor
from sepconvert.network.copies import private_copy, quick_copy
from sepconvert.network.tensors import fresh
from sepconvert.network.trace import ConvSite


def calibrate(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    answers: Answers,
    known: Mapping[str, Kernel] | None = None,
    memory: float | None = None,
) -> Generator[tuple[ConvSite, Moments], Kernel | None, None]:
    """The moments of each layer, in order of execution; send back the kernel that takes its place, or None.

    A module that is called several times comes first: it is met with what the original presents to it
    in all its calls, since its factors must be known at the first one. One that only these images call
    again is met once, with its first call.

    Args:
        model: the original; left as it is.
        batches: those that were recorded.
        sites: convolutions to look at, among those recorded.
        answers: of the original, recorded.
        known: kernels of those sites, by name, that have been fitted; they are not met.
        memory: bytes that the process may have; None for half of what is free.

    Raises:
        SepconvertError: the model cannot run on the images, or treats images differently.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    kernels: dict[Place, Kernel | None] = {
        place: known[site.name] for place, site in places.items() if known and site.name in known
    }
    if places.keys() == kernels.keys():
        return
    if not batches:
        raise SepconvertError(
            "calibration: there are fewer batches of images than processes; pass more images"
        )
    shared = {key: site for key, site in places.items() if site.calls > 1 and key not in kernels}
    if shared:
        for key, moments in _moments_of_all_calls(model, batches, shared, answers).items():
            kernels[key] = yield places[key], moments
    stops = set(places) - set(kernels)
    quick = quick_copy(model, next(iter(batches.values())))
    room = allowance(memory) - max((_bytes_of_moments(places[key]) for key in stops), default=0)
    with Passes(quick, batches, stops, kernels, room) as passes:
        # Of those left over when all have come to the end, the images reach none.
        while stops:
            accumulator: Accumulator | None = None
            arrived: set[Place | None] = set()
            for number, place, arguments in passes.arrivals():
                arrived.add(place)
                if len(arrived) > 1 or (place is not None and (place, number) not in answers.outputs):
                    raise SepconvertError(
                        "calibration: the images do not take the same way through the model; it branches on "
                        f"their values at {', '.join(sorted(str(each and each[0]) for each in arrived))}; "
                        "leave these layers out with --exclude"
                    )
                if place is None:
                    continue
                if accumulator is None:
                    accumulator = Accumulator(places[place], most_positions(places[place], answers.images))
                # Before any layer is replaced nothing is missed but rounding.
                followed = any(kernel is not None for kernel in kernels.values())
                expected = answers.outputs[place, number] if followed else None
                accumulator.add(arguments, position_generator(answers.seed, places[place], number), expected)
            if accumulator is None:
                return
            site = accumulator.site
            stops.discard(site.place)
            kernels[site.place] = yield site, accumulator.moments()


def too_large(
    model: nn.Module,
    batches: Mapping[int, Tensor],
    sites: Sequence[ConvSite],
    *,
    images: int,
    memory: float | None = None,
) -> dict[str, str]:
    """Why single layers cannot be calibrated in the memory that there is, by name; all processes are asked.

    Args:
        model: the original; left as it is.
        batches: of images N × C × H × W by number; this process's share of them.
        sites: convolutions to look at, those with a `conv`.
        images: that all processes have.
        memory: bytes that the process may have; None for half of what is free.

    Raises:
        SepconvertError: the model cannot run on the images, or memory suffices for no layer at all.
    """
    if not sites:
        return {}
    found: dict[str, str] = {}
    if batches:
        batch = next(iter(batches.values()))
        try:
            running = footprint(model, (batch[:1],)).peak * len(batch) * passes_at_once(batches)
        except Exception as error:  # the user's code
            raise cannot_run(batch, error) from error
        answers = sum(map(len, batches.values())) * sum(_bytes_of_answers(site, images) for site in sites)
        free = allowance(memory)
        by = "by --memory" if memory else "as half of what is free"
        limit = f"{free / 1e9:.2g} are there {by}; pass more --memory"
        least = min(sites, key=_bytes_of_moments)
        if (needed := running + answers + _bytes_of_moments(least)) > free:
            raise SepconvertError(
                f"calibration: needs {needed / 1e9:.2g} GB, {answers / 1e9:.2g} for the original's outputs; "
                f"{limit} or fewer --calib-images"
            )
        found = {
            site.name: f"its statistics take {_bytes_of_moments(site) / 1e9:.2g} GB; {limit}"
            for site in sites
            if running + answers + _bytes_of_moments(site) > free
        }
    return {name: reason for each in reversed(gather(found)) for name, reason in each.items()}


def _moments_of_all_calls(
    model: nn.Module, batches: Mapping[int, Tensor], sites: Mapping[Place, ConvSite], answers: Answers
) -> dict[Place, Moments]:
    model = private_copy(model)
    names, accumulators = (
        module_names(model),
        {key: Accumulator(site, most_positions(site, answers.images)) for key, site in sites.items()},
    )

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output, key = call(), (names[module], index)
        if key in accumulators:
            generator = position_generator(answers.seed, sites[key], number)
            accumulators[key].add(arguments, generator)
        return output

    with torch.no_grad(), ConvolutionInterceptor(model, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            model(fresh(batch))
    return {key: found.moments() for key, found in accumulators.items() if found.count}


def _bytes_of_moments(site: ConvSite) -> int:
    """S, its working copies in the fit, and a batch of patches."""
    spec = site.dense.spec
    unknowns = spec.in_channels // spec.groups * spec.kernel_size[0] * spec.kernel_size[1]
    return 8 * spec.groups * unknowns * (5 * unknowns + 4 * spec.out_channels // spec.groups)


def _bytes_of_answers(site: ConvSite, images: int) -> int:
    """Of one image, at most."""
    spec, size = site.dense.spec, site.sizes[0]
    return (
        site.dense.inputs.element_size()
        * spec.out_channels
        * min(most_positions(site, images), math.prod(size))
    )
