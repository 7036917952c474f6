"""Profile of one model: cost, latency and accuracy, as a value that can be stored and compared."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from tabulate import tabulate
from torch import Tensor, nn

from sepconvert.base.documents import decode, read_file
from sepconvert.base.environment import TIMES_DEPEND_ON, Runtime
from sepconvert.base.errors import MAX_SEED, SepconvertError, check_number, quoted
from sepconvert.base.options.values import Task, Timing
from sepconvert.base.progress import Progress, silent
from sepconvert.files.onnx.facts import onnx_sizes, read_onnx
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.cost import count
from sepconvert.measure.execution.operators import OperatorTime, operator_times
from sepconvert.measure.latency import (
    Deployed,
    Latency,
    Startup,
    measure_grid,
    measure_single,
    session,
    startup,
)
from sepconvert.measure.metrics.classes import Accuracy, Labels
from sepconvert.measure.metrics.evaluation import TOP1, Evaluation, evaluate
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.measure.statistics import Interval
from sepconvert.network.copies import checked, private_copy
from sepconvert.network.tensors import Inputs, arguments, tensors_in

SCHEMA = "sepconvert.profile/1"


_SESSIONS = 5


@dataclass(frozen=True)
class Anatomy:
    """Execution of an ONNX file in detail."""

    peak_activation_bytes: int | None  # see `OnnxFile`
    startup: Startup
    latencies: tuple[Latency, ...]  # one for each number of threads and batch size
    operators: tuple[OperatorTime, ...]  # for one batch as it is timed, in the order of execution

    def latency(self, threads: int, batch: int) -> Latency:
        """Return the latency with this number of threads and this batch size."""
        return next(found for found in self.latencies if (found.threads, found.batch) == (threads, batch))

    def to_json(self) -> dict[str, Any]:
        """Return the `anatomy` object of a profile; throughput is in samples per second."""
        return {
            "peak_activation_bytes": self.peak_activation_bytes,
            "startup": self.startup.to_dict(),
            "latencies_ms": [
                {**latency.to_dict(), "per_second": latency.per_second} for latency in self.latencies
            ],
            "operators": [operator.to_dict() for operator in self.operators],
        }


def anatomy(
    path: Path,
    inputs: Sequence[npt.NDArray[Any]],
    *,
    batches: Sequence[int],
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress = silent,
) -> Anatomy:
    """Measure start-up, memory, latency by threads and batch, and time by operator of an ONNX file.

    Args:
        path: the file. One that fixes the batch is timed in that batch alone.
        inputs: arrays by position, batch first; repeated to fill the other batches.
        batches: sizes to time in addition to that of `inputs`.
        runs: interleaved rounds, in each of which every batch runs with all threads of `runtime` and, if the
            provider takes threads, with one.
        runtime: settings of ONNX Runtime.
        seed: seed of the order of runs.
        progress: shows the progress of loops.

    Raises:
        SepconvertError: ONNX Runtime cannot load the file or run it on these inputs.
    """
    file, deployed = read_onnx(path), Deployed(path, runtime)
    names = [argument.name for argument in session(deployed).get_inputs()]
    own = max((len(array) for array in inputs if array.ndim), default=1)
    fixed = any(shape and shape[0] is not None for shape in file.shapes)
    feeds = {
        size: {
            name: _resized(array, size).astype(dtype, copy=False)
            for name, array, dtype in zip(names, inputs, file.dtypes, strict=True)
        }
        for size in ([own] if fixed else sorted({own, *batches}))
    }
    numbers = {1, runtime.threads} if runtime.takes_threads else {runtime.threads}
    by_threads = [Deployed(path, replace(runtime, threads=threads)) for threads in sorted(numbers)]
    return Anatomy(
        file.peak_activation_bytes,
        startup(deployed, feeds[own], sessions=_SESSIONS),
        measure_grid(by_threads, feeds, runs=runs, seed=seed, progress=progress),
        operator_times(deployed, feeds[own], runs=runs),
    )


def _resized(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Return the array with its samples repeated or cut to a batch of `size`; a scalar stays as it is."""
    return np.resize(array, (size, *array.shape[1:])) if array.ndim else array


