"""Memory of a forward pass, counted by hand."""

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sepconvert.calibration import footprint as module
from sepconvert.calibration.footprint import allowance, footprint, images_at_once
from sepconvert.network.tensors import InputBatch


class Branches(nn.Module):
    """Holds what it is given while it computes the other summand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


IMAGE = torch.zeros(1, 2, 10, 10)
SIZE = 10 * 10 * 4  # bytes of one channel


def test_what_is_alive_at_once_and_at_each_convolution():
    found = footprint(Branches(), (IMAGE,))
    # The input, what the first convolution returned and what ReLU makes of it.
    assert found.peak == (2 + 8 + 8) * SIZE
    assert found.total == (2 + 8 + 8 + 2 + 2) * SIZE
    assert found.held == {("first", 0): 2 * SIZE, ("second", 0): (2 + 8) * SIZE}
    assert footprint(Branches(), (IMAGE.repeat(3, 1, 1, 1),)).peak == 3 * found.peak


def test_batches_are_cut_to_what_they_take(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 5 * 18 * SIZE)
    assert images_at_once(Branches(), InputBatch((IMAGE.repeat(4, 1, 1, 1),)), 64) == 5
    assert images_at_once(Branches(), InputBatch((IMAGE,)), 3) == 3
    assert footprint(Branches(), (IMAGE,)).differentiated(16) == 4
    monkeypatch.setattr(module, "AT_ONCE", 1)
    assert images_at_once(Branches(), InputBatch((IMAGE,)), 64) == 1


def test_samples_may_lie_in_the_second_dimension(monkeypatch):
    """T × N × F: a sample is all its steps, not the first step of all samples."""
    steps = torch.zeros(25, 2, 8)
    needed = footprint(nn.Linear(8, 8), (steps[:, :1],)).peak
    monkeypatch.setattr(module, "AT_ONCE", 3 * needed)
    assert images_at_once(nn.Linear(8, 8), InputBatch((steps,), 1), 64) == 3


def test_what_may_be_taken_is_what_is_not_taken_yet():
    holds = psutil.Process().memory_info().rss
    assert allowance(holds + 1e8) == pytest.approx(1e8, abs=5e7)
    assert allowance(1.0) == 0
    assert allowance(1e18) <= psutil.virtual_memory().total
    assert 0 < allowance(None) <= psutil.virtual_memory().total / 2
