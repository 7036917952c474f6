"""The named metrics against torchmetrics' own classes, which see a data set as a whole."""

import math

import numpy as np
import pytest
import torch
import torchmetrics
from torchmetrics import classification as tc
from torchmetrics import image as ti
from torchmetrics import text as tt

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.metrics.named import NAMES, named


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


MASKS = (seeded(9, 4, 6, 5), (seeded(9, 6, 5) > 0).long() + 2 * (seeded(9, 6, 5) > 0.8).long())
LOGITS = (seeded(60, 5), torch.arange(60) * 7 % 5)
PICTURES = (seeded(6, 3, 24, 20).mul(0.3).add(0.5), seeded(7, 6, 3, 24, 20)[3].mul(0.3).add(0.5).clamp(0, 1))


def ratio(value: float) -> float:
    return 100 * value


@pytest.mark.parametrize(
    ("name", "pair", "oracle", "scale"),
    [
        ("top1", LOGITS, tc.MulticlassAccuracy(5, average="micro"), 100),
        (
            "top5",
            (seeded(60, 9), torch.arange(60) % 9),
            tc.MulticlassAccuracy(9, top_k=5, average="micro"),
            100,
        ),
        ("miou", MASKS, tc.MulticlassJaccardIndex(4), 100),
        ("dice", MASKS, tc.MulticlassF1Score(4, average="macro"), 100),
        ("f1", LOGITS, tc.MulticlassF1Score(5, average="macro"), 100),
        ("pixel-accuracy", MASKS, tc.MulticlassAccuracy(4, average="micro"), 100),
        ("miou", (seeded(9, 1, 6, 5), (seeded(9, 6, 5) > 0).long()), tc.BinaryJaccardIndex(), 100),
        ("mse", (seeded(6, 4), seeded(2, 6, 4)[1]), torchmetrics.MeanSquaredError(), 1),
        ("mae", (seeded(6, 4), seeded(2, 6, 4)[1]), torchmetrics.MeanAbsoluteError(), 1),
        ("auc", LOGITS, tc.MulticlassAUROC(5), 100),
        ("auc", (seeded(60), (seeded(2, 60)[1] > 0).long()), tc.BinaryAUROC(), 100),
        ("auc", (seeded(60, 3), (seeded(2, 60, 3)[1] > 0).long()), tc.MultilabelAUROC(3), 100),
    ],
)
def test_values_are_those_of_torchmetrics(name, pair, oracle, scale) -> None:
    outputs, targets = pair
    metric = named(name)
    found = np.concatenate(
        [metric.statistics(outputs[part], targets[part]) for part in (slice(4), slice(4, None))]
    )
    if isinstance(oracle, tc.BinaryJaccardIndex):
        value = metric.value(found[:, :, :])
        oracle.update(outputs[:, 0].sigmoid(), targets)
        assert value == pytest.approx(100 * float(oracle.compute()), rel=1e-5)
        return
    oracle.update(outputs, targets)
    assert len(found) == len(targets)
    assert metric.value(found) == pytest.approx(scale * float(oracle.compute()), rel=1e-5)


def test_pixels_of_the_ignored_class_do_not_count() -> None:
    outputs, targets = MASKS
    masked = targets.masked_fill(seeded(3, 9, 6, 5)[2] > 0.5, 255)
    oracle = tc.MulticlassJaccardIndex(4, ignore_index=255)
    oracle.update(outputs, masked)
    metric = named("miou", 255)
    assert metric.value(metric.statistics(outputs, masked)) == pytest.approx(100 * float(oracle.compute()))
    with pytest.raises(SepconvertError, match=r"expected 0 to 3.*got 255;.*`ignore_index`"):
        named("miou").statistics(outputs, masked)


def test_a_metric_of_nothing_has_no_value() -> None:
    outputs, targets = MASKS
    for name in ("miou", "dice", "pixel-accuracy"):
        metric = named(name, 255)
        assert math.isnan(metric.value(metric.statistics(outputs, torch.full_like(targets, 255))))
    metric = named("cer")
    assert math.isnan(metric.value(metric.statistics(["a"], [""])))


