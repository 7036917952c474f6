"""Evaluation: a model's statistics on every sample of a data set, and the paired drop of another's."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import Progress, Stage, silent, stage
from sepconvert.measure.divergence import returned_by
from sepconvert.measure.metrics.classes import Accuracy, Predictions, are_classified, joined_predictions
from sepconvert.measure.metrics.metric import Metric, MetricValue, Statistics, shares, written_drop
from sepconvert.measure.metrics.named import check_classes, named
from sepconvert.measure.metrics.uncertainty import Discordant, MeanDrop, ResampledDrop, Uncertainty
from sepconvert.measure.statistics import Interval, mcnemar
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import InputBatch, arguments, tensor_leaves

T = TypeVar("T")

TOP1 = named("top1")
"""Top-1 accuracy; differences are in percentage points."""


@dataclass(frozen=True)
class Scoring:
    """Judgement of outputs: what is taken of them, and the metric.

    Attributes:
        metric: None for top-1 accuracy, if outputs and targets are those of a classifier.
        postprocess: called with a model's outputs, or with the one that is chosen; returns what is judged.
        output: number or name of the output that is judged; None for the `logits`, or the first tensor.
        axis: dimension of the inputs that counts samples.
    """

    metric: Metric | None = None
    postprocess: Callable[[Any], Any] | None = None
    output: int | str | None = None
    axis: int = 0

    @property
    def classifies(self) -> bool:
        """Whether a class of each sample is judged, as a classifier's is."""
        return self.metric is None or self.metric.name in ("top1", "top5")

    def batched(self, model: nn.Module, x: Any) -> InputBatch:
        """Return what a loader yields as x as a batch of inputs for a model."""
        return InputBatch(arguments(model, x), self.axis)

    def judged(self, returned: Any, samples: int, first: Any = None) -> Any:
        """Return what the metric takes of a model's outputs for some samples.

        A tensor is returned with the samples in its first dimension; they are found by comparing shapes with
        those of `first`, the outputs for the first sample alone, if that is given.

        Raises:
            SepconvertError: there is no such output, or `postprocess` fails.
        """
        if self.postprocess is None:
            chosen = _chosen(returned, 0 if self.output is None else self.output, self.output is None)
            single = None if first is None else _chosen(first, self.output or 0, self.output is None)
            return _samples_first(chosen, samples, single)
        chosen = self.chosen(returned)
        try:
            return self.postprocess(chosen)
        except Exception as error:  # the user's code
            raise SepconvertError(
                f"`postprocess`: failed on the outputs of {samples} samples with {type(error).__name__}: "
                f"{first_line(error)}; it is called with what the model returns"
            ) from error

    def chosen(self, returned: Any) -> Any:
        """Return the output that `output` says, or all that a model returns, as the user's functions take it.

        Raises:
            SepconvertError: there is no such output.
        """
        return returned if self.output is None else _chosen(returned, self.output, False)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A metric's statistics of every sample of a data set, in the order of the set.

    `targets` holds a checksum of each sample's target. `predictions` are those of a classifier, else None.
    """

    metric: Metric
    statistics: Statistics
    targets: npt.NDArray[np.uint32]
    predictions: Predictions | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def value(self) -> float:
        """Value of the metric, in its unit."""
        return self.metric.value(self.statistics)

    def at(self, places: npt.NDArray[np.int64]) -> "Evaluation":
        """Return the evaluation of the samples at some places."""
        predictions = None if self.predictions is None else self.predictions.at(places)
        return Evaluation(self.metric, self.statistics[places], self.targets[places], predictions)

    def summary(self) -> MetricValue:
        """Return the value as profiles hold it."""
        metric = self.metric
        return MetricValue(metric.name, metric.unit, metric.higher_is_better, self.value, len(self))

    def accuracy(self) -> Accuracy | None:
        """Return a classifier's accuracy; None for other models."""
        return None if self.predictions is None else self.predictions.accuracy()


