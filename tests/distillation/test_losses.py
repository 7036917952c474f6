"""Losses by hand."""

import pytest
import torch
from torch import nn

from sepconvert.distillation.losses import (
    EMBEDDING_WEIGHT,
    embedding_loss,
    feature_loss,
    holding_labels,
    label_loss,
)
from sepconvert.files.data import UNLABELLED


class BrighterHalf(nn.Module):
    """Two logits: how bright the left and the right half are; or the brighter and the darker one, as pictures
    and their mirror images have them alike."""

    def __init__(self, alike):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.alike = alike

    def forward(self, x):
        halves = torch.stack([half.mean(dim=(1, 2, 3)) for half in x.chunk(2, dim=3)], 1)
        return self.scale * (halves.sort(1).values if self.alike else halves)


@pytest.mark.parametrize("alike", [True, False])
def test_mirrored_pictures_keep_the_labels_that_the_teacher_gives_them(alike):
    teacher = BrighterHalf(alike)
    x = torch.zeros(40, 3, 8, 8)
    x[:20, ..., :4] = x[20:, ..., 4:] = 1
    labels = teacher(x).argmax(1)
    mirrored = torch.arange(40) % 3 == 0
    seen = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    found = holding_labels(labels, mirrored, teacher(seen))
    assert torch.equal(found, labels if alike else labels.where(~mirrored, UNLABELLED))


def test_unlabelled_samples_have_no_label_loss():
    logits, labels = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 2, -1, 1, -1]),
    )
    known = labels != UNLABELLED
    oracle = -logits.log_softmax(1)[known, labels[known]].sum()
    torch.testing.assert_close(label_loss([logits], labels), oracle)


def test_the_embedding_counts_relative_to_its_variance():
    expected, actual = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert float(embedding_loss(expected, actual, torch.tensor(8.0))) == EMBEDDING_WEIGHT * 4 / 8


def test_features_are_a_mean_over_layers():
    expected = {
        "near": torch.tensor([[-1.0, 1.0]]),
        "far": torch.tensor([[-10.0, 10.0]]),
    }  # variances 1 and 100
    actual = {"near": torch.tensor([[-1.0, 2.0]]), "far": torch.tensor([[0.0, 10.0]])}
    assert float(feature_loss(expected, actual)) == pytest.approx((0.5 / 1 + 50 / 100) / 2)
