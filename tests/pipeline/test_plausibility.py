"""Labels, accuracy on calibration images, and ranges of values are those of the data."""

import pytest
import torch
from conversions import decided
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert import Calibration
from sepconvert.pipeline.plausibility import ValueRange
from sepconvert.report.text.risks import doubts


def test_the_range_of_values():
    values = ValueRange([torch.tensor([1.5, -2.0, torch.inf]), torch.arange(3)])
    assert values.to_json() == [-2.0, 2.0]
    assert ValueRange([torch.tensor([torch.nan])]).to_json() is None


@pytest.fixture(scope="module")
def classifier():
    """A network of three classes, and 120 images with the labels that it gives them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        x = torch.randn(120, 1, 8, 8) * torch.linspace(0.2, 3, 120)[:, None, None, None]
        model[2].bias -= model(x).median(0).values
        return model.eval(), x, model(x).argmax(1)


def test_the_report_holds_the_facts(classifier):
    model, x, y = classifier
    data = DataLoader(TensorDataset(50 * x[:40], (y[:40] + 1) % 3), 16)
    calib = DataLoader(TensorDataset(x[40:], y[40:]), 16)
    report = decided(
        model, x[:2], "approx", data=data, calib=calib, rank=1, gate="none",
        calibration=Calibration(images=80),
    ).report  # fmt: skip
    found = report["data"]
    assert found["labels"]["classes"] == 3
    assert found["calibration_accuracy"] == {"top1": 1.0, "top5": None, "n": 20}
    low, high = found["values"]["scored"]
    assert low == pytest.approx(50 * float(x[:40].min()))
    assert high == pytest.approx(50 * float(x[:40].max()))
    assert found["values"]["calibration"] == [float(x[40:].min()), float(x[40:].max())]
    assert found["values"]["example"] == [float(x[:2].min()), float(x[:2].max())]


def test_exact_mode_reports_them_too_and_nothing_without_data(classifier):
    model, x, y = classifier
    found = decided(model, x[:2], data=DataLoader(TensorDataset(x, y), 64)).report["data"]
    assert found["labels"]["chance"] == pytest.approx(float(y.bincount().max()) / 120)
    assert (found["calibration_accuracy"], found["values"]["calibration"]) == (None, None)
    assert decided(model, x[:2]).report["data"] is None


def test_images_that_are_scored_more_than_once_are_counted(classifier):
    model, x, y = classifier
    for places, repeated in (([*range(40)], 0), ([*range(40), 3, 3, 7], 3)):
        data = DataLoader(TensorDataset(x[places], y[places]), 16)
        report = sepconvert.convert(model, x[:1], data=data, timing=sepconvert.Timing(runs=0)).report
        assert report["data"]["repeated"] == repeated
        texts = [str(note) for note in doubts(report) if "equal to others" in str(note)]
        assert [text[:15] for text in texts] == (["3 scored images"] if repeated else [])
