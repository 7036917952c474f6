"""Divergence and labels of held-out images."""

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.heldout import Heldout

X = torch.randn(9, 3, 3, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, -1, -1, 0, 7])  # 7 is none of the classes
BATCHES, LABELS = [X[:4], X[4:]], [Y[:4], Y[4:]]


def classifier(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(), nn.Linear(9, 5)).eval()


def test_labels_of_held_out_images_count():
    model, other = classifier(0), classifier(1)
    found = Heldout(model, BATCHES, LABELS).measure(other)
    known = [0, 1, 2, 3, 4, 7]
    with torch.no_grad():
        logits = other(X)
        expected = nn.functional.cross_entropy(logits[known], Y[known])
    assert found.label_loss == pytest.approx(float(expected), rel=1e-5)
    assert found.accuracy == float((logits[known].argmax(1) == Y[known]).double().mean())
    without = Heldout(model, BATCHES).measure(other)
    assert (without.accuracy, without.label_loss) == (None, None)
    assert without.divergence == found.divergence == without.loss
    assert found.loss == found.divergence + found.label_loss


def test_divergence_is_that_of_the_predicted_distributions():
    model, other = classifier(0), classifier(1)
    with torch.no_grad():
        p, q = (each(X).double().log_softmax(1) for each in (model, other))
    found = Heldout(model, BATCHES).measure(other)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    assert found.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert Heldout(model, BATCHES).measure(model).loss == 0


def test_the_first_images_alone():
    model, other = classifier(0), classifier(1)
    found = Heldout(model, BATCHES, LABELS).first(6)
    assert [len(batch) for batch in found.batches] == [4, 2]
    expected = Heldout(model, [X[:6]], [Y[:6]]).measure(other)
    assert found.measure(other).loss == pytest.approx(expected.loss, rel=1e-6)


def test_kernels_take_the_place_of_a_layer_s():
    model, other = classifier(0), classifier(1)
    both = nn.Sequential(other[0], *model[1:])
    kernel = other[0].weight.detach().double(), other[0].bias.detach().double()
    heldout = Heldout(model, BATCHES)
    assert heldout.measure(model, {("0", 0): kernel}).divergence == pytest.approx(
        heldout.measure(both).divergence, rel=1e-6
    )


def test_an_original_with_outputs_that_are_not_finite():
    model = classifier(0)
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    with pytest.raises(SepconvertError, match="the model's outputs hold NaN or Inf"):
        Heldout(model, BATCHES).measure(model)