@dataclass(frozen=True, repr=False)
class Profile:
    """Cost, latency and accuracy of a model, or the value of another metric; it prints as a table.

    `macs` are those of one sample as fvcore counts them (one fused multiply-add = 1), `flops` is twice that.
    `uncounted_ops` are operators that fvcore has no count for, with their numbers of calls.
    """

    params: int
    macs: int
    onnx_bytes: int | None
    weight_bytes: int | None  # in the ONNX file
    latency: Latency | None
    accuracy: Accuracy | None
    uncounted_ops: Mapping[str, int]
    anatomy: Anatomy | None = None  # if it was requested
    metric: MetricValue | None = None
    labels: Labels | None = field(default=None, compare=False)  # of a classifier's images; not stored

    def __repr__(self) -> str:
        table: str = tabulate(self._measured(), tablefmt="simple", disable_numparse=True)
        return table

    def _repr_html_(self) -> str:
        table: str = tabulate(self._measured(), tablefmt="html", disable_numparse=True)
        return table

    def _measured(self) -> list[tuple[str, str]]:
        return [(name, text) for name, text in self.facts().items() if text != "-"]

    @property
    def sentence(self) -> str:
        """Latency, cost and quality in one sentence."""
        names = ("latency, ms", "parameters", "MACs")
        found = self.facts()
        parts = [f"{found[name]} {name.removeprefix('latency, ')}" for name in names if found[name] != "-"]
        if self.latency is not None:
            parts[0] += f" a batch of {self.latency.batch} on {self.latency.threads} thread"
            parts[0] += "s" * (self.latency.threads > 1)
        if self.metric is not None:
            parts.append(f"{self.metric.name} {self.metric}")
        return f"{', '.join(parts)}."

    def facts(self) -> dict[str, str]:
        """Return what was measured as text, by name; a dash for what was not."""
        latency, accuracy, metric = self.latency, self.accuracy, self.metric
        facts = {
            "parameters": f"{self.params:,}",
            "MACs": f"{self.macs:,}",
            "FLOPs": f"{self.flops:,}",
            "weights, bytes": "-" if self.weight_bytes is None else f"{self.weight_bytes:,}",
            "ONNX bytes": "-" if self.onnx_bytes is None else f"{self.onnx_bytes:,}",
            "latency, ms": "-"
            if latency is None
            else f"{latency.median_ms:.3f} [{latency.ci95_ms.lo:.3f}, {latency.ci95_ms.hi:.3f}]",
            "top-1": "-" if accuracy is None else f"{100 * accuracy.top1:.2f} % of {accuracy.n}",
        }
        return facts if metric is None or metric.name == TOP1.name else facts | {metric.name: str(metric)}

    @property
    def flops(self) -> int:
        """Floating-point operations of one sample: 2 × `macs`."""
        return 2 * self.macs

    def with_scores(self, scored: Evaluation | None) -> "Profile":
        """Return the profile with the value of a metric, and the accuracy of a classifier."""
        if scored is None:
            return self
        labels = None if scored.predictions is None else Labels.of(scored.predictions)
        return replace(self, accuracy=scored.accuracy(), metric=scored.summary(), labels=labels)

    def to_json(self) -> dict[str, Any]:
        """Return the PROFILE object of the report."""
        return {
            "params": self.params,
            "macs": self.macs,
            "flops": self.flops,
            "onnx_bytes": self.onnx_bytes,
            "weight_bytes": self.weight_bytes,
            "latency_ms": None if self.latency is None else self.latency.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "metric": None if self.metric is None else self.metric.to_dict(),
            "uncounted_ops": dict(self.uncounted_ops),
            **({} if self.anatomy is None else {"anatomy": self.anatomy.to_json()}),
        }


@dataclass(frozen=True)
class StoredProfile:
    """A profile that `sepconvert profile` wrote: of which file, and where it was measured."""

    profile: Profile
    model: str
    sha256: str | None
    environment: Mapping[str, Any]

    def differences(self, environment: Mapping[str, Any]) -> list[str]:
        """Return the differences to another environment that make latencies incomparable."""
        names = (*TIMES_DEPEND_ON, "cores", "platform")
        return [
            f"{name} ({self.environment.get(name)}, {environment.get(name)})"
            for name in names
            if self.environment.get(name) != environment.get(name)
        ]


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class _StoredLatency:
    median: _Milliseconds
    ci95: tuple[_Milliseconds, _Milliseconds]
    quantiles: Annotated[tuple[_Milliseconds, ...], msgspec.Meta(min_length=21, max_length=21)]
    runs: _Positive
    threads: _Positive
    batch: _Positive

    def __post_init__(self) -> None:
        """Check the order of the numbers."""
        if not self.ci95[0] <= self.median <= self.ci95[1]:
            raise ValueError(f"ci95: expected an interval around the median, got {quoted(self.ci95)}")
        if list(self.quantiles) != sorted(self.quantiles):
            raise ValueError(f"quantiles: expected rising numbers, got {quoted(self.quantiles)}")

    def latency(self) -> Latency:
        return Latency(self.median, Interval(*self.ci95), self.quantiles, self.runs, self.threads, self.batch)


@dataclass(frozen=True)
class _StoredAccuracy:
    top1: _Share
    top5: _Share | None
    n: _Count

    def accuracy(self) -> Accuracy:
        return Accuracy(self.top1, self.top5, self.n)


@dataclass(frozen=True)
class _StoredModel:
    path: str
    sha256: str | None


