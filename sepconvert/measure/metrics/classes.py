"""Predictions of classifiers, sample by sample, and which of them a conversion changes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SHOWN = 5  # classes that the labels lack


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

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Predictions":
        """Return the predictions of logits N × classes, given N labels."""
        # Stable: of equal logits, as int8 makes them, the first counts, as it does for argmax.
        ranked = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]
        return cls(ranked.cpu().numpy(), labels.cpu().long().numpy(), logits.shape[1])

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the first-ranked class is the label: N booleans."""
        return np.equal(self.ranked[:, 0], self.labels)

    def at(self, places: npt.NDArray[np.int64]) -> "Predictions":
        """Return the predictions for the samples at some places."""
        return Predictions(self.ranked[places], self.labels[places], self.classes)

    def agreement(self, other: "Predictions") -> float:
        """Return the share of samples, in [0, 1], for which both predict the same class, right or wrong."""
        return float((self.ranked[:, 0] == other.ranked[:, 0]).mean())

    def accuracy(self) -> Accuracy:
        """Return the top-1 accuracy, and top-5 if there are more than five classes."""
        among_five = (self.ranked == self.labels[:, None]).any(axis=1)
        return Accuracy(
            top1=float(self.correct.mean()),
            top5=float(among_five.mean()) if self.classes > 5 else None,
            n=len(self.labels),
        )


@dataclass(frozen=True)
class Labels:
    """Labels of the scored images.

    `missing` counts the classes of the model that no label names, of which `missing_shown` are the first;
    `missing_by_chance` is the number to be expected of as many labels if all classes are equally frequent.
    `chance` is the accuracy without looking: of the commonest label, and at least that of guessing.
    """

    classes: int
    smallest: int
    largest: int
    missing: int
    missing_shown: tuple[int, ...]
    missing_by_chance: float
    chance: float

    @classmethod
    def of(cls, predictions: Predictions) -> "Labels":
        """Return what the labels of a classifier's data show."""
        labels, classes = predictions.labels, predictions.classes
        counts = np.bincount(labels, minlength=classes)
        missing = np.flatnonzero(counts == 0)
        return cls(
            classes=classes,
            smallest=int(labels.min()),
            largest=int(labels.max()),
            missing=len(missing),
            missing_shown=tuple(missing[:_SHOWN].tolist()),
            missing_by_chance=classes * (1 - 1 / classes) ** len(labels),
            chance=max(1 / classes, float(counts.max()) / len(labels)),
        )


def joined_predictions(parts: list[Predictions]) -> Predictions:
    """Return the predictions for several parts of the data, one after the other."""
    return Predictions(
        np.concatenate([part.ranked for part in parts]),
        np.concatenate([part.labels for part in parts]),
        parts[0].classes,
    )


def are_classified(logits: object, labels: object) -> bool:
    """Return whether outputs and targets are those of a classifier: logits N × K and N class numbers."""
    return (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.ndim == 2
        and logits.shape[1] > 1
        and logits.is_floating_point()
        and labels.shape == logits.shape[:1]
        and labels.dtype in _INTEGERS
    )


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
