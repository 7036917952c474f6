"""Merging of linear pairs of convolutions whose dense form pays."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sepconvert.base.distributed import once
from sepconvert.base.errors import first_line
from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.base.options.values import Gate
from sepconvert.base.progress import Progress, Stage, silent, stage
from sepconvert.factorize.geometry import ConvSpec, chain_macs
from sepconvert.measure.cost import Cost
from sepconvert.measure.latency import Speedup
from sepconvert.measure.verification.outputs import Reference, compare_with, reference
from sepconvert.network.copies import duplicate, private_copy
from sepconvert.network.merge import (
    LinearPair,
    compose,
    conv2d_at,
    dense_spec,
    linear_pairs,
    obstacle,
    with_merged,
)
from sepconvert.network.tensors import Inputs
from sepconvert.network.trace import ConvSite, DenseConv, TracedModel, traced
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import Original
from sepconvert.planning.conversion import Merge
from sepconvert.planning.timing.clock import Clock


@dataclass(frozen=True, eq=False)
class Start:
    """The model in which layers are replaced: the original, with linear pairs merged where that pays."""

    traced: TracedModel
    cost: Cost
    merges: tuple[Merge, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.traced.model

    @property
    def sites(self) -> tuple[ConvSite, ...]:
        """Its convolutions."""
        return self.traced.sites


@stage(Stage.MERGING)
def merge_original(original: Original, job: Job) -> Start:
    """Merge linear pairs of the original's selected convolutions, as `merge_pairs` decides."""
    pairs = [
        pair
        for pair in linear_pairs(original.traced)
        if all(job.selection.admits(*site.names) for site in (pair.first, pair.second))
    ]
    model, merges = merge_pairs(
        original.model,
        original.inputs,
        pairs,
        gate=job.gate,
        clock=original.clock,
        seed=job.seed,
        progress=job.progress,
    )
    if model is original.model:
        return Start(original.traced, original.cost, merges)
    return Start(traced(model, original.inputs), original.count(model), merges)


def merge_pairs(
    model: nn.Module,
    inputs: Inputs,
    pairs: Sequence[LinearPair],
    *,
    gate: Gate,
    clock: Clock,
    seed: int,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Merge, ...]]:
    """Merge the pairs whose dense form pays, and decide on each of the others why it is kept.

    Under the gate "latency", a dense form pays if it is measured to be faster in ONNX Runtime (see `Clock`);
    under "macs" and "none", if it has no more MACs. Where pairs follow one another, the dense form of one is
    the first convolution of the next.

    After each merge, the model is compared with the original in float64, on the given and on random inputs,
    and may differ by no more than float64's rounding; otherwise the pair is kept.

    Args:
        model: is left as it is.
        inputs: positional arguments of its forward.
        pairs: from `linear_pairs` of the model.
        gate: "macs", "latency" or "none".
        clock: measures; when its time is up, pairs are kept.
        seed: of random inputs.
        progress: shows the progress.

    Returns:
        A copy in which a dense `nn.Conv2d` takes the place of each first convolution and `nn.Identity` that
        of the second, or `model` itself if nothing was merged; and a decision for each pair.
    """
    merger = _Merger(model, inputs, pairs, gate, clock, seed)
    decisions = tuple(merger.decide(pair) for pair in progress(pairs, "merging"))
    return merger.model(), decisions


