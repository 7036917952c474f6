"""Factors that are tuned together on the calibration images, and for how long."""

import copy

import pytest
import torch
from conversions import apart, convert_small
from torch import nn
from torch.utils.data import DataLoader

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Calibration
from sepconvert.network.tensors import InputBatch
from sepconvert.pipeline.modes import reconstruction
from sepconvert.pipeline.modes.reconstruction import MOST_EPOCHS, extent_within
from sepconvert.report.text.tables import summary


@pytest.mark.parametrize(
    ("seconds", "images", "epochs"),
    [(0.0, 1, 1), (0.5, 2, 1), (25.0, 100, 1), (60.0, 100, 2), (1e6, 100, MOST_EPOCHS)],
)
def test_images_come_first_and_then_passes_over_them(monkeypatch, seconds, images, epochs):
    monkeypatch.setattr(reconstruction, "_seconds", lambda model, images: 0.05 * len(images))
    net, batches = nn.Conv2d(3, 4, 3), [InputBatch((torch.rand(50, 3, 8, 8),))] * 2
    extent = extent_within(seconds, net, net, batches)
    assert (extent.images, extent.epochs) == (images, epochs)


def test_a_step_has_fewer_images_where_they_are_large(monkeypatch):
    monkeypatch.setattr(reconstruction, "_MEMORY", 10 * 4 * (3 * 8 * 8 + 4 * 6 * 6))  # ten images and outputs
    net, batches = nn.Conv2d(3, 4, 3), [InputBatch((torch.rand(50, 3, 8, 8),))]
    assert extent_within(1.0, net, net, batches).batch == 10


def test_reconstruction_brings_a_plan_nearer_to_the_original(small):
    report = convert_small(small, target_macs=0.5, reconstruct=20).report
    found = report["approximation"]
    *_, before, step = found["steps"]
    assert (step["kind"], step["name"], step["kept"]) == ("reconstruction", "reconstruct", True)
    assert step["divergence"] < 0.9 * before["divergence"]
    history = found["reconstruction"]["history"]
    assert 2 <= len(history) <= 11
    losses = [each["heldout_loss"] for each in history]
    assert found["reconstruction"]["delivered"]["heldout_loss"] == min(losses) < losses[0]
    assert found["reconstruction"]["attempts"] == []
    assert found["finetune"] is None


def test_reconstruction_goes_further_within_a_drop(small):
    data = apart(small[1])[1]
    report = convert_small(small, max_drop=2.0, data=data, reconstruct=20).report
    attempts = report["approximation"]["reconstruction"]["attempts"]
    assert 1 <= len(attempts) <= 2
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 2.0
    text = " ".join(summary(report).split())
    assert text.count("Reconstruction changed a plan's drop from ") == len(attempts)


SHORTLY = Calibration(reconstruct=5)


@pytest.mark.parametrize("images", [0, 3])
def test_without_images_to_tune_on_and_to_judge_by_nothing_is_tuned(small, images):
    x = small[1].dataset.tensors[0]
    calib = DataLoader(x[:images], 3) if images else None
    with pytest.raises(SepconvertError, match="`reconstruct`: needs images to tune on, and others to judge"):
        sepconvert.convert(
            small[0],
            x[:1],
            "approx",
            calib=calib,
            rank=1,
            calibration=SHORTLY,
            check="torch",
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "exact"}, "is for the modes approx and auto"),
        ({"mode": "auto", "finetune": 1}, "tunes factors as fine-tuning does"),
        ({"mode": "auto", "int8": True}, "tunes factors in floating point"),
        ({"mode": "auto", "max_drop": 1.0, "confidence": 0.95}, "tunes plans that `confidence` proves"),
    ],
)
def test_where_factors_are_not_tuned_the_option_is_refused(small, options, reason):
    with pytest.raises(SepconvertError, match=f"`reconstruct`: {reason}"):
        sepconvert.convert(small[0], small[1].dataset[0][0][None], **options, calibration=SHORTLY)


class Watched(nn.Module):
    """A network that computes as the other one does, but without gradients."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.no_grad():
            return self.net(x)


def test_a_model_that_computes_without_gradients_is_refused(small):
    with pytest.raises(SepconvertError, match="depend on its parameters by gradients, got none"):
        convert_small((Watched(small[0]), small[1]), target_macs=0.5, reconstruct=5)


def test_a_frozen_model_is_tuned_and_frozen_again(small):
    frozen = copy.deepcopy(small[0]).requires_grad_(False)
    found = convert_small((frozen, small[1]), target_macs=0.5, reconstruct=20)
    assert found.report["approximation"]["reconstruction"]["delivered"]["epoch"] > 0
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
