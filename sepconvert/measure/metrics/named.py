"""The metrics that `--metric` knows by name, each on the functions of torchmetrics that it corresponds to."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.metrics.boxes import mean_average_precisions, records_of_boxes
from sepconvert.measure.metrics.metric import Metric, Statistics, Weights, means, shares

NAMES = (
    "top1", "top5", "miou", "dice", "pixel-accuracy", "psnr", "ssim", "mse", "mae", "auc", "f1", "map", "cer",
)  # fmt: skip
"""Names in the order of the documentation."""


def named(name: str, ignore_index: int | None = None) -> Metric:
    """Return a metric by its name.

    Args:
        name: one of `NAMES`.
        ignore_index: class number of samples or pixels that are not scored.
    """
    counts = partial(_counts, ignore_index=ignore_index, metric=name)
    known = {
        "top1": Metric("top1", "pp", True, partial(_ranked, 1), shares, True, "classes"),
        "top5": Metric("top5", "pp", True, partial(_ranked, 5), shares, True, "classes"),
        "miou": Metric("miou", "pp", True, counts, _of_counts(_iou), targets="classes"),
        "dice": Metric("dice", "pp", True, counts, _of_counts(_dice), targets="classes"),
        "f1": Metric("f1", "pp", True, counts, _of_counts(_dice), targets="classes"),
        "pixel-accuracy": Metric("pixel-accuracy", "pp", True, counts, _recall, targets="classes"),
        "psnr": Metric("psnr", "dB", True, _psnr, means, True, "pictures"),
        "ssim": Metric("ssim", "", True, _ssim, means, True, "pictures"),
        "mse": Metric("mse", "", False, partial(_errors, torch.square, "mse"), means, True, "pictures"),
        "mae": Metric("mae", "", False, partial(_errors, torch.abs, "mae"), means, True, "pictures"),
        "auc": Metric("auc", "pp", True, _scores, _auroc, targets="classes"),
        "map": Metric("map", "pp", True, records_of_boxes, mean_average_precisions),
        "cer": Metric("cer", "pp", False, _edits, _error_rate),
    }
    return known[name]


def _tensors(metric: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    for value, what in ((outputs, "outputs"), (targets, "targets")):
        if not isinstance(value, Tensor):
            raise SepconvertError(
                f"`metric` {metric}: expected a tensor of {what}, got a {type(value).__name__}; pass "
                "`postprocess` to make one of it, or another `metric`"
            )
    assert isinstance(outputs, Tensor)  # noqa: S101  (mypy does not follow the loop)
    assert isinstance(targets, Tensor)  # noqa: S101
    return outputs, targets


# Classes of samples or pixels -----------------------------------------------------------------------


def _classified(metric: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return logits N × K × … (K of 1: of one class against the rest) and class numbers N × …, int64."""
    logits, classes = _tensors(metric, outputs, targets)
    if classes.ndim == logits.ndim and classes.shape[1:2] == (1,):
        classes = classes[:, 0]  # a mask with a dimension of one channel
    if (
        logits.ndim < 2
        or classes.is_floating_point()
        or logits.shape[:1] + logits.shape[2:] != classes.shape
        or not logits.is_floating_point()
    ):
        raise SepconvertError(
            f"`metric` {metric}: expected outputs N×classes×… and class numbers N×…, got outputs "
            f"{_described(logits)} and targets {_described(classes)}; pass other data, or `postprocess`"
        )
    if logits.isnan().any():
        raise SepconvertError(
            f"`metric` {metric}: expected finite outputs, got NaN; check the model and the preprocessing of "
            "the inputs"
        )
    return logits, classes.long()


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def check_classes(metric: str, classes: Tensor, number: int, ignore_index: int | None = None) -> None:
    """Raise `SepconvertError` if a target is no class number below `number`, and not the ignored one."""
    foreign = classes[(classes < 0) | (classes >= number)]
    foreign = foreign if ignore_index is None else foreign[foreign != ignore_index]
    if len(foreign):
        raise SepconvertError(
            f"`data`: labels: expected 0 to {number - 1}, as the model has {number} classes, got "
            f"{int(foreign[0])}; use the labels that the model was trained with, numbered from 0"
            + (", or leave these out by `ignore_index`" if metric not in ("top1", "top5") else "")
        )