class _Merger:
    """Merges pairs one after the other, and keeps the convolutions that result."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        pairs: Sequence[LinearPair],
        gate: Gate,
        clock: Clock,
        seed: int,
    ) -> None:
        self._model, self._inputs, self._gate, self._clock, self._seed = model, inputs, gate, clock, seed
        self._sites = {site.name: site for pair in pairs for site in (pair.first, pair.second)}
        self._convs = {name: site.conv for name, site in self._sites.items() if site.conv is not None}
        self._firsts: dict[str, str] = {}  # by each second convolution that was merged, the first

    def model(self) -> nn.Module:
        """Return the model with the pairs merged so far; the given model itself if there are none."""
        if not self._firsts:
            return self._model
        return with_merged(duplicate(self._model), self._convs, self._firsts)

    def decide(self, pair: LinearPair) -> Merge:
        """Merge a pair if that is possible and pays."""
        first, second = self._firsts.get(pair.first.name, pair.first.name), pair.second.name
        specs = self._convs[first].spec, self._convs[second].spec
        why_not = obstacle(*specs)
        if why_not is not None:
            reason = Reason(ReasonCode.OBSTACLE, why_not)
            return Merge(first, second, "kept", reason, spec=None, macs=None, speedup=None)
        spec, sizes = dense_spec(*specs), self._sites[first].sizes
        macs = sum(chain_macs(specs, size) for size in sizes), sum(spec.macs(size) for size in sizes)
        timed = self._timed(specs, spec, self._convs[first]) if self._gate == "latency" else None
        reason = _verdict(macs) if timed is None else _timed_verdict(timed)
        speedup = timed if isinstance(timed, Speedup) else None
        if reason.code is ReasonCode.MERGED:
            convs = {**self._convs, first: compose(self._convs[first], self._convs[second])}
            firsts = {**self._firsts, second: first}
            failure = self._failure(convs, firsts)
            if failure is None:
                self._convs, self._firsts = convs, firsts
                return Merge(first, second, "merged", reason, spec, macs, speedup)
            reason = Reason(ReasonCode.OBSTACLE, failure)
        return Merge(first, second, "kept", reason, spec, macs, speedup)

    def _timed(self, pair: tuple[ConvSpec, ConvSpec], dense: ConvSpec, first: DenseConv) -> Speedup | float:
        return once(lambda: self._clock.pair(pair, dense, first.inputs))

    @functools.cached_property
    def _expected(self) -> Reference:
        eps = torch.finfo(torch.float64).eps
        tolerances = {
            name: eps * site.conv.weight[0].numel()
            for name, site in self._sites.items()
            if site.conv is not None
        }
        return reference(self._model, self._inputs, tuple(self._sites.values()), tolerances, self._seed)

    def _failure(self, convs: dict[str, DenseConv], firsts: dict[str, str]) -> str | None:
        """Return how a merged model differs from the original; None if it does not."""
        expected = self._expected
        for first in set(firsts.values()):
            dtype = conv2d_at(self._model, first).weight.dtype
            if not convs[first].weight.to(dtype).isfinite().all():
                return f"the dense kernel overflows {dtype}"
        try:
            # In float64 from the beginning: rounding to the model's own dtype would hide small differences.
            merged = with_merged(private_copy(self._model, expected.dtype), convs, firsts)
            comparison = compare_with(expected, merged)
        except Exception as error:  # the user's code may read the weight of a convolution that is gone
            return f"the model does not run without it: {first_line(error)}"
        if comparison.holds:
            return None
        moved, tolerance = comparison.max_abs_diff, comparison.tolerance
        return f"merged, the outputs of the model move by {moved:.3g}, tolerance {tolerance:.3g}"


def _verdict(macs: tuple[int, int]) -> Reason:
    code = ReasonCode.MERGED if macs[1] <= macs[0] else ReasonCode.COSTS_MORE
    return Reason(code, f"the dense form has {macs[1]:,} MACs instead of {macs[0]:,}")


def _timed_verdict(speedup: Speedup | float) -> Reason:
    if isinstance(speedup, float):
        text = f"the dense form is {speedup:.2f}× as fast by the model of times; there was no time to measure"
        return Reason(ReasonCode.MERGED if speedup > 1 else ReasonCode.COSTS_MORE, text)
    pays = speedup.significant and speedup.median > 1
    interval = f"[{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"
    return Reason(
        ReasonCode.MERGED if pays else ReasonCode.COSTS_MORE,
        f"the dense form is measured {speedup.median:.2f}× as fast {interval}"
        + ("" if speedup.significant else " ~ within noise"),
    )
