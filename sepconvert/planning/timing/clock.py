"""Times of forms of layers and of whole plans, measured once and remembered."""

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from weakref import finalize

import numpy as np
from msgspec import Meta
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sepconvert.base.documents import is_intact, read_file, replacing, sealed, structured, writing
from sepconvert.base.environment import TIMES_DEPEND_ON, Runtime, environment
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import Progress, silent
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.factorize.exact.factors import branches
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import Form
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import LEAST_RUNS, Deployed, Speedup, speedup, time_all
from sepconvert.measure.statistics import Interval
from sepconvert.network.trace import ConvSite
from sepconvert.planning.allocate import IN_FLOAT
from sepconvert.planning.timing.model import TimeModel

FLOAT: Form = (IN_FLOAT, 0)


# Seconds that timing some plans takes about: the times of slow models vary less, and tell enough in fewer
# runs. The delivered one is timed in all runs at the end.
_PLAN_SECONDS = 5.0


# Layers and plans are timed at different moments, when the machine may be more or less busy. So each is timed
# together with this layer, and its time is expressed as a multiple of this one's.
YARDSTICK = ConvSpec(64, 64, (3, 3), padding=((1, 1), (1, 1)), bias=True)


YARDSTICK_SHAPE = (1, 64, 24, 24)


LAYOUT = 5
"""Version of the models that `Clock` times; remembered times of another version are not used."""


_MODEL_ERROR = 1.25  # ratio of modelled times that is taken for a gain: nine in ten are off by less


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
    ci95: Interval  # of the ratio
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


@dataclass(frozen=True)
class FormTime:
    """The time of one form of a layer within a graph.

    `speedup` is the ratio of the dense layer's time to the form's, and `ci95` its interval; None if the time
    is modelled.
    """

    milliseconds: float  # over all calls of one forward pass
    speedup: float
    ci95: Interval | None
    faster: bool  # than the dense layer, beyond noise or beyond the errors of the model

    @property
    def measured(self) -> bool:
        """Whether the time was measured."""
        return self.ci95 is not None


@dataclass(frozen=True)
class FormTimes:
    """The times of a layer and of its forms."""

    dense_milliseconds: float
    forms: Mapping[Form, FormTime]

    @property
    def best(self) -> FormTime | None:
        """The fastest form."""
        return min(self.forms.values(), key=lambda each: each.milliseconds, default=None)


