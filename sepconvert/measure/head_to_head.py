"""Models and ONNX files against the first of them, in one process.

Each runs once in every round, in random order, the first one twice, which shows what this machine calls the
same speed; all see the same inputs and data.
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
from sepconvert.base.progress import Progress
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.facts import OnnxFile, onnx_sizes
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.cost import count
from sepconvert.measure.divergence import OutputComparison
from sepconvert.measure.latency import Speedup, latency, session, speedup, time_all
from sepconvert.measure.metrics import Predictions, whole
from sepconvert.measure.metrics import compare as compare_predictions
from sepconvert.measure.profiling import Profile
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, model_dtype

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Subject:
    """A model to measure: its ONNX file, and its profile so far."""

    name: str
    path: Path
    profile: Profile

    @classmethod
    def of_file(cls, path: Path, file: OnnxFile) -> "Subject":
        """An ONNX file as it is."""
        profile = Profile(file.params, file.macs, *file.sizes, None, None, file.uncounted_ops)
        return cls(str(path), path, profile)

    @classmethod
    def of_model(cls, name: str, model: nn.Module, inputs: Inputs, path: Path) -> "Subject":
        """A model, exported to `path`; the inputs are cast to its dtype and device.

        Raises:
            SepconvertError: it does not run on them, or cannot be exported.
        """
        device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
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
    """Latency, accuracy and outputs of models against the first one.

    Args:
        subjects: one or more.
        inputs: the arrays that every model is given, by position; what is timed, batch first.
        data: labelled batches (x, y) for accuracy, and for outputs too; else those are of `inputs`.
        runs: timed rounds; 0 for no latency.
        runtime: of ONNX Runtime.
        seed: of the order of runs.
        progress: shows it.

    Raises:
        SepconvertError: ONNX Runtime cannot load a model, or run it on these inputs or data.
    """
    sessions = [_Session(subject, runtime) for subject in subjects]
    outputs: list[list[OutputComparison] | None]
    if data is None:
        answers = [each.run(inputs) for each in sessions]
        outputs = [_started(answers[0], own) for own in answers[1:]]
        _add(outputs, answers)
        predictions: list[Predictions] | None = None
    else:
        predictions, outputs = _answers(sessions, data, progress)
    speedups: list[Speedup | None] = [None] * (len(subjects) - 1)
    profiles = [subject.profile for subject in subjects]
    if runs:
        models = [(each.path, own.feed(inputs)) for each, own in zip(subjects, sessions, strict=True)]
        first, again, *others = time_all(
            [models[0], *models], runs=runs, runtime=runtime, seed=seed,
            progress=lambda items: progress(items, "timing"),
        )  # fmt: skip
        speedups = [speedup(first, again, times) for times in others]
        batch = len(inputs[0])
        profiles = [
            replace(each, latency=latency(times, runtime.threads, batch))
            for each, times in zip(profiles, (first, *others), strict=True)
        ]
    if predictions is not None:
        profiles = [
            replace(each, accuracy=found.accuracy())
            for each, found in zip(profiles, predictions, strict=True)
        ]
    deltas = tuple(
        Delta(
            ratio,
            None if predictions is None else compare_predictions(predictions[0], predictions[index]),
            None if differences is None else tuple(each.result() for each in differences),
        )
        for index, (ratio, differences) in enumerate(zip(speedups, outputs, strict=True), start=1)
    )
    return Comparison(tuple(profiles), tuple(subject.name for subject in subjects), deltas)


class _Session:
    """An ONNX file, ready to answer."""

    def __init__(self, subject: Subject, runtime: Runtime) -> None:
        self.name = subject.name
        self._session: ort.InferenceSession = session(subject.path, runtime)
        self._inputs = self._session.get_inputs()

    @property
    def batch(self) -> int | None:
        """That the file fixes, if it does."""
        sizes = {each.shape[0] for each in self._inputs if each.shape}
        fixed = {size for size in sizes if isinstance(size, int)}
        return fixed.pop() if len(fixed) == 1 else None

    def feed(self, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Arrays by position, in the dtypes that the file expects."""
        if len(arrays) != len(self._inputs):
            raise SepconvertError(
                f"{self.name}: takes {len(self._inputs)} inputs, the others {len(arrays)}; compare models "
                "that take the same"
            )
        return {
            each.name: array.astype(_DTYPES.get(each.type, array.dtype), copy=False)
            for each, array in zip(self._inputs, arrays, strict=True)
        }

    def run(self, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs."""
        feed = self.feed(arrays)
        try:
            return [np.asarray(each) for each in self._session.run(None, feed)]
        except Exception as error:  # ONNX Runtime's errors share no base class
            expected = ", ".join(f"{each.name} {each.shape}" for each in self._inputs)
            got = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise SepconvertError(
                f"{self.name}: ONNX Runtime cannot run it: expected {expected}, got {got} "
                f"({first_line(error)}); pass --input-shape, --batch or other data"
            ) from error

    def run_batch(self, x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The outputs for any number of samples, in the batches that the file allows."""
        size = self.batch or len(x)
        parts = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padding = size - len(part)
            whole = np.concatenate([part, np.repeat(part[-1:], padding, 0)]) if padding else part
            parts.append([each[: len(part)] for each in self.run([whole])])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _answers(
    sessions: Sequence[_Session], data: Iterable[tuple[Tensor, Tensor]], progress: Progress
) -> tuple[list[Predictions], list[list[OutputComparison] | None]]:
    """What every model says of every sample, and how far its outputs are from the first one's."""
    ranked: list[list[npt.NDArray[np.int64]]] = [[] for _ in sessions]
    labels: list[npt.NDArray[np.int64]] = []
    outputs: list[list[OutputComparison] | None] = []
    classes = 0
    for x, y in whole(data, lambda batches: progress(batches, "comparing outputs")):
        answers = [each.run_batch(x.numpy()) for each in sessions]
        if not labels:
            outputs = [_started(answers[0], own) for own in answers[1:]]
        _add(outputs, answers)
        labels.append(y.numpy().astype(np.int64))
        for each, found, answer in zip(sessions, ranked, answers, strict=True):
            logits = answer[0]
            classes = logits.shape[1] if logits.ndim == 2 else 0
            if classes < 2 or not np.isfinite(logits).all():
                raise SepconvertError(
                    f"{each.name}: expected finite logits of shape ({len(x)}, classes) as the first output, "
                    f"got shape {logits.shape}{'' if classes < 2 else ' with NaN or Inf'}; leave out --data"
                )
            if int(y.min()) < 0 or int(y.max()) >= classes:
                raise SepconvertError(
                    f"{each.name}: answers with {classes} classes, the data hold labels from {int(y.min())} "
                    f"to {int(y.max())}; use the data that it was trained for"
                )
            top = torch.from_numpy(logits).float().topk(min(5, classes), dim=1)
            found.append(top.indices.numpy())
    predictions = [Predictions(np.concatenate(each), np.concatenate(labels), classes) for each in ranked]
    return predictions, outputs


def _started(
    base: Sequence[npt.NDArray[Any]], other: Sequence[npt.NDArray[Any]]
) -> list[OutputComparison] | None:
    """Nothing where outputs differ in number or shape."""
    if [each.shape for each in base] != [each.shape for each in other]:
        return None
    return [OutputComparison() for _ in base]


def _add(
    outputs: Sequence[list[OutputComparison] | None], answers: Sequence[Sequence[npt.NDArray[Any]]]
) -> None:
    for found, answer in zip(outputs, answers[1:], strict=True):
        for each, base, other in zip(found or (), answers[0], answer, strict=False):
            each.add(base, other)