def _ranked(most: int, outputs: object, targets: object) -> Statistics:
    """Return whether the class is among the `most` first of each sample: N zeros and ones."""
    logits, classes = _classified(f"top{most}", outputs, targets)
    check_classes(f"top{most}", classes, logits.shape[1])
    found = logits.topk(min(most, logits.shape[1]), dim=1).indices
    return (found == classes[:, None]).any(1).cpu().numpy().astype(np.float64)


def _counts(outputs: object, targets: object, *, ignore_index: int | None, metric: str) -> Statistics:
    """Return true positives, false positives and false negatives of every class: N × K × 3.

    One output channel is the logit, or the probability, of class 1 against class 0.
    """
    from torchmetrics.functional.classification import binary_stat_scores, multiclass_stat_scores

    logits, classes = _classified(metric, outputs, targets)
    samples, number = logits.shape[:2]
    check_classes(metric, classes, max(number, 2), ignore_index)
    flat = classes.reshape(samples, -1)
    if number == 1:
        scores = binary_stat_scores(
            logits.reshape(samples, -1).float(), flat, multidim_average="samplewise",
            ignore_index=ignore_index,
        )[:, None]  # fmt: skip
    else:
        scores = multiclass_stat_scores(
            logits.reshape(samples, number, -1).argmax(1), flat, number, average=None,
            multidim_average="samplewise", ignore_index=ignore_index,
        )  # fmt: skip
    return scores[..., [0, 1, 3]].cpu().numpy().astype(np.float64)