class Clock:
    """Times forms of layers, and whole plans, against the original, and remembers the times on disk.

    Each layer shape is timed once, within the surroundings that `layer_onnx` gives it; their time is part of
    every measurement and cancels in differences. All times that decisions depend on are remembered, so that
    the same command gives the same plan again.
    """

    def __init__(
        self,
        runtime: Runtime,
        seed: int,
        cache: Path | None,
        seconds: float,
        form: Int8Form | None = None,
    ) -> None:
        """Keep times in the folder `cache`, if given, and time forms and pairs for at most `seconds`.

        Everything is timed in the `form` that models are deployed in.
        """
        self._runtime, self._seed, self._cache, self._form = runtime, seed, cache, form
        self._layers = _LayerModels(form)
        self._seconds_left = seconds
        self._known: dict[str, Any] = {}
        self._model, self._learnt = TimeModel(), set[str]()
        self._folder = Path(tempfile.mkdtemp(prefix="sepconvert-"))
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files: MutableMapping[nn.Module, Path] = WeakIdKeyDictionary()  # of models timed before

    def plans(
        self,
        drafts: Drafts,
        converted: Sequence[nn.Module],
        runs: int,
        progress: Progress,
    ) -> tuple[float, list[Speedup]]:
        """Return the milliseconds of an original, and how much faster conversions are, timed together."""
        models = [drafts.original, *converted]
        new = [model for model in models if model not in self._files]
        for model in progress(new, "drafting plans"):
            path = self._folder / f"{uuid.uuid4()}.onnx"
            with writing(path):
                path.write_bytes(
                    drafts.timed(model).SerializeToString() if self._form is None else self._form.timed(model)
                )
            self._files[model] = path
        paths = [self._files[model] for model in models]
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        keys = [self._key(layout=LAYOUT, original=files[0], converted=file, runs=runs) for file in files]
        missing = [index for index, key in enumerate(keys) if self._recall(key, _PlanEntry) is None]
        if missing:
            feed = drafts.feed(drafts.inputs)
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

    def forms(self, site: ConvSite, forms: Sequence[Form]) -> FormTimes:
        """Return the times of the layer at `site` and of these forms, modelled if time is up."""
        conv = site.dense
        shape = input_shape(conv.inputs)
        key = self._key(layout=LAYOUT, spec=asdict(conv.spec), input=list(shape), **self._layers.key)
        known = self._recall(key, _LayerEntry)
        missing = [form for form in forms if known is None or _label(form) not in known.forms]
        if missing and self._seconds_left > 0:
            with self._counted():
                known = self._measure(conv.spec, shape, missing, known)
            self._keep(key, known)
        # Calls of other sizes are taken to run at the same pace.
        calls = site.macs / (conv.spec.macs((shape[2], shape[3])) or 1) * self._milliseconds
        modelled = self._model.time([[conv.spec]], shape)
        if known is not None:
            self._learn(key, conv.spec, shape, known)
        dense = modelled if known is None else known.dense_yardsticks
        found = {}
        for form in forms:
            entry = None if known is None else known.forms.get(_label(form))
            if entry is not None:
                time = FormTime(dense / entry.ratio * calls, entry.ratio, entry.ci95, entry.faster)
            else:
                ratio = modelled / self._model.time(branches(conv.spec, *form, Border()), shape)
                time = FormTime(dense / ratio * calls, ratio, None, ratio > _MODEL_ERROR)
            found[form] = time
        return FormTimes(dense * calls, found)

    def in_float(self, site: ConvSite) -> float | None:
        """Return the milliseconds of a layer in floating point among others in int8; None if not measured."""
        if self._seconds_left <= 0:
            return None
        return self.forms(site, [FLOAT]).forms[FLOAT].milliseconds

    def pair(self, pair: tuple[ConvSpec, ConvSpec], dense: ConvSpec, inputs: Tensor) -> Speedup | float:
        """Return the speed-up of one convolution over the two that it equals, modelled if time is up."""
        shape = input_shape(inputs)
        specs = [asdict(spec) for spec in pair]
        key = self._key(layout=LAYOUT, pair=specs, input=list(shape), **self._layers.key)
        known = self._recall(key, _PlanEntry)
        if known is None:
            if self._seconds_left <= 0:
                return self._model.time([pair], shape) / self._model.time([[dense]], shape)
            models = [self._layers.of([chain], shape) for chain in (pair, pair, (dense,))]
            with self._counted():
                first, again, times = self._samples(
                    [(model, random_feed(shape, self._seed)) for model in models]
                )
            known = _PlanEntry(float(np.median(times)), speedup(first, again, times))
            self._keep(key, known)
        return known.speedup

    def _learn(self, key: str, spec: ConvSpec, shape: Sequence[int], known: _LayerEntry) -> None:
        """Correct the model of times by a measured layer, once."""
        if key in self._learnt:
            return
        self._learnt.add(key)
        self._model.learn([[spec]], shape, known.dense_yardsticks)
        for label, entry in known.forms.items():
            if _form(label) == FLOAT:
                continue
            chains = branches(spec, *_form(label), Border())
            self._model.learn(chains, shape, known.dense_yardsticks / entry.ratio)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds_left -= time.monotonic() - start

    def _measure(
        self, spec: ConvSpec, shape: Sequence[int], forms: Sequence[Form], known: _LayerEntry | None
    ) -> _LayerEntry:
        models = [self._layers.of_form(spec, form, shape) for form in ((ZERO_BORDER, 0), *forms)]
        dense, *others = [(each, random_feed(shape, self._seed)) for each in models]
        first, again, *samples = self._samples([dense, dense, *others])
        found = {} if known is None else {**known.forms}
        for form, times in zip(forms, samples, strict=True):
            ratio = speedup(first, again, times)
            faster = ratio.significant and ratio.median > 1
            found[_label(form)] = _FormEntry(ratio.median, ratio.ci95, faster)
        return _LayerEntry(float(np.median(first)) if known is None else known.dense_yardsticks, found)

    def _samples(
        self,
        models: Sequence[tuple[Path | bytes, Mapping[str, Any]]],
        runs: int = LEAST_RUNS,
        progress: Progress = silent,
    ) -> Any:
        """Return the times of models, models × runs, in units of the yardstick's time in the same round."""
        yardstick = layer_onnx([[YARDSTICK]], YARDSTICK_SHAPE), random_feed(YARDSTICK_SHAPE, self._seed)
        deployed = [(Deployed(model, self._runtime), feed) for model, feed in (*models, yardstick)]
        *samples, unit = time_all(
            deployed,
            runs=runs,
            seed=self._seed,
            seconds=_PLAN_SECONDS,
            progress=progress,
            description="timing plans",
        )
        key = self._key(yardstick=asdict(YARDSTICK), layout=LAYOUT)
        if self._recall(key, _YardstickEntry) is None:
            self._keep(key, _YardstickEntry(float(np.median(unit))))
        return [np.asarray(times) / unit for times in samples]

    @property
    def _milliseconds(self) -> float:
        """Time of the yardstick."""
        key = self._key(yardstick=asdict(YARDSTICK), layout=LAYOUT)
        if self._recall(key, _YardstickEntry) is None:
            self._samples([])
        found: _YardstickEntry = self._known[key]
        return found.milliseconds

    def _key(self, **what: Any) -> str:
        found = environment(self._runtime)
        what |= {name: found[name] for name in TIMES_DEPEND_ON}
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
            with replacing(self._cache / f"{key}.json") as unfinished:
                unfinished.write_text(json.dumps(sealed(asdict(entry))), encoding="utf-8")


