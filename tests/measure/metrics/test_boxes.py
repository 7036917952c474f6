"""Mean average precision against torchmetrics with pycocotools."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.metrics.boxes import mean_average_precisions, records_of_boxes


def images(
    number: int, seed: int, classes: int = 3
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Boxes at random places, found with some error, some missed, some twice, and false ones."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    found, wanted = [], []
    for _ in range(number):
        count = int(4 * drawn(1))
        corners = 60 * drawn(count, 2)
        boxes = torch.cat([corners, corners + 6 + 30 * drawn(count, 2)], 1)
        labels = (classes * drawn(count)).long()
        kept = drawn(count) < 0.8
        near = boxes[kept] + 8 * (drawn(int(kept.sum()), 4) - 0.5)
        false = 60 * drawn(2, 2)
        guesses = torch.cat([near, near + 2, torch.cat([false, false + 12], 1)])
        guessed = torch.cat([labels[kept], labels[kept], (classes * drawn(2)).long()])
        found.append({"boxes": guesses, "scores": drawn(len(guesses)), "labels": guessed})
        wanted.append({"boxes": boxes, "labels": labels})
    return found, wanted


def coco() -> MeanAveragePrecision:
    """torchmetrics' thresholds are rounded to float32 by default, COCO's are not."""
    return MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist()
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_value_is_coco_s(seed: int) -> None:
    found, wanted = images(25, seed)
    oracle = coco()
    oracle.update(found, wanted)
    value = mean_average_precisions(records_of_boxes(found, wanted), np.ones((1, 25)))[0]
    assert 5 < value < 95
    assert value == pytest.approx(100 * float(oracle.compute()["map"]), abs=1e-4)


def test_resampled_images_count_as_often_as_they_are_drawn() -> None:
    found, wanted = images(12, 9)
    weights = np.array([2.0, 0, 1, 3, 0, 1, 1, 0, 2, 0, 1, 1])
    value = mean_average_precisions(records_of_boxes(found, wanted), weights[None])[0]
    oracle = coco()
    for index, times in enumerate(weights):
        for _ in range(int(times)):
            oracle.update([found[index]], [wanted[index]])
    assert value == pytest.approx(100 * float(oracle.compute()["map"]), abs=1e-4)


def test_perfect_boxes_missed_ones_and_images_without_any() -> None:
    box = torch.tensor([[1.0, 2, 9, 8]])
    one = torch.ones(1).long()
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    right = {"boxes": box, "scores": torch.tensor([0.9]), "labels": one}
    truth = {"boxes": box, "labels": one}
    nothing = {"boxes": torch.zeros(0), "labels": torch.zeros(0).long()}
    records = records_of_boxes([right, empty, empty], [truth, truth, nothing])
    weights = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
    # Half of the recalls, 0 to 0.5, are reached: 51 of 101.
    assert mean_average_precisions(records, weights) == pytest.approx(
        [100, 0, 100 * 51 / 101, np.nan], nan_ok=True
    )


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (
            torch.zeros(1, 4),
            [],
            r"expected outputs as a list of mappings .* got a Tensor; pass `postprocess`",
        ),
        ([{"boxes": torch.zeros(1, 4)}], [], r"boxes, scores, labels"),
        ([], [{"boxes": torch.zeros(1, 4)}], r"expected targets as a list .* data that yield"),
        ([], [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1).int()}], r"for each of 1 images, got 0"),
        ([], [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}], r"integer labels .* and float32"),
        ([], [{"boxes": -torch.eye(4)[3:], "labels": torch.zeros(1).int()}], r"\(left, top, right, bottom\)"),
        ([], [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(1)}], r"boxes \(2, 4\), labels \(1,\)"),
        ([], [{"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}], r"expected boxes M×4"),
    ],
)
def test_boxes_of_another_form(outputs, targets, message) -> None:
    with pytest.raises(SepconvertError, match=message):
        records_of_boxes(outputs, targets)