Share = Callable[[npt.NDArray[np.float64]], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


def _of_counts(share: Share) -> Callable[[Statistics, Weights], npt.NDArray[np.float64]]:
    """Return the mean over classes, those that occur nowhere left out, of a share of summed counts."""

    def values(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
        counts = np.tensordot(weights, statistics, 1)  # B × K × 3
        part, whole = share(counts)
        present = whole > 0
        each = np.divide(part, whole, out=np.zeros_like(part), where=present)
        number = present.sum(1)
        return _percent(each.sum(1), number)

    return values


def _iou(counts: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return counts[..., 0], counts.sum(-1)


def _dice(counts: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return 2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]


def _recall(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the percentage of pixels, or samples, of the right class."""
    right, _, missed = np.moveaxis(np.tensordot(weights, statistics.sum(1), 1), -1, 0)
    return _percent(right, right + missed)


def _percent(part: npt.NDArray[np.float64], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return parts of wholes in percent, NaN of nothing."""
    found: npt.NDArray[np.float64] = np.divide(
        100.0 * part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0
    )
    return found


def _scores(outputs: object, targets: object) -> Statistics:
    """Return scores and truth, 0 or 1, of every class: N × K × 2; of two classes that of the second alone."""
    scores, truth = _tensors("auc", outputs, targets)
    scores, truth = (value[:, None] if value.ndim == 1 else value for value in (scores, truth))
    alike = scores.ndim == truth.ndim == 2 and len(scores) == len(truth)
    if not alike or truth.is_floating_point() or truth.shape[1] not in (1, scores.shape[1]):
        raise SepconvertError(
            f"`metric` auc: expected outputs N×classes, and class numbers N or 0 and 1 for each class, got "
            f"outputs {_described(scores)} and targets {_described(truth)}; pass other data, or `postprocess`"
        )
    number = scores.shape[1]
    if truth.shape[1] == number:
        check_classes("auc", truth, 2)
    else:
        check_classes("auc", truth, number)
        scores, truth = scores.double().softmax(1), truth == torch.arange(number)
        scores, truth = (value[:, 1:] if number == 2 else value for value in (scores, truth))
    return torch.stack([scores.double(), truth.to(scores.device).double()], 2).cpu().numpy()


def _auroc(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the area under the ROC curve in percent, a mean over the classes that have samples and others.

    It is the share of pairs of a sample of the class and another in which the former scores higher, equal
    scores counting half (J. Hanley, B. McNeil, Radiology 143, 1982).
    """
    areas = []
    for scores, truth in np.moveaxis(statistics, (1, 2), (0, 1)):
        _, group = np.unique(scores, return_inverse=True)
        of_groups = np.zeros((len(scores), group.max() + 1))
        of_groups[np.arange(len(scores)), group] = 1
        positive, negative = (weights * truth) @ of_groups, (weights * (1 - truth)) @ of_groups
        below = negative.cumsum(1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        areas.append(
            np.divide((positive * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        )
    known = np.isfinite(areas)
    return _percent(np.where(known, areas, 0).sum(0), known.sum(0))


# Pictures and numbers -------------------------------------------------------------------------------


def _alike(metric: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of the same shape, in float32 at least."""
    given, wanted = _tensors(metric, outputs, targets)
    if given.shape != wanted.shape:
        raise SepconvertError(
            f"`metric` {metric}: expected outputs of the targets' shape, got outputs {_described(given)} and "
            f"targets {_described(wanted)}; pass other data, or `postprocess`"
        )
    given, wanted = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (given, wanted))
    if not given.isfinite().all():
        raise SepconvertError(
            f"`metric` {metric}: expected finite outputs, got NaN or Inf; check the model and its inputs"
        )
    return given, wanted.to(given.device)


def _pictures(metric: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return pictures N × C × H × W of values from 0 to 1; outputs are clipped to these."""
    given, wanted = _alike(metric, outputs, targets)
    if given.ndim != 4 or not -1e-3 <= float(wanted.min()) <= float(wanted.max()) <= 1.001:
        raise SepconvertError(
            f"`metric` {metric}: expected pictures N×C×H×W of values from 0 to 1, got {_described(wanted)} "
            f"with values from {float(wanted.min()):.3g} to {float(wanted.max()):.3g}; scale the "
            "targets, and the outputs by `postprocess`"
        )
    return given.clamp(0, 1), wanted.clamp(0, 1)


def _psnr(outputs: object, targets: object) -> Statistics:
    """Return the PSNR of each picture, in dB, for values from 0 to 1."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    given, wanted = _pictures("psnr", outputs, targets)
    found = peak_signal_noise_ratio(given, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    # Equal pictures would have infinitely many: 8-bit pictures cannot tell more than this.
    return found.clamp(max=_HIGHEST_PSNR).double().cpu().numpy()


_HIGHEST_PSNR = 100.0


def _ssim(outputs: object, targets: object) -> Statistics:
    """Return the structural similarity of each picture."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    given, wanted = _pictures("ssim", outputs, targets)
    found = structural_similarity_index_measure(given, wanted, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # noqa: S101  (a tuple only if asked for more)
    return found.double().reshape(-1).cpu().numpy()


def _errors(size: Callable[[Tensor], Tensor], metric: str, outputs: object, targets: object) -> Statistics:
    """Return the mean size of the differences in each sample."""
    given, wanted = _alike(metric, outputs, targets)
    return size((given - wanted).double()).reshape(len(given), -1).mean(1).cpu().numpy()


# Texts ----------------------------------------------------------------------------------------------


def _edits(outputs: object, targets: object) -> Statistics:
    """Return edits and the length of each text: N × 2."""
    from torchmetrics.functional.text import edit_distance

    for value, what in ((outputs, "outputs"), (targets, "targets")):
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise SepconvertError(
                f"`metric` cer: expected a list of strings as {what}, got {_kind(value)}; decode the outputs "
                "by `postprocess`, and let the data yield strings"
            )
    texts, wanted = list(outputs), list(targets)  # type: ignore[call-overload]  # checked above
    if len(texts) != len(wanted):
        raise SepconvertError(
            f"`metric` cer: expected a text for each of {len(wanted)} targets, got {len(texts)}; check "
            "`postprocess`"
        )
    found = edit_distance(texts, wanted, reduction="none")
    return np.stack([found.double().numpy(), np.array([len(each) for each in wanted], float)], 1)


def _kind(value: object) -> str:
    inner = next(iter(value), None) if isinstance(value, list | tuple) else None
    return f"a {type(value).__name__}" + ("" if inner is None else f" of {type(inner).__name__}")


def _error_rate(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return edits by characters, in percent."""
    edits, lengths = (weights @ statistics).T
    return _percent(edits, lengths)
