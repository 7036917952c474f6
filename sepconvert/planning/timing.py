"""Dense and converted, whole models and single layers, timed against each other in ONNX Runtime."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from weakref import WeakKeyDictionary, finalize

import numpy as np
from msgspec import Meta
from torch import Tensor, nn

from sepconvert.base.documents import is_intact, read_file, sealed, structured
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
from sepconvert.network.rewrite import Replacement
from sepconvert.network.tensors import Inputs, cast
from sepconvert.network.trace import ConvSite

FORM_RUNS = 20
"""Interleaved runs of each form of a layer."""


# Layers and plans are timed at different moments, when the machine may be more or less busy. So each is timed
# together with this layer, and its time is expressed as a multiple of this one's.
_YARDSTICK = ConvSpec(64, 64, (3, 3), padding=((1, 1), (1, 1)), bias=True)


_YARDSTICK_SHAPE = (1, 64, 24, 24)


# Entries of `environment` that times depend on.
_RUNTIME = (
    "cpu",
    "instruction_sets",
    "threads",
    "spinning",
    "graph_optimization",
    "provider",
    "provider_options",
    "onnxruntime",
)


LAYOUT = 3
"""Version of the models that `Clock` times; remembered times of another version are not used."""


T = TypeVar("T")
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]


@dataclass(frozen=True)
class _YardstickEntry:
    """The cached time of the yardstick."""

    milliseconds: Positive


@dataclass(frozen=True)
class _FormEntry:
    """The cached time of one form of a layer."""

    ratio: Positive  # time of the dense layer over that of the form
    faster: bool


@dataclass(frozen=True)
class _LayerEntry:
    """The cached times of a layer and of its forms."""

    dense_yardsticks: Positive
    forms: dict[str, _FormEntry]


@dataclass(frozen=True)
class _PlanEntry:
    """The cached time of a model, and how much faster it is than another."""

    yardsticks: Positive
    speedup: Speedup

    def __post_init__(self) -> None:
        """Raise `ValueError` for ratios that no measurement gives."""
        ratio = self.speedup
        numbers = (
            ratio.median,
            *(end for each in (ratio.ci95, ratio.noise_floor) for end in (each.lo, each.hi)),
        )
        if not all(0 < each <= sys.float_info.max for each in numbers):
            raise ValueError("ratios of times are positive")


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
    """Return why a replacement does not pay in the runtime; None if it is measured to be faster."""
    speedup = time_layer(site, replacement, max(runs, 1), runtime, seed).speedup
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"


@dataclass(frozen=True)
class FormTime:
    """The time of one form of a layer within a graph."""

    milliseconds: float  # over all calls of one forward pass
    faster: bool  # than the dense layer, beyond noise


@dataclass(frozen=True)
class FormTimes:
    """The times of a layer and of its forms."""

    dense_milliseconds: float
    forms: Mapping[Form, FormTime]

    @property
    def best_ratio(self) -> float:
        """Ratio of the layer's time to that of its fastest form."""
        return max((self.dense_milliseconds / each.milliseconds for each in self.forms.values()), default=0.0)