@dataclass(frozen=True)
class MetricDelta:
    """Difference of a converted model from its original, on the same samples, in the unit of `metric`.

    `drop` is what was lost (below 0: gained), of the value `original`, which became `converted`. `agreement`
    is the fraction, in [0, 1], of samples for which two classifiers predict the same class, right or wrong;
    None for other models.
    """

    metric: Metric
    original: float
    converted: float
    drop: float
    uncertainty: Uncertainty
    agreement: float | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.uncertainty.n

    @cached_property
    def ci95(self) -> Interval:
        """95 % interval of the drop."""
        return self.uncertainty.interval(0.95)

    @property
    def p_value(self) -> float | None:
        """P-value of McNemar's exact test of no difference; None unless samples are right or wrong."""
        counts = self.uncertainty
        return mcnemar(counts.lost, counts.won) if isinstance(counts, Discordant) else None

    @property
    def written_drop(self) -> str:
        """The drop as people read it, with its unit: 0.71 pp."""
        return written_drop(self.drop, self.metric.unit)

    def drop_to_dict(self) -> dict[str, Any]:
        """Return the drop, its unit and interval, and the number of samples, as the JSON of plans does."""
        return {
            "value": self.drop,
            "unit": self.metric.unit,
            "ci95": self.ci95.to_list(),
            "n": self.n,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the keys `metric`, `accuracy_drop_pp` and `agreement` of the JSON report."""
        return {
            "metric": {
                "name": self.metric.name,
                "unit": self.metric.unit,
                "higher_is_better": self.metric.higher_is_better,
                "original": self.original,
                "converted": self.converted,
                "drop": self.drop,
                "ci95": self.ci95.to_list(),
                "n": self.n,
            },
            "accuracy_drop_pp": {
                "value": self.drop,
                "ci95": self.ci95.to_list(),
                "mcnemar_p": self.p_value,
                "n": self.n,
            }
            if self.metric.name == TOP1.name
            else None,
            "agreement": self.agreement,
        }


NO_DELTA: Mapping[str, Any] = {"metric": None, "accuracy_drop_pp": None, "agreement": None}
"""The same keys where nothing was scored."""


@stage(Stage.ACCURACY)
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    scoring: Scoring = Scoring(),
    progress: Progress = silent,
    description: str = "accuracy",
    on_images: Callable[[InputBatch], None] | None = None,
) -> Evaluation:
    """Run a copy of a model, in eval mode, over a data set with targets, and score every sample.

    `loader` yields batches `(x, y)`: inputs, and targets such as the metric takes. The inputs are moved to
    the device and dtype of the model's first floating-point parameter (or buffer; a model without any gets
    them as they are). `on_images` is called with the inputs of each batch.

    Raises `SepconvertError` if the loader is empty, a batch is no such pair, the model cannot run on it, or
    outputs or targets are not such as the metric takes.
    """
    running: nn.Module | None = None
    parts: list[Evaluation] = []
    first: Any = None
    with torch.no_grad():
        for batch in whole(loader, progress, description):
            x, y = pair_of(batch)
            samples = scoring.batched(model, x)
            if on_images is not None:
                on_images(samples)
            if running is None:  # a Sequential of nothing is false
                running = quick_copy(model, samples)
            returned = returned_by(running, samples.on(running))
            if not parts and len(samples) > 1:
                first = returned_by(running, samples[:1].on(running))
            scoring, part = score(scoring, returned, y, len(samples), first)
            parts.append(part)
    return joined(parts)


def score(
    scoring: Scoring, returned: Any, y: Any, samples: int, first: Any = None
) -> tuple[Scoring, Evaluation]:
    """Score the outputs for one batch; return the scoring too, with the metric filled in.

    Raises:
        SepconvertError: outputs or targets are not such as the metric takes.
    """
    judged = scoring.judged(returned, samples, first)
    if scoring.metric is None:
        _check_classifier(judged, y, samples)
        scoring = replace(scoring, metric=TOP1)
    assert scoring.metric is not None  # noqa: S101  (mypy does not see through `replace`)
    metric = scoring.metric
    statistics = metric.statistics(judged, y)
    if len(statistics) != samples:
        raise SepconvertError(
            f"`metric` {metric.name}: expected a score for each of {samples} samples, got {len(statistics)}; "
            "let the outputs and the targets hold one sample after the other (`batch_dim`, `postprocess`)"
        )
    predictions = Predictions.of(judged, y) if are_classified(judged, y) else None
    return scoring, Evaluation(metric, statistics, _checksums(y, samples), predictions)


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluations of several parts of the data, one after the other.

    Raises:
        SepconvertError: there are no samples.
    """
    if not sum(map(len, parts)):
        raise SepconvertError("data: expected at least one labelled sample, got none; check the data path")
    statistics = [part.statistics for part in parts]
    if len({each.shape[1:] for each in statistics}) > 1:
        raise SepconvertError(
            f"`metric` {parts[0].metric.name}: expected statistics of one shape, got "
            f"{statistics[0].shape[1:]} and others; let all outputs have the same classes"
        )
    predictions = [part.predictions for part in parts if part.predictions is not None]
    return Evaluation(
        parts[0].metric,
        np.concatenate(statistics),
        np.concatenate([part.targets for part in parts]),
        joined_predictions(predictions) if len(predictions) == len(parts) else None,
    )


def metric_delta(original: Evaluation, converted: Evaluation) -> MetricDelta:
    """Return the drop from `original` to `converted`, paired by sample.

    Raises `SepconvertError` if the two were not evaluated on the same targets in the same order.
    """
    if not np.array_equal(original.targets, converted.targets):
        raise SepconvertError(
            "accuracy: expected both models evaluated on the same samples in the same order, got labels that"
            f" differ ({len(original)} and {len(converted)} of them); load with shuffle=False"
        )
    metric, before, after = original.metric, original.statistics, converted.statistics
    drop = metric.drop(original.value, converted.value)
    uncertainty: Uncertainty
    if metric.values is shares:  # each sample is right or wrong
        right, still = before > 0.5, after > 0.5
        uncertainty = Discordant(int((right & ~still).sum()), int((still & ~right).sum()), len(before))
        drop = 100 * metric.drop(int(right.sum()), int(still.sum())) / len(before)
    elif metric.is_mean:
        uncertainty = MeanDrop(before - after if metric.higher_is_better else after - before)
    else:
        uncertainty = ResampledDrop(metric, before, after, drop)
    agreement = None
    if original.predictions is not None and converted.predictions is not None:
        agreement = original.predictions.agreement(converted.predictions)
    return MetricDelta(metric, original.value, converted.value, drop, uncertainty, agreement)


