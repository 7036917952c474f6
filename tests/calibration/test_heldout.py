"""Divergence and labels of held-out images."""

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.heldout import Heldout
from sepconvert.measure.divergence import Kind, Yardstick
from sepconvert.network.tensors import InputBatch

X = torch.randn(9, 3, 3, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, -1, -1, 0, 7])  # 7 is none of the classes
BATCHES, LABELS = [InputBatch((X[:4],)), InputBatch((X[4:],))], [Y[:4], Y[4:]]


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
    expected = Heldout(model, [InputBatch((X[:6],))], [Y[:6]]).measure(other)
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


class Segmenter(nn.Module):
    """Logits of each pixel, or what else `end` makes of them."""

    def __init__(self, seed, end=lambda y: y):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.end = nn.Conv2d(3, 5, 3, padding=1), end

    def forward(self, x):
        return self.end(self.conv(x))


def test_the_share_of_equal_pixels():
    """Each pixel counts once, however the images differ in size."""
    model, other = Segmenter(0).eval(), Segmenter(1).eval()
    sizes = [X[:1], X[1:2, :, :2]]
    batches = [InputBatch((x,)) for x in sizes]
    found = Heldout(model, batches, [torch.tensor([1]), torch.tensor([2])]).measure(other)
    with torch.no_grad():
        equal = [(model(x).argmax(1) == other(x).argmax(1)).flatten() for x in sizes]
    assert found.agreement == pytest.approx(float(torch.cat(equal).double().mean()))
    assert (found.accuracy, found.label_loss) == (None, None)  # labels of images are none of their pixels
    assert 0 < found.agreement < 1


def test_labels_of_a_softmax_are_not_normalised_twice():
    model, other = classifier(0), classifier(1)
    ending = [nn.Sequential(*each, nn.Softmax(1)).eval() for each in (model, other)]
    plain = Heldout(model, BATCHES, LABELS).measure(other)
    found = Heldout(ending[0], BATCHES, LABELS).measure(ending[1])
    assert found.label_loss == pytest.approx(plain.label_loss, rel=1e-5)
    assert found.divergence == pytest.approx(plain.divergence, rel=1e-5)


def test_several_outputs_are_relative_to_the_variance_of_all_images():
    def heads(y):
        return y.mean((2, 3)), y[:, :1] * 100

    model, other = Segmenter(0, heads).eval(), Segmenter(1, heads).eval()
    found = Heldout(model, BATCHES)
    with torch.no_grad():
        (logits, picture), (others, changed) = model(X), other(X)
    kl = nn.functional.kl_div(
        others.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
    )
    errors = (picture - changed).square().mean() / picture.var(correction=0)
    assert found.measure(other).divergence == pytest.approx(float(kl + errors) / 2, rel=1e-5)
    assert found.measure(other).agreement is None
    assert found.first(4).yardstick == found.yardstick


def test_the_yardstick_may_be_another():
    model, other = classifier(0), classifier(1)
    found = Heldout(model, BATCHES, LABELS, Yardstick((Kind("squared"),))).measure(other)
    with torch.no_grad():
        assert found.divergence == pytest.approx(float((model(X) - other(X)).square().mean()), rel=1e-5)
    assert (found.agreement, found.accuracy) == (None, None)
