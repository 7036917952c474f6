"""Divergence and labels of held-out images."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.split import split_data


def test_labels_of_images_held_out_count(samples):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(27, 5)) for _ in range(2))
    x, y = torch.randn(9, 3, 3, 3), torch.tensor([0, 1, 2, 3, 4, -1, -1, 0, 7])  # 7 is none of the classes
    parts = ([x[:4], x[4:]], [y[:4], y[4:]])
    found = Heldout(model, *parts).measure(other)
    known = [0, 1, 2, 3, 4, 7]
    with torch.no_grad():
        logits = other(x)
        expected = nn.functional.cross_entropy(logits[known], y[known])
    assert found.label_loss == pytest.approx(float(expected), rel=1e-5)
    assert found.accuracy == float((logits[known].argmax(1) == y[known]).double().mean())
    without = Heldout(model, parts[0]).measure(other)
    assert (without.accuracy, without.label_loss) == (None, None)
    assert without.divergence == found.divergence == without.loss
    assert found.loss == found.divergence + found.label_loss
    # And they come from where the images come from.
    parts = split_data(None, DataLoader(TensorDataset(*samples), batch_size=7), None, 100, 0, seed=0)
    seen = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*samples, strict=True)}
    for images, labels in zip(parts.calibration.heldout, parts.calibration.labels, strict=True):
        assert [seen[tuple(image.flatten().tolist())] for image in images] == labels.tolist()
