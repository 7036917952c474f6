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
from sepconvert.base.progress import LoopProgress
from sepconvert.measure.statistics import Interval, mcnemar, paired_difference_interval
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import fresh, placed, tensor_leaves

T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct predictions, as fractions in [0, 1], among `n` samples.

    `top5` is None where it would say nothing: with five classes or fewer.
    """

    top1: float
    top5: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """The `accuracy` object of the JSON profile."""
        return {"top1": self.top1, "top5": self.top5, "n": self.n}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier says of every sample of a data set, in the order of the set.

    `ranked`: N×min(5, classes) int64, class indices by falling logit. `labels`: N int64, the true classes.
    """

    ranked: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: int

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """N booleans: whether the first-ranked class is the label."""
        return np.equal(self.ranked[:, 0], self.labels)

    def accuracy(self) -> Accuracy:
        """Top-1 accuracy, and top-5 if there are more than five classes."""
        among_five = (self.ranked == self.labels[:, None]).any(axis=1)
        return Accuracy(
            top1=float(self.correct.mean()),
            top5=float(among_five.mean()) if self.classes > 5 else None,
            n=len(self.labels),
        )


@dataclass(frozen=True)
class AccuracyDelta:
    """How a converted classifier differs from its original on the same samples.

    `drop_pp` is the top-1 accuracy lost, in percentage points (below 0: gained), and `ci95_pp` its 95 %
    interval (`paired_difference_interval`). `agreement` is the fraction, in [0, 1], of samples on which
    both predict the same class, right or wrong. `p_value` is that of `mcnemar`.
    """

    drop_pp: float
    ci95_pp: Interval
    agreement: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """The keys `accuracy_drop_pp` and `agreement` of the JSON report."""
        return {
            "accuracy_drop_pp": {
                "value": self.drop_pp,
                "ci95": self.ci95_pp.to_list(),
                "mcnemar_p": self.p_value,
            },
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class ChangedPrediction:
    """A sample of which two classifiers say different things; classes by number."""

    index: int  # in the data set
    label: int
    original: int
    converted: int


@dataclass(frozen=True)
class ChangedPredictions:
    """How many samples are predicted otherwise, and some of them, evenly spread over the data set."""

    count: int
    lost: int  # right before
    won: int  # right now
    shown: tuple[ChangedPrediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """The `changed_predictions` object of the JSON report."""
        return asdict(self)


def changes(original: Predictions, converted: Predictions, most: int) -> ChangedPredictions:
    """What two classifiers, seen on the same samples, disagree on; `most` of it is shown."""
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
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], progress: LoopProgress | None = None
) -> Predictions:
    """Run a copy of a classifier over a labelled data set: eval mode, no gradients, its device and dtype.

    `loader` yields batches `(x, y)`: inputs, and N integer labels. The inputs go to the device and dtype
    of the model's first floating-point parameter (or buffer; a model without any gets them as they are).
    The model answers with logits, N×classes: a tensor, the `logits` of a mapping or object, or else the
    first tensor in a tuple, list, mapping or dataclass. `progress` wraps the loader, as `tqdm` does.

    Raises `SepconvertError` if the loader is empty, a batch is no such pair, the model cannot run on it, the
    output holds no such logits or has NaN, or a label is not a class of the model.
    """
    ranked, labels, classes = [], [], 0
    running: nn.Module | None = None
    with torch.no_grad():
        for batch in whole(loader, progress):
            x, y = checked_batch(batch)
            if running is None:  # a Sequential of nothing is false
                running = quick_copy(model, x)
            logits = _logits(_run(running, placed(x, running)), len(y))
            classes = logits.shape[1]
            strangers = y[(y < 0) | (y >= classes)]
            if len(strangers):
                raise SepconvertError(
                    f"labels: expected 0 to {classes - 1}, as the model has {classes} classes,"
                    f" got {int(strangers[0])}; use the labels that the model was trained with"
                )
            ranked.append(logits.topk(min(5, classes), dim=1).indices.cpu())
            labels.append(y.cpu())
    if not sum(map(len, labels)):
        raise SepconvertError("data: expected at least one labelled sample, got none; check the data path")
    return Predictions(torch.cat(ranked).numpy(), torch.cat(labels).numpy(), classes)


def whole(loader: Iterable[T], progress: Callable[[Iterable[T]], Iterable[T]] | None = None) -> Iterator[T]:
    """All that a loader yields, with `progress` around it.

    A StopIteration out of a data set ends torch's loop as if that were all.

    Raises `SepconvertError` if a loader of known length ends before it.
    """
    number = 0
    for batch in progress(loader) if progress else loader:
        yield batch
        number += 1
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        expected = len(loader)
        if number < expected:
            raise SepconvertError(
                f"data: the loader ended after {number} of {expected} batches; mend its data set, whose "
                "__getitem__ raises StopIteration, or __len__ is wrong"
            )


def compare(original: Predictions, converted: Predictions) -> AccuracyDelta:
    """The drop of top-1 accuracy from `original` to `converted`, sample by sample, and their agreement.

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
    interval = paired_difference_interval(lost, won, n)
    return AccuracyDelta(
        drop_pp=100 * (lost - won) / n,
        ci95_pp=Interval(100 * interval.lo, 100 * interval.hi),
        agreement=float((original.ranked[:, 0] == converted.ranked[:, 0]).mean()),
        p_value=mcnemar(lost, won),
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
