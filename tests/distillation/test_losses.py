"""Losses by hand."""

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Task
from sepconvert.distillation.losses import (
    EMBEDDING_WEIGHT,
    TaskLoss,
    embedding_loss,
    feature_loss,
    holding_labels,
    label_loss,
)
from sepconvert.files.data import UNLABELLED
from sepconvert.measure.divergence import Kind
from sepconvert.network.tensors import InputBatch


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
    torch.testing.assert_close(label_loss(Kind("kl"), [logits], labels), oracle)
    probabilities = Kind("kl", probabilities=True)
    torch.testing.assert_close(label_loss(probabilities, [logits.softmax(1)], labels), oracle)


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


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return {"sums": self.last(x), "twice": 2 * x}


SAMPLES = InputBatch((torch.ones(2, 3),))


def test_the_users_loss_is_given_the_output_that_is_chosen():
    targets = torch.zeros(2, 3)
    model = Heads()
    found = TaskLoss.of(Task(loss=nn.functional.mse_loss, output="twice"))
    assert found(model(*SAMPLES.inputs), targets).item() == 4
    found = TaskLoss.of(Task(loss=lambda returned, y: (returned["sums"].sum() - y.sum()).square()))
    expected = model.last(SAMPLES.inputs[0]).sum().item() ** 2
    assert found(model(*SAMPLES.inputs), targets).item() == pytest.approx(expected)
    found.check(model, SAMPLES, targets)
    assert model.last.weight.grad is None
    assert TaskLoss.of(Task()) is None


def test_the_users_loss_may_be_in_a_file(tmp_path):
    (tmp_path / "own_loss.py").write_text("def apart(outputs, y):\n    return (outputs - y).abs().mean()\n")
    found = TaskLoss.of(Task(loss=f"{tmp_path / 'own_loss.py'}:apart"))
    assert float(found(torch.ones(2, 3), torch.zeros(2, 3))) == 1
    with pytest.raises(SepconvertError, match=r"`loss`.*defines no 'missing'"):
        TaskLoss.of(Task(loss=f"{tmp_path / 'own_loss.py'}:missing"))


def of_nothing(returned, targets):
    return torch.zeros(())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda returned, y: returned["sums"] - y, r"`loss`: failed with RuntimeError.*outputs \(dict\) and"
         r" the targets \(float32 of shape \(2, 5\)\)"),
        (lambda returned, y: returned["sums"], "`loss`: expected a tensor with one number.* float32 of"),
        (lambda returned, y: 1.0, "`loss`: expected a tensor with one number.* got float"),
        (lambda returned, y: returned["sums"].sum() / 0, "`loss`: expected a finite number"),
        (of_nothing, "`loss`: expected a loss that depends on the outputs"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_trained_by_is_named(function, message):
    with pytest.raises(SepconvertError, match=message) as caught:
        TaskLoss.of(Task(loss=function)).check(Heads(), SAMPLES, torch.zeros(2, 5))
    assert "\n" not in str(caught.value)
