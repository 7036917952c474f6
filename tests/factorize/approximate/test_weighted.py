"""The weighted problem and its moments, against numpy on explicit samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_samples import cases, make

from sepconvert.factorize.approximate.weighted import (
    RIDGE,
    Moments,
    WeightedProblem,
    flatten_by_group,
    importance_factor,
)
from sepconvert.factorize.geometry import ConvSpec


def weighted(case, factor):
    """A problem with outputs weighted by Lᵀ and a scale of 1, by definition."""
    spec, moments = case.spec, case.moments
    dense = factor.mT @ torch.from_numpy(case.rows)
    importance = factor @ factor.mT
    return WeightedProblem(
        spec=spec,
        importance_factor=factor,
        scale=1.0,
        spread=1.0,
        power=float((importance * moments.output_covariance).sum()),
        dense=dense.view(spec.groups, -1, spec.weight_shape[1], spec.kernel_size[0] * spec.kernel_size[1]),
        metric=moments.covariance + RIDGE * torch.eye(moments.covariance.shape[-1], dtype=torch.float64),
        cross=factor.mT @ moments.cross,
        constant=float((importance * moments.residual_covariance).sum()),
    )


def lower_triangular(groups, size, seed):
    factor = np.tril(np.random.default_rng(seed).standard_normal((groups, size, size)))
    return torch.from_numpy(factor + 2 * np.eye(size))


def test_a_kernel_by_group_keeps_the_order_of_a_patch():
    spec = ConvSpec(4, 6, (2, 3), groups=2)
    weight = torch.arange(72.0).view(spec.weight_shape)
    assert torch.equal(flatten_by_group(spec, weight), weight.view(2, 3, 12))


@pytest.mark.parametrize("spec", [ConvSpec(3, 4, (3, 2)), ConvSpec(4, 6, (1, 3), groups=2)])
def test_under_white_noise_the_error_is_that_of_the_weights(spec):
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    moments = Moments.of_weights(spec, weight)
    assert moments.power == pytest.approx(float(weight.double().square().sum()))
    difference = flatten_by_group(spec, weight.flip(0).double())
    assert moments.error(difference, difference @ moments.covariance) == pytest.approx(
        float(difference.square().sum())
    )


@given(cases(), st.integers(0, 99))
def test_moments_give_the_error_of_any_kernel_with_the_bias_refitted(case, seed):
    difference = np.random.default_rng(seed).standard_normal(case.weight.shape)
    kernel = case.weight - difference
    bias = (case.outputs - case.outputs_of(kernel, 0)).mean(0)
    rows = torch.from_numpy(difference.reshape(case.rows.shape))
    found = case.moments.error(rows, rows @ case.moments.covariance)
    assert found == pytest.approx(case.error(kernel, bias), rel=1e-6, abs=1e-9 * (1 + case.power))


@pytest.mark.parametrize("rank", [4, 1])
def test_the_importance_factor_is_the_root_of_the_regularised_importance(rank):
    spec = ConvSpec(2, 8, (3, 3), groups=2)
    half = np.random.default_rng(0).standard_normal((2, 4, rank))
    importance = torch.from_numpy(half @ half.transpose(0, 2, 1))
    for scale in (1.0, 1e-12):
        factor = importance_factor(spec, scale * importance)
        mean = float(np.trace(importance.numpy(), axis1=1, axis2=2).mean()) / 4
        expected = importance.numpy() / mean + 0.5 * np.eye(4)
        np.testing.assert_allclose(factor @ factor.mT, expected, rtol=0, atol=1e-12)
        assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("importance", [None, 0.0, float("nan"), float("inf")])
def test_without_importance_all_outputs_matter_alike(importance):
    spec = ConvSpec(2, 8, (3, 3), groups=2)
    stated = None if importance is None else torch.full((2, 4, 4), importance, dtype=torch.float64)
    assert torch.equal(importance_factor(spec, stated), torch.eye(4, dtype=torch.float64).expand(2, -1, -1))


@pytest.mark.parametrize("data", ["plenty", "few", "dead"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_weighted_problem_is_the_regression_on_weighted_samples(data, groups):
    """Ridge regression towards LᵀW, by numpy's least squares on the samples."""
    case = make(ConvSpec(4, 6, (2, 3), groups=groups), data)
    factor = lower_triangular(groups, 6 // groups, seed=3)
    problem = weighted(case, factor)
    x = (case.patches - case.patches.mean(1, keepdims=True)) / np.sqrt(case.count)
    y = (case.outputs - case.outputs.mean(0)) / np.sqrt(case.count)
    start = 0.0
    for group, outputs in enumerate(np.split(y, groups, 1)):
        dense = factor[group].numpy().T @ case.rows[group]
        ridge = np.sqrt(RIDGE) * np.eye(x.shape[2])
        wanted = np.concatenate([outputs @ factor[group].numpy(), ridge @ dense.T])
        best = np.linalg.lstsq(np.concatenate([x[group], ridge]), wanted, rcond=None)[0].T
        np.testing.assert_allclose(problem.unconstrained[group].flatten(1), best, rtol=0, atol=1e-8)
        np.testing.assert_allclose(
            problem.target[group].flatten(1), wanted.T @ np.concatenate([x[group], ridge]), rtol=0, atol=1e-9
        )
        np.testing.assert_allclose(problem.product[group], dense @ x[group].T @ x[group], rtol=0, atol=1e-9)
        unweighted = problem.unweighted(problem.dense.flatten(2))[group]
        np.testing.assert_allclose(unweighted, case.rows[group], rtol=0, atol=1e-12)
        start += np.square(wanted).sum()
    assert problem.start == pytest.approx(start)


def test_inputs_that_do_not_vary_leave_no_product_at_all():
    case = make(ConvSpec(3, 4, (3, 3)))
    problem = weighted(case, lower_triangular(1, 4, seed=0))
    problem = replace(problem, metric=RIDGE * torch.eye(27, dtype=torch.float64))
    assert not problem.product.any()