class Clock:
    """Times forms of layers, and whole plans, against the original, and remembers the times on disk.

    Each layer shape is timed once, within the surroundings that `layer_onnx` gives it; their time is part of
    every measurement and cancels in differences. All times that decisions depend on are remembered, so that
    the same command gives the same plan again.
    """

    def __init__(self, runtime: Runtime, seed: int, cache: Path | None, seconds: float) -> None:
        """Keep times in the folder `cache`, if given, and time forms and pairs for at most `seconds`."""
        self._runtime, self._seed, self._cache = runtime, seed, cache
        self._seconds_left = seconds
        self._known: dict[str, Any] = {}
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
        """Return the milliseconds of a model, and how much faster others are, exported and timed together."""
        models = [original, *converted]
        new = [model for model in models if model not in self._files]
        for model in progress(new, "exporting plans"):
            path = self._folder / f"{uuid.uuid4()}.onnx"
            save_onnx(export_program(model, inputs, dynamic_batch=False), path, check=False)
            self._files[model] = path
        paths = [self._files[model] for model in models]
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        keys = [self._key(layout=LAYOUT, original=files[0], converted=file, runs=runs) for file in files]
        missing = [index for index, key in enumerate(keys) if self._recall(key, _PlanEntry) is None]
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
                    f"({cause}); convert it in exact mode, or by `rank` or `target_macs` with `runs` 0"
                ) from error
            for index, times in zip(missing, others, strict=True):
                self._keep(keys[index], _PlanEntry(float(np.median(times)), speedup(first, again, times)))
        known: list[_PlanEntry] = [self._known[key] for key in keys]
        return known[0].yardsticks * self._milliseconds, [each.speedup for each in known[1:]]

    def forms(self, site: ConvSite, forms: Sequence[Form]) -> FormTimes | None:
        """Return the times of the layer at `site` and of these forms; None if time is up."""
        conv = site.dense
        shape = _input_shape(conv.inputs)
        key = self._key(layout=LAYOUT, spec=asdict(conv.spec), input=list(shape))
        known = self._recall(key, _LayerEntry)
        missing = [form for form in forms if known is None or _label(form) not in known.forms]
        if known is None or missing:
            if self._seconds_left <= 0:
                return None
            with self._counted():
                known = self._measure(conv.spec, shape, missing, known)
            self._keep(key, known)
        # Calls of other sizes are taken to run at the same pace.
        calls = site.macs / (conv.spec.macs((shape[2], shape[3])) or 1)
        dense = known.dense_yardsticks * self._milliseconds
        entries = {form: known.forms[_label(form)] for form in forms}
        return FormTimes(
            dense * calls,
            {form: FormTime(dense / each.ratio * calls, each.faster) for form, each in entries.items()},
        )

    def pair(self, pair: tuple[ConvSpec, ConvSpec], dense: ConvSpec, inputs: Tensor) -> Speedup | None:
        """Return the speed-up of one convolution over the two that it equals; None if time is up."""
        shape = _input_shape(inputs)
        key = self._key(layout=LAYOUT, pair=[asdict(spec) for spec in pair], input=list(shape))
        known = self._recall(key, _PlanEntry)
        if known is None:
            if self._seconds_left <= 0:
                return None
            models = [layer_onnx([chain], shape) for chain in (pair, pair, (dense,))]
            with self._counted():
                first, again, times = self._samples([(model, _feed(shape, self._seed)) for model in models])
            known = _PlanEntry(float(np.median(times)), speedup(first, again, times))
            self._keep(key, known)
        return known.speedup

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds_left -= time.monotonic() - start

    def _measure(
        self, spec: ConvSpec, shape: Sequence[int], forms: Sequence[Form], known: _LayerEntry | None
    ) -> _LayerEntry:
        layouts = [branches(spec, *form, Border()) for form in ((ZERO_BORDER, 0), *forms)]
        dense, *others = [(layer_onnx(each, shape), _feed(shape, self._seed)) for each in layouts]
        first, again, *samples = self._samples([dense, dense, *others])
        found = {} if known is None else {**known.forms}
        for form, times in zip(forms, samples, strict=True):
            ratio = speedup(first, again, times)
            found[_label(form)] = _FormEntry(ratio.median, ratio.significant and ratio.median > 1)
        return _LayerEntry(float(np.median(first)) if known is None else known.dense_yardsticks, found)

    def _samples(
        self,
        models: Sequence[tuple[Path | bytes, Mapping[str, Any]]],
        runs: int = FORM_RUNS,
        progress: Progress = silent,
    ) -> Any:
        """Return the times of models, models × runs, in units of the yardstick's time in the same round."""
        yardstick = layer_onnx([[_YARDSTICK]], _YARDSTICK_SHAPE), _feed(_YARDSTICK_SHAPE, self._seed)
        deployed = [(Deployed(model, self._runtime), feed) for model, feed in (*models, yardstick)]
        *samples, unit = time_all(
            deployed, runs=runs, seed=self._seed, progress=progress, description="timing plans"
        )
        key = self._key(yardstick=asdict(_YARDSTICK), layout=LAYOUT)
        if self._recall(key, _YardstickEntry) is None:
            self._keep(key, _YardstickEntry(float(np.median(unit))))
        return np.asarray(samples) / unit

    @property
    def _milliseconds(self) -> float:
        """Time of the yardstick."""
        key = self._key(yardstick=asdict(_YARDSTICK), layout=LAYOUT)
        if self._recall(key, _YardstickEntry) is None:
            self._samples([])
        found: _YardstickEntry = self._known[key]
        return found.milliseconds

    def _key(self, **what: Any) -> str:
        found = environment(self._runtime)
        what |= {name: found[name] for name in _RUNTIME}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def _recall(self, key: str, kind: type[T]) -> T | None:
        """Return an entry that was kept before; None if there is none, or if its file is damaged."""
        if key not in self._known and self._cache is not None:
            path = self._cache / f"{key}.json"
            with contextlib.suppress(SepconvertError, OSError, ValueError, RecursionError):
                found = json.loads(read_file(path))
                if isinstance(found, dict) and is_intact(found):
                    self._known[key] = structured(found, kind, str(path))
        entry: T | None = self._known.get(key)
        return entry

    def _keep(self, key: str, entry: _YardstickEntry | _LayerEntry | _PlanEntry) -> None:
        """Keep an entry; where the folder cannot be written, the next run measures again."""
        self._known[key] = entry
        if self._cache is None:
            return
        with contextlib.suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            # Written aside and renamed: another process may be reading.
            unfinished = self._cache / f"{key}.{os.getpid()}"
            unfinished.write_text(json.dumps(sealed(asdict(entry))), encoding="utf-8")
            unfinished.replace(self._cache / f"{key}.json")


def _input_shape(inputs: Tensor) -> tuple[int, ...]:
    """Return the shape N × C × H × W of a convolution's inputs."""
    return (len(inputs) if inputs.ndim == 4 else 1, *inputs.shape[-3:])


def _feed(shape: Sequence[int], seed: int) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def _label(form: Form) -> str:
    return f"{form[0]} {form[1]}"
