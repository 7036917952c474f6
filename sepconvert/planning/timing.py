"""Dense and converted, whole models and single layers, timed against each other in ONNX Runtime."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
from torch import Tensor, nn

from sepconvert.base.documents import is_intact, read_file, sealed
from sepconvert.base.environment import Runtime, environment
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import Progress, silent
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.factorize.exact.factors import branches
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import Form
from sepconvert.files.onnx.export import export_program, onnx_feed, runtime_dtype, save_onnx
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import Deployed, PairTiming, Speedup, measure_pair, speedup, time_all
from sepconvert.measure.profiling import batch_size
from sepconvert.measure.statistics import Interval
from sepconvert.network.rewrite import Replacement
from sepconvert.network.tensors import Inputs, cast
from sepconvert.network.trace import ConvSite

FORM_RUNS = 20
"""Interleaved runs of each form of a layer."""


# Layers and plans are timed at different moments, when the machine may be more or less busy: each against a
# layer that is always the same.
_YARDSTICK = ConvSpec(64, 64, (3, 3), padding=((1, 1), (1, 1)), bias=True)


_YARDSTICK_SHAPE = (1, 64, 24, 24)


# What reading a file of the cache that is none can end in.
_NO_ENTRY = (SepconvertError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


# What times hang on, of what `environment` tells.
_RUNTIME = ("cpu", "threads", "graph_optimization", "provider", "onnxruntime")


LAYOUT = 3
"""Of the layers that `Clock` times, and how: another one makes what it remembers worthless."""


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
    feed = onnx_feed(cast(inputs, runtime_dtype(model)))
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
    spec, shape = site.dense.spec, _input_shape(site.dense.inputs)
    forms = (ZERO_BORDER, 0, Border()), (replacement.scheme, replacement.rank, replacement.border)
    before, after = (Deployed(layer_onnx(branches(spec, *form), shape), runtime) for form in forms)
    return measure_pair(before, after, _feed(shape, seed), runs=runs, batch=shape[0], seed=seed)


def not_faster(
    site: ConvSite, replacement: Replacement, runs: int, runtime: Runtime, seed: int
) -> str | None:
    """Why a replacement does not pay in the runtime; None if it is measured to be faster."""
    speedup = time_layer(site, replacement, max(runs, 1), runtime, seed).speedup
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"


@dataclass(frozen=True)
class FormTime:
    """A form of a layer as it runs in a graph."""

    milliseconds: float  # over all calls of one forward pass
    faster: bool  # than the layer, beyond noise


@dataclass(frozen=True)
class FormTimes:
    """A layer and its forms."""

    dense_milliseconds: float
    forms: Mapping[Form, FormTime]

    @property
    def best_ratio(self) -> float:
        """Of the layer's time to that of its fastest form."""
        return max((self.dense_milliseconds / each.milliseconds for each in self.forms.values()), default=0.0)


