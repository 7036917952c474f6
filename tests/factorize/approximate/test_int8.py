"""Factors in int8, and the errors predicted for them, against numpy's rounding and simulated layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_samples import CHANNELWISE, PAIRS, SCHEMES, make
from strategies import numbered
from torch.nn import functional as F

from sepconvert.factorize.approximate.int8 import rounded, with_rounding
from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS

LEVELS = st.sampled_from((127, 64))


# Kernels ----------------------------------------------------------------------------------------------


@st.composite
def kernels(draw):
    """A kernel whose outputs differ in size by orders of magnitude, some of them being 0."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    weight = random.standard_normal(shape) * np.exp(5 * random.standard_normal((shape[0], 1, 1, 1)))
    weight[: draw(st.integers(0, 1))] = 0
    return weight


@given(kernels(), LEVELS)
def test_rounded_kernels(weight, levels):
    """Whole multiples of a step for each output, half a step off at most, the largest as it was."""
    found = rounded(torch.from_numpy(weight), levels).numpy()
    assert found.dtype == np.float64
    for one, other in zip(found, weight, strict=True):
        step = np.abs(other).max() / levels
        if not step:
            np.testing.assert_array_equal(one, 0)
            continue
        assert np.abs(one - other).max() <= 0.5 * step * (1 + 1e-9)
        np.testing.assert_allclose(one / step, np.round(one / step), rtol=0, atol=1e-9)
        assert np.abs(one).max() == pytest.approx(levels * step, rel=1e-12)
        assert len(np.unique(np.round(one / step))) <= 2 * levels + 1


@given(kernels(), LEVELS)
def test_rounding_twice_changes_nothing(weight, levels):
    once = rounded(torch.from_numpy(weight), levels)
    torch.testing.assert_close(rounded(once, levels), once, rtol=1e-12, atol=0)


