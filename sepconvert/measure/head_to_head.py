"""Measurement of models and ONNX files against the first of them, in one process.

Each runs once in every round, in random order. The first one runs twice, which shows how much the times of
equal models differ on this machine. All get the same inputs and data.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.progress import Progress
from sepconvert.files.data import UNLABELLED
from sepconvert.files.onnx.export import MAPPING, OUTPUTS
from sepconvert.files.onnx.facts import OnnxFile, onnx_sizes
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.cost import count
from sepconvert.measure.divergence import OutputComparison
from sepconvert.measure.latency import Deployed, Speedup, latency, session, speedup, time_all
from sepconvert.measure.metrics.evaluation import Evaluation, Scoring, joined, metric_delta, score, whole
from sepconvert.measure.profiling import Profile
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, by_position, cast, model_dtype, sha256_of, tensors_in

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Subject:
    """A model to measure: its ONNX file, and the part of its profile that needs no data and no timing."""

    name: str
    path: Path
    profile: Profile

    @classmethod
    def of_file(cls, path: Path, file: OnnxFile) -> "Subject":
        """Return the subject of an ONNX file."""
        profile = Profile(file.params, file.macs, *file.sizes, None, None, file.uncounted_ops)
        return cls(str(path), path, profile)

    @classmethod
    def of_model(cls, name: str, model: nn.Module, inputs: Inputs, path: Path) -> "Subject":
        """Export a model to `path`, and return its subject; the inputs are cast to its dtype and device.

        Raises:
            SepconvertError: it does not run on them, or cannot be exported.
        """
        tensors = (*unshadowed(model).parameters(), *unshadowed(model).buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        own = tuple(
            value.to(device) if isinstance(value, Tensor) else value
            for value in cast(inputs, model_dtype(model))
        )
        write_onnx(model, own, path)
        cost = count(private_copy(model), own)
        sizes = onnx_sizes(path)
        return cls(name, path, Profile(cost.params, cost.macs, *sizes, None, None, cost.uncounted_ops))


def measure(
    subjects: Sequence[Subject],
    inputs: Sequence[npt.NDArray[Any]],
    *,
    data: Iterable[Any] | None,
    scoring: Scoring,
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> Comparison:
    """Measure latency, accuracy and outputs of models against the first one.

    Args:
        subjects: one or more.
        inputs: the arrays that every model is given, by position and batch first; they are timed.
        data: batches (x, y) for the metric and for the comparison of outputs; without them, the outputs for
            `inputs` are compared. If every y of the first batch is -1 or None, there is no metric.
        scoring: how outputs are judged.
        runs: timed rounds; 0 for no latency.
        runtime: settings of ONNX Runtime.
        seed: seed of the order of runs.
        progress: shows the progress of loops.

    Raises:
        SepconvertError: ONNX Runtime cannot load a model, or run it on these inputs or data.
    """
    sessions = [_Session(subject, runtime) for subject in subjects]
    outputs: list[list[OutputComparison] | None]
    seen = hashlib.sha256()
    if data is None:
        returned = [opened.run(inputs) for opened in sessions]
        outputs = [_started(returned[0], own) for own in returned[1:]]
        _add(outputs, returned)
        scored: list[Evaluation] | None = None
    else:
        scored, outputs = _evaluated(sessions, data, scoring, progress, seen)
    speedups: list[Speedup | None] = [None] * (len(subjects) - 1)
    profiles = [subject.profile for subject in subjects]
    if runs:
        models = [(opened.deployed, opened.feed(inputs)) for opened in sessions]
        first, again, *others = time_all([models[0], *models], runs=runs, seed=seed, progress=progress)
        speedups = [speedup(first, again, times) for times in others]
        batch = len(inputs[0])
        profiles = [
            replace(profile, latency=latency(times, runtime.threads, batch))
            for profile, times in zip(profiles, (first, *others), strict=True)
        ]
    if scored is not None:
        profiles = [profile.with_scores(own) for profile, own in zip(profiles, scored, strict=True)]
    deltas = tuple(
        Delta(
            ratio,
            None if scored is None else metric_delta(scored[0], scored[index]),
            None if differences is None else tuple(output.result() for output in differences),
        )
        for index, (ratio, differences) in enumerate(zip(speedups, outputs, strict=True), start=1)
    )
    names = tuple(subject.name for subject in subjects)
    return Comparison(tuple(profiles), names, deltas, None if data is None else seen.hexdigest())


class _Session:
    """An ONNX file in a session of ONNX Runtime."""

    def __init__(self, subject: Subject, runtime: Runtime) -> None:
        self.name = subject.name
        self.deployed = Deployed(subject.path, runtime)
        self._session: ort.InferenceSession = session(self.deployed)
        self._inputs = self._session.get_inputs()

    @property
    def batch(self) -> int | None:
        """Batch size that the file fixes; None if it fixes none."""
        sizes = {each.shape[0] for each in self._inputs if each.shape}
        fixed = {size for size in sizes if isinstance(size, int)}
        return fixed.pop() if len(fixed) == 1 else None

    def feed(self, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return arrays, given by position, by name and in the dtypes that the file expects."""
        if len(arrays) != len(self._inputs):
            raise SepconvertError(
                f"{self.name}: expected a model with {len(arrays)} inputs, as the first one has, got "
                f"{len(self._inputs)}; compare models that take the same"
            )
        return {
            each.name: array.astype(_DTYPES.get(each.type, array.dtype), copy=False)
            for each, array in zip(self._inputs, arrays, strict=True)
        }

    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the outputs."""
        feed = self.feed(arrays)
        try:
            return [np.asarray(each) for each in self._session.run(None, feed)]
        except Exception as error:  # ONNX Runtime's errors share no base class
            expected = ", ".join(f"{each.name} {each.shape}" for each in self._inputs)
            got = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise SepconvertError(
                f"{self.name}: ONNX Runtime cannot run it: expected {expected}, got {got} "
                f"({first_line(error)}); pass `input_shape`, `batch` or other data"
            ) from error

    def run_batch(self, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the outputs for any number of samples, run in batches that the file allows."""
        samples = len(arrays[0])
        size = self.batch or samples
        if size >= samples and self.batch is None:
            return self.run(arrays)
        parts = []
        for start in range(0, samples, size):
            part = [array[start : start + size] for array in arrays]
            held = len(part[0])
            padded = [np.concatenate([each, np.repeat(each[-1:], size - held, 0)]) for each in part]
            parts.append([each[:held] for each in self.run(padded)])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def ordered(self, x: Any) -> list[npt.NDArray[Any]]:
        """Return what a loader yields as x as arrays in the order of the file's inputs.

        Raises:
            SepconvertError: it is a mapping that lacks one of them.
        """
        if isinstance(x, Mapping):
            x = by_position([each.name for each in self._inputs], x)
        return [value.numpy() for value in tensors_in(x)]

    def judged(self, returned: Sequence[npt.NDArray[Any]], by_name: bool) -> Any:
        """Return the outputs as the metric takes them: one tensor, several, or tensors by name.

        Those of a model that returns a mapping have names in any case.
        """
        tensors = [torch.from_numpy(np.asarray(each)) for each in returned]
        properties = self._session.get_modelmeta().custom_metadata_map
        if by_name or properties.get(OUTPUTS) == MAPPING:
            return {
                each.name: value for each, value in zip(self._session.get_outputs(), tensors, strict=True)
            }
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _evaluated(
    sessions: Sequence[_Session],
    data: Iterable[Any],
    scoring: Scoring,
    progress: Progress,
    seen: "hashlib._Hash",
) -> tuple[list[Evaluation] | None, list[list[OutputComparison] | None]]:
    """Return every model's evaluation, if there are targets, and how far its outputs are from the first's.

    `seen` is updated with the data.
    """
    parts: list[list[Evaluation]] = [[] for _ in sessions]
    outputs: list[list[OutputComparison] | None] = []
    firsts: list[Any] = []
    scored, by_name = False, isinstance(scoring.output, str)
    for x, y in whole(data, progress, "comparing outputs"):
        arrays = sessions[0].ordered(x)
        _update(seen, (x, y))
        returned = [opened.run_batch(arrays) for opened in sessions]
        if not outputs:
            outputs = [_started(returned[0], own) for own in returned[1:]]
            scored = _has_targets(y)
            firsts = [_first(opened, arrays, by_name) for opened in sessions]
        _add(outputs, returned)
        if not scored:
            continue
        for index, (opened, own) in enumerate(zip(sessions, returned, strict=True)):
            judged = opened.judged(own, by_name)
            try:
                scoring, part = score(scoring, judged, y, len(arrays[0]), firsts[index])
            except SepconvertError as error:
                raise SepconvertError(f"{opened.name}: {error}") from error
            parts[index].append(part)
    return [joined(own) for own in parts] if scored else None, outputs


