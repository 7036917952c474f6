"""Pairs of factors on different axes, against numpy on explicit samples."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_samples import (
    cases,
    ranks,
)

from sepconvert.factorize.structures import FORMS


@given(cases(), st.data())
def test_a_pair_that_ends_pointwise_is_the_best_there_is(case, data):
    """Reduced-rank regression in closed form, on samples to which the ridge adds some (Izenman, 1975)."""
    spec, scheme = case.spec, "output-subspace"
    assume(FORMS[scheme].applies(spec))
    rank = data.draw(st.sampled_from(ranks(spec, scheme)))
    earlier = case.fit(scheme, rank, sweeps=1, basis=torch.randn(spec.groups, rank, case.rows.shape[2]))
    best = np.empty_like(case.rows)
    x = (case.patches - case.patches.mean(1, keepdims=True)) / np.sqrt(case.count)
    y = (case.outputs - case.outputs.mean(0)) / np.sqrt(case.count)
    for group, outputs in enumerate(np.split(y, spec.groups, 1)):
        inputs = np.concatenate([x[group], np.sqrt(case.ridge) * np.eye(x.shape[2])])
        wanted = np.concatenate([outputs, np.sqrt(case.ridge) * case.rows[group].T])
        kernel = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        directions = np.linalg.svd(inputs @ kernel, full_matrices=False)[2][:rank]
        best[group] = (kernel @ directions.T @ directions).T
    best = best.reshape(spec.weight_shape)
    bias = (case.outputs - case.outputs_of(best, 0)).mean(0)
    optimum = case.objective(best, bias) / case.power
    for found in (case.fit(scheme, rank), earlier):
        assert found.objective[-1] == pytest.approx(optimum, rel=1e-6, abs=1e-9)