class Clock:
    """Times forms of layers, and whole plans, against the original, and remembers it on disk.

    Layers are timed as `layer_onnx` surrounds them, each shape once; what surrounds them is in all times, and
    cancels in differences. What is remembered is what decisions hang on: the same command then gives the same
    plan.
    """

    def __init__(self, runtime: Runtime, seed: int, cache: Path | None, seconds: float) -> None:
        """`cache`: a folder, made when needed; None to keep nothing. `seconds`: of timing forms and pairs."""
        self._runtime, self._seed, self._cache = runtime, seed, cache
        self._seconds_left = seconds
        self._known: dict[str, dict[str, Any]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="sepconvert-"))
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()  # of models exported before

    def plans(
        self,
        original: nn.Module,
        converted: Sequence[nn.Module],
        inputs: Inputs,
        runs: int,
        progress: Progress,
    ) -> tuple[float, list[Speedup]]:
        """Milliseconds of a model, and how much faster others are, all exported and timed together."""
        models = [original, *converted]
        new = [model for model in models if model not in self._files]
        for model in progress(new, "exporting plans"):
            path = self._folder / f"{uuid.uuid4()}.onnx"
            save_onnx(export_program(model, inputs, dynamic_batch=False), path, check=False)
            self._files[model] = path
        paths = [self._files[model] for model in models]
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        keys = [self._key(layout=LAYOUT, original=files[0], converted=file, runs=runs) for file in files]
        missing = [index for index, key in enumerate(keys) if not self._recall(key, _usable_plan)]
        if missing:
            feed = onnx_feed(cast(inputs, runtime_dtype(original)))
            timed = [(path, feed) for path in (paths[0], paths[0], *(paths[index] for index in missing))]
            try:
                first, again, *others = self._samples(timed, runs, progress)
            except SepconvertError as error:
                if error.__cause__ is None:  # not ONNX Runtime's, but of the provider, say
                    raise
                # Without the path of a file that is not the user's.
                cause = first_line(error.__cause__).rpartition(" failed:")[2].strip()
                raise SepconvertError(
                    "plans are timed in ONNX Runtime, which does not run what this model is exported to "
                    f"({cause}); convert it in exact mode, or by --rank or --target-macs with --runs 0"
                ) from error
            for index, times in zip(missing, others, strict=True):
                found = speedup(first, again, times)
                self._keep(keys[index], {"yardsticks": float(np.median(times)), "speedup": asdict(found)})
        known = [self._known[key] for key in keys]
        return known[0]["yardsticks"] * self._milliseconds, [_speedup(each["speedup"]) for each in known[1:]]

    def forms(self, site: ConvSite, forms: Sequence[Form]) -> FormTimes | None:
        """Of the layer at `site` in these forms; None if time is up."""
        conv = site.dense
        shape = _input_shape(conv.inputs)
        key = self._key(layout=LAYOUT, spec=asdict(conv.spec), input=list(shape))
        known = self._recall(key, _usable_forms)
        missing = [form for form in forms if _label(form) not in known.get("forms", {})]
        if missing:
            if self._seconds_left <= 0:
                return None
            with self._counted():
                known = self._measure(conv.spec, shape, missing, known)
            self._keep(key, known)
        # Calls of other sizes are taken to run at the same pace.
        calls = site.macs / (conv.spec.macs((shape[2], shape[3])) or 1)
        dense = known["dense_yardsticks"] * self._milliseconds
        entries = {form: known["forms"][_label(form)] for form in forms}
        return FormTimes(
            dense * calls,
            {form: FormTime(dense / each["ratio"] * calls, each["faster"]) for form, each in entries.items()},
        )

    def pair(self, pair: tuple[ConvSpec, ConvSpec], dense: ConvSpec, inputs: Tensor) -> Speedup | None:
        """Of one convolution over the two that it may stand for, on such inputs; None if time is up."""
        shape = _input_shape(inputs)
        key = self._key(layout=LAYOUT, pair=[asdict(spec) for spec in pair], input=list(shape))
        if not self._recall(key, _usable_plan):
            if self._seconds_left <= 0:
                return None
            models = [layer_onnx([chain], shape) for chain in (pair, pair, (dense,))]
            with self._counted():
                first, again, times = self._samples([(model, _feed(shape, self._seed)) for model in models])
            found = speedup(first, again, times)
            self._keep(key, {"yardsticks": float(np.median(times)), "speedup": asdict(found)})
        return _speedup(self._known[key]["speedup"])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds_left -= time.monotonic() - start

    def _measure(
        self, spec: ConvSpec, shape: Sequence[int], forms: Sequence[Form], known: Mapping[str, Any]
    ) -> dict[str, Any]:
        layouts = [branches(spec, *form, Border()) for form in ((ZERO_BORDER, 0), *forms)]
        dense, *others = [(layer_onnx(each, shape), _feed(shape, self._seed)) for each in layouts]
        first, again, *samples = self._samples([dense, dense, *others])
        found = {}
        for form, times in zip(forms, samples, strict=True):
            ratio = speedup(first, again, times)
            found[_label(form)] = {
                "ratio": ratio.median,
                "faster": ratio.significant and ratio.median > 1,
            }
        return {
            "dense_yardsticks": known.get("dense_yardsticks", float(np.median(first))),
            "forms": {**known.get("forms", {}), **found},
        }

    def _samples(
        self,
        models: Sequence[tuple[Path | bytes, Mapping[str, Any]]],
        runs: int = FORM_RUNS,
        progress: Progress = silent,
    ) -> Any:
        """Times of models in units of the yardstick of the same round, models × runs."""
        yardstick = layer_onnx([[_YARDSTICK]], _YARDSTICK_SHAPE), _feed(_YARDSTICK_SHAPE, self._seed)
        deployed = [(Deployed(model, self._runtime), feed) for model, feed in (*models, yardstick)]
        *samples, unit = time_all(
            deployed, runs=runs, seed=self._seed, progress=progress, description="timing plans"
        )
        key = self._key(yardstick=asdict(_YARDSTICK), layout=LAYOUT)
        if not self._recall(key, _usable_yardstick):
            self._keep(key, {"milliseconds": float(np.median(unit))})
        return np.asarray(samples) / unit

    @property
    def _milliseconds(self) -> float:
        """Of the yardstick."""
        key = self._key(yardstick=asdict(_YARDSTICK), layout=LAYOUT)
        if not self._recall(key, _usable_yardstick):
            self._samples([])
        return float(self._known[key]["milliseconds"])

    def _key(self, **what: Any) -> str:
        found = environment(self._runtime)
        what |= {name: found[name] for name in _RUNTIME}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def _recall(self, key: str, usable: Callable[[Any], bool]) -> dict[str, Any]:
        """What is known; nothing if that is none, not ours, or damaged."""
        if key not in self._known and self._cache is not None:
            with contextlib.suppress(*_NO_ENTRY):
                found = json.loads(read_file(self._cache / f"{key}.json"))
                if is_intact(found) and usable(found):
                    self._known[key] = found
        return self._known.get(key, {})

    def _keep(self, key: str, known: dict[str, Any]) -> None:
        """Whole or not at all, for others may read; where it cannot be kept, the next run measures again."""
        self._known[key] = known
        if self._cache is None:
            return
        with contextlib.suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            unfinished = self._cache / f"{key}.{os.getpid()}"
            unfinished.write_text(json.dumps(sealed(known)), encoding="utf-8")
            unfinished.replace(self._cache / f"{key}.json")


def _input_shape(inputs: Tensor) -> tuple[int, ...]:
    """N × C × H × W of a convolution's inputs."""
    return (len(inputs) if inputs.ndim == 4 else 1, *inputs.shape[-3:])


def _feed(shape: Sequence[int], seed: int) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def _usable_yardstick(found: Any) -> bool:
    return 0 < float(found["milliseconds"]) < math.inf


def _usable_forms(found: Any) -> bool:
    ratios = [each["ratio"] for each in found["forms"].values() if isinstance(each["faster"], bool)]
    times = [found["dense_yardsticks"], *ratios]
    return len(ratios) == len(found["forms"]) and all(0 < float(each) < math.inf for each in times)


def _usable_plan(found: Any) -> bool:
    numbers = [found["yardsticks"], *asdict(_speedup(found["speedup"])).values()]
    flat = [
        each for number in numbers for each in (number.values() if isinstance(number, dict) else [number])
    ]
    return all(0 < float(each) < math.inf for each in flat)


def _speedup(found: Mapping[str, Any]) -> Speedup:
    intervals = {name: Interval(**found[name]) for name in ("ci95", "noise_floor")}
    return Speedup(found["median"], **intervals)


def _label(form: Form) -> str:
    return f"{form[0]} {form[1]}"