class _LayerModels:
    """ONNX models of layers in the form that they are deployed in."""

    def __init__(self, form: Int8Form | None) -> None:
        self._form = form

    @property
    def key(self) -> dict[str, Any]:
        """The kind of integers, which times depend on besides geometry and runtime."""
        return {} if self._form is None else {"number": asdict(self._form.number)}

    def of(self, chains: Sequence[Sequence[ConvSpec]], shape: Sequence[int]) -> bytes:
        """Return the model of some convolutions, see `layer_onnx`."""
        model = layer_onnx(chains, shape)
        return model if self._form is None else self._form.layer(model)

    def of_form(self, spec: ConvSpec, form: Form, shape: Sequence[int]) -> bytes:
        """Return the model of a form of a layer."""
        if self._form is not None and form == FLOAT:
            return self._form.layer(layer_onnx([[spec]], shape), in_float=True)
        return self.of(branches(spec, *form, Border()), shape)


def input_shape(inputs: Tensor) -> tuple[int, ...]:
    """Return the shape N × C × H × W of a convolution's inputs."""
    return (len(inputs) if inputs.ndim == 4 else 1, *inputs.shape[-3:])


def random_feed(shape: Sequence[int], seed: int) -> dict[str, Any]:
    """Return a random input of a model that `layer_onnx` makes."""
    return {"input": np.random.default_rng(seed).standard_normal(shape, np.float32)}


def _label(form: Form) -> str:
    return f"{form[0]} {form[1]}"


def _form(label: str) -> Form:
    scheme, _, rank = label.rpartition(" ")
    return scheme, int(rank)