@dataclass(frozen=True)
class _Document:
    """The JSON of a profile; the anatomy and other keys are not read."""

    model: _StoredModel
    environment: dict[str, Any]
    params: _Count
    macs: _Count
    onnx_bytes: _Count | None
    weight_bytes: _Count | None
    latency_ms: _StoredLatency | None
    accuracy: _StoredAccuracy | None
    uncounted_ops: dict[str, int]
    metric: MetricValue | None = None  # which older profiles lack

    def profile(self) -> Profile:
        return Profile(
            self.params,
            self.macs,
            self.onnx_bytes,
            self.weight_bytes,
            None if self.latency_ms is None else self.latency_ms.latency(),
            None if self.accuracy is None else self.accuracy.accuracy(),
            self.uncounted_ops,
            metric=self.metric,
        )


@dataclass(frozen=True)
class _Versioned:
    schema: str


def read_profile(path: Path) -> StoredProfile:
    """Read a profile that `sepconvert profile` wrote.

    Raises:
        SepconvertError: there is no such file, or it is no profile or one of another version; the message
            names the key at fault.
    """
    try:
        text = read_file(path)
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    where = f"{path}: not a profile that sepconvert wrote"
    advice = "make it anew with sepconvert profile"
    if (schema := decode(text, _Versioned, where, advice).schema) != SCHEMA:
        raise SepconvertError(
            f"{path}: expected schema {SCHEMA!r}, got {quoted(schema)}; make it anew with this version"
        )
    document = decode(text, _Document, where, advice)
    return StoredProfile(document.profile(), document.model.path, document.model.sha256, document.environment)


def profile(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    data: Iterable[Any] | None = None,
    metric: str | Callable[..., Any] | Task | None = None,
    timing: Timing = Timing(),
    batches: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """Measure a model: MACs and parameters, ONNX size, latency in ONNX Runtime, accuracy on `data`.

    Args:
        model: the model; it is left as it is.
        example_inputs: N × … tensor, or a tuple of positional arguments; N is the batch that is timed.
        data: batches (x, y) of inputs and labels or other targets, for accuracy or another metric.
        metric: what the outputs are judged by, as in `convert`.
        timing: how often, and by which runtime, the model is timed; no runs for no latency.
        batches: where not None, the profile has an `anatomy`, with latencies of these sizes too.
        seed: of the order of runs.
        progress: shows it.

    Raises:
        SepconvertError: an option is out of range, or the model does not run on these inputs or cannot be
            exported.

    Example:
        256 kernels of 5×5×3 on an image of 12×12, at 8×8 positions:

        >>> import torch, sepconvert
        >>> dense = torch.nn.Conv2d(3, 256, 5, bias=False)
        >>> found = sepconvert.profile(dense, torch.rand(1, 3, 12, 12), timing=sepconvert.Timing(runs=0))
        >>> found.macs, found.flops, found.params
        (1228800, 2457600, 19200)
    """
    model, inputs = checked(model), as_inputs(model, example_inputs)
    check_number("seed", seed, 0, MAX_SEED, whole=True)
    if not isinstance(timing, Timing):
        raise SepconvertError(
            f"`timing`: expected a sepconvert.Timing, got {quoted(timing)}; pass timing=sepconvert.Timing(…)"
        )
    for size in batches or ():
        check_number("batches", size, 1, whole=True)
    runs, runtime = timing.runs, timing.runtime
    latency, detail = None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, inputs, path)
        feed = onnx_feed(model, inputs)
        batch = batch_size(inputs)
        if runs and batches is None:
            latency = measure_single(Deployed(path, runtime), feed, runs=runs, batch=batch, seed=seed)
        elif runs and batches is not None:
            detail = anatomy(
                path, list(feed.values()), batches=batches, runs=runs, runtime=runtime, seed=seed,
                progress=progress,
            )  # fmt: skip
            latency = detail.latency(runtime.threads, batch)
        sizes = onnx_sizes(path)
    cost = count(private_copy(model), inputs)
    task = Task.of(metric)
    if data is not None and not isinstance(data, Iterable):
        raise SepconvertError(
            f"`data`: expected batches (x, y), got {quoted(data)}; pass a DataLoader or a list"
        )
    if data is None and task.needs_data:
        raise SepconvertError(
            f"`{task.needs_data}`: says how `data` are scored, and there are none; pass `data`"
        )
    scoring = scoring_of(task, model, inputs)
    scored = None if data is None else evaluate(private_copy(model), data, scoring)
    found = Profile(cost.params, cost.macs, *sizes, latency, None, cost.uncounted_ops, detail)
    return found.with_scores(scored)


def as_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Return a single tensor, a tuple, or a mapping by name, as the tuple of positional arguments of a model.

    Raises:
        SepconvertError: there is no tensor in it.
    """
    if isinstance(example_inputs, Mapping):
        inputs = arguments(model, example_inputs)
    else:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not tensors_in(inputs) or any(value.is_meta for value in tensors_in(inputs)):
        raise SepconvertError(
            "`example_inputs`: expected a tensor, or a tuple of the model's positional arguments, got "
            f"{quoted(example_inputs)}; give a batch of one sample"
        )
    return inputs


def batch_size(inputs: Inputs) -> int:
    """Return the first dimension of the first tensor."""
    return next((int(value.shape[0]) for value in tensors_in(inputs) if value.ndim), 1)
