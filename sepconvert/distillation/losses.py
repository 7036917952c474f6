"""Terms of the loss of fine-tuning, next to the divergence from the teacher: labels, embedding, features."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import UNLABELLED
from sepconvert.measure.divergence import relative_error

EMBEDDING_WEIGHT = 32.0
"""Weight of the relative error of the classifier's input, next to the divergence from the teacher.

The embedding says more about each picture than the logits do, and costs nothing.
"""


LABEL_WEIGHT = 1.0
"""Weight of the cross-entropy with labels, next to the divergence from the teacher.

One epoch of a ResNet-20 on 10,000 pictures ends at a divergence of 0.35, at 0.38 with 0.3."""


def label_loss(leaves: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the weighted cross-entropy, summed over the samples that have a label."""
    logits = class_logits(leaves, labels).float()
    return LABEL_WEIGHT * F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")


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
