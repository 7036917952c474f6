"""Fits in the metric of the data, against numpy's least squares and SVD on explicit samples."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_samples import (
    CHANNELWISE,
    PAIRS,
    SCHEMES,
    Case,
    cases,
    composed,
    forms,
    make,
    ranks,
)
from strategies import numbered, unfolded

from sepconvert.factorize.approximate.problem import Problem, output_error
from sepconvert.factorize.approximate.weighted import POINTWISE_DEPTHWISE, Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import BY_NAME, FORMS


@given(forms())
def test_errors_are_those_measured_on_the_samples(form):
    case, scheme, rank = form
    found = case.fit(scheme, rank)
    assert (found.scheme, found.rank) == (scheme, rank)
    kernel, bias = found.kernel.numpy(), case.bias + found.bias_shift.numpy()
    np.testing.assert_allclose(kernel, composed(case, scheme, found.weights), rtol=0, atol=1e-12)
    relative = np.linalg.norm(case.weight - kernel) / np.linalg.norm(case.weight)
    assert found.weight_error == pytest.approx(relative, rel=1e-9, abs=1e-12)
    # Moments are differences of numbers as large as the outputs, which rounding is relative to.
    large = (
        np.square(case.outputs_of(case.weight, case.bias) - case.outputs.mean(0)).sum(1).mean() + case.power
    )
    rounding = 1e-9 * large
    error = case.error(kernel, bias)
    assert found.output_error**2 * case.power == pytest.approx(error, rel=1e-6, abs=rounding)
    assert found.objective[-1] * case.power == pytest.approx(
        case.objective(kernel, bias), rel=1e-6, abs=rounding + 1e-9 * case.ridge * relative**2
    )
    # The bias is refitted: no other one is better.
    residual = (case.outputs - case.outputs_of(kernel, bias)).mean(0)
    assert np.abs(residual).max() <= 1e-9 * max(np.abs(case.outputs).max(), np.abs(case.patches).max())


@numbered(40)
@given(cases(), st.integers(0, 2**20))
def test_output_error_of_any_kernel(case, seed):
    kernel = case.weight + np.random.default_rng(seed).standard_normal(case.weight.shape)
    unbiased = case.outputs_of(kernel, 0)
    bias = (case.outputs - unbiased).mean(0)  # refitted
    found = output_error(case.spec, torch.from_numpy(case.weight), torch.from_numpy(kernel), case.moments)
    if case.power > 1e-20:
        assert found**2 == pytest.approx(case.error(kernel, bias) / case.power, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS])
@given(case=cases(drift=False))
def test_full_rank_is_the_kernel_itself(scheme, case):
    assume(FORMS[scheme].applies(case.spec))
    rank = FORMS[scheme].full_rank(case.spec)
    found = case.fit(scheme, rank)
    # eps·κ, the ridge being a thousandth of the mean of at most 75 eigenvalues.
    assert found.weight_error < 1e-10
    np.testing.assert_allclose(composed(case, scheme, found.weights), case.weight, rtol=0, atol=1e-10)
    scale = max(np.abs(case.patches).max(), 1)
    assert np.abs(found.bias_shift.numpy()).max() < 1e-10 * scale
    assert found.output_error < 1e-5


KERNEL_SIZES = ((1, 3), (2, 2), (3, 3), (3, 2), (5, 5), (7, 1))


@pytest.mark.parametrize(
    ("scheme", "spec"),
    [
        pytest.param(scheme, spec, id=f"{scheme}-{spec.kernel_size}-{spec.groups}")
        for scheme in (*SCHEMES, *PAIRS, *CHANNELWISE)
        for spec in (ConvSpec(6, 12, size, groups=groups) for size in KERNEL_SIZES for groups in (1, 2, 6))
        if FORMS[scheme].applies(spec)
    ],
)
def test_full_rank_without_data(scheme, spec):
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    rank = FORMS[scheme].full_rank(spec)
    found = Problem(spec, weight, Moments.of_weights(spec, weight)).fit(scheme, rank)
    assert found.weight_error < 1e-13
    torch.testing.assert_close(found.kernel, weight.double(), rtol=0, atol=1e-12)
    assert not found.bias_shift.any()


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS[:4]])
@numbered(30)
@given(data=st.data(), case=cases())
def test_of_white_noise_it_is_the_truncated_svd(scheme, data, case):
    spec = case.spec
    assume(FORMS[scheme].applies(spec))
    rank = data.draw(st.sampled_from(ranks(spec, scheme)))
    weight = torch.from_numpy(case.weight)
    found = Problem(spec, weight, Moments.of_weights(spec, weight)).fit(scheme, rank)
    matrices = unfolded(scheme, case.weight, spec.groups)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    optimum = np.sqrt(np.square(values[:, rank:]).sum() / np.square(values).sum())
    assert found.weight_error == pytest.approx(optimum, rel=1e-9, abs=1e-12)
    assert found.output_error == pytest.approx(optimum, rel=1e-9, abs=1e-7)
    truncated = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    if rank == values.shape[1] or (values[:, rank] < 0.99 * values[:, rank - 1]).all():  # it is unique
        np.testing.assert_allclose(unfolded(scheme, found.kernel.numpy(), spec.groups), truncated, atol=1e-9)


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS, *CHANNELWISE])
@pytest.mark.parametrize("zero", ["all", "outputs", "inputs", "corner"])
@pytest.mark.parametrize("data", ["plenty", "dead", "few", "constant"])
def test_kernels_with_zeros(scheme, zero, data):
    """The singular twin of every form: dead channels of kernel and data, too few samples, constant data."""
    spec = ConvSpec(3, 6, (3, 3), groups=3) if scheme in CHANNELWISE else ConvSpec(4, 6, (3, 3))
    case = make(spec, data)
    parts = {
        "all": np.s_[:],
        "outputs": np.s_[::2],
        "inputs": np.s_[:, 1:] if spec.groups == 1 else np.s_[2:],
        "corner": np.s_[:, :, 1:],
    }
    case.weight[parts[zero]] = 0
    case = Case(case.spec, case.weight, case.bias, case.patches, case.outputs_of(case.weight, case.bias) + 1)
    for rank in ranks(case.spec, scheme):
        found = case.fit(scheme, rank)
        assert all(weight.isfinite().all() for weight in found.weights)
        assert found.output_error <= 1 + 1e-9
    assert np.abs(found.kernel.numpy() - case.weight).max() < 1e-8
    np.testing.assert_allclose(found.bias_shift, np.ones(6), atol=1e-8)


@given(forms())
def test_no_sweep_raises_the_objective(form):
    case, scheme, rank = form
    objective = np.array(case.fit(scheme, rank, sweeps=12).objective)
    assert 1 <= len(objective) <= 12
    offset = (
        np.square(case.outputs_of(case.weight, 0) - case.outputs_of(case.weight, 0).mean(0)).sum(1).mean()
    )
    rounding = 1e-10 * (1 + offset / case.power)
    assert (np.diff(objective) <= rounding).all()
    # Every sweep that is asked for is one more of the same.
    fewer = case.fit(scheme, rank, sweeps=max(len(objective) - 1, 1)).objective
    np.testing.assert_allclose(fewer, objective[: len(fewer)], rtol=1e-9, atol=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS])
@numbered(25)
@given(case=cases())
def test_a_higher_rank_is_never_worse(scheme, case):
    assume(FORMS[scheme].applies(case.spec))
    found = [case.fit(scheme, rank).objective[-1] for rank in ranks(case.spec, scheme)]
    for lower, higher in pairwise(found):
        assert higher <= 1.01 * lower + 1e-9


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS[:4]])
@numbered(40)
@given(case=cases(), data=st.data())
def test_never_worse_on_the_data_than_the_svd_of_the_kernel(scheme, case, data):
    assume(FORMS[scheme].applies(case.spec))
    rank = data.draw(st.sampled_from(ranks(case.spec, scheme)))
    matrices = BY_NAME[scheme].unfold(case.spec, torch.from_numpy(case.weight)).numpy()
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    truncated = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    kernel = BY_NAME[scheme].fold(case.spec, torch.from_numpy(truncated)).numpy()
    bias = (case.outputs - case.outputs_of(kernel, 0)).mean(0)
    found = case.fit(scheme, rank)
    # The ridge is what may stand against the data.
    assert found.objective[-1] * case.power <= case.objective(kernel, bias) * (1 + 1e-6) + 1e-9 * case.power


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_precision_is_read_as_it_is(scheme, dtype):
    case = make(ConvSpec(4, 5, (3, 3)))
    stored = torch.from_numpy(case.weight).to(dtype)
    found = Problem(case.spec, stored, case.moments).fit(scheme, 2)
    wide = Problem(case.spec, stored.double(), case.moments).fit(scheme, 2)
    assert torch.equal(found.kernel, wide.kernel)
    assert {weight.dtype for weight in (*found.weights, found.kernel, found.bias_shift)} == {torch.float64}


def importance_of(case, seed=0):
    """A positive semidefinite matrix of low rank for each group."""
    o = case.spec.out_channels // case.spec.groups
    half = np.random.default_rng(seed).standard_normal((case.spec.groups, o, max(o // 2, 1)))
    return half @ half.transpose(0, 2, 1)


@numbered(40)
@given(forms(schemes=(*SCHEMES, *PAIRS)), st.integers(0, 99))
def test_the_weighted_error_is_that_measured_on_the_samples(form, seed):
    case, scheme, rank = form
    weights = importance_of(case, seed)
    found = case.fit(scheme, rank, sweeps=3, importance=torch.from_numpy(weights))
    np.testing.assert_allclose(
        found.kernel.numpy(), composed(case, scheme, found.weights), rtol=0, atol=1e-11
    )
    kernel, bias = found.kernel.numpy(), case.bias + found.bias_shift.numpy()
    errors = (case.outputs - case.outputs_of(kernel, bias)).reshape(case.count, case.spec.groups, -1)
    measured = np.einsum("ngo,gop,ngp->n", errors, weights, errors).mean()
    large = (
        np.square(case.outputs_of(case.weight, case.bias) - case.outputs.mean(0)).sum(1).mean() + case.power
    )
    rounding = 1e-9 * large * np.abs(weights).max()
    assert found.weighted_error == pytest.approx(measured, rel=1e-6, abs=rounding)
    rounding = 1e-10 * (1 + large / case.power) if case.power else 1.0
    assert (np.diff(found.objective) <= rounding).all()


@pytest.mark.parametrize("scheme", ["depthwise-pointwise", *PAIRS])
def test_what_matters_more_is_fitted_better(scheme):
    case = make(ConvSpec(6, 8, (3, 3)), drift=0, seed=3)
    weights = np.diag([100.0] + [1e-3] * 7)[None]
    rank = 2 if scheme != "depthwise-pointwise" else 1
    errors = []
    for importance in (None, torch.from_numpy(weights)):
        found = case.fit(scheme, rank, importance=importance)
        outputs = case.outputs_of(found.kernel.numpy(), case.bias + found.bias_shift.numpy())
        errors.append(np.square(case.outputs - outputs).mean(0))
    assert errors[1][0] < 0.7 * errors[0][0]
    assert errors[1][1:].sum() > errors[0][1:].sum()


@numbered(40)
@given(forms())
def test_a_fit_is_taken_up_where_it_was_left(form):
    case, scheme, rank = form
    before = case.fit(scheme, rank, sweeps=2)
    after = case.fit(scheme, rank, sweeps=1, basis=before.basis)
    offset = (
        np.square(case.outputs_of(case.weight, 0) - case.outputs_of(case.weight, 0).mean(0)).sum(1).mean()
    )
    rounding = 1e-9 * (1 + offset / case.power) if case.power else 1.0
    # Of a pointwise factor that is found by conjugate gradients, few steps are taken anew.
    slack = 1.05 if scheme == POINTWISE_DEPTHWISE else 1
    assert after.objective[-1] <= slack * before.objective[-1] + rounding
