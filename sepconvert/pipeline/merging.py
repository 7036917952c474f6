"""Merging of linear pairs of convolutions whose dense form pays."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sepconvert.base.distributed import once
from sepconvert.base.errors import first_line
from sepconvert.base.progress import Progress, silent
from sepconvert.factorize.geometry import chain_macs
from sepconvert.measure.verification import Reference, compare_with, reference
from sepconvert.network.copies import duplicate, private_copy
from sepconvert.network.merge import LinearPair, compose, conv2d_at, dense_spec, obstacle, with_merged
from sepconvert.network.tensors import Inputs
from sepconvert.network.trace import DenseConv
from sepconvert.planning.conversion import Merge
from sepconvert.planning.timing import Clock


def merge_pairs(
    model: nn.Module,
    inputs: Inputs,
    pairs: Sequence[LinearPair],
    *,
    gate: str,
    clock: Clock,
    seed: int,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Merge, ...]]:
    """Merge the pairs whose dense form pays, and say of each what became of it.

    Under the gate "latency" that is a form measured to be faster in ONNX Runtime, as forms of layers are
    (`Clock`); under "macs" and "none" one without more MACs. Where pairs continue one another, the dense
    form of one is the first convolution of the next.

    The model with each further pair merged is held against the original in float64, on given and on random
    inputs, where no more than float64's rounding may separate them; a pair that fails is kept.

    Args:
        model: is left as it is.
        inputs: positional arguments of its forward.
        pairs: `linear_pairs` of both.
        gate: "macs", "latency" or "none".
        clock: measures; when its time is up, pairs are kept.
        seed: of random inputs.
        progress: shows the progress.

    Returns:
        A copy in which a dense `nn.Conv2d` takes the place of each first convolution and `nn.Identity` that
        of the second, or `model` itself if nothing was merged; and a decision for each pair.
    """
    sites = {site.name: site for pair in pairs for site in (pair.first, pair.second)}
    convs = {name: site.conv for name, site in sites.items() if site.conv is not None}
    places: dict[str, str] = {}  # of each second convolution that was merged, the first
    decisions = []

    @functools.cache
    def expected() -> Reference:
        eps = torch.finfo(torch.float64).eps
        tolerances = {name: eps * site.conv.weight[0].numel() for name, site in sites.items() if site.conv}
        return reference(model, inputs, tuple(sites.values()), tolerances, seed)

    for pair in progress(pairs, "merging"):
        name, second = places.get(pair.first.name, pair.first.name), pair.second.name
        specs = convs[name].spec, convs[second].spec
        reason = obstacle(*specs)
        if reason is not None:
            decisions.append(Merge(name, second, "kept", reason, None, None, None))
            continue
        spec = dense_spec(*specs)
        macs = (
            sum(chain_macs(specs, size) for size in sites[name].sizes),
            sum(spec.macs(size) for size in sites[name].sizes),
        )
        ratio = None
        if gate == "latency":
            ratio = once(lambda: clock.pair(specs, spec, convs[name].inputs))  # noqa: B023  (called at once)
            pays = ratio is not None and ratio.significant and ratio.median > 1
            reason = (
                "was not timed within --measure-seconds"
                if ratio is None
                else f"the dense form is measured {ratio.median:.2f}× as fast "
                f"[{ratio.ci95.lo:.2f}, {ratio.ci95.hi:.2f}]"
            )
        else:
            pays = macs[1] <= macs[0]
            reason = f"the dense form has {macs[1]:,} MACs instead of {macs[0]:,}"
        if pays:
            trial = {**convs, name: compose(convs[name], convs[second])}, {**places, second: name}
            failure = _failure(model, expected(), *trial)
            if failure is None:
                convs, places = trial
            pays, reason = failure is None, failure or reason
        decisions.append(Merge(name, second, "merged" if pays else "kept", reason, spec, macs, ratio))
    merged = with_merged(duplicate(model), convs, places) if places else model
    return merged, tuple(decisions)


def _failure(
    model: nn.Module, expected: Reference, convs: Mapping[str, DenseConv], places: Mapping[str, str]
) -> str | None:
    """What the merged model does that the original does not."""
    for first in set(places.values()):
        dtype = conv2d_at(model, first).weight.dtype
        if not convs[first].weight.to(dtype).isfinite().all():
            return f"the dense kernel overflows {dtype}"
    try:
        # In float64 from the beginning: rounding to the model's own dtype would hide small differences.
        merged = with_merged(private_copy(model, expected.dtype), convs, places)
        comparison = compare_with(expected, merged)
    except Exception as error:  # the user's code may read the weight of a convolution that is gone
        return f"the model does not run without it: {first_line(error)}"
    if comparison.holds:
        return None
    moved, tolerance = comparison.max_abs_diff, comparison.tolerance
    return f"merged, the outputs of the model move by {moved:.3g}, tolerance {tolerance:.3g}"