def _update(seen: "hashlib._Hash", batch: Any) -> None:
    """Add a batch to a hash: the bytes of tensors and arrays, the text of anything else."""
    for value in pytree.tree_leaves(batch):
        if isinstance(value, np.ndarray):
            seen.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Tensor):
            seen.update(sha256_of([value]).encode())
        else:
            seen.update(repr(value).encode(errors="replace"))


def _has_targets(y: Any) -> bool:
    return y is not None and not (
        isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point() and bool((y == UNLABELLED).all())
    )


def _first(opened: _Session, arrays: Sequence[npt.NDArray[Any]], by_name: bool) -> Any:
    """Return the outputs for the first sample alone; None if the file fixes the batch."""
    if opened.batch is not None or len(arrays[0]) < 2:
        return None
    return opened.judged(opened.run([array[:1] for array in arrays]), by_name)


def _started(
    base: Sequence[npt.NDArray[Any]], other: Sequence[npt.NDArray[Any]]
) -> list[OutputComparison] | None:
    """Return an empty comparison of each output; None if they differ in number or shape."""
    if [output.shape for output in base] != [output.shape for output in other]:
        return None
    return [OutputComparison() for _ in base]


def _add(
    outputs: Sequence[list[OutputComparison] | None], returned: Sequence[Sequence[npt.NDArray[Any]]]
) -> None:
    for comparisons, own in zip(outputs, returned[1:], strict=True):
        for comparison, base, other in zip(comparisons or (), returned[0], own, strict=False):
            comparison.add(base, other)
