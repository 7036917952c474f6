"""Moments of each layer's inputs in the network converted so far, layer by layer.

The original has been run once, and its outputs recorded at sampled positions (`record`). Then every batch
runs through the network that is converted. Each forward pass stops at a convolution that is to be replaced
until all have arrived there; the moments of that layer are accumulated, the layer is fitted, and the passes
go on with the new kernel. As many passes wait as memory has room for their activations; the others start
again for each layer, which changes nothing but time. This matters only for early layers, where activations
are large but cheap to recompute. In addition, memory holds the recorded outputs and one layer's moments.
"""

import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.footprint import allowance, footprint
from sepconvert.calibration.moments import Accumulator
from sepconvert.calibration.passes import Passes, passes_at_once
from sepconvert.calibration.record import RecordedOutputs, Sampling, cannot_run
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.network.calls import Call, ConvolutionInterceptor, Kernel, Place
from sepconvert.network.copies import private_copy, quick_copy
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import ConvSite


def calibrate(
    model: nn.Module,
    batches: Mapping[int, InputBatch],
    sites: Sequence[ConvSite],
    recorded: RecordedOutputs,
    known: Mapping[str, Kernel] | None = None,
    memory: float | None = None,
) -> Generator[tuple[ConvSite, Moments], Kernel | None, None]:
    """Yield each layer and its moments, in order of execution; take back the kernel that replaces it.

    Modules that are called several times come first, with the moments of all their calls in the original,
    since their factors must be known at the first one. A module that is called several times for these images
    only is visited at its first call. Send None for a layer that is not replaced.

    Args:
        model: the original; left as it is.
        batches: those that were recorded, at least one.
        sites: convolutions to look at, among those recorded.
        recorded: outputs of the original.
        known: kernels of those `sites`, by name, that have been fitted; they are not visited.
        memory: bytes that the process may use; None for half of the free memory.

    Raises:
        SepconvertError: the model cannot run on the images, or runs other layers for some of them.
    """
    places = {site.place: site for site in sites if site.conv is not None}
    kernels: dict[Place, Kernel | None] = {
        place: known[site.name] for place, site in places.items() if known and site.name in known
    }
    if places.keys() == kernels.keys():
        return
    shared = {place: site for place, site in places.items() if site.calls > 1 and place not in kernels}
    if shared:
        for place, moments in _moments_of_all_calls(model, batches, shared, recorded.sampling).items():
            kernels[place] = yield places[place], moments
    stops = set(places) - set(kernels)
    quick = quick_copy(model, next(iter(batches.values())))
    room = allowance(memory) - max((bytes_of_moments(places[place]) for place in stops), default=0)
    with Passes(quick, batches, stops, kernels, room) as passes:
        while stops:
            # Before any layer is replaced, the residuals are rounding errors alone.
            followed = any(kernel is not None for kernel in kernels.values())
            accumulator = _accumulated(passes, places, recorded, followed=followed)
            if accumulator is None:  # the images reach none of the layers that are left
                return
            site = accumulator.site
            stops.discard(site.place)
            kernels[site.place] = yield site, accumulator.moments()


def _accumulated(
    passes: Passes, places: Mapping[Place, ConvSite], recorded: RecordedOutputs, *, followed: bool
) -> Accumulator | None:
    """Advance all passes to the next layer, and accumulate its moments; return None at the end.

    If the drift of the converted network is `followed`, the layer is compared with the recorded outputs.
    """
    accumulator: Accumulator | None = None
    arrived: set[Place | None] = set()
    for number, call in passes.arrivals():
        arrived.add(None if call is None else call.place)
        if len(arrived) > 1 or (call is not None and (call.place, number) not in recorded.outputs):
            raise SepconvertError(
                "calibration: the images do not take the same way through the model; it branches on "
                f"their values at {', '.join(sorted(str(place and place[0]) for place in arrived))}; "
                "leave these layers out (`exclude`)"
            )
        if call is None:
            continue
        if accumulator is None:
            accumulator = Accumulator(places[call.place], recorded.sampling)
        accumulator.add(call, number, recorded.outputs[call.place, number] if followed else None)
    return accumulator


def _moments_of_all_calls(
    model: nn.Module, batches: Mapping[int, InputBatch], sites: Mapping[Place, ConvSite], sampling: Sampling
) -> dict[Place, Moments]:
    """Return the moments of all calls of each layer, as the original makes them."""
    model = private_copy(model)
    accumulators = {place: Accumulator(site, sampling) for place, site in sites.items()}

    def on_call(call: Call) -> Tensor:
        output = call.run()
        if call.place in accumulators:
            accumulators[call.place].add(call, number)
        return output

    with torch.no_grad(), ConvolutionInterceptor(model, on_call).watching():
        for number, batch in batches.items():  # noqa: B007  (`on_call` reads it)
            batch.run(model)
    return {place: found.moments() for place, found in accumulators.items() if found.count}


def too_large(
    model: nn.Module,
    batches: Mapping[int, InputBatch],
    sites: Sequence[ConvSite],
    *,
    images: int,
    memory: float | None = None,
) -> dict[str, str]:
    """Return the reasons, by name, of layers whose moments do not fit into memory.

    All processes must call it.

    Args:
        model: the original; left as it is.
        batches: samples by number; this process's share of them, at least one.
        sites: convolutions to look at, those with a `conv`.
        images: number of images of all processes.
        memory: bytes that the process may use; None for half of the free memory.

    Raises:
        SepconvertError: the model cannot run on the images, or memory suffices for no layer at all.
    """
    if not sites:
        return {}
    batch = next(iter(batches.values()))
    try:
        running = footprint(model, batch[:1].inputs).peak * len(batch) * passes_at_once(batches)
    except Exception as error:  # the user's code
        raise cannot_run(batch, error) from error
    outputs = sum(map(len, batches.values())) * sum(_bytes_of_outputs(site, images) for site in sites)
    free = allowance(memory)
    limit = f"{free / 1e9:.2g} GB are available ({'`memory`' if memory else 'half of the free memory'})"
    least = min(sites, key=bytes_of_moments)
    if (needed := running + outputs + bytes_of_moments(least)) > free:
        raise SepconvertError(
            f"calibration: needs {needed / 1e9:.2g} GB, {outputs / 1e9:.2g} of them for the original's "
            f"outputs; {limit}; pass more `memory` or fewer `calib_images`"
        )
    reasons = {
        site.name: f"its statistics take {bytes_of_moments(site) / 1e9:.2g} GB; {limit}; pass more `memory`"
        for site in sites
        if running + outputs + bytes_of_moments(site) > free
    }
    # Of several processes' reasons those of the first count.
    return {name: reason for found in reversed(gather(reasons)) for name, reason in found.items()}


def bytes_of_moments(site: ConvSite) -> int:
    """Estimate the bytes of the covariance, of its working copies in the fit, and of a batch of patches."""
    spec = site.dense.spec
    unknowns = spec.in_channels // spec.groups * spec.kernel_size[0] * spec.kernel_size[1]
    return 8 * spec.groups * unknowns * (5 * unknowns + 4 * spec.out_channels // spec.groups)


def _bytes_of_outputs(site: ConvSite, images: int) -> int:
    """Return the bytes of the recorded outputs of one image, at most."""
    positions = min(Sampling(images, seed=0).most(site), math.prod(site.sizes[0]))
    return site.dense.inputs.element_size() * site.dense.spec.out_channels * positions
