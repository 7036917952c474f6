"""Divergences against scipy's and against ones known beforehand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, rel_entr, softmax
from torch import nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.divergence import (
    Kind,
    OutputComparison,
    Yardstick,
    is_logits,
    outputs,
    relative_error,
    yardstick_of,
)
from sepconvert.network.tensors import InputBatch

KL = Yardstick((Kind("kl"),))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensors(rng, *shape):
    return [torch.from_numpy(rng.standard_normal(shape)) for _ in range(2)]


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2, 6), (3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_by_the_kullback_leibler_divergence(rng, shape, temperature):
    expected, actual = tensors(rng, *shape)
    wanted, given = (softmax(t.numpy() / temperature, axis=1) for t in (expected, actual))
    oracle = temperature**2 * rel_entr(wanted, given).sum(axis=1).mean()
    assert float(KL.scaled([expected], [actual], temperature)) == pytest.approx(oracle)
    assert float(KL.scaled([actual], [expected], temperature)) != pytest.approx(oracle)
    shifted = expected + torch.rand(shape[0], *[1] * (len(shape) - 1))
    assert float(KL.scaled([expected], [shifted], temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("of", ["probabilities", "logarithms"])
def test_probabilities_are_not_normalised_again(rng, of, temperature):
    expected, actual = tensors(rng, 6, 2, 5)  # time, samples, classes
    wanted, given = (softmax(t.numpy() / temperature, axis=2) for t in (expected, actual))
    oracle = temperature**2 * rel_entr(wanted, given).sum(axis=2).mean()
    yardstick = Yardstick((Kind("kl", 2, of == "probabilities", 3),))
    as_returned = [t.softmax(2) if of == "probabilities" else t.log_softmax(2) for t in (expected, actual)]
    found = yardstick.scaled([as_returned[0]], [as_returned[1]], temperature)
    assert float(found) == pytest.approx(oracle)


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sigmoids_by_the_bernoulli_divergence_of_each_value(rng, probabilities, temperature):
    expected, actual = tensors(rng, 4, 3, 5, 5)
    p, q = (expit(t.numpy() / temperature) for t in (expected, actual))
    oracle = temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
    yardstick = Yardstick((Kind("bernoulli", probabilities=probabilities),))
    given = [t.sigmoid() if probabilities else t for t in (expected, actual)]
    assert float(yardstick.scaled(given[:1], given[1:], temperature)) == pytest.approx(oracle)


def test_saturated_probabilities_diverge_by_finite_numbers():
    for kind in (Kind("bernoulli", probabilities=True), Kind("kl", probabilities=True)):
        certain, wrong = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]], requires_grad=True)
        found = Yardstick((kind,)).divergence([certain], [wrong])
        assert 10 < found.item() < 100
        assert float(Yardstick((kind,)).divergence([certain], [certain])) == 0


@pytest.mark.parametrize("shapes", [[(5, 1)], [(5,)], [(5, 3, 4, 4)], [(5, 7), (5, 7)], [(5, 7, 3)]])
def test_errors_relative_to_the_variance(rng, shapes):
    expected = [tensors(rng, *shape)[0] for shape in shapes]
    mean = [torch.full_like(t, float(t.mean())) for t in expected]
    yardstick = Yardstick((Kind("relative"),) * len(shapes))
    assert float(yardstick.divergence(expected, expected)) == 0
    assert float(yardstick.divergence(expected, mean)) == pytest.approx(1)
    halfway = [(e + m) / 2 for e, m in zip(expected, mean, strict=True)]
    assert float(yardstick.scaled(expected, halfway, temperature=3)) == pytest.approx(1 / 4)


def test_pictures_by_the_squared_error_in_their_units(rng):
    expected, actual = (10 * t for t in tensors(rng, 4, 3, 6, 6))
    squares = float(np.square(expected.numpy() - actual.numpy()).mean())
    yardstick = Yardstick((Kind("squared"),))
    assert float(yardstick.divergence([expected], [actual])) == pytest.approx(squares)
    assert yardstick.unit == 1
    parts = yardstick.measured_on([[expected[:3]], [expected[3:]]])
    assert parts.unit == pytest.approx(float(expected.numpy().var()))
    assert float(parts.divergence([expected], [actual])) == pytest.approx(squares)
    assert float(parts.scaled([expected], [actual])) == pytest.approx(squares / parts.unit)


def test_several_outputs_count_alike(rng):
    """However large the numbers of one are, and however small the variance in a batch."""
    logits, picture = tensors(rng, 6, 5), [1000 * t for t in tensors(rng, 6, 1, 8, 8)]
    expected, actual = zip(logits, picture, strict=True)
    apart = [
        float(KL.divergence(*([t] for t in logits))),
        float(np.square(picture[0].numpy() - picture[1].numpy()).mean() / picture[0].numpy().var()),
    ]
    yardstick = Yardstick((Kind("kl"), Kind("squared")))
    assert float(yardstick.divergence(expected, actual)) == pytest.approx(np.mean(apart))
    known = yardstick.measured_on([[logits[0], 2 * picture[0]]])
    assert float(known.divergence(expected, actual)) == pytest.approx((apart[0] + apart[1] / 4) / 2)
    assert known.unit == 1


def test_a_constant_output_is_compared_as_it_is():
    assert float(relative_error(torch.ones(4, 1), torch.full((4, 1), 3.0))) == 4
    yardstick = Yardstick((Kind("squared"),)).measured_on([[torch.ones(4, 1, 2, 2)]])
    assert yardstick.variances == (1.0,)


@pytest.mark.parametrize(
    ("shape", "logits"),
    [((5, 2), True), ((5, 1), False), ((5,), False), ((), False), ((5, 3, 2, 2), False),
     ((5, 1, 2, 2), False), ((5, 2, 2, 2), True), ((5, 21, 2, 2), True), ((5, 4, 2), False)],
)  # fmt: skip
def test_what_counts_as_logits(shape, logits):
    assert is_logits(torch.zeros(shape)) == logits


def test_half_precision_is_computed_in_float32(rng):
    expected, actual = (t.half() for t in tensors(rng, 50, 10))
    exact = KL.divergence([expected.double()], [actual.double()])
    assert KL.divergence([expected], [actual]).dtype == torch.float32
    assert float(KL.divergence([expected], [actual])) == pytest.approx(float(exact), rel=1e-5)


def test_it_is_differentiable(rng):
    expected, actual = tensors(rng, 4, 5)
    actual.requires_grad_()
    torch.autograd.backward(KL.divergence([expected], [actual]))
    oracle = (actual.softmax(1) - expected.softmax(1)) / 4
    torch.testing.assert_close(actual.grad, oracle.detach())


@pytest.mark.parametrize("actual", [[], [torch.zeros(4, 6)], [torch.zeros(4, 5)] * 2])
def test_outputs_that_do_not_match_are_named(actual):
    with pytest.raises(SepconvertError, match="outputs: expected 1 floating-point tensors of the shapes"):
        KL.divergence([torch.zeros(4, 5)], actual)


# What the kind of an output is told by


class Ending(nn.Module):
    """A convolution of `channels` with something at its end."""

    def __init__(self, channels, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, channels, 3), end

    def forward(self, x):
        return self.end(self.conv(x))


def kinds(channels, end, *asked, **options):
    torch.manual_seed(0)
    model = Ending(channels, end).eval().requires_grad_(False)
    return yardstick_of(model, InputBatch((torch.randn(2, 3, 8, 8),)), *asked, **options).kinds


def pooled(y):
    return y.mean((2, 3))


def steps(y):  # the columns as a sequence: time, samples, classes
    return y.mean(2).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("channels", "end", "kind"),
    [
        (5, pooled, Kind("kl")),
        (5, lambda y: y, Kind("kl", ndim=4)),
        (5, lambda y: pooled(y).softmax(1), Kind("kl", 1, True)),
        (5, lambda y: F.interpolate(y.log_softmax(1), scale_factor=2), Kind("kl", 1, False, 4)),
        (5, lambda y: steps(y).log_softmax(2), Kind("kl", 2, False, 3)),
        (5, lambda y: steps(y).softmax(2).transpose(0, 1), Kind("kl", 2, True, 3)),
        (5, lambda y: y.movedim(1, -1).softmax(-1).movedim(-1, 1), Kind("kl", 1, True, 4)),
        (5, steps, Kind("relative", ndim=3)),
        (5, lambda y: y.softmax(1)[:, 1:], Kind("relative", ndim=4)),
        (1, lambda y: y.sigmoid(), Kind("bernoulli", 1, True, 4)),
        (6, lambda y: torch.cat([part.flatten(2).sigmoid() for part in y.split(2, 1)], 2),
         Kind("bernoulli", 1, True, 3)),
        (6, lambda y: torch.cat([y[:, :2].sigmoid(), y[:, 2:]], 1).flatten(2), Kind("relative", ndim=3)),
        (6, lambda y: (y * y.sigmoid()).flatten(2), Kind("relative", ndim=3)),
        (1, lambda y: y, Kind("squared", ndim=4)),
        (3, lambda y: y.softmax(1)[:, :1].expand(-1, 3, -1, -1) + y, Kind("squared", ndim=4)),
        (1, pooled, Kind("relative")),
        (3, lambda y: y.mean((1, 2, 3)), Kind("relative", ndim=1)),
    ],
)  # fmt: skip
def test_operator_and_shape_tell_the_kind(channels, end, kind):
    assert kinds(channels, end) == (kind,)


def test_shapes_alone_where_there_is_no_graph():
    def without_graph(end):
        with torch.inference_mode():
            return lambda y: torch.from_numpy(end(y).detach().numpy())

    assert kinds(5, without_graph(lambda y: y)) == (Kind("kl", ndim=4),)
    assert kinds(1, without_graph(torch.sigmoid)) == (Kind("squared", ndim=4),)


def test_targets_of_the_metric_tell_what_shapes_cannot():
    assert kinds(1, lambda y: y, targets="classes") == (Kind("bernoulli", ndim=4),)
    assert kinds(1, pooled, targets="classes") == (Kind("bernoulli"),)
    assert kinds(3, lambda y: y, targets="classes") == (Kind("kl", ndim=4),)
    assert kinds(3, lambda y: y) == (Kind("squared", ndim=4),)
    # Four numbers are a box beside scores of classes, and classes where there are no others.
    beside = lambda y: (y.sigmoid(), y)  # noqa: E731
    assert [each.name for each in kinds(4, beside, targets="classes")] == ["bernoulli", "relative"]
    assert [
        each.name for each in kinds(4, lambda y: (y, y[:, :2].mean((2, 3)).relu()), targets="classes")
    ] == [
        "kl",
        "relative",
    ]
    assert kinds(3, torch.sigmoid, targets="pictures") == (Kind("squared", ndim=4),)
    assert kinds(17, lambda y: y, targets="pictures") == (Kind("relative", ndim=4),)
    assert kinds(5, pooled, targets="classes") == (Kind("kl"),)


def test_of_several_outputs_each_has_its_own():
    def heads(y):
        rows = pooled(y)
        return {
            "classes": rows, "box": rows[:, :4], "mask": y[:, :1].sigmoid(), "picture": y[:, :3],
            "embedding": rows.relu(), "count": torch.zeros(2, dtype=torch.int64),
        }  # fmt: skip

    names = [kind.name for kind in kinds(6, heads)]
    assert names == ["kl", "relative", "bernoulli", "squared", "relative"]


@pytest.mark.parametrize(
    ("asked", "channels", "end", "kind"),
    [
        ("relative", 5, pooled, Kind("relative")),
        ("squared", 5, pooled, Kind("squared")),
        ("kl", 3, lambda y: y, Kind("kl", ndim=4)),
        ("kl", 5, steps, Kind("kl", 2, ndim=3)),
        ("kl", 5, lambda y: steps(y).softmax(2), Kind("kl", 2, True, 3)),
        ("bernoulli", 1, lambda y: y, Kind("bernoulli", ndim=4)),
        ("bernoulli", 5, lambda y: pooled(y).softmax(1), Kind("bernoulli", 1, True)),
    ],
)
def test_the_user_may_say_it(asked, channels, end, kind):
    assert kinds(channels, end, asked) == (kind,)


def test_no_classes_to_compare():
    with pytest.raises(SepconvertError, match=r"`divergence` kl: expected outputs over classes.*\(1, 1\)"):
        kinds(1, pooled, "kl")


def test_nothing_to_compare_is_named():
    with pytest.raises(SepconvertError, match="outputs: expected a floating-point tensor, got none"):
        kinds(1, lambda y: y > 0)


class Named(nn.Module):
    def forward(self, x):
        return {"mask": x > 0, "values": (x, x.sum())}


def test_outputs_are_the_floating_point_tensors():
    x = torch.ones(2, 3)
    first, second = outputs(Named(), InputBatch((x,)))
    assert torch.equal(first, x)
    assert second == 6


def test_inputs_that_a_model_does_not_take_are_named():
    with pytest.raises(SepconvertError, match=r"shape \(3, 5\), on which it fails with RuntimeError"):
        outputs(nn.Linear(6, 4), InputBatch((torch.zeros(3, 5),)))


# Differences of outputs in numpy


def compared(*pairs):
    found = OutputComparison()
    for base, other in pairs:
        found.add(np.asarray(base), np.asarray(other))
    return found.result()


def test_by_hand():
    found = compared(([[3.0, 4.0]], [[3.0, 1.0]]))
    assert (found.max_abs, found.mean_abs, found.relative) == (3, 1.5, 0.6)
    assert found.cosine == pytest.approx(13 / (5 * math.sqrt(10)))
    assert found.snr_db == pytest.approx(10 * math.log10(25 / 9))
    assert found.agreement == 0


@given(st.integers(1, 5), st.integers(0, 2**20))
def test_batches_make_no_difference(parts, seed):
    rng = np.random.default_rng(seed)
    base, other = rng.standard_normal((2, 12, 4)).astype(np.float32)
    whole = compared((base, other))
    found = compared(*zip(np.array_split(base, parts), np.array_split(other, parts), strict=True))
    assert found.to_dict() == pytest.approx(whole.to_dict())
    difference = np.linalg.norm((base - other).astype(float)) / np.linalg.norm(base.astype(float))
    assert found.relative == pytest.approx(difference, rel=1e-5)
    assert found.agreement == np.mean(base.argmax(1) == other.argmax(1))


def test_equal_outputs_have_no_noise():
    x = np.ones((2, 3, 4, 4), np.float16)
    found = compared((x, x))
    assert (found.max_abs, found.mean_abs, found.relative) == (0, 0, 0)
    assert found.cosine == pytest.approx(1)
    assert (found.snr_db, found.agreement) == (None, None)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_not_small(odd):
    found = compared(([[1.0, 2.0]], [[1.0, odd]]), ([[1.0, 2.0]], [[1.0, 2.0]]))
    assert (found.max_abs, found.mean_abs, found.relative) == (None, None, None)


def test_zeros():
    found = compared(([[0.0, 0.0]], [[0.0, 0.0]]))
    assert (found.max_abs, found.relative, found.cosine) == (0, None, None)
