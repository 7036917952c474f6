"""Originals and conversions, whole models and single layers, timed against each other in ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sepconvert.base.environment import Runtime
from sepconvert.base.progress import Progress
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.factorize.exact.factors import branches
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.files.onnx.writing import onnx_feed
from sepconvert.measure.latency import Deployed, PairTiming, measure_pair
from sepconvert.measure.profiling import batch_size
from sepconvert.network.rewrite import Replacement
from sepconvert.network.tensors import Inputs
from sepconvert.network.trace import ConvSite
from sepconvert.planning.timing.clock import input_shape, random_feed


def time_files(
    model: nn.Module,
    paths: tuple[Path, Path],
    inputs: Inputs,
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> PairTiming:
    """Two ONNX files of `model` and of what it became, on its inputs."""
    feed = onnx_feed(model, inputs)
    original, converted = (Deployed(path, runtime) for path in paths)
    return measure_pair(
        original, converted, feed, runs=runs, batch=batch_size(inputs), seed=seed, progress=progress
    )


def time_layers(
    sites: Sequence[ConvSite],
    replacements: Mapping[str, Replacement],
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> dict[str, PairTiming]:
    """Dense layer against factors for each converted one; layers of the same shape share one measurement."""
    measured: dict[Any, PairTiming] = {}
    timings = {}
    converted = [site for site in sites if site.name in replacements]
    for site in progress(converted, "timing layers"):
        replacement = replacements[site.name]
        shapes = tuple(weight.shape for weight in replacement.weights)
        key = (site.dense.spec, site.dense.inputs.shape, replacement.scheme, shapes)
        if key not in measured:
            measured[key] = time_layer(site, replacement, runs, runtime, seed)
        timings[site.name] = measured[key]
    return timings


def time_layer(
    site: ConvSite, replacement: Replacement, runs: int, runtime: Runtime, seed: int
) -> PairTiming:
    """The dense layer and its factors as they run within a graph, on inputs as large as there."""
    spec, shape = site.dense.spec, input_shape(site.dense.inputs)
    forms = (ZERO_BORDER, 0, Border()), (replacement.scheme, replacement.rank, replacement.border)
    before, after = (Deployed(layer_onnx(branches(spec, *form), shape), runtime) for form in forms)
    return measure_pair(before, after, random_feed(shape, seed), runs=runs, batch=shape[0], seed=seed)


def not_faster(
    site: ConvSite, replacement: Replacement, runs: int, runtime: Runtime, seed: int
) -> str | None:
    """Return why a replacement does not pay in the runtime; None if it is measured to be faster."""
    speedup = time_layer(site, replacement, max(runs, 1), runtime, seed).speedup
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"
