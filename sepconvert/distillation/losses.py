"""Label loss of fine-tuning, and the checks of batches and labels that it needs."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import UNLABELLED, Batch

EMBEDDING_WEIGHT = 32.0
"""Weight of the relative error of what the classifier is given, next to the divergence from the teacher.

It tells more of each picture than the logits do, and costs nothing.
"""


LABEL_WEIGHT = 1.0
"""Weight of the cross-entropy with labels, next to the divergence from the teacher.

One epoch of a ResNet-20 on 10,000 pictures ends at a divergence of 0.35, at 0.38 with 0.3."""


def checked_batch(batch: object) -> Batch:
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not all(isinstance(t, Tensor) for t in batch)
    ):
        raise SepconvertError(
            f"data: expected batches of two tensors (x, y), got {type(batch).__name__}; wrap the dataset so"
            " that it yields a sample and its label, -1 where there is none"
        )
    x, y = batch
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise SepconvertError(
            f"data: expected {len(x)} integer labels for a batch of {len(x)} samples, got {y.dtype} of shape"
            f" {tuple(y.shape)}; give a class, or -1, for each"
        )
    return x, y.long()


def label_loss(leaves: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of all samples that have a label, by its weight."""
    logits = class_logits(leaves, labels).float()
    return LABEL_WEIGHT * F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")


def class_logits(leaves: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The logits, N×classes, that answer to the `labels`: the first output."""
    logits = leaves[0]
    if logits.ndim != 2 or int(labels.max()) >= logits.shape[1] or int(labels.min()) < UNLABELLED:
        raise SepconvertError(
            f"labels: expected logits of shape ({len(labels)}, classes) and labels from -1 to classes - 1,"
            f" got shape {tuple(logits.shape)} and labels from {int(labels.min())} to {int(labels.max())};"
            " leave the labels out of the data (in Python: labelled=False)"
        )
    return logits
