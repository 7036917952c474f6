"""Tasks other than classification from end to end: what a small network answers is what it is scored by."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sepconvert import Task, Timing, convert
from sepconvert.base.errors import SepconvertError

UNTIMED = Timing(runs=0)


def blocks(number, height, width, cell, seed=0):
    """Pictures of cells of different brightness, with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 1, height // cell, width // cell, generator=generator)
    noise = torch.rand(number, 1, height, width, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=cell) + 0.3 * noise


def spread(head, logits, axes):
    """Shift and scale a last layer so that its outputs differ, for features that give these now."""
    mean, deviation = logits.mean(axes), logits.std(axes)
    shape = (-1,) + (1,) * (head.weight.ndim - 1)
    head.weight.data *= (3 / deviation).reshape(shape)
    head.bias.data = 3 / deviation * (head.bias.data - mean)


class Answers(Dataset):
    """Pictures, and what a function says of them."""

    def __init__(self, pictures, targets):
        self.pictures, self.targets = pictures, targets

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index], self.targets[index]


def layers(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(part for pair in pairs for part in (nn.Conv2d(*pair, 3, padding=1), nn.ReLU())))


class Recurrent(nn.Module):
    """A time-major recogniser: N pictures to T × N × K log-probabilities."""

    def __init__(self):
        super().__init__()
        self.features, self.pooled = layers(1, 12, 16), nn.AdaptiveAvgPool2d((1, None))
        self.lstm, self.head = nn.LSTM(16, 12), nn.Linear(12, 6)

    def forward(self, x):
        steps = self.pooled(self.features(x)).squeeze(2).permute(2, 0, 1)
        return self.head(self.lstm(steps)[0]).log_softmax(2)


def texts(outputs):
    """One letter for each step, blanks and repetitions left out: N strings."""
    found = []
    for row in outputs.argmax(2).T.tolist():
        kept = [each for each, before in zip(row, [0, *row], strict=False) if each and each != before]
        found.append("".join("?abcde"[each] for each in kept))
    return found


class Detector(nn.Module):
    """Scores of three classes and a box for each cell of a grid."""

    def __init__(self):
        super().__init__()
        self.features = layers(1, 12, 16, 16)
        self.scores, self.boxes = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        grid = nn.functional.avg_pool2d(self.features(x), 8)
        return {"scores": self.scores(grid).sigmoid(), "boxes": self.boxes(grid)}


def decoded(outputs):
    """Boxes around the cells of an 8 × 8 grid: a mapping for each picture."""
    scores, boxes = outputs["scores"].flatten(2), outputs["boxes"].flatten(2)
    side = math.isqrt(scores.shape[2])
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = 8.0 * torch.stack([columns, rows]).flatten(1) + 4
    found = []
    for score, box in zip(scores, boxes, strict=True):
        middle, size = centres + 4 * box[:2].tanh(), 8 + 8 * box[2:].tanh()
        corners = torch.cat([middle - size / 2, middle + size / 2]).T
        best, labels = score.max(0)
        found.append({"boxes": corners, "scores": best, "labels": labels})
    return found


@pytest.fixture(scope="module")
def recogniser():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Recurrent().eval()
    pictures = blocks(60, 8, 24, 4)
    with torch.no_grad():
        steps = model.pooled(model.features(pictures)).squeeze(2).permute(2, 0, 1)
        spread(model.head, model.head(model.lstm(steps)[0]), (0, 1))
        return model, pictures, texts(model(pictures))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["approx", "auto"])
def test_a_time_major_recogniser(recogniser, mode):
    model, pictures, wanted = recogniser
    assert len(set(wanted)) > 20
    data = DataLoader(Answers(pictures, wanted), 16)  # strings are collated as tuples
    calib = DataLoader(blocks(60, 8, 24, 4, seed=1), 20)
    result = convert(
        model, pictures[:1], mode, data=data, calib=calib, metric=Task("cer", postprocess=texts),
        gate="none" if mode == "approx" else "macs", timing=UNTIMED,
        **({"rank": 2} if mode == "approx" else {"target_macs": 0.7}),
    )  # fmt: skip
    metric = result.report["delta"]["metric"]
    assert (metric["name"], metric["unit"], metric["original"], metric["n"]) == ("cer", "pp", 0.0, 60)
    with torch.no_grad():
        now = texts(result.model(pictures))
    assert now != wanted
    assert 0 < metric["converted"] == pytest.approx(metric["drop"])
    assert result.report["approximation"]["divergence"] == ["kl"]
    assert any(layer["decision"] == "converted" for layer in result.report["layers"])


@pytest.fixture(scope="module")
def detector():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Detector().eval()
    pictures = blocks(40, 32, 32, 8)
    with torch.no_grad():
        outputs = model(pictures)
        spread(model.scores, outputs["scores"].logit(), (0, 2, 3))
        spread(model.boxes, outputs["boxes"], (0, 2, 3))
        found = decoded(model(pictures))
    targets = [{key: image[key][image["scores"] > 0.9] for key in ("boxes", "labels")} for image in found]
    return model, pictures, targets


def stacked(batch):
    return torch.stack([picture for picture, _ in batch]), [target for _, target in batch]


@pytest.mark.slow
def test_a_detector_with_sigmoid_heads(detector, tmp_path):
    model, pictures, targets = detector
    data = DataLoader(Answers(pictures, targets), 8, collate_fn=stacked)
    result = convert(
        model, pictures[:1], "approx", data=data, calib=DataLoader(blocks(50, 32, 32, 8, seed=1), 10),
        metric=Task("map", postprocess=decoded), rank=1, gate="none", timing=UNTIMED, finetune=1,
        out=tmp_path / "out",
    )  # fmt: skip
    metric = result.report["delta"]["metric"]
    assert metric["original"] > 95  # found at every threshold, but for boxes below the score of 0.9
    assert metric["converted"] < metric["original"]
    low, high = metric["ci95"]
    assert low < metric["drop"] < high
    assert result.report["approximation"]["divergence"] == ["bernoulli", "relative"]
    assert "map" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_outputs_that_are_not_decoded(detector):
    model, pictures, targets = detector
    data = DataLoader(Answers(pictures, targets), 8, collate_fn=stacked)
    with pytest.raises(SepconvertError, match=r"`metric` map: expected outputs as a list .* `postprocess`"):
        convert(model, pictures[:1], "auto", data=data, metric="map", max_drop=1, timing=UNTIMED)