def whole(loader: Iterable[T], progress: Progress = silent, description: str = "data") -> Iterator[T]:
    """Yield everything that a loader yields, and show the progress.

    A StopIteration that leaves a data set ends torch's loop as if there were no more data.

    Raises `SepconvertError` if a loader of known length ends early.
    """
    number = 0
    for batch in progress(loader, description):
        yield batch
        number += 1
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        expected = len(loader)
        if number < expected:
            raise SepconvertError(
                f"data: the loader ended after {number} of {expected} batches; fix its data set, whose "
                "__getitem__ raises StopIteration or whose __len__ is wrong"
            )


def pair_of(batch: object) -> tuple[Any, Any]:
    """Return a batch as a pair (x, y).

    Raises:
        SepconvertError: it is none.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise SepconvertError(
            f"data: expected batches of two (x, y), got {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}; wrap the dataset so that it "
            "yields a sample and its label or target"
        )
    return batch[0], batch[1]


def _chosen(returned: Any, output: int | str, by_default: bool) -> Any:
    """Return an output by its name or its number among the tensors; by default one called `logits`.

    Raises:
        SepconvertError: there is none.
    """
    name = "logits" if by_default else output
    if isinstance(name, str):
        found = returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
        if isinstance(found, Tensor) or (found is not None and not by_default):
            return found
        if not by_default:
            names = f" named {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else ""
            raise SepconvertError(
                f"`output` {name}: the model returns a {type(returned).__name__}{names}; pass the name "
                "or the number of one of its outputs"
            )
    leaves = list(tensor_leaves(returned))
    number = 0 if by_default else output
    if isinstance(number, int) and 0 <= number < len(leaves):
        return leaves[number]
    if by_default:
        return returned
    raise SepconvertError(f"`output` {output}: the model returns {len(leaves)} tensors; pass one from 0")


def _samples_first(value: Any, samples: int, single: Any) -> Any:
    """Return a tensor with the dimension that grew from 1 sample to `samples` moved to the front."""
    if not isinstance(value, Tensor) or not isinstance(single, Tensor) or value.ndim != single.ndim:
        return value
    grown = [
        axis
        for axis, (size, one) in enumerate(zip(value.shape, single.shape, strict=True))
        if (size, one) != (size, size)
    ]
    return value.movedim(grown[0], 0) if len(grown) == 1 else value


def _check_classifier(logits: object, y: object, samples: int) -> None:
    """Raise `SepconvertError` unless these are logits and labels, of which top-1 accuracy can be taken."""
    advice = "evaluate a classifier, or say by `metric` what the outputs are judged by, such as miou or psnr"
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != samples:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise SepconvertError(f"accuracy: expected logits of shape ({samples}, classes), got {got}; {advice}")
    if logits.isnan().any():
        raise SepconvertError(
            f"accuracy: expected finite logits, got NaN for {int(logits.isnan().any(dim=1).sum())} of"
            f" {samples} samples; check the model and the preprocessing of the inputs"
        )
    labels = y if isinstance(y, Tensor) else None
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or len(labels) != samples:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if labels is not None else type(y).__name__
        raise SepconvertError(
            f"`data`: labels: expected {samples} integers, one for each sample, got {got}; give a class "
            "for each, or say by `metric` what the outputs are judged by, such as miou or psnr"
        )
    check_classes("top1", labels.to(logits.device), logits.shape[1])


def _checksums(y: Any, samples: int) -> npt.NDArray[np.uint32]:
    """Return a checksum of each sample's target."""
    return np.array([_checksum(one_of(y, index, samples)) for index in range(samples)], np.uint32)


def _checksum(target: Any) -> int:
    found = 0
    for leaf in pytree.tree_leaves(target):
        data = (
            leaf.detach().cpu().contiguous().numpy().tobytes()
            if isinstance(leaf, Tensor)
            else repr(leaf).encode()
        )
        found = zlib.crc32(data, found)
    return found


def one_of(values: Any, index: int, samples: int) -> Any:
    """Return the part that belongs to one of so many samples, as a batch of one.

    It is a slice of a tensor or an array, an item of a list or tuple of `samples`, and the same of each value
    of a mapping, or of each item of another list or tuple.
    """
    if isinstance(values, Tensor | np.ndarray):
        return values[index : index + 1]
    if isinstance(values, Mapping):
        return {key: one_of(value, index, samples) for key, value in values.items()}
    if isinstance(values, list | tuple) and len(values) == samples:
        return [values[index]]
    if isinstance(values, list | tuple):
        return [one_of(value, index, samples) for value in values]
    return values
