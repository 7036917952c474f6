"""Terms of the loss of fine-tuning, next to the divergence from the teacher.

Labels, the embedding, features, and a loss of the user's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.options.values import Task
from sepconvert.distillation.samples import on_device
from sepconvert.files.callables import resolve_callable
from sepconvert.files.data import UNLABELLED
from sepconvert.measure.divergence import Kind, relative_error, returned_by
from sepconvert.measure.metrics.evaluation import Scoring
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch, tensors_in

EMBEDDING_WEIGHT = 32.0
"""Weight of the relative error of the classifier's input, next to the divergence from the teacher.

The embedding says more about each picture than the logits do, and costs nothing.
"""


LABEL_WEIGHT = 1.0
"""Weight of the cross-entropy with labels, next to the divergence from the teacher.

One epoch of a ResNet-20 on 10,000 pictures ends at a divergence of 0.35, at 0.38 with 0.3."""


@dataclass(frozen=True)
class TaskLoss:
    """A loss of the user's, added to the divergence from the teacher; cross-entropy is then left to it.

    `function` is called with what the student returns, or the output that is chosen, and the targets.
    """

    function: Callable[[Any, Any], Any]
    scoring: Scoring

    @classmethod
    def of(cls, task: Task) -> "TaskLoss | None":
        """Return the loss of a task; None where it has none.

        Raises:
            SepconvertError: there is no such callable.
        """
        if task.loss is None:
            return None
        found = resolve_callable(task.loss, "loss") if isinstance(task.loss, str) else task.loss
        return cls(found, Scoring(output=task.output))

    def __call__(self, returned: Any, targets: Any) -> Tensor:
        """Return the loss for one batch, 0-d.

        Raises:
            SepconvertError: the function fails, or returns anything else.
        """
        chosen = self.scoring.chosen(returned)
        try:
            loss = self.function(chosen, targets)
        except Exception as error:  # the user's code
            raise SepconvertError(
                f"`loss`: failed with {type(error).__name__}: {first_line(error)}; it is called with the "
                f"outputs ({_described(chosen)}) and the targets ({_described(targets)}) of a batch"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise SepconvertError(
                f"`loss`: expected a tensor with one number, the mean over the batch, got {_described(loss)}"
            )
        return loss.reshape(())

    def check(self, model: nn.Module, samples: InputBatch, targets: Any) -> None:
        """Raise `SepconvertError` unless the loss of a model can be taken, is finite and has a derivative."""
        private = private_copy(model)
        inputs = samples.on(private)
        device = tensors_in(inputs.inputs)[0].device
        with torch.enable_grad():
            loss = self(returned_by(private, inputs), on_device(targets, device))
        if not bool(loss.isfinite()):
            raise SepconvertError(
                f"`loss`: expected a finite number for the first sample, got {float(loss.detach())}"
            )
        if not loss.requires_grad:
            raise SepconvertError(
                "`loss`: expected a loss that depends on the outputs, got one without a derivative; compute "
                "it of the outputs by operators of torch"
            )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__


def label_loss(kind: Kind, leaves: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the weighted cross-entropy, summed over the samples that have a label.

    `kind` is that of the first output.
    """
    logits = kind.logits(class_logits(leaves, labels)).float()
    return LABEL_WEIGHT * F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")


def check_labels(targets: Any, samples: int) -> None:
    """Raise `SepconvertError` unless targets are class numbers, or -1, of so many samples."""
    if not isinstance(targets, Tensor) or targets.shape != (samples,) or targets.is_floating_point():
        raise SepconvertError(
            f"labels: expected {samples} integers, one for each sample, got {_described(targets)}; leave the "
            "labels out of the data (in Python: labelled=False), or pass a `loss`"
        )


def class_logits(leaves: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the first output: logits, N×classes, that the `labels` belong to.

    Raises:
        SepconvertError: the output has another shape, or a label is no class of it.
    """
    logits = leaves[0]
    if logits.ndim != 2 or int(labels.max()) >= logits.shape[1] or int(labels.min()) < UNLABELLED:
        raise SepconvertError(
            f"labels: expected logits of shape ({len(labels)}, classes) and labels from -1 to classes - 1,"
            f" got shape {tuple(logits.shape)} and labels from {int(labels.min())} to {int(labels.max())};"
            " leave the labels out of the data (in Python: labelled=False)"
        )
    return logits


def holding_labels(labels: Tensor, mirrored: Tensor, expected: Tensor) -> Tensor:
    """Return the labels, with -1 for each mirrored picture whose label the teacher's logits do not confirm.

    A mirrored cat is a cat, but a mirrored 3 is no 3: the teacher, which saw the mirrored picture, can tell.
    """
    holds = ~mirrored | (expected.argmax(1) == labels)
    return labels.where(holds, UNLABELLED)


def embedding_loss(expected: Tensor, actual: Tensor, variance: Tensor) -> Tensor:
    """Return the weighted mean squared error of the embedding, relative to the variance of its elements."""
    squares = (actual - expected).float().square().mean()
    return EMBEDDING_WEIGHT * squares / variance


def feature_loss(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over layers of the relative error of their outputs."""
    return torch.stack([relative_error(expected[name], actual[name]) for name in expected]).mean()
