"""Latency in ONNX Runtime: interleaved, paired rounds, and a speedup only where noise cannot explain it.

Machines drift: clocks change and neighbours come and go, by more than the differences of interest. So
models are never timed one after the other. Every round times each of them once, in a random order, and
what is compared is their ratio *within* the round. A second session of the original runs along: its ratio
to the first shows what this machine, at this moment, calls "the same speed".
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError, first_line, quoted
from sepconvert.base.progress import Progress, Stage, silent, stage
from sepconvert.measure.statistics import Interval, median_interval

# Shortest timed sample. The clock and the call around it cost about 0.1 µs, a preemption far more.
_SHORTEST_SAMPLE_NS = 1_000_000


LEAST_RUNS = 12
"""Rounds of which a median has a usable interval: that from the third to the tenth in order, at 96 %."""


_WARMUP_BLOCK = 3


_WARMUP_TOLERANCE = 0.05
_MANY_TASKS, _SAME_PACE = 10, 0.01


_WARMUP_MOST_BLOCKS = 10


_WARMUP_MOST_NS = 5_000_000_000


_CPU = "CPUExecutionProvider"


_SPINNING = {"off": "0", "on": "1"}


_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


@dataclass(frozen=True)
class Deployed:
    """A model as it is deployed: an ONNX file or its bytes, whose numeric form it has, in a runtime."""

    model: Path | bytes
    runtime: Runtime

    def __str__(self) -> str:
        """Name for messages."""
        return str(self.model) if isinstance(self.model, Path) else f"the model of {len(self.model)} bytes"


@dataclass(frozen=True)
class Latency:
    """Time of one run of a model, in milliseconds for the whole batch of `batch` samples.

    `runs` is the number of timed samples behind the numbers, `threads` the intra-op threads, and `ci95_ms`
    the 95 % interval of the median (`median_interval`). `quantiles_ms` are 21, from the fastest sample to the
    slowest in steps of 5 %.
    """

    median_ms: float
    ci95_ms: Interval
    quantiles_ms: tuple[float, ...]
    runs: int
    threads: int
    batch: int

    @property
    def p90_ms(self) -> float:
        """90th percentile."""
        return self.quantiles_ms[18]

    @property
    def per_second(self) -> float:
        """Samples per second, one batch after the other."""
        return 1000 * self.batch / self.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the `latency_ms` object of the JSON profile, in milliseconds."""
        return {
            "median": self.median_ms,
            "ci95": self.ci95_ms.to_list(),
            "p90": self.p90_ms,
            "quantiles": list(self.quantiles_ms),
            "runs": self.runs,
            "threads": self.threads,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Speedup:
    """Ratio of the latencies original / converted, paired by round: above 1 the converted model is faster.

    `noise_floor` is the 95 % interval of the same ratio between two sessions of the original.
    """

    median: float
    ci95: Interval
    noise_floor: Interval

    @property
    def significant(self) -> bool:
        """Whether `ci95` excludes 1 and the whole `noise_floor`.

        The median must also lie farther from 1 than any of the noise floor, in either direction: where two
        sessions of one model differ, two models may differ as much the other way round.
        """
        noise = max(self.noise_floor.hi, 1 / self.noise_floor.lo)
        return (
            1.0 not in self.ci95
            and not self.ci95.overlaps(self.noise_floor)
            and max(self.median, 1 / self.median) > noise
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the `latency_speedup` object of the JSON report."""
        return {
            "median": self.median,
            "ci95": self.ci95.to_list(),
            "significant": self.significant,
            "noise_floor": self.noise_floor.to_list(),
        }


@dataclass(frozen=True)
class PairTiming:
    """Latencies of the original and of the converted model, measured in the same rounds, and their ratio."""

    original: Latency
    converted: Latency
    speedup: Speedup


def session(deployed: Deployed, profile: Path | None = None) -> ort.InferenceSession:
    """Open an ONNX Runtime session on the runtime's provider that runs one operator after the other.

    With `profile`, the times of operators are written to a file whose name begins so. Operators for which the
    provider has no kernel run on the CPU.

    Everything else is ONNX Runtime's default, as deployed, with one exception: unless the runtime's spinning
    is "on", the worker threads do not spin while they wait. The workers of one session would spin on the
    cores of whichever session is timed next: with two threads on two cores, three interleaved sessions of one
    0.56 ms model took 0.6 to 3.6 ms, and without spinning 0.56 to 0.60 ms, as it does alone. (To stop
    spinning after each run, as `session.force_spinning_stop` does, does not help: 1.4 to 2.0 ms.)

    Raises `SepconvertError` if ONNX Runtime cannot load the model, start the provider, or read its options.
    """
    model, runtime = deployed.model, deployed.runtime
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.graph_optimization_level = _LEVELS[runtime.graph_optimization]
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", _SPINNING[runtime.spinning])
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        opened = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=list({runtime.execution_provider: runtime.execution_options, _CPU: {}}.items()),
            enable_fallback=0,  # which would print an error, and go on without the provider
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        _check_provider(deployed, first_line(error))
        raise SepconvertError(
            f"onnxruntime cannot load {deployed}: {first_line(error)}; expected a valid ONNX file,"
            " check it with onnx.checker.check_model"
        ) from error
    if opened.get_providers()[0] != runtime.execution_provider:  # left out, and the CPU taken instead
        _check_provider(deployed, "it gives no reason")
    return opened


def _check_provider(deployed: Deployed, failure: str) -> None:
    """Raise `SepconvertError` if the provider or its options cause a failure: without them there is none."""
    runtime = deployed.runtime
    options, plain = runtime.provider_options, replace(runtime, provider_options={})
    if options and _opens(replace(deployed, runtime=plain)):
        raise SepconvertError(
            f"`provider_options`: {runtime.provider} refuses {quoted(dict(options))} ({failure}); "
            "expected options that ONNX Runtime documents for this provider"
        ) from None
    if runtime.provider != "cpu" and _opens(replace(deployed, runtime=replace(plain, provider="cpu"))):
        raise SepconvertError(
            f"`provider`: onnxruntime has {runtime.provider} but cannot start it ({failure}); install the "
            "drivers and libraries that it needs, or pass 'cpu'"
        ) from None


def _opens(deployed: Deployed) -> bool:
    try:
        session(deployed)
    except SepconvertError:
        return False
    return True


@dataclass(frozen=True)
class Startup:
    """Milliseconds until a model's first output; medians over new sessions in one process."""

    session_ms: float  # to read, optimise and lay out the model
    first_run_ms: float  # which allocates what later runs use again
    sessions: int

    def to_dict(self) -> dict[str, Any]:
        """Return the `startup` object of a profile."""
        return asdict(self)


@stage(Stage.TIMING)
def startup(deployed: Deployed, feeds: Mapping[str, npt.NDArray[Any]], *, sessions: int) -> Startup:
    """Open `sessions` sessions of a model one after the other, and run each once.

    Raises `SepconvertError` if the model cannot be loaded.
    """
    times = []
    for _ in range(sessions):
        start = time.perf_counter_ns()
        opened = session(deployed)
        ready = time.perf_counter_ns()
        opened.run(None, dict(feeds))
        times.append((ready - start, time.perf_counter_ns() - ready))
    created, first = np.median(times, axis=0) / 1e6
    return Startup(float(created), float(first), sessions)


def measure_pair(
    original: Deployed,
    converted: Deployed,
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    runs: int,
    batch: int,
    seed: int,
    progress: Progress = silent,
) -> PairTiming:
    """Time two models against each other in `runs` interleaved rounds.

    `feeds` maps the input names that both models share to arrays whose batch dimension is `batch`. A round
    times the original, a second session of the original, and the converted model once each (`interleave`).

    Raises `SepconvertError` if a model cannot be loaded or run on `feeds`, or `runs` is below 1.
    """
    models = [(deployed, feeds) for deployed in (original, original, converted)]
    first, again, other = time_all(models, runs=runs, seed=seed, progress=progress)
    return PairTiming(
        latency(first, original.runtime.threads, batch),
        latency(other, converted.runtime.threads, batch),
        speedup(first, again, other),
    )


@stage(Stage.TIMING)
def time_all(
    models: Sequence[tuple[Deployed, Mapping[str, npt.NDArray[Any]]]],
    *,
    runs: int,
    seed: int,
    seconds: float = math.inf,
    progress: Progress = silent,
    description: str = "timing",
) -> npt.NDArray[np.float64]:
    """Return the milliseconds of every model, on its feeds, in every round: `models × runs`.

    See `interleave` for `seconds`.

    Raises `SepconvertError` as `measure_pair` does.
    """
    tasks = [_runner(session(deployed), feeds) for deployed, feeds in models]
    return interleave(
        tasks, runs=runs, seed=seed, seconds=seconds, progress=progress, description=description
    )


def speedup(
    original: npt.NDArray[np.float64], again: npt.NDArray[np.float64], converted: npt.NDArray[np.float64]
) -> Speedup:
    """Return the speedup from times of the same rounds: the original, the original once more, the converted.

    It consists of medians of the ratios within the rounds and their intervals; the unit of the times cancels.
    """
    median, ci95 = median_interval(original / converted)
    _, noise_floor = median_interval(original / again)
    return Speedup(median, ci95, noise_floor)


@stage(Stage.TIMING)
def measure_single(
    deployed: Deployed,
    feeds: Mapping[str, npt.NDArray[Any]],
    *,
    runs: int,
    batch: int,
    seed: int,
    progress: Progress = silent,
) -> Latency:
    """Time one model, by the same loop and with the same parameters as `measure_pair`.

    Two latencies measured apart are not comparable to better than the drift of the machine between them.
    """
    task = _runner(session(deployed), feeds)
    (samples,) = interleave([task], runs=runs, seed=seed, progress=progress)
    return latency(samples, deployed.runtime.threads, batch)


@stage(Stage.TIMING)
def measure_grid(
    models: Sequence[Deployed],
    feeds: Mapping[int, Mapping[str, npt.NDArray[Any]]],
    *,
    runs: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """Time every model in every batch, all interleaved; a model has one session.

    `feeds` are given by batch size, each as in `measure_pair`. Raises `SepconvertError` as that does.
    """
    tasks, places = [], []
    for deployed in models:
        opened = session(deployed)
        for batch, arrays in feeds.items():
            tasks.append(_runner(opened, arrays))
            places.append((deployed.runtime.threads, batch))
    times = interleave(tasks, runs=runs, seed=seed, progress=progress, description="timing batches")
    return tuple(latency(each, *place) for each, place in zip(times, places, strict=True))


def interleave(
    tasks: Sequence[Callable[[], object]],
    *,
    runs: int,
    seed: int,
    seconds: float = math.inf,
    progress: Progress = silent,
    description: str = "timing",
) -> npt.NDArray[np.float64]:
    """Time every task once per round, in an order drawn anew for each round: milliseconds, `tasks × runs`.

    After `seconds`, warm-up excepted, no round begins that is beyond the twelfth.

    Column `i` holds what was measured within round `i`, so ratios of rows are paired. A sample is the mean
    of as many calls in a row as take 1 ms or more together (the count doubles until the fastest of three
    attempts does), which keeps the clock and the call around it out of the times of small models. One untimed
    call goes before: the task that ran last has filled the caches with its own data, which weighs more on a
    model that is called once than on one that is called several times in a row. (A ResNet-9 of 3.1 ms and
    its conversion of 0.6 ms: 4.6 times as fast without that call, 5.1 with it, 5.1 in ten calls in a row.)

    Warm-up: blocks of 3 rounds, until no task's median differs by more than 5 % from the one of the block
    before, or, among ten tasks and more, some of which a moment's noise always hits, until these differences
    have a median of at most 1 %; 10 blocks or 5 seconds at most, since a noisy machine may never settle. The
    limit in seconds is for slow models, which have allocated and cached everything by then.

    Raises `SepconvertError` if `runs` is below 1.
    """
    if runs < 1:
        raise SepconvertError(f"`runs`: expected at least 1, got {runs}; 50 give a usable interval")
    calls = [_calls_per_sample(task) for task in tasks]

    def rounds(count: int, show: Progress = silent) -> npt.NDArray[np.float64]:
        rng = np.random.default_rng(seed)  # anew, so that the order does not depend on how long warm-up took
        times, start = np.empty((len(tasks), count)), time.perf_counter_ns()
        for column in show(range(count), description):
            if column >= LEAST_RUNS and time.perf_counter_ns() - start > 1e9 * seconds:
                return times[:, :column]
            for row in rng.permutation(len(tasks)):
                tasks[row]()
                times[row, column] = _elapsed_ns(tasks[row], calls[row]) / calls[row] / 1e6
        return times

    start = time.perf_counter_ns()
    before = np.median(rounds(_WARMUP_BLOCK), axis=1)
    for _ in range(_WARMUP_MOST_BLOCKS - 1):
        now = np.median(rounds(_WARMUP_BLOCK), axis=1)
        moved = now / before - 1
        same_pace = len(tasks) >= _MANY_TASKS and abs(np.median(moved)) <= _SAME_PACE
        settled = same_pace or np.all(np.abs(moved) <= _WARMUP_TOLERANCE)
        if settled or time.perf_counter_ns() - start >= _WARMUP_MOST_NS:
            break
        before = now
    return rounds(runs, progress)


def _calls_per_sample(task: Callable[[], object]) -> int:
    task()  # the first call allocates what the later ones reuse
    calls = 1
    while min(_elapsed_ns(task, calls) for _ in range(3)) < _SHORTEST_SAMPLE_NS:
        calls *= 2
    return calls


def _elapsed_ns(task: Callable[[], object], calls: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(calls):
        task()
    return time.perf_counter_ns() - start


def _runner(model: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]) -> Callable[[], object]:
    inputs = dict(feeds)
    try:
        model.run(None, inputs)
    except Exception as error:  # ONNX Runtime's errors share no base class
        expected = ", ".join(f"{each.name} {each.type} {each.shape}" for each in model.get_inputs())
        got = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in inputs.items())
        raise SepconvertError(
            f"onnxruntime cannot run the model: expected {expected}; got {got};"
            f" feed the inputs that it expects ({first_line(error)})"
        ) from error
    return partial(model.run, None, inputs)


def latency(samples_ms: npt.NDArray[np.float64], threads: int, batch: int) -> Latency:
    """Return the latency from times of single runs of a batch, in milliseconds."""
    median, ci95 = median_interval(samples_ms)
    quantiles = tuple(np.quantile(samples_ms, np.linspace(0, 1, 21)).tolist())
    return Latency(median, ci95, quantiles, runs=len(samples_ms), threads=threads, batch=batch)