def test_psnr_is_the_mean_of_the_pictures() -> None:
    outputs, targets = PICTURES
    metric = named("psnr")
    mse = (outputs.clamp(0, 1) - targets).square().mean((1, 2, 3)).double()
    assert metric.value(metric.statistics(outputs, targets)) == pytest.approx(
        float((-10 * mse.log10()).mean())
    )
    assert metric.value(metric.statistics(targets, targets)) == 100.0  # equal pictures


def test_ssim() -> None:
    outputs, targets = PICTURES
    metric, oracle = named("ssim"), ti.StructuralSimilarityIndexMeasure(data_range=1.0)
    oracle.update(outputs.clamp(0, 1), targets)
    found = metric.statistics(outputs, targets)
    assert found.shape == (6,)
    assert metric.value(found) == pytest.approx(float(oracle.compute()), rel=1e-5)


def test_character_errors() -> None:
    texts, wanted = ["kitten", "", "abc", "flaw"], ["sitting", "ab", "abc", "lawn"]
    metric, oracle = named("cer"), tt.CharErrorRate()
    oracle.update(texts, wanted)
    found = metric.statistics(texts, tuple(wanted))
    assert found.tolist() == [[3, 7], [2, 2], [0, 3], [2, 4]]
    assert metric.value(found) == pytest.approx(100 * float(oracle.compute()))
    assert not metric.higher_is_better


def test_every_name_is_known_and_resampled_data_sets_have_a_value() -> None:
    boxes = [
        {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "scores": torch.ones(1), "labels": torch.ones(1).long()}
    ]
    pairs = {
        **dict.fromkeys(("top1", "top5", "f1", "auc"), LOGITS),
        **dict.fromkeys(("miou", "dice", "pixel-accuracy"), MASKS),
        **dict.fromkeys(("psnr", "ssim", "mse", "mae"), PICTURES),
        "map": (boxes, boxes),
        "cer": (["a"], ["b"]),
    }
    assert set(pairs) == set(NAMES)
    for name, (outputs, targets) in pairs.items():
        metric = named(name)
        assert metric.name == name
        statistics = metric.statistics(outputs, targets)
        weights = np.stack([np.ones(len(statistics)), np.arange(len(statistics)) + 1.0])
        found = metric.values(statistics, weights)
        # Weights are multiplicities: the same as samples repeated as often.
        repeated = np.repeat(statistics, weights[1].astype(int), axis=0)
        assert found == pytest.approx([metric.value(statistics), metric.value(repeated)])
        assert all(map(math.isfinite, found))


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        (
            "miou",
            {"out": 1},
            MASKS[1],
            r"`metric` miou: expected a tensor of outputs, got a dict; pass `postprocess`",
        ),
        ("miou", MASKS[0], MASKS[1][:, :3], r"class numbers N×….*targets int64 of shape \(9, 3, 5\)"),
        ("miou", MASKS[0], MASKS[1].float(), r"targets float32 of shape"),
        ("miou", MASKS[0], MASKS[1] + 2, r"labels: expected 0 to 3, .* got [45]"),
        ("miou", MASKS[0] / 0 * 0, MASKS[1], r"finite outputs, got NaN"),
        (
            "psnr",
            PICTURES[0],
            PICTURES[1][:, :, 1:],
            r"the targets' shape, got outputs .*24, 20\) and .*23, 20\)",
        ),
        ("psnr", PICTURES[0], 255 * PICTURES[1], r"values from 0 to 1, got .* from .* to 255"),
        ("psnr", PICTURES[0] / 0 * 0, PICTURES[1], r"finite outputs"),
        ("auc", LOGITS[0], torch.zeros(60, 2).long(), r"N×classes, and class numbers N"),
        ("auc", LOGITS[0], LOGITS[1] + 1, r"expected 0 to 4"),
        ("cer", torch.zeros(3), ["a"], r"a list of strings as outputs, got a Tensor"),
        ("cer", ["a"], [3], r"a list of strings as targets, got a list of int"),
        ("cer", ["a"], ["b", "c"], r"a text for each of 2 targets, got 1"),
    ],
)
def test_what_a_metric_cannot_take(name, outputs, targets, message) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        named(name).statistics(outputs, targets)
    assert "\n" not in str(caught.value)
