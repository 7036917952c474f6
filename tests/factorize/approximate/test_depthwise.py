"""Depthwise and pointwise factors, against numpy's least squares on explicit samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_samples import (
    SCHEMES,
    cases,
    make,
    ranks,
)
from strategies import numbered
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE, Moments
from sepconvert.factorize.geometry import ConvSpec


def best_pointwise(case, scheme, rank, weights):
    """The kernel of the best pointwise factors for the depthwise ones found, by numpy's least squares."""
    spec = case.spec
    g, o = spec.groups, spec.out_channels // spec.groups
    c, taps = spec.in_channels // spec.groups, spec.kernel_size[0] * spec.kernel_size[1]
    x = (case.patches - case.patches.mean(1, keepdims=True)) / np.sqrt(case.count)
    y = ((case.outputs - case.outputs.mean(0)) / np.sqrt(case.count)).reshape(case.count, g, o)
    root = np.sqrt(case.ridge)
    depthwise = np.asarray(weights[0 if scheme == DEPTHWISE_POINTWISE else 1])
    rows = np.empty_like(case.rows)
    for group in range(g):
        for output in range(o):
            if scheme == DEPTHWISE_POINTWISE:
                kernels = depthwise.reshape(g, c, rank, taps)[group]
            else:
                kernels = np.broadcast_to(depthwise.reshape(g, o, rank, taps)[group, output], (c, rank, taps))
            basis = np.zeros((c, rank, c, taps))
            for channel in range(c):
                basis[channel, :, channel] = kernels[channel]
            basis = basis.reshape(-1, c * taps)
            factors = np.concatenate([x[group], root * np.eye(c * taps)]) @ basis.T
            wanted = np.concatenate([y[:, group, output], root * case.rows[group, output]])
            rows[group, output] = np.linalg.lstsq(factors, wanted, rcond=None)[0] @ basis
    return rows.reshape(spec.weight_shape)


@given(cases(), st.data())
def test_pointwise_factors_are_the_best_for_the_depthwise_ones(case, data):
    scheme = DEPTHWISE_POINTWISE
    rank = data.draw(st.sampled_from(ranks(case.spec, scheme)))
    found = case.fit(scheme, rank)
    best = best_pointwise(case, scheme, rank, found.weights)
    np.testing.assert_allclose(found.kernel.numpy(), best, rtol=0, atol=1e-6)


@numbered(40)
@given(cases(), st.data())
def test_pointwise_factors_are_nearly_the_best_where_they_come_first(case, data):
    """Here they are found by few steps of conjugate gradients in each sweep."""
    scheme = POINTWISE_DEPTHWISE
    rank = data.draw(st.sampled_from(ranks(case.spec, scheme)))
    found = case.fit(scheme, rank)
    best = best_pointwise(case, scheme, rank, found.weights)
    bias = (case.outputs - case.outputs_of(best, 0)).mean(0)
    optimum = case.objective(best, bias) / case.power
    assert optimum * (1 - 1e-6) - 1e-9 <= found.objective[-1] <= 1.02 * optimum + 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_data_do_not_show_is_not_fitted(scheme):
    """Where only one direction of the input varies, any kernel that is right there will do."""
    spec = ConvSpec(3, 4, (3, 3))
    case = make(spec, drift=0)
    direction = np.random.default_rng(1).standard_normal(27)
    patches = np.random.default_rng(2).standard_normal((1, 50, 1)) * direction
    case = replace(case, patches=patches)
    case = replace(case, outputs=case.outputs_of(case.weight, case.bias))
    found = case.fit(scheme, 1)
    assert found.weight_error > 0.3
    assert found.output_error < 0.05


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_large_layer(scheme):
    spec = ConvSpec(256, 256, (3, 3))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(spec.weight_shape, generator=generator) / 48
    patches = torch.randn(1, 500, 2304, generator=generator, dtype=torch.float64)
    patches = patches + patches.roll(1, -1)
    covariance = patches.mT @ patches / 500
    nothing = Moments.of_weights(spec, weight)
    rows = weight.double().flatten(1)
    power = (rows @ covariance[0] @ rows.mT)[None]
    moments = replace(nothing, count=500, covariance=covariance, output_covariance=power)
    largest = Largest()
    with largest:
        found = Problem(spec, weight, moments).fit(scheme, 2, sweeps=2)
    assert len(found.objective) == 2
    assert 0 < found.objective[1] < found.objective[0] < 1
    assert largest.bytes <= 2.5 * covariance.nbytes
