"""Held-out calibration images, on which converted models are compared with the original."""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.distributed import once
from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import Stage, stage
from sepconvert.files.data import UNLABELLED
from sepconvert.measure.divergence import Yardstick, outputs, yardstick_of
from sepconvert.network.calls import Kernel, Place, substitute
from sepconvert.network.copies import quick_copy
from sepconvert.network.tensors import InputBatch


@dataclass(frozen=True)
class Divergence:
    """Difference of a model from the original on held-out images, and from their labels if they have any.

    All but the divergence are None if the outputs are not over classes, and the last two if there are no
    labels of samples.
    """

    divergence: float  # `sepconvert.measure.divergence`
    agreement: float | None  # share of equal predictions, of samples or of their positions, 0 to 1
    accuracy: float | None = None  # top-1, 0 to 1
    label_loss: float | None = None  # cross-entropy, in nats

    @property
    def loss(self) -> float:
        """Ranking criterion: the fine-tuning loss at temperature 1."""
        return self.divergence + (self.label_loss or 0.0)


class Heldout:
    """The original's outputs on images that nothing is fitted to.

    Args:
        original: left as it is.
        batches: the samples.
        labels: integers for each batch, -1 for an image without one; None if there are no labels.
        yardstick: what outputs are compared by; decided from the original's if there is none.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Sequence[InputBatch],
        labels: Sequence[Tensor] | None = None,
        yardstick: Yardstick | None = None,
    ) -> None:
        self._original = quick_copy(original, batches[0])
        self._yardstick = yardstick or yardstick_of(original, batches[0])
        self.batches = [batch.on(self._original) for batch in batches]
        self._labels = labels or [torch.full((len(batch),), UNLABELLED) for batch in batches]

    @functools.cached_property
    def expected(self) -> list[list[Tensor]]:
        """The original's list of outputs for every batch.

        Raises:
            SepconvertError: they hold NaN or Inf.
        """
        with torch.no_grad():
            expected = [outputs(self._original, batch) for batch in self.batches]
        if not all(output.isfinite().all() for batch in expected for output in batch):
            raise SepconvertError(
                "calibration: the model's outputs hold NaN or Inf for some images; check images and model"
            )
        return expected

    @functools.cached_property
    def yardstick(self) -> Yardstick:
        """Kinds that outputs are compared by, with the variances of the original's."""
        given = self._yardstick
        return given if given.variances is not None else given.measured_on(self.expected)

    def first(self, most: int) -> "Heldout":
        """Return the same for the first `most` images."""
        starts = itertools.accumulate((len(batch) for batch in self.batches), initial=0)
        shown = [
            (batch[: most - start], labels[: most - start])
            for batch, labels, start in zip(self.batches, self._labels, starts, strict=False)
            if start < most
        ]
        batches, labels = zip(*shown, strict=True)
        return Heldout(self._original, batches, labels, self.yardstick)

    @stage(Stage.DIVERGENCE)
    def measure(self, model: nn.Module, kernels: Mapping[Place, Kernel] | None = None) -> Divergence:
        """Return the difference of `model` in eval mode, with some kernels replaced, from the original."""
        return once(lambda: self._measure(quick_copy(model, self.batches[0]), kernels or {}))

    def _measure(self, private: nn.Module, kernels: Mapping[Place, Kernel]) -> Divergence:
        total, count, equal, positions = 0.0, 0, 0, 0
        loss, right, labelled = 0.0, 0, 0
        yardstick, classes = self.yardstick, self.yardstick.classes
        watching = substitute(private, kernels).watching() if kernels else contextlib.nullcontext()
        with torch.no_grad(), watching:
            for batch, labels, expected in zip(self.batches, self._labels, self.expected, strict=True):
                actual = outputs(private, batch)
                total += len(batch) * float(yardstick.divergence(expected, actual))
                count += len(batch)
                if classes is None:
                    continue
                predicted = actual[0].argmax(classes.axis)
                equal += int((expected[0].argmax(classes.axis) == predicted).sum())
                positions += predicted.numel()
                if yardstick.is_classifier:
                    known = (labels >= 0) & (labels < expected[0].shape[1])
                    logits, truth = classes.logits(actual[0]).cpu().double()[known], labels[known]
                    loss += float(F.cross_entropy(logits, truth, reduction="sum"))
                    right += int((logits.argmax(1) == truth).sum())
                    labelled += len(truth)
        return Divergence(
            max(total / count, 0.0),  # only rounding makes it negative
            equal / positions if positions else None,
            right / labelled if labelled else None,
            loss / labelled if labelled else None,
        )
