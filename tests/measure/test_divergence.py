"""Divergences against scipy's and against ones known beforehand."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.divergence import divergence, is_logits, mean_divergence, outputs, relative_error


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


def test_a_data_set_is_averaged_over_samples(rng):
    original, converted = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9)), nn.Linear(6, 4).double()
    x = torch.from_numpy(rng.standard_normal((11, 6))).float()
    loader = DataLoader(TensorDataset(x, torch.full((11,), -1)), 4)
    wanted = original[0](x).log_softmax(1)
    given = converted(x.double()).log_softmax(1)
    oracle = float((wanted.exp() * (wanted - given)).sum(1).mean().detach())
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch[0]))
            yield batch

    assert mean_divergence(original, converted, loader, progress) == pytest.approx(oracle, rel=1e-5)
    assert seen == [4, 4, 3]
    assert original.training
    assert original[1].training


def test_bad_data_are_named():
    model = nn.Linear(6, 4)
    with pytest.raises(SepconvertError, match="expected at least one sample"):
        mean_divergence(model, model, [])
    with pytest.raises(SepconvertError, match=r"shape \(3, 5\), on which it fails with RuntimeError"):
        mean_divergence(model, model, [(torch.zeros(3, 5), torch.zeros(3))])
