"""Divergences against scipy's and against ones known beforehand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.divergence import OutputComparison, divergence, is_logits, outputs, relative_error


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
    assert float(divergence([expected], [actual], temperature)) == pytest.approx(oracle)
    assert float(divergence([actual], [expected], temperature)) != pytest.approx(oracle)
    shifted = expected + torch.rand(shape[0], *[1] * (len(shape) - 1))
    assert float(divergence([expected], [shifted], temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shapes", [[(5, 1)], [(5,)], [(5, 3, 4, 4)], [(5, 7), (5, 7)], [(5, 7, 3)]])
def test_anything_else_by_the_relative_error(rng, shapes):
    expected = [tensors(rng, *shape)[0] for shape in shapes]
    mean = [torch.full_like(t, float(t.mean())) for t in expected]
    assert float(divergence(expected, expected)) == 0
    assert float(divergence(expected, mean)) == pytest.approx(1)
    halfway = [(e + m) / 2 for e, m in zip(expected, mean, strict=True)]
    assert float(divergence(expected, halfway, temperature=3)) == pytest.approx(1 / 4)


def test_a_constant_output_is_compared_as_it_is():
    assert float(relative_error(torch.ones(4, 1), torch.full((4, 1), 3.0))) == 4


@pytest.mark.parametrize(
    ("shape", "logits"),
    [((5, 2), True), ((5, 1), False), ((5,), False), ((), False), ((5, 3, 2, 2), False),
     ((5, 1, 2, 2), False), ((5, 2, 2, 2), True), ((5, 21, 2, 2), True), ((5, 4, 2), False)],
)  # fmt: skip
def test_what_counts_as_logits(shape, logits):
    assert is_logits(torch.zeros(shape)) == logits


def test_half_precision_is_computed_in_float32(rng):
    expected, actual = (t.half() for t in tensors(rng, 50, 10))
    exact = divergence([expected.double()], [actual.double()])
    assert divergence([expected], [actual]).dtype == torch.float32
    assert float(divergence([expected], [actual])) == pytest.approx(float(exact), rel=1e-5)


def test_it_is_differentiable(rng):
    expected, actual = tensors(rng, 4, 5)
    actual.requires_grad_()
    torch.autograd.backward(divergence([expected], [actual]))
    oracle = (actual.softmax(1) - expected.softmax(1)) / 4
    torch.testing.assert_close(actual.grad, oracle.detach())


@pytest.mark.parametrize("actual", [[], [torch.zeros(4, 6)], [torch.zeros(4, 5)] * 2])
def test_outputs_that_do_not_match_are_named(actual):
    with pytest.raises(SepconvertError, match="outputs: expected floating-point tensors of the shapes"):
        divergence([torch.zeros(4, 5)], actual)


def test_nothing_to_compare_is_named():
    with pytest.raises(SepconvertError, match="outputs: expected"):
        divergence([], [])


class Named(nn.Module):
    def forward(self, x):
        return {"mask": x > 0, "values": (x, x.sum())}


def test_outputs_are_the_floating_point_tensors():
    x = torch.ones(2, 3)
    first, second = outputs(Named(), x)
    assert torch.equal(first, x)
    assert second == 6


def test_inputs_that_a_model_does_not_take_are_named():
    with pytest.raises(SepconvertError, match=r"shape \(3, 5\), on which it fails with RuntimeError"):
        outputs(nn.Linear(6, 4), torch.zeros(3, 5))


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
