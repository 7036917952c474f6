"""Dense and converted, whole models and single layers, timed against each other in ONNX Runtime."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepconvert.export import cast, onnx_bytes, onnx_feed, runtime_dtype, save_onnx
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import ZERO_BORDER
from sepconvert.layers import FactorizedConv2d
from sepconvert.measure.latency import Latency, Speedup, measure_pair
from sepconvert.profiling import batch_size
from sepconvert.progress import Progress
from sepconvert.rewrite import Replacement
from sepconvert.trace import ConvSite, Inputs

Timing = tuple[Latency, Latency, Speedup]


def time_files(
    model: nn.Module,
    paths: tuple[Path, Path],
    inputs: Inputs,
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> Timing:
    """Two ONNX files of `model` and of what it became, on its inputs."""
    feed = onnx_feed(cast(inputs, runtime_dtype(model)))
    return measure_pair(
        *paths, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed,
        progress=lambda items: progress(items, "timing"),
    )  # fmt: skip


def time_models(
    original: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> Timing:
    """Two models, exported for the occasion."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "original.onnx", Path(folder) / "converted.onnx"
        for model, path in zip((original, converted), paths, strict=True):
            save_onnx(model, inputs, path, dynamic_batch=False)
        return time_files(original, paths, inputs, runs, threads, seed, progress)


def time_layers(
    sites: Sequence[ConvSite],
    replacements: Mapping[str, Replacement],
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> dict[str, Timing]:
    """Dense layer against factors for each converted one; layers of the same shape share one measurement."""
    measured: dict[Any, Timing] = {}
    timings = {}
    converted = [site for site in sites if site.name in replacements]
    for site in progress(converted, "timing layers"):
        assert site.conv is not None  # noqa: S101  (only such sites are converted)
        replacement = replacements[site.name]
        shapes = tuple(weight.shape for weight in replacement.weights)
        key = (site.conv.spec, site.conv.inputs.shape, replacement.scheme, shapes)
        if key not in measured:
            measured[key] = time_layer(site, replacement, runs, threads, seed)
        timings[site.name] = measured[key]
    return timings


def time_layer(site: ConvSite, replacement: Replacement, runs: int, threads: int, seed: int) -> Timing:
    """The dense layer and its factors, each alone in the runtime, on the input it has in the model."""
    conv = site.conv
    assert conv is not None  # noqa: S101  (only such sites are planned)
    dense = FactorizedConv2d(conv.spec, ZERO_BORDER, 0, Border())
    dense.set_factors([conv.weight], conv.bias)
    factored = FactorizedConv2d(conv.spec, replacement.scheme, replacement.rank, replacement.border)
    factored.set_factors(replacement.weights, replacement.bias)
    inputs = cast((conv.inputs,), torch.float32)
    before, after = (onnx_bytes(module.float().eval(), inputs) for module in (dense, factored))
    feed = onnx_feed(inputs)
    return measure_pair(before, after, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed)


def not_faster(site: ConvSite, replacement: Replacement, runs: int, threads: int, seed: int) -> str | None:
    """Why a replacement does not pay in the runtime; None if it is measured to be faster."""
    _, _, speedup = time_layer(site, replacement, max(runs, 1), threads, seed)
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"
