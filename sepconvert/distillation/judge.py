"""Evaluation on held-out data, by which weights are chosen."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.losses import class_logits, label_loss
from sepconvert.distillation.samples import Samples, as_input, on_device
from sepconvert.distillation.settings import Settings
from sepconvert.files.data import UNLABELLED, class_labels
from sepconvert.measure.divergence import divergence, outputs


class Score(NamedTuple):
    """Means over held-out data: loss, divergence from the teacher, and accuracy if there are labels.

    The loss and the divergence are infinite where they are NaN.
    """

    loss: float
    divergence: float
    accuracy: float | None


class Judge:
    """Held-out data, and the teacher whose outputs for them are to be met."""

    def __init__(
        self,
        teacher: nn.Module,
        heldout: Samples,
        accelerator: Accelerator,
        settings: Settings,
        dtype: torch.dtype,
    ) -> None:
        """Take a model in eval mode and the dtype in which inputs are given to it."""
        self._teacher, self._heldout, self._accelerator = teacher, heldout, accelerator
        self._temperature, self._labelled, self._dtype = settings.temperature, settings.labelled, dtype

    @torch.no_grad()
    def scores(self, candidates: Sequence[nn.Module]) -> list[Score]:
        """Return the score of each model.

        Raises:
            SepconvertError: labels are expected and there are none.
        """
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        losses, divergences, correct = ([0.0] * len(candidates) for _ in range(3))
        labels = 0.0
        for pair in self._heldout.load(self._heldout.ordered()[rank::processes]):
            x, target = self._heldout.pair(pair)
            x = as_input(x, self._accelerator.device, self._dtype)
            y = on_device(class_labels(target, len(x)), self._accelerator.device)
            expected = outputs(self._teacher, x)
            labels += float((y != UNLABELLED).sum())
            for index, model in enumerate(candidates):
                actual = outputs(model, x)
                # Rounding makes the divergence of equal outputs slightly negative.
                divergences[index] += len(x) * max(float(divergence(expected, actual)), 0.0)
                losses[index] += len(x) * float(divergence(expected, actual, self._temperature))
                if self._labelled:
                    losses[index] += float(label_loss(actual, y))
                    correct[index] += float((class_logits(actual, y).argmax(1) == y).sum())
        *sums, labels = self._summed([*losses, *divergences, *correct, labels])
        if self._labelled and not labels:
            raise SepconvertError(
                "held-out data: expected labels, got none; give some, or leave them out of all data (in"
                " Python: labelled=False)"
            )
        count, size = len(candidates), len(self._heldout.indices)
        return [
            Score(
                math.inf if math.isnan(loss) else loss / size,
                math.inf if math.isnan(value) else value / size,
                hits / labels if self._labelled else None,
            )
            for loss, value, hits in zip(
                sums[:count], sums[count : 2 * count], sums[2 * count :], strict=True
            )
        ]

    def _summed(self, values: list[float]) -> list[float]:
        """Return sums over the processes."""
        if self._accelerator.num_processes == 1:
            return values
        totals = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        result: list[float] = self._accelerator.reduce(totals, "sum").tolist()
        return result
