"""Measurement of models and ONNX files against the first of them, in one process.

Each runs once in every round, in random order. The first one runs twice, which shows how much the times of
equal models differ on this machine. All get the same inputs and data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn

from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.progress import Progress
from sepconvert.files.data import UNLABELLED
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.facts import OnnxFile, onnx_sizes
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.cost import count
from sepconvert.measure.divergence import OutputComparison
from sepconvert.measure.latency import Deployed, Speedup, latency, session, speedup, time_all
from sepconvert.measure.metrics import Predictions, accuracy_delta, whole
from sepconvert.measure.profiling import Profile
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, model_dtype

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
        save_onnx(export_program(model, own), path)
        cost = count(private_copy(model), own)
        sizes = onnx_sizes(path)
        return cls(name, path, Profile(cost.params, cost.macs, *sizes, None, None, cost.uncounted_ops))


def measure(
    subjects: Sequence[Subject],
    inputs: Sequence[npt.NDArray[Any]],
    *,
    data: Iterable[tuple[Tensor, Tensor]] | None,
    runs: int,
    runtime: Runtime,
    seed: int,
    progress: Progress,
) -> Comparison:
    """Measure latency, accuracy and outputs of models against the first one.

    Args:
        subjects: one or more.
        inputs: the arrays that every model is given, by position and batch first; they are timed.
        data: batches (x, y) for accuracy and for the comparison of outputs; without them, the outputs for
            `inputs` are compared. If every y of the first batch is -1, there is no accuracy.
        runs: timed rounds; 0 for no latency.
        runtime: settings of ONNX Runtime.
        seed: seed of the order of runs.
        progress: shows the progress of loops.

    Raises:
        SepconvertError: ONNX Runtime cannot load a model, or run it on these inputs or data.
    """
    sessions = [_Session(subject, runtime) for subject in subjects]
    outputs: list[list[OutputComparison] | None]
    if data is None:
        returned = [opened.run(inputs) for opened in sessions]
        outputs = [_started(returned[0], own) for own in returned[1:]]
        _add(outputs, returned)
        predictions: list[Predictions] | None = None
    else:
        predictions, outputs = _predictions(sessions, data, progress)
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
    if predictions is not None:
        profiles = [
            replace(profile, accuracy=predicted.accuracy())
            for profile, predicted in zip(profiles, predictions, strict=True)
        ]
    deltas = tuple(
        Delta(
            ratio,
            None if predictions is None else accuracy_delta(predictions[0], predictions[index]),
            None if differences is None else tuple(output.result() for output in differences),
        )
        for index, (ratio, differences) in enumerate(zip(speedups, outputs, strict=True), start=1)
    )
    return Comparison(tuple(profiles), tuple(subject.name for subject in subjects), deltas)


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

    def run_batch(self, x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return the outputs for any number of samples, run in batches that the file allows."""
        size = self.batch or len(x)
        parts = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padding = size - len(part)
            whole = np.concatenate([part, np.repeat(part[-1:], padding, 0)]) if padding else part
            parts.append([each[: len(part)] for each in self.run([whole])])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _predictions(
    sessions: Sequence[_Session], data: Iterable[tuple[Tensor, Tensor]], progress: Progress
) -> tuple[list[Predictions] | None, list[list[OutputComparison] | None]]:
    """Return every model's predictions, if there are labels, and how far its outputs are from the first's."""
    ranked: list[list[npt.NDArray[np.int64]]] = [[] for _ in sessions]
    labels: list[npt.NDArray[np.int64]] = []
    outputs: list[list[OutputComparison] | None] = []
    classes, labelled = 0, False
    for x, y in whole(data, progress, "comparing outputs"):
        returned = [opened.run_batch(x.numpy()) for opened in sessions]
        if not outputs:
            outputs = [_started(returned[0], own) for own in returned[1:]]
            labelled = bool((y != UNLABELLED).any())
        _add(outputs, returned)
        if not labelled:
            continue
        labels.append(y.numpy().astype(np.int64))
        for opened, classes_by_rank, own in zip(sessions, ranked, returned, strict=True):
            logits = own[0]
            classes = logits.shape[1] if logits.ndim == 2 else 0
            if classes < 2 or not np.isfinite(logits).all():
                raise SepconvertError(
                    f"{opened.name}: expected finite logits of shape ({len(x)}, classes) as the first "
                    f"output, got shape {logits.shape}{'' if classes < 2 else ' with NaN or Inf'}; "
                    "leave out `data`"
                )
            if int(y.min()) < 0 or int(y.max()) >= classes:
                raise SepconvertError(
                    f"{opened.name}: expected labels from 0 to {classes - 1}, as the model has {classes} "
                    f"classes, got {int(y.min())} to {int(y.max())}; use the data that it was trained for"
                )
            top = torch.from_numpy(logits).float().topk(min(5, classes), dim=1)
            classes_by_rank.append(top.indices.numpy())
    if not labels:
        return None, outputs
    predictions = [Predictions(np.concatenate(own), np.concatenate(labels), classes) for own in ranked]
    return predictions, outputs


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
