"""What one model costs and how well it does, as a value that can be stored and compared."""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from sepconvert.base.documents import read_file
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import MAX_SEED, SepconvertError, check_number, first_line, quoted
from sepconvert.base.options import Timing
from sepconvert.base.progress import Progress, silent
from sepconvert.files.onnx.export import onnx_feed, runtime_dtype, save_onnx
from sepconvert.files.onnx.facts import onnx_sizes, read_onnx
from sepconvert.measure.cost import count
from sepconvert.measure.execution import OperatorTime, operator_times
from sepconvert.measure.latency import Latency, Startup, measure_grid, measure_single, session, startup
from sepconvert.measure.metrics import Accuracy, evaluate
from sepconvert.measure.statistics import Interval
from sepconvert.network.copies import checked, private_copy
from sepconvert.network.tensors import Inputs, cast, tensors_in

SCHEMA = "sepconvert.profile/1"


_SESSIONS = 5


@dataclass(frozen=True)
class Anatomy:
    """How an ONNX file runs, looked at in more ways than a comparison needs."""

    peak_activation_bytes: int | None  # see `OnnxFile`
    startup: Startup
    latencies: tuple[Latency, ...]  # by threads and batch
    operators: tuple[OperatorTime, ...]  # of one batch as it is timed, in the order of execution

    def latency(self, threads: int, batch: int) -> Latency:
        """One of `latencies`."""
        return next(each for each in self.latencies if (each.threads, each.batch) == (threads, batch))

    def to_json(self) -> dict[str, Any]:
        """The `anatomy` object of a profile; throughput in samples per second."""
        return {
            "peak_activation_bytes": self.peak_activation_bytes,
            "startup": self.startup.to_dict(),
            "latencies_ms": [{**each.to_dict(), "per_second": each.per_second} for each in self.latencies],
            "operators": [each.to_dict() for each in self.operators],
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
    """Start-up, memory, latency by threads and batch, and time by operator, of an ONNX file.

    Args:
        path: the file. One that fixes the batch is timed in that alone.
        inputs: arrays by position, batch first; repeated to make up the other batches.
        batches: sizes to time, besides that of `inputs`.
        runs: interleaved rounds, in each of which every batch runs with one thread and with all of `runtime`.
        runtime: of ONNX Runtime.
        seed: of the order of runs.
        progress: shows it.

    Raises:
        SepconvertError: ONNX Runtime cannot load the file or run it on these inputs.
    """
    file = read_onnx(path)
    names = [each.name for each in session(path, runtime).get_inputs()]
    own = max((len(each) for each in inputs if each.ndim), default=1)
    fixed = any(shape and shape[0] is not None for shape in file.shapes)
    feeds = {
        size: {
            name: (np.resize(each, (size, *each.shape[1:])) if each.ndim else each).astype(dtype, copy=False)
            for name, each, dtype in zip(names, inputs, file.dtypes, strict=True)
        }
        for size in ([own] if fixed else sorted({own, *batches}))
    }
    runtimes = [replace(runtime, threads=threads) for threads in sorted({1, runtime.threads})]
    return Anatomy(
        file.peak_activation_bytes,
        startup(path, feeds[own], sessions=_SESSIONS, runtime=runtime),
        measure_grid(
            path, feeds, runtimes, runs=runs, seed=seed,
            progress=lambda items: progress(items, "timing batches"),
        ),
        operator_times(path, feeds[own], runs=runs, runtime=runtime),
    )  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Costs of one sample, and quality.

    `macs` is fvcore's count (one fused multiply-add = 1) and `flops` is twice that. Operators that
    fvcore has no count for are in `uncounted_ops`.
    """

    params: int
    macs: int
    onnx_bytes: int | None
    weight_bytes: int | None  # in that file
    latency: Latency | None
    accuracy: Accuracy | None
    uncounted_ops: Mapping[str, int]
    anatomy: Anatomy | None = None  # where it was asked for

    @property
    def flops(self) -> int:
        """Floating-point operations of one sample: 2 × `macs`."""
        return 2 * self.macs

    def to_json(self) -> dict[str, Any]:
        """The PROFILE object of the report."""
        return {
            "params": self.params,
            "macs": self.macs,
            "flops": self.flops,
            "onnx_bytes": self.onnx_bytes,
            "weight_bytes": self.weight_bytes,
            "latency_ms": None if self.latency is None else self.latency.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "uncounted_ops": dict(self.uncounted_ops),
            **({} if self.anatomy is None else {"anatomy": self.anatomy.to_json()}),
        }


@dataclass(frozen=True)
class StoredProfile:
    """What `sepconvert profile` wrote: the profile, of which file, and where it was measured."""

    profile: Profile
    model: str
    sha256: str | None
    environment: Mapping[str, Any]

    def differences(self, environment: Mapping[str, Any]) -> list[str]:
        """In what another environment differs so that latencies are not to be compared."""
        names = (
            "cpu",
            "cores",
            "threads",
            "graph_optimization",
            "provider",
            "onnxruntime",
            "platform",
        )
        return [
            f"{name} ({self.environment.get(name)}, {environment.get(name)})"
            for name in names
            if self.environment.get(name) != environment.get(name)
        ]


def read_profile(path: Path) -> StoredProfile:
    """Read a profile that `sepconvert profile` wrote.

    Raises:
        SepconvertError: no such file, no profile, or of another version, with the key at fault.
    """
    try:
        document = json.loads(read_file(path), parse_constant=_no_number)
        if document["schema"] != SCHEMA:
            raise SepconvertError(
                f"{path}: expected schema {SCHEMA!r}, got {quoted(document['schema'])}; make it anew with "
                "this version"
            )
        return StoredProfile(
            _profile(document),
            str(document["model"]["path"]),
            document["model"]["sha256"],
            dict(document["environment"]),
        )
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except KeyError as error:
        raise SepconvertError(
            f"{path}: lacks the key {first_line(error)}; make it anew with `sepconvert profile`"
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SepconvertError(
            f"{path}: not a profile that `sepconvert profile` wrote ({first_line(error)}); make it anew"
        ) from error


def _profile(document: Mapping[str, Any]) -> Profile:
    latency, accuracy, size = document["latency_ms"], document["accuracy"], document["onnx_bytes"]
    return Profile(
        params=_count(document, "params"),
        macs=_count(document, "macs"),
        onnx_bytes=None if size is None else _count(document, "onnx_bytes"),
        weight_bytes=None if document["weight_bytes"] is None else _count(document, "weight_bytes"),
        latency=None
        if latency is None
        else Latency(
            _number(latency["median"], "median"),
            _interval(latency),
            _quantiles(latency["quantiles"]),
            *(_count(latency, name, least=1) for name in ("runs", "threads", "batch")),
        ),
        accuracy=None
        if accuracy is None
        else Accuracy(
            _number(accuracy["top1"], "top1", 1.0),
            None if accuracy["top5"] is None else _number(accuracy["top5"], "top5", 1.0),
            _count(accuracy, "n"),
        ),
        uncounted_ops={str(name): int(count) for name, count in document["uncounted_ops"].items()},
    )


def _interval(latency: Mapping[str, Any]) -> Interval:
    low, high = (_number(bound, "ci95") for bound in latency["ci95"])
    if not low <= latency["median"] <= high:
        raise ValueError(f"ci95: expected an interval around the median, got {quoted(latency['ci95'])}")
    return Interval(low, high)


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _quantiles(values: Sequence[Any]) -> tuple[float, ...]:
    found = tuple(_number(value, "quantiles") for value in values)
    if len(found) != 21 or list(found) != sorted(found):
        raise ValueError(f"quantiles: expected 21 rising numbers, got {quoted(values)}")
    return found


def _count(document: Mapping[str, Any], name: str, least: int = 0) -> int:
    value = document[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {quoted(value)}")
    return value


def _number(value: Any, name: str, most: float = math.inf) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= most or math.isinf(value):
        bounds = "from 0" if math.isinf(most) else f"from 0 to {most:g}"
        raise ValueError(f"{name}: expected a number {bounds}, got {quoted(value)}")
    return float(value)


def profile(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    timing: Timing = Timing(),
    batches: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """Measure a model: MACs and parameters, ONNX size, latency in ONNX Runtime, accuracy on `data`.

    Args:
        model: left as it is.
        example_inputs: N × … tensor, or a tuple of positional arguments; N is the batch that is timed.
        data: labelled batches (x, y), for accuracy.
        timing: how often, and by which runtime, the model is timed; no runs for no latency.
        batches: where not None, the profile has an `anatomy`, with latencies of these sizes too.
        seed: of the order of runs.
        progress: shows it.

    Raises:
        SepconvertError: the model does not run on these inputs, or cannot be exported.

    Example:
        256 kernels of 5×5×3 on an image of 12×12, at 8×8 positions:

        >>> import torch, sepconvert
        >>> dense = torch.nn.Conv2d(3, 256, 5, bias=False)
        >>> found = sepconvert.profile(dense, torch.rand(1, 3, 12, 12), timing=sepconvert.Timing(runs=0))
        >>> found.macs, found.flops, found.params
        (1228800, 2457600, 19200)
    """
    model, inputs = checked(model), as_inputs(example_inputs)
    check_number("seed", seed, 0, MAX_SEED, whole=True)
    runs, runtime = timing.runs, timing.runtime
    latency, detail = None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, inputs, path)
        feed = onnx_feed(cast(inputs, runtime_dtype(model)))
        batch = batch_size(inputs)
        if runs and batches is None:
            latency = measure_single(path, feed, runs=runs, runtime=runtime, batch=batch, seed=seed)
        elif runs and batches is not None:
            detail = anatomy(
                path, list(feed.values()), batches=batches, runs=runs, runtime=runtime, seed=seed,
                progress=progress,
            )  # fmt: skip
            latency = detail.latency(runtime.threads, batch)
        sizes = onnx_sizes(path)
    cost = count(private_copy(model), inputs)
    accuracy = None if data is None else evaluate(private_copy(model), data).accuracy()
    return Profile(cost.params, cost.macs, *sizes, latency, accuracy, cost.uncounted_ops, detail)


def as_inputs(example_inputs: Tensor | Inputs) -> Inputs:
    """A single tensor as the tuple of positional arguments.

    Raises:
        SepconvertError: there is no tensor in it.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not tensors_in(inputs) or any(value.is_meta for value in tensors_in(inputs)):
        raise SepconvertError(
            "example_inputs: expected a tensor, or a tuple of the model's positional arguments, got "
            f"{quoted(example_inputs)}; give a batch of one sample"
        )
    return inputs


def batch_size(inputs: Inputs) -> int:
    """First dimension of the first tensor."""
    return next((int(value.shape[0]) for value in tensors_in(inputs) if value.ndim), 1)
