"""Evaluation on held-out data, by which weights are chosen."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.losses import TaskLoss, class_logits, label_loss
from sepconvert.distillation.samples import Samples, as_input, on_device
from sepconvert.distillation.settings import Settings
from sepconvert.files.data import UNLABELLED, class_labels
from sepconvert.measure.divergence import Yardstick, floating_outputs, outputs, returned_by
from sepconvert.network.tensors import InputBatch


class Score(NamedTuple):
    """Means over held-out data: loss, divergence from the teacher, and accuracy if there are labels.

    The loss is that of training, in which squared errors are relative; the divergence may have a unit. Both
    are infinite where they are NaN.
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
        yardstick: Yardstick,
        task_loss: TaskLoss | None = None,
    ) -> None:
        """Take a model in eval mode, the dtype in which inputs are given to it, and what is judged by.

        The variances of the yardstick are measured on the held-out data, where it has none.
        """
        self._teacher, self._heldout, self._accelerator = teacher, heldout, accelerator
        self._temperature, self._labelled, self._dtype = settings.temperature, settings.labelled, dtype
        self.task_loss = task_loss
        self.yardstick = yardstick
        if yardstick.variances is None and any(kind.has_scale for kind in yardstick.kinds):
            self.yardstick = self._measured(yardstick)

    @torch.no_grad()
    def scores(self, candidates: Sequence[nn.Module]) -> list[Score]:
        """Return the score of each model.

        Raises:
            SepconvertError: labels are expected and there are none.
        """
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        losses, divergences, correct = ([0.0] * len(candidates) for _ in range(3))
        labels = 0.0
        for x, target in self._batches(rank, processes):
            y = on_device(class_labels(target, len(x)), self._accelerator.device)
            expected = outputs(self._teacher, x)
            labels += float((y != UNLABELLED).sum())
            for index, model in enumerate(candidates):
                returned = returned_by(model, x)
                actual = floating_outputs(returned)
                # Rounding makes the divergence of equal outputs slightly negative.
                divergences[index] += len(x) * max(float(self.yardstick.divergence(expected, actual)), 0.0)
                losses[index] += len(x) * float(self.yardstick.scaled(expected, actual, self._temperature))
                if self.task_loss is not None:
                    losses[index] += len(x) * float(self.task_loss(returned, target))
                if self._labelled:
                    if self.task_loss is None:
                        losses[index] += float(label_loss(self.yardstick.kinds[0], actual, y))
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

    def _batches(self, rank: int, processes: int) -> Iterator[tuple[InputBatch, Any]]:
        """Yield every so many batches of inputs and targets, on the device."""
        for pair in self._heldout.load(self._heldout.ordered()[rank::processes]):
            x, target = self._heldout.pair(pair)
            yield (
                as_input(x, self._accelerator.device, self._dtype),
                on_device(target, self._accelerator.device),
            )

    @torch.no_grad()
    def _measured(self, yardstick: Yardstick) -> Yardstick:
        """Return the yardstick with variances of all held-out data, the same in every process."""
        return yardstick.measured_on(outputs(self._teacher, x) for x, _ in self._batches(0, 1))

    def _summed(self, values: list[float]) -> list[float]:
        """Return sums over the processes."""
        if self._accelerator.num_processes == 1:
            return values
        totals = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        result: list[float] = self._accelerator.reduce(totals, "sum").tolist()
        return result
