"""Top-1 and top-5 accuracy, and the paired difference of two classifiers on the same samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import Progress, silent
from sepconvert.measure.statistics import Interval, mcnemar, paired_difference_interval
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import fresh, placed, tensor_leaves

T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """A quality of a model that a conversion may change.

    `unit` is that of differences. `interval` returns the 95 % interval of a paired drop, in that unit, from
    the numbers of samples lost and won and of all samples.
    """

    name: str
    unit: str
    higher_is_better: bool
    interval: Callable[[int, int, int], Interval]

    def drop(self, before: float, after: float) -> float:
        """Return by how much `after` is worse than `before`."""
        return before - after if self.higher_is_better else after - before


def _top1_interval(lost: int, won: int, n: int) -> Interval:
    interval = paired_difference_interval(lost, won, n)
    return Interval(100 * interval.lo, 100 * interval.hi)


TOP1 = Metric("top1", "pp", higher_is_better=True, interval=_top1_interval)
"""Top-1 accuracy; differences are in percentage points."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, as fractions in [0, 1], among `n` samples.

    `top5` is None with five classes or fewer, where it would say nothing.
    """

    top1: float
    top5: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the `accuracy` object of the JSON profile."""
        return {"top1": self.top1, "top5": self.top5, "n": self.n}


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a classifier for every sample of a data set, in the order of the set.

    `ranked`: N×min(5, classes) int64, class indices by falling logit. `labels`: N int64, the true classes.
    """

    ranked: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: int

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the first-ranked class is the label: N booleans."""
        return np.equal(self.ranked[:, 0], self.labels)

    def at(self, places: npt.NDArray[np.int64]) -> "Predictions":
        """Return the predictions for the samples at some places."""
        return Predictions(self.ranked[places], self.labels[places], self.classes)

    def accuracy(self) -> Accuracy:
        """Return the top-1 accuracy, and top-5 if there are more than five classes."""
        among_five = (self.ranked == self.labels[:, None]).any(axis=1)
        return Accuracy(
            top1=float(self.correct.mean()),
            top5=float(among_five.mean()) if self.classes > 5 else None,
            n=len(self.labels),
        )


