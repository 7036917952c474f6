"""Mean average precision of detected boxes, from matches that are made once for each image.

It is COCO's: the mean over classes and over IoU thresholds of 0.5, 0.55, … 0.95 of the area under the curve
of precision against recall, at 101 points, of the 100 best boxes of each image and class. torchmetrics and
pycocotools compute it of a whole data set at once, in seconds; here the matches of each image are kept, so
that the data sets of a bootstrap cost milliseconds. The tests compare both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.metrics.metric import Statistics, Weights

_THRESHOLDS = np.linspace(0.5, 0.95, 10)

_RECALLS = np.linspace(0, 1, 101)

_MOST = 100  # boxes of an image and a class


@dataclass(frozen=True)
class _Matches:
    """The boxes of one class that were found in one image, best first, and the number that there are."""

    scores: npt.NDArray[np.float64]  # D
    right: npt.NDArray[np.bool_]  # thresholds × D
    wanted: int


def records_of_boxes(outputs: object, targets: object) -> Statistics:
    """Return the matches of each image, by class: N mappings.

    Args:
        outputs: for each image a mapping of `boxes`, M × 4 (left, top, right, bottom), `scores`, M, and
            `labels`, M integers.
        targets: for each image a mapping of `boxes` and `labels`.

    Raises:
        SepconvertError: they have another form.
    """
    found, wanted = _images(outputs, "outputs", True), _images(targets, "targets", False)
    if len(found) != len(wanted):
        raise SepconvertError(
            f"`metric` map: expected boxes for each of {len(wanted)} images, got {len(found)}; check "
            "`postprocess`"
        )
    records = np.empty(len(found), dtype=object)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        classes = sorted({*one["labels"].tolist(), *other["labels"].tolist()})
        records[index] = {label: _matches(one, other, label) for label in classes}
    return records


def _images(value: object, what: str, scored: bool) -> list[dict[str, npt.NDArray[Any]]]:
    keys = ("boxes", "scores", "labels") if scored else ("boxes", "labels")
    if not isinstance(value, list | tuple) or not all(
        isinstance(image, Mapping) and all(isinstance(image.get(key), Tensor) for key in keys)
        for image in value
    ):
        raise SepconvertError(
            f"`metric` map: expected {what} as a list of mappings with the tensors "
            f"{', '.join(keys)}, one for each image, got a {type(value).__name__}; pass "
            + ("`postprocess` to decode the outputs" if scored else "data that yield such targets")
        )
    images = []
    for image in value:
        arrays = {key: torch.as_tensor(image[key]).detach().cpu().numpy() for key in keys}
        boxes = arrays["boxes"] = (
            arrays["boxes"].reshape(-1, 4) if not arrays["boxes"].size else arrays["boxes"]
        )
        if boxes.ndim != 2 or boxes.shape[1] != 4 or any(len(arrays[key]) != len(boxes) for key in keys):
            shapes = ", ".join(f"{key} {arrays[key].shape}" for key in keys)
            raise SepconvertError(
                f"`metric` map: expected boxes M×4 (left, top, right, bottom) in the {what}, and M of each "
                f"other, got {shapes}; check {'`postprocess`' if scored else 'the data'}"
            )
        if (boxes[:, 2:] < boxes[:, :2]).any() or arrays["labels"].dtype.kind not in "iu":
            raise SepconvertError(
                f"`metric` map: expected boxes (left, top, right, bottom) and integer labels in the {what}, "
                f"got {boxes[0].tolist()} and {arrays['labels'].dtype}; check "
                + ("`postprocess`" if scored else "the data")
            )
        images.append(arrays)
    return images


def _matches(
    found: Mapping[str, npt.NDArray[Any]], wanted: Mapping[str, npt.NDArray[Any]], label: int
) -> _Matches:
    """Match boxes with those that they overlap most, the best first, at every threshold."""
    chosen = np.flatnonzero(found["labels"] == label)
    chosen = chosen[np.argsort(-found["scores"][chosen], kind="stable")][:_MOST]
    truth = wanted["boxes"][wanted["labels"] == label].astype(np.float64)
    overlaps = _overlaps(found["boxes"][chosen].astype(np.float64), truth)
    right = np.zeros((len(_THRESHOLDS), len(chosen)), bool)
    for row, threshold in enumerate(_THRESHOLDS):
        free = np.ones(len(truth), bool)
        for column in range(len(chosen)):
            candidates = np.where(free, overlaps[column], -1.0)
            if len(truth) and candidates.max() >= threshold:
                # Of equal overlaps the last counts, as in COCO's code.
                best = len(truth) - 1 - int(candidates[::-1].argmax())
                free[best], right[row, column] = False, True
    return _Matches(found["scores"][chosen].astype(np.float64), right, len(truth))


def _overlaps(boxes: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return intersection over union, D × G."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(each[:, 2:] - each[:, :2], 0, None).prod(-1) for each in (boxes, others)]
    whole = areas[0][:, None] + areas[1][None] - shared
    found: npt.NDArray[np.float64] = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return found


def mean_average_precisions(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the mean average precision of each data set, in percent; NaN where there is nothing to find."""
    classes = sorted({label for record in statistics for label in record})
    areas = np.stack([_areas(statistics, label, weights) for label in classes] or [np.zeros(len(weights))])
    known = np.isfinite(areas)
    number = known.sum(0)
    found: npt.NDArray[np.float64] = np.divide(
        100 * np.where(known, areas, 0).sum(0), number, out=np.full(len(weights), np.nan), where=number > 0
    )
    return found


def _areas(statistics: Statistics, label: int, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the average precision of one class in each data set, NaN where there is nothing to find."""
    records = [(image, record[label]) for image, record in enumerate(statistics) if label in record]
    images = np.concatenate([np.full(len(each.scores), image) for image, each in records])
    scores = np.concatenate([each.scores for _, each in records])
    right = np.concatenate([each.right for _, each in records], 1)
    wanted = weights[:, [image for image, _ in records]] @ np.array([each.wanted for _, each in records])
    order = np.argsort(-scores, kind="stable")
    images, right = images[order].astype(int), right[:, order]
    areas = np.full(len(weights), np.nan)
    for index, (counts, number) in enumerate(zip(weights, wanted, strict=True)):
        if not number:
            continue
        times = counts[images]
        hits, seen = np.cumsum(times * right, 1), np.cumsum(times)
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        areas[index] = np.mean([_interpolated(*pair) for pair in zip(hits / number, precision, strict=True)])
    return areas


def _interpolated(recall: npt.NDArray[np.float64], precision: npt.NDArray[np.float64]) -> float:
    places = np.searchsorted(recall, _RECALLS, side="left")
    reached = places < len(recall)
    return float(precision[places[reached]].sum() / len(_RECALLS))
