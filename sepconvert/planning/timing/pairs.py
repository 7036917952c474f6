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
from sepconvert.files.onnx.graph.running import Feed
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import LEAST_RUNS, Deployed, PairTiming, Speedup, measure_pair
from sepconvert.measure.profiling import batch_size
from sepconvert.network.rewrite import Replacement
from sepconvert.network.tensors import Inputs
from sepconvert.network.trace import ConvSite
from sepconvert.planning.timing.clock import input_shape, random_feed


def time_files(
    paths: tuple[Path, Path],
    feed: Feed,
    batch: int,
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> PairTiming:
    """Two ONNX files of a model and of what it became, on a batch of inputs."""
    original, converted = (Deployed(path, runtime) for path in paths)
    return measure_pair(original, converted, feed, runs=runs, batch=batch, seed=seed, progress=progress)


def time_int8(form: Int8Form, model: nn.Module, inputs: Inputs, runtime: Runtime, seed: int) -> Speedup:
    """The speed-up of a model in int8 over itself in floating point."""
    feed, files = form.feed(inputs), (form.timed(model, quantize=False), form.timed(model))
    before, after = (Deployed(file, runtime) for file in files)
    return measure_pair(before, after, feed, runs=LEAST_RUNS, batch=batch_size(inputs), seed=seed).speedup


def time_layers(
    sites: Sequence[ConvSite],
    replacements: Mapping[str, Replacement],
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
    form: Int8Form | None = None,
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
            measured[key] = time_layer(site, replacement, runs, runtime, seed, form)
        timings[site.name] = measured[key]
    return timings


def time_layer(
    site: ConvSite,
    replacement: Replacement,
    runs: int,
    runtime: Runtime,
    seed: int,
    form: Int8Form | None = None,
) -> PairTiming:
    """The dense layer and its factors as they run within a graph, on inputs as large as there.

    Both are timed in the `form` that models are deployed in.
    """
    spec, shape = site.dense.spec, input_shape(site.dense.inputs)
    forms = (ZERO_BORDER, 0, Border()), (replacement.scheme, replacement.rank, replacement.border)
    models = [layer_onnx(branches(spec, *each), shape) for each in forms]
    if form is not None:
        models = [form.layer(model) for model in models]
    before, after = (Deployed(model, runtime) for model in models)
    return measure_pair(before, after, random_feed(shape, seed), runs=runs, batch=shape[0], seed=seed)


def not_faster(
    site: ConvSite,
    replacement: Replacement,
    runs: int,
    runtime: Runtime,
    seed: int,
    form: Int8Form | None = None,
) -> str | None:
    """Return why a replacement does not pay in the runtime; None if it is measured to be faster."""
    speedup = time_layer(site, replacement, max(runs, 1), runtime, seed, form).speedup
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"