@dataclass(frozen=True)
class AccuracyDelta:
    """Difference of a converted classifier from its original, on the same samples.

    `drop` is the accuracy lost, in percentage points (below 0: gained), and `ci95` its 95 % interval
    (`paired_difference_interval`); both are in the unit of `metric`. `agreement` is the fraction, in [0, 1],
    of samples for which both predict the same class, right or wrong. `p_value` is that of `mcnemar`. Of `n`
    samples, `lost` are right before and wrong after, and `won` the converse.
    """

    drop: float
    ci95: Interval
    agreement: float
    p_value: float
    n: int
    lost: int
    won: int
    metric: Metric = TOP1

    def to_dict(self) -> dict[str, Any]:
        """Return the keys `accuracy_drop_pp` and `agreement` of the JSON report."""
        return {
            "accuracy_drop_pp": {
                "value": self.drop,
                "ci95": self.ci95.to_list(),
                "mcnemar_p": self.p_value,
                "n": self.n,
            },
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class ChangedPrediction:
    """A sample for which two classifiers predict different classes; classes are numbers."""

    index: int  # in the data set
    label: int
    original: int
    converted: int


@dataclass(frozen=True)
class ChangedPredictions:
    """Number of samples whose predicted class changed, and some of them, evenly spread over the data set."""

    count: int
    lost: int  # correct before the conversion
    won: int  # correct after it
    shown: tuple[ChangedPrediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the `changed_predictions` object of the JSON report."""
        return asdict(self)


def changes(original: Predictions, converted: Predictions, most: int) -> ChangedPredictions:
    """Return the samples that two classifiers predict differently; at most `most` of them are shown."""
    before, after = original.ranked[:, 0], converted.ranked[:, 0]
    differing = np.flatnonzero(before != after)
    places = np.unique(np.linspace(0, len(differing) - 1, min(most, len(differing))).round().astype(int))
    shown = tuple(
        ChangedPrediction(int(n), int(original.labels[n]), int(before[n]), int(after[n]))
        for n in differing[places]
    )
    return ChangedPredictions(
        len(differing),
        int((original.correct & ~converted.correct).sum()),
        int((converted.correct & ~original.correct).sum()),
        shown,
    )


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    progress: Progress = silent,
    description: str = "accuracy",
    on_images: Callable[[Tensor], None] | None = None,
) -> Predictions:
    """Run a copy of a classifier, in eval mode, over a labelled data set and return its predictions.

    `loader` yields batches `(x, y)`: inputs, and N integer labels. The inputs are moved to the device and
    dtype of the model's first floating-point parameter (or buffer; a model without any gets them as they
    are). The model returns logits, N×classes: a tensor, the `logits` of a mapping or object, or else the
    first tensor in a tuple, list, mapping or dataclass. `on_images` is called with the inputs of each batch.

    Raises `SepconvertError` if the loader is empty, a batch is no such pair, the model cannot run on it, the
    output holds no such logits or has NaN, or a label is not a class of the model.
    """
    ranked, labels, classes = [], [], 0
    running: nn.Module | None = None
    with torch.no_grad():
        for batch in whole(loader, progress, description):
            x, y = checked_batch(batch)
            if on_images is not None:
                on_images(x)
            if running is None:  # a Sequential of nothing is false
                running = quick_copy(model, x)
            logits = _logits(_run(running, placed(x, running)), len(y))
            classes = logits.shape[1]
            foreign = y[(y < 0) | (y >= classes)]
            if len(foreign):
                raise SepconvertError(
                    f"labels: expected 0 to {classes - 1}, as the model has {classes} classes,"
                    f" got {int(foreign[0])}; use the labels that the model was trained with,"
                    " numbered from 0"
                )
            ranked.append(logits.topk(min(5, classes), dim=1).indices.cpu())
            labels.append(y.cpu())
    if not sum(map(len, labels)):
        raise SepconvertError("data: expected at least one labelled sample, got none; check the data path")
    return Predictions(torch.cat(ranked).numpy(), torch.cat(labels).numpy(), classes)


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


def accuracy_delta(original: Predictions, converted: Predictions) -> AccuracyDelta:
    """Return the drop of top-1 accuracy from `original` to `converted`, paired by sample.

    Raises `SepconvertError` if the two were not evaluated on the same labels in the same order.
    """
    if not np.array_equal(original.labels, converted.labels):
        raise SepconvertError(
            "accuracy: expected both models evaluated on the same samples in the same order, got labels that"
            f" differ ({len(original.labels)} and {len(converted.labels)} of them); load with shuffle=False"
        )
    n = len(original.labels)
    lost = int((original.correct & ~converted.correct).sum())
    won = int((converted.correct & ~original.correct).sum())
    return AccuracyDelta(
        drop=100 * TOP1.drop(int(original.correct.sum()), int(converted.correct.sum())) / n,
        ci95=TOP1.interval(lost, won, n),
        agreement=float((original.ranked[:, 0] == converted.ranked[:, 0]).mean()),
        p_value=mcnemar(lost, won),
        n=n,
        lost=lost,
        won=won,
    )


def checked_batch(batch: object) -> tuple[Tensor, Tensor]:
    """Return a batch `(x, y)` of N samples and N integer labels, which become int64.

    Raises:
        SepconvertError: it is no such pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise SepconvertError(
            f"data: expected batches of two tensors (x, y), got {type(batch).__name__}; wrap the dataset so"
            " that it yields a sample and its label, -1 where there is none"
        )
    x, y = batch[0], torch.as_tensor(batch[1])
    if y.ndim != 1 or y.is_floating_point() or y.shape != x.shape[:1]:
        raise SepconvertError(
            f"labels: expected {len(x)} integers, one for each sample, got {y.dtype} of shape"
            f" {tuple(y.shape)}; give a class, or -1 where there is none, for each"
        )
    return x, y.long()


def _run(model: nn.Module, x: Tensor) -> object:
    try:
        return model(fresh(x))
    except Exception as error:  # whatever the user's forward raises
        raise SepconvertError(
            f"accuracy: expected a model that takes inputs of shape {tuple(x.shape)}, got"
            f" {type(error).__name__}: {first_line(error)}; check the size and the channels of the data"
        ) from error


def _logits(output: object, samples: int) -> Tensor:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = named if isinstance(named, Tensor) else next(tensor_leaves(output), None)
    if logits is None or logits.ndim != 2 or len(logits) != samples:
        got = type(output).__name__ if logits is None else f"shape {tuple(logits.shape)}"
        raise SepconvertError(
            f"accuracy: expected logits of shape ({samples}, classes), got {got}; evaluate a classifier,"
            " or wrap the model so that it returns them first"
        )
    if logits.isnan().any():
        raise SepconvertError(
            f"accuracy: expected finite logits, got NaN for {int(logits.isnan().any(dim=1).sum())} of"
            f" {samples} samples; check the model and the preprocessing of the inputs"
        )
    return logits
