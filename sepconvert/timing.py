"""Dense and converted, whole models and single layers, timed against each other in ONNX Runtime."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sepconvert.environment import environment
from sepconvert.export import cast, onnx_bytes, onnx_feed, runtime_dtype, save_onnx
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import ZERO_BORDER
from sepconvert.factorize.structures import BY_NAME
from sepconvert.layers import FactorizedConv2d
from sepconvert.measure.latency import Latency, Speedup, measure_pair, speedup, time_all
from sepconvert.profiling import batch_size
from sepconvert.progress import Progress
from sepconvert.rewrite import Replacement
from sepconvert.spec import ConvSpec
from sepconvert.trace import ConvSite, Inputs

Timing = tuple[Latency, Latency, Speedup]

LAYOUT = 1
"""Of the layers that `FormClock` times: another one makes what it remembers worthless."""


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


@dataclass(frozen=True)
class FormTimes:
    """A layer and its forms as they run in a graph, over all calls of one forward pass."""

    dense_milliseconds: float
    milliseconds: tuple[float, ...]
    faster: tuple[bool, ...]  # measured, beyond noise

    @property
    def best_ratio(self) -> float:
        """Of the layer's time to that of its fastest form."""
        return max((self.dense_milliseconds / each for each in self.milliseconds), default=0.0)


class FormClock:
    """Times forms of layers against the dense layer, each shape once, and remembers it on disk.

    A layer is timed between two poolings of one pixel, followed by a ReLU: the runtime then keeps its blocked
    layout around the layer, as in a network, and fuses what it fuses there; a form that cannot be run in
    that layout pays for leaving it. What surrounds the layer is in all times, and cancels in differences.
    """

    def __init__(self, runs: int, threads: int, seed: int, cache: Path | None, seconds: float) -> None:
        """`cache`: a folder, made when needed; None to remember nothing. `seconds`: for measurements."""
        self._runs, self._threads, self._seed, self._cache = runs, threads, seed, cache
        self._deadline = time.monotonic() + seconds
        self._known: dict[str, dict[str, Any]] = {}

    def time(self, site: ConvSite, forms: Sequence[tuple[str, int]]) -> FormTimes | None:
        """Of the layer at `site` in these forms; None if time is up."""
        conv = site.conv
        assert conv is not None  # noqa: S101  (only such sites are surveyed)
        key = self._key(conv.spec, tuple(conv.inputs.shape))
        known = self._known.get(key) or self._read(key)
        missing = [form for form in forms if _label(form) not in known.get("forms", {})]
        if missing:
            if time.monotonic() > self._deadline:
                return None
            known = self._measure(site, missing, known)
            self._write(key, known)
        self._known[key] = known
        # Calls of other sizes are taken to run at the same pace.
        calls = site.macs / (conv.spec.macs(_size(conv.inputs)) or 1)
        dense = known["dense_milliseconds"]
        entries = [known["forms"][_label(form)] for form in forms]
        return FormTimes(
            dense * calls,
            tuple(dense / each["ratio"] * calls for each in entries),
            tuple(each["faster"] for each in entries),
        )

    def _measure(
        self, site: ConvSite, forms: Sequence[tuple[str, int]], known: Mapping[str, Any]
    ) -> dict[str, Any]:
        conv = site.conv
        assert conv is not None  # noqa: S101
        inputs = cast((conv.inputs,), torch.float32)
        layers = [_filled(conv.spec, ZERO_BORDER, 0), *(_filled(conv.spec, *form) for form in forms)]
        models = [onnx_bytes(surrounded(layer), inputs) for layer in layers]
        samples = time_all(
            [models[0], *models], onnx_feed(inputs), runs=self._runs, threads=self._threads, seed=self._seed
        )
        dense, again, *others = samples
        found = {}
        for form, times in zip(forms, others, strict=True):
            ratio = speedup(dense, again, times)
            found[_label(form)] = {
                "ratio": ratio.median,
                "faster": ratio.significant and ratio.median > 1,
            }
        return {
            "dense_milliseconds": known.get("dense_milliseconds", float(np.median(dense))),
            "forms": {**known.get("forms", {}), **found},
        }

    def _key(self, spec: ConvSpec, shape: tuple[int, ...]) -> str:
        what = {
            "layout": LAYOUT,
            "spec": asdict(spec),
            "input": shape,
            "runs": self._runs,
            **{k: v for k, v in environment(self._threads).items() if k in ("cpu", "threads", "onnxruntime")},
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def _read(self, key: str) -> dict[str, Any]:
        if self._cache is None:
            return {}
        try:
            found = json.loads((self._cache / f"{key}.json").read_text(encoding="utf-8"))
            dense = float(found["dense_milliseconds"])
            ratios = [each["ratio"] for each in found["forms"].values() if isinstance(each["faster"], bool)]
            usable = 0 < dense < math.inf and all(0 < float(ratio) < math.inf for ratio in ratios)
            return found if usable and len(ratios) == len(found["forms"]) else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: measure anew
            return {}

    def _write(self, key: str, known: Mapping[str, Any]) -> None:
        """Whole or not at all, for others may read; where it cannot be kept, the next run measures again."""
        if self._cache is None:
            return
        with contextlib.suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            unfinished = self._cache / f"{key}.{os.getpid()}"
            unfinished.write_text(json.dumps(known), encoding="utf-8")
            unfinished.replace(self._cache / f"{key}.json")


def _filled(spec: ConvSpec, scheme: str, rank: int) -> FactorizedConv2d:
    """With random factors, which take as long as others."""
    generator = torch.Generator().manual_seed(0)
    layer = FactorizedConv2d(spec, scheme, rank, Border())
    chain = (spec,) if scheme == ZERO_BORDER else BY_NAME[scheme].split(spec, rank)
    layer.set_factors(
        [torch.randn(each.weight_shape, generator=generator) for each in chain],
        torch.randn(spec.out_channels, generator=generator),
    )
    return layer


def surrounded(layer: nn.Module) -> nn.Module:
    """A layer as it is timed; see `FormClock`."""
    return nn.Sequential(nn.MaxPool2d(1), layer, nn.ReLU(), nn.MaxPool2d(1)).eval()


def _label(form: tuple[str, int]) -> str:
    return f"{form[0]} {form[1]}"


def _size(inputs: Tensor) -> tuple[int, int]:
    return int(inputs.shape[-2]), int(inputs.shape[-1])
