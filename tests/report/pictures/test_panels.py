"""Panels show where and how a sample changed."""

import numpy as np
import pytest
import torch
from data_urls import pixels

from sepconvert.report.pictures.panels import amplification, gallery
from sepconvert.report.pictures.samples import ChangedSample, ChangedSamples


def sample(target, before, after, image=None) -> ChangedSample:
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) if image is None else image
    return ChangedSample(5, image, target, before, after, (28.2, 28.1))


def shown(*samples):
    """The legend, and captions and pixels of the panels of the first sample."""
    found = gallery(ChangedSamples(samples, len(samples)))
    return found.legend, {each.caption: pixels(each.url) for each in found.samples[0][1]}


def test_without_samples_there_is_no_gallery():
    assert gallery(ChangedSamples()) is None


# Masks --------------------------------------------------------------------------------------------


def logits(classes: torch.Tensor, number: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, number).permute(0, 3, 1, 2).float()


def test_masks():
    label = torch.zeros(1, 16, 24, dtype=torch.int64)
    label[0, :, 12:] = 1
    label[0, 0] = 255
    before, after = label.clamp(max=2), label.clamp(max=2).clone()
    after[0, 8, 20] = 2  # right before
    before[0, 9, 3] = 1  # right after
    before[0, 10, 3], after[0, 10, 3] = 1, 2  # neither
    legend, panels = shown(sample(label, logits(before), logits(after)))
    assert [*panels][:4] == ["image", "label", "before", "after"]
    (name,) = [*panels][4:]
    assert name == f"where they differ, {100 * 3 / 384:.2g} % of the pixels"
    assert "red was right before" in legend
    differ, old, new, truth = panels[name], panels["before"], panels["after"], panels["label"]
    assert differ.shape == (16, 24, 3)
    red, green, yellow = differ[8, 20], differ[9, 3], differ[10, 3]
    assert red[0] > 2 * red[1]
    assert green[1] > 2 * green[0]
    assert min(yellow[0], yellow[1]) > 150 > yellow[2]
    changed = np.ptp(differ, axis=2) > 0
    assert changed.sum() == 3  # the rest is the image in grey
    assert (old[8, 20] == truth[8, 20]).all()
    assert (new[8, 20] != truth[8, 20]).any()
    assert len({tuple(colour) for colour in truth.reshape(-1, 3)}) == 3  # two classes and what is not scored
    assert np.ptp(truth[0]) == 0


def test_a_mask_of_one_channel_is_a_threshold():
    label = torch.zeros(1, 1, 16, 24, dtype=torch.int64)
    label[..., 6:] = 1
    for low, high in ((-2.0, 0.25), (0.25, 0.75)):  # logits, and probabilities
        made = torch.where(label > 0, high, low).float()
        assert not (
            shown(sample(label, made, made))[1]["before"] != shown(sample(label, made, made))[1]["label"]
        ).any()


def test_masks_of_another_size_than_the_image():
    label = torch.zeros(1, 8, 12, dtype=torch.int64)
    _, panels = shown(sample(label, logits(label), logits(1 - label)))
    assert panels["where they differ, 1e+02 % of the pixels"].shape == (8, 12, 3)


# Pictures -----------------------------------------------------------------------------------------


def test_pictures():
    target = torch.full((1, 1, 60, 90), 0.5)
    before, after = target.clone(), target.clone()
    after[0, 0, 40:44, 70:74] += 0.04
    _, panels = shown(sample(target, before, after, target - 0.5))
    assert [*panels][:4] == ["input", "target", "before", "after"]
    difference, name = [*panels][4:]
    assert difference == "difference × 20"
    assert name == "30 × 30 pixels: target, before, after"
    assert not panels["input"].any()  # on the scale of the others
    assert set(np.unique(panels["before"])) == {128}
    assert panels["after"].max() == round(0.54 * 255)
    difference = panels["difference × 20"]
    assert difference.max() == round(0.8 * 255)
    assert np.argwhere(difference).min(0).tolist() == [40, 70]
    crop = panels[name]
    assert max(crop.shape) <= 256
    third = (crop.shape[1] - 8) // 3
    assert (crop[:, :third] == crop[:, third + 4 : 2 * third + 4]).all()
    assert (crop[:, 2 * third + 8 :] == round(0.54 * 255)).sum() == 16 * (third // 30) ** 2  # all of it


def test_targets_beyond_0_and_1_set_the_scale():
    target = torch.linspace(-3, 5, 16 * 24).reshape(1, 16, 24)
    _, panels = shown(sample(target, target, target))
    assert (panels["before"].min(), panels["before"].max()) == (0, 255)
    assert "difference × 1" in panels


@pytest.mark.parametrize(
    ("difference", "factor"), [(0.0, 1), (1.5, 1), (0.6, 1), (0.5, 2), (0.21, 2), (0.04, 20), (0.0011, 500)]
)
def test_amplification_is_a_round_number_that_keeps_the_range(difference, factor):
    assert amplification(difference, 1.0) == factor


def test_panels_are_small():
    large = torch.rand(1, 3, 400, 1000)
    for each in gallery(ChangedSamples((sample(large, large, large, large),))).samples[0][1]:
        assert max(pixels(each.url).shape) <= 256
        assert (each.width, each.height) == pixels(each.url).shape[1::-1]


# Boxes --------------------------------------------------------------------------------------------


def found(*boxes):
    """Boxes with a label and a score."""
    return [
        {
            "boxes": torch.tensor([box for box, _, _ in boxes]).reshape(-1, 4).float(),
            "labels": torch.tensor([label for _, label, _ in boxes]),
            "scores": torch.tensor([score for _, _, score in boxes]).float(),
        }
    ]


def test_boxes():
    one, other, false = (8, 8, 40, 40), (48, 16, 60, 56), (2, 44, 20, 60)
    target = found((one, 0, 1), (other, 1, 1))
    before = found((one, 0, 0.9), (other, 1, 0.6), (false, 1, 0.3))
    after = found((one, 0, 0.7), (other, 1, 0.5), (false, 1, 0.65))
    image = torch.zeros(1, 1, 64, 64)
    legend, panels = shown(sample(target, before, after, image))
    assert "Boxes of a score of 0.60 or more are drawn" in legend
    assert [*panels] == ["label", "before", "after"]
    coloured = {name: panel.max(2) > 0 for name, panel in panels.items()}
    assert coloured["label"].shape == (256, 256)

    def drawn(name, box):
        left, top, right, bottom = (4 * edge for edge in box)
        return coloured[name][top, left] and coloured[name][bottom, right]

    assert (coloured["before"] == coloured["label"]).all()  # what is below the score is left out
    assert drawn("after", one)
    assert drawn("after", false)
    assert not drawn("after", other)
    colours = panels["label"][4 * 8, 4 * 8], panels["label"][4 * 16, 4 * 48]
    assert (colours[0] != colours[1]).any()  # two classes


def test_images_without_boxes():
    nothing = found()
    legend, panels = shown(sample(nothing, nothing, nothing, torch.zeros(1, 1, 64, 64)))
    assert not any(panel.any() for panel in panels.values())
    assert "0.00" in legend