@given(kernels(), LEVELS, st.integers(0, 2**20))
def test_outputs_are_rounded_by_themselves(weight, levels, seed):
    """Neither the order of the outputs nor their scales matter."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(weight))
    scale = 2.0 ** random.integers(-9, 9, (len(weight), 1, 1, 1))
    found = rounded(torch.from_numpy(scale * weight[order]), levels)
    torch.testing.assert_close(
        found, torch.from_numpy(scale) * rounded(torch.from_numpy(weight), levels)[order], rtol=1e-12, atol=0
    )


def test_kernels_in_single_precision_are_rounded_in_double():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weight, 127), rounded(weight.double(), 127))


# Errors -----------------------------------------------------------------------------------------------

NESTED = tuple(name for name in FORMS if name not in {*SCHEMES, *PAIRS, *CHANNELWISE})


def run(spec, weights, patches, levels=None):
    """Outputs of the factors, one after the other, on patches g × n × C·K; n × g·O.

    With levels, the kernels are rounded for each output, and each value between two of them for each of its
    channels, in 255 steps of a range of 12 standard deviations.
    """
    value = np.moveaxis(patches, 0, 1).reshape(patches.shape[1], spec.in_channels, *spec.kernel_size)
    for number, weight in enumerate(weights):
        kernel = np.asarray(weight)
        if levels:
            step = np.abs(kernel).max((1, 2, 3), keepdims=True) / levels
            kernel = np.round(kernel / np.where(step, step, 1)) * step
            if number:
                centred = value - value.mean(
                    0
                )  # samples differ in their means from tap to tap; images do not
                steps = 12 * centred.std((0, 2, 3), keepdims=True) / 255
                value = np.round(value / np.where(steps, steps, 1)) * np.where(steps, steps, 0)
        groups = value.shape[1] // kernel.shape[1]
        value = F.conv2d(torch.from_numpy(value), torch.from_numpy(kernel), groups=groups).numpy()
    assert value.shape == (patches.shape[1], spec.out_channels, 1, 1)
    return value[..., 0, 0]


def simulated(case, found, levels, importance=None):
    """Mean square of what rounding does to the outputs, about its own mean, which the bias takes back."""
    exact, moved = (run(case.spec, found.weights, case.patches, each) for each in (None, levels))
    error = moved - exact
    error -= error.mean(0)
    if importance is None:
        return np.square(error).sum(1).mean()
    by_group = error.reshape(len(error), case.spec.groups, -1)
    return np.einsum("ngo,gop,ngp->n", by_group, importance, by_group).mean()


def layers(scheme):
    specs = [
        ConvSpec(8, 12, (3, 3)), ConvSpec(8, 12, (5, 3)), ConvSpec(12, 8, (3, 3), groups=2),
        ConvSpec(10, 10, (3, 3), groups=10),
    ]  # fmt: skip
    return [spec for spec in specs if FORMS[scheme].applies(spec)]


CASES = [
    pytest.param(scheme, spec, id=f"{scheme}-{spec.kernel_size[0]}-{spec.groups}")
    for scheme in (*SCHEMES, *PAIRS, *CHANNELWISE, *NESTED)
    for spec in layers(scheme)
]


def fitted(scheme, spec, importance=None, data="plenty"):
    """A layer and its fit in half of the ranks; outputs are those of the layer itself."""
    case = make(spec, data, drift=0, seed=1)
    rank = max(FORMS[scheme].full_rank(spec) // 2, 1)
    problem = Problem(spec, torch.from_numpy(case.weight), case.moments, importance)
    return case, problem, problem.fit(scheme, rank)


@pytest.mark.parametrize("levels", [127, 64])
@pytest.mark.parametrize(("scheme", "spec"), CASES)
def test_the_error_is_that_of_rounded_layers(scheme, spec, levels):
    """Kernels and values between them are rounded on the samples; the prediction is near."""
    case, problem, before = fitted(scheme, spec)
    after = with_rounding(problem, before, levels)
    added = (after.output_error**2 - before.output_error**2) * case.power
    measured = simulated(case, before, levels)
    assert measured / 1.5 < added < 1.5 * measured
    # Both errors together, of the fit and of rounding, are those of the outputs.
    total = run(spec, before.weights, case.patches, levels) - case.outputs_of(case.weight, case.bias)
    total = np.square(total - total.mean(0)).sum(1).mean() / case.power
    assert total / 1.5 < after.output_error**2 < 1.5 * total


@pytest.mark.parametrize(("scheme", "spec"), CASES[::3])
def test_weighted_errors(scheme, spec):
    """By an importance of some outputs alone, which differs from that of all."""
    outputs = spec.out_channels // spec.groups
    random = np.random.default_rng(0)
    root = random.standard_normal((spec.groups, outputs, outputs)) * np.exp(
        random.standard_normal((spec.groups, 1, outputs))
    )
    importance = np.einsum("gij,gkj->gik", root, root)
    case, problem, before = fitted(scheme, spec, torch.from_numpy(importance))
    after = with_rounding(problem, before, 127)
    measured = simulated(case, before, 127, importance)
    assert measured / 2 < after.weighted_error - before.weighted_error < 2 * measured
    alike = replace(problem, importance=None)
    assert with_rounding(alike, replace(before, weighted_error=None), 127).weighted_error is None


@numbered(20)
@given(
    scheme=st.sampled_from((*SCHEMES, *PAIRS)), data=st.sampled_from(("plenty", "few", "dead", "constant")),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_what_rounding_leaves_as_it_is(scheme, data, seed):
    """Errors alone change, they grow, by more with fewer levels, and are the same in every call."""
    spec = ConvSpec(4, 6, (3, 3))
    case = make(spec, data, seed=seed)
    problem = Problem(spec, torch.from_numpy(case.weight), case.moments)
    before = problem.fit(scheme, 1)
    after, again, coarse = (with_rounding(problem, before, levels) for levels in (127, 127, 64))
    assert after.output_error == again.output_error
    assert before.output_error <= after.output_error < np.inf
    if data != "constant":
        assert before.output_error < after.output_error < coarse.output_error
    assert replace(after, output_error=before.output_error) == before


def test_exact_factors_of_few_numbers_have_the_noise_between_them_alone():
    """Kernels of 0 and ±1 are not moved by rounding."""
    spec = ConvSpec(4, 6, (3, 3))
    case = make(spec, drift=0)
    problem = Problem(spec, torch.from_numpy(case.weight), case.moments)
    random = np.random.default_rng(0)
    weights = tuple(
        torch.from_numpy(random.integers(-1, 2, shape).astype(float))
        for shape in ((5, 4, 3, 1), (6, 5, 1, 3))
    )
    assert all((weight.abs().amax((1, 2, 3)) == 1).all() for weight in weights)
    kernel = FORMS["spatial-vh"].compose(spec, *weights)
    before = replace(problem.fit("spatial-vh", 5), weights=weights, kernel=kernel, output_error=0.0)
    errors = [with_rounding(problem, before, levels).output_error for levels in (127, 64)]
    assert errors[0] == errors[1] > 0
    assert 0.5 < errors[0] ** 2 * case.power / simulated(case, before, 127) < 2
