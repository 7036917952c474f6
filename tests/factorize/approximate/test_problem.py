"""Fits in the metric of the data, against numpy's least squares and SVD on explicit samples."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import numbered, unfolded
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.factorize.approximate.problem import Problem, approximate, output_error
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE, RIDGE, Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import BY_NAME, FORMS

SCHEMES = (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE)
PAIRS = ("spatial-vh", "spatial-hv", "input-subspace", "output-subspace", "channel-subspace")
CHANNELWISE = ("channelwise-spatial-vh", "channelwise-spatial-hv")


@dataclass(frozen=True, repr=False)
class Case:
    """A layer and samples of its data: `patches` g × n × C·K, `outputs` n × g·O, all numpy float64."""

    spec: ConvSpec
    weight: np.ndarray  # O × C × kh × kw
    bias: np.ndarray
    patches: np.ndarray
    outputs: np.ndarray
    made: str = ""  # how, for a falsifying example

    def __repr__(self):
        return f"make({self.spec}, {self.made})"

    @property
    def count(self):
        return self.patches.shape[1]

    @cached_property
    def rows(self):
        """The kernel as g × O × C·K."""
        return self.weight.reshape(self.spec.groups, self.spec.out_channels // self.spec.groups, -1)

    def answers(self, kernel, bias):
        """What a kernel makes of every sample: n × g·O."""
        rows = kernel.reshape(self.rows.shape)
        return np.einsum("gnk,gok->ngo", self.patches, rows).reshape(self.count, -1) + bias

    def error(self, kernel, bias):
        """Mean over the samples of ‖y − ŷ‖²."""
        return np.square(self.outputs - self.answers(kernel, bias)).sum(1).mean()

    @property
    def power(self):
        return np.square(self.outputs - self.outputs.mean(0)).sum(1).mean()

    @property
    def ridge(self):
        """ρ: a share of the mean variance of a patch's elements; 1 if there is none."""
        variance = self.patches.var(1)
        return RIDGE * variance.mean() if variance.any() else 1.0

    def objective(self, kernel, bias):
        return self.error(kernel, bias) + self.ridge * np.square(self.weight - kernel).sum()

    @cached_property
    def moments(self):
        """By definition, with numpy."""
        n, g = self.count, self.spec.groups
        missed = self.outputs - self.answers(self.weight, self.bias)
        x = self.patches - self.patches.mean(1, keepdims=True)
        e, y = ((each - each.mean(0)).reshape(n, g, -1) for each in (missed, self.outputs))
        return Moments(
            count=n,
            covariance=torch.from_numpy(np.einsum("gnk,gnl->gkl", x, x) / n),
            cross=torch.from_numpy(np.einsum("ngo,gnk->gok", e, x) / n),
            mean=torch.from_numpy(self.patches.mean(1)),
            missed=torch.from_numpy(missed.mean(0)),
            missed_covariance=torch.from_numpy(np.einsum("ngo,ngp->gop", e, e) / n),
            output_covariance=torch.from_numpy(np.einsum("ngo,ngp->gop", y, y) / n),
        )

    def fit(self, scheme, rank, **options):
        importance = options.pop("importance", None)
        problem = Problem(self.spec, torch.from_numpy(self.weight), self.moments, importance)
        return problem.fit(scheme, rank, **options)


def make(spec, data="plenty", drift=0.5, size=1.0, seed=0):
    """A case; `data` says what is wrong with its samples, `drift` how far off the original kernel is."""
    rng = np.random.default_rng(seed)
    if data == "constant":  # then the ridge is 1, and nothing of less than its rounding can be seen
        size = 1.0
    out_per_group, (kh, kw) = spec.out_channels // spec.groups, spec.kernel_size
    channels = spec.in_channels // spec.groups
    unknowns = channels * kh * kw
    count = max(unknowns // 3, 2) if data == "few" else 4 * unknowns + 7
    mixing = rng.standard_normal((spec.groups, unknowns, unknowns)) / np.sqrt(unknowns) + np.eye(unknowns)
    patches = rng.standard_normal((spec.groups, count, unknowns)) @ mixing
    patches = size * (patches + 3 * rng.standard_normal((spec.groups, 1, unknowns)))
    if data == "dead":
        patches.reshape(spec.groups, count, channels, -1)[:, :, 0] = 0
    if data == "constant":
        patches[:] = np.round(patches[:, :1])  # whose means are exact
    weight = rng.standard_normal(spec.weight_shape)
    bias = rng.standard_normal(spec.out_channels)
    made = f"{data=} {drift=} {size=} {seed=}"
    case = Case(spec, weight, bias, patches, np.zeros((count, spec.out_channels)), made)
    outputs = case.answers(weight, bias)
    if drift:
        other = weight + drift * rng.standard_normal(weight.shape)
        noise = rng.standard_normal(outputs.shape)
        outputs = case.answers(other, bias) + size * drift * (noise + np.tanh(outputs / size) + 1)
    assert outputs.shape == (count, spec.groups * out_per_group)
    return replace(case, outputs=outputs)


@st.composite
def cases(draw, drift=True):
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    kernel_size = draw(st.sampled_from(((3, 3), (3, 3), (2, 2), (1, 3), (4, 2), (2, 3), (5, 1), (3, 5))))
    spec = ConvSpec(
        groups * draw(st.integers(2, 5)), groups * draw(st.integers(2, 7)), kernel_size, groups=groups
    )
    return make(
        spec,
        draw(st.sampled_from(("plenty", "plenty", "few", "dead", "constant"))),
        draw(st.sampled_from((0.1, 1.0))) if drift else 0,
        draw(st.sampled_from((1.0, 1e-6, 1e5))),
        draw(st.integers(0, 2**20)),
    )


def ranks(spec, scheme):
    return range(1, FORMS[scheme].full_rank(spec) + 1)


@st.composite
def depthwise_layers(draw):
    channels, multiplier = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    kernel_size = draw(st.sampled_from(((3, 3), (2, 4), (5, 3))))
    spec = ConvSpec(channels, channels * multiplier, kernel_size, groups=channels)
    drift = draw(st.sampled_from((0, 0.1, 1.0)))
    return make(spec, draw(st.sampled_from(("plenty", "few"))), drift, seed=draw(st.integers(0, 2**20)))


@st.composite
def forms(draw, schemes=(*SCHEMES, *PAIRS, *CHANNELWISE)):
    scheme = draw(st.sampled_from(schemes))
    case = draw(depthwise_layers() if scheme in CHANNELWISE else cases())
    assume(FORMS[scheme].applies(case.spec))
    return case, scheme, draw(st.sampled_from(ranks(case.spec, scheme)))


def composed(case, scheme, weights):
    """The dense kernel of the factors, written out for each group."""
    spec = case.spec
    g, o = spec.groups, spec.out_channels // spec.groups
    c, (kh, kw) = spec.in_channels // spec.groups, spec.kernel_size
    first, second, *third = (np.asarray(weight) for weight in weights)
    if scheme in CHANNELWISE:
        first, second = (
            first.reshape(g * o, -1, *first.shape[2:]),
            second.reshape(g * o, -1, *second.shape[2:]),
        )
        return np.einsum("orij,orkl->oikjl", first, second).reshape(spec.weight_shape)
    if scheme in PAIRS:
        chain = [each.reshape(g, len(each) // g, *each.shape[1:]) for each in (first, second, *third)]
        if third:
            chain = [np.einsum("grcij,gsrkl->gscikjl", *chain[:2]).reshape(g, -1, c, kh, kw), chain[2]]
        return np.einsum("grcij,gorkl->gocikjl", *chain).reshape(spec.weight_shape)
    if scheme == DEPTHWISE_POINTWISE:
        d, p = first.reshape(g, c, -1, kh, kw), second.reshape(g, o, c, -1)
        return np.einsum("gocm,gcmij->gocij", p, d).reshape(spec.weight_shape)
    p, d = first.reshape(g, o, -1, c), second.reshape(g, o, -1, kh, kw)
    return np.einsum("gomc,gomij->gocij", p, d).reshape(spec.weight_shape)


# What is reported


@numbered(50)
@given(forms())
def test_errors_are_those_measured_on_the_samples(form):
    case, scheme, rank = form
    found = case.fit(scheme, rank)
    assert (found.scheme, found.rank) == (scheme, rank)
    kernel, bias = found.kernel.numpy(), case.bias + found.bias_shift.numpy()
    np.testing.assert_allclose(kernel, composed(case, scheme, found.weights), rtol=0, atol=1e-12)
    relative = np.linalg.norm(case.weight - kernel) / np.linalg.norm(case.weight)
    assert found.weight_error == pytest.approx(relative, rel=1e-9, abs=1e-12)
    # Moments are differences of numbers as large as `answers`, which rounding is relative to.
    large = np.square(case.answers(case.weight, case.bias) - case.outputs.mean(0)).sum(1).mean() + case.power
    rounding = 1e-9 * large
    error = case.error(kernel, bias)
    assert found.output_error**2 * case.power == pytest.approx(error, rel=1e-6, abs=rounding)
    assert found.objective[-1] * case.power == pytest.approx(
        case.objective(kernel, bias), rel=1e-6, abs=rounding + 1e-9 * case.ridge * relative**2
    )
    # The bias is refitted: no other one is better.
    residual = (case.outputs - case.answers(kernel, bias)).mean(0)
    assert np.abs(residual).max() <= 1e-9 * max(np.abs(case.outputs).max(), np.abs(case.patches).max())


@numbered(40)
@given(cases(), st.integers(0, 2**20))
def test_output_error_of_any_kernel(case, seed):
    kernel = case.weight + np.random.default_rng(seed).standard_normal(case.weight.shape)
    unbiased = case.answers(kernel, 0)
    bias = (case.outputs - unbiased).mean(0)  # refitted
    found = output_error(case.spec, torch.from_numpy(case.weight), torch.from_numpy(kernel), case.moments)
    if case.power > 1e-20:
        assert found**2 == pytest.approx(case.error(kernel, bias) / case.power, rel=1e-6, abs=1e-9)


# Full rank, and white noise


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS])
@numbered(50)
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


@pytest.mark.parametrize("scheme", [*SCHEMES, *PAIRS, *CHANNELWISE])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kernel_size", [(1, 3), (2, 2), (3, 3), (3, 2), (5, 5), (7, 1)])
def test_full_rank_without_data(scheme, groups, kernel_size):
    spec = ConvSpec(6, 12, kernel_size, groups=groups)
    if not FORMS[scheme].applies(spec):
        return
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    rank = FORMS[scheme].full_rank(spec)
    found = approximate(spec, weight, Moments.of_weights(spec, weight), scheme, rank)
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
    found = approximate(spec, weight, Moments.of_weights(spec, weight), scheme, rank)
    matrices = unfolded(scheme, case.weight, spec.groups)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    optimum = np.sqrt(np.square(values[:, rank:]).sum() / np.square(values).sum())
    assert found.weight_error == pytest.approx(optimum, rel=1e-9, abs=1e-12)
    assert found.output_error == pytest.approx(optimum, rel=1e-9, abs=1e-7)
    truncated = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    if rank == values.shape[1] or (values[:, rank] < 0.99 * values[:, rank - 1]).all():  # it is unique
        np.testing.assert_allclose(unfolded(scheme, found.kernel.numpy(), spec.groups), truncated, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("zero", ["all", "outputs", "inputs", "corner"])
@pytest.mark.parametrize("data", ["plenty", "dead", "few"])
def test_kernels_with_zeros(scheme, zero, data):
    case = make(ConvSpec(4, 6, (3, 3)), data)
    parts = {
        "all": np.s_[:],
        "outputs": np.s_[::2],
        "inputs": np.s_[:, 1:],
        "corner": np.s_[:, :, 1:],
    }
    case.weight[parts[zero]] = 0
    case = Case(case.spec, case.weight, case.bias, case.patches, case.answers(case.weight, case.bias) + 1)
    for rank in ranks(case.spec, scheme):
        found = case.fit(scheme, rank)
        assert all(weight.isfinite().all() for weight in found.weights)
        assert found.output_error <= 1 + 1e-9
    assert np.abs(found.kernel.numpy() - case.weight).max() < 1e-8
    np.testing.assert_allclose(found.bias_shift, np.ones(6), atol=1e-8)


# How good it is


@numbered(50)
@given(forms())
def test_no_sweep_raises_the_objective(form):
    case, scheme, rank = form
    objective = np.array(case.fit(scheme, rank, sweeps=12).objective)
    assert 1 <= len(objective) <= 12
    offset = np.square(case.answers(case.weight, 0) - case.answers(case.weight, 0).mean(0)).sum(1).mean()
    rounding = 1e-10 * (1 + offset / case.power)
    assert (np.diff(objective) <= rounding).all()
    # Every sweep that is asked for is one more of the same.
    fewer = case.fit(scheme, rank, sweeps=max(len(objective) - 1, 1)).objective
    np.testing.assert_allclose(fewer, objective[: len(fewer)], rtol=1e-9, atol=rounding)


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


@numbered(50)
@given(cases(), st.data())
def test_pointwise_factors_are_the_best_for_the_depthwise_ones(case, data):
    scheme = DEPTHWISE_POINTWISE
    rank = data.draw(st.sampled_from(ranks(case.spec, scheme)))
    found = case.fit(scheme, rank)
    best = best_pointwise(case, scheme, rank, found.weights)
    np.testing.assert_allclose(found.kernel.numpy(), best, rtol=0, atol=1e-6)


@numbered(50)
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
    for group, answers in enumerate(np.split(y, spec.groups, 1)):
        inputs = np.concatenate([x[group], np.sqrt(case.ridge) * np.eye(x.shape[2])])
        wanted = np.concatenate([answers, np.sqrt(case.ridge) * case.rows[group].T])
        kernel = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
        directions = np.linalg.svd(inputs @ kernel, full_matrices=False)[2][:rank]
        best[group] = (kernel @ directions.T @ directions).T
    best = best.reshape(spec.weight_shape)
    bias = (case.outputs - case.answers(best, 0)).mean(0)
    optimum = case.objective(best, bias) / case.power
    for found in (case.fit(scheme, rank), earlier):
        assert found.objective[-1] == pytest.approx(optimum, rel=1e-6, abs=1e-9)


@numbered(40)
@given(cases(), st.data())
def test_pointwise_factors_are_nearly_the_best_where_they_come_first(case, data):
    """Here they are found by few steps of conjugate gradients in each sweep."""
    scheme = POINTWISE_DEPTHWISE
    rank = data.draw(st.sampled_from(ranks(case.spec, scheme)))
    found = case.fit(scheme, rank)
    best = best_pointwise(case, scheme, rank, found.weights)
    bias = (case.outputs - case.answers(best, 0)).mean(0)
    optimum = case.objective(best, bias) / case.power
    assert optimum * (1 - 1e-6) - 1e-9 <= found.objective[-1] <= 1.02 * optimum + 1e-6


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
    bias = (case.outputs - case.answers(kernel, 0)).mean(0)
    found = case.fit(scheme, rank)
    # The ridge is what may stand against the data.
    assert found.objective[-1] * case.power <= case.objective(kernel, bias) * (1 + 1e-6) + 1e-9 * case.power


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_data_do_not_show_is_not_fitted(scheme):
    """Where only one direction of the input varies, any kernel that is right there will do."""
    spec = ConvSpec(3, 4, (3, 3))
    case = make(spec, drift=0)
    direction = np.random.default_rng(1).standard_normal(27)
    patches = np.random.default_rng(2).standard_normal((1, 50, 1)) * direction
    case = replace(case, patches=patches)
    case = replace(case, outputs=case.answers(case.weight, case.bias))
    found = case.fit(scheme, 1)
    assert found.weight_error > 0.3
    assert found.output_error < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_precision_is_read_as_it_is(scheme, dtype):
    case = make(ConvSpec(4, 5, (3, 3)))
    stored = torch.from_numpy(case.weight).to(dtype)
    found = approximate(case.spec, stored, case.moments, scheme, 2)
    wide = approximate(case.spec, stored.double(), case.moments, scheme, 2)
    assert torch.equal(found.kernel, wide.kernel)
    assert {weight.dtype for weight in (*found.weights, found.kernel, found.bias_shift)} == {torch.float64}


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
        found = approximate(spec, weight, moments, scheme, 2, sweeps=2)
    assert len(found.objective) == 2
    assert 0 < found.objective[1] < found.objective[0] < 1
    assert largest.bytes <= 2.5 * covariance.nbytes


# Where outputs matter differently


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
    errors = (case.outputs - case.answers(kernel, bias)).reshape(case.count, case.spec.groups, -1)
    measured = np.einsum("ngo,gop,ngp->n", errors, weights, errors).mean()
    large = np.square(case.answers(case.weight, case.bias) - case.outputs.mean(0)).sum(1).mean() + case.power
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
        answers = case.answers(found.kernel.numpy(), case.bias + found.bias_shift.numpy())
        errors.append(np.square(case.outputs - answers).mean(0))
    assert errors[1][0] < 0.7 * errors[0][0]
    assert errors[1][1:].sum() > errors[0][1:].sum()


@numbered(40)
@given(forms())
def test_a_fit_is_taken_up_where_it_was_left(form):
    case, scheme, rank = form
    before = case.fit(scheme, rank, sweeps=2)
    after = case.fit(scheme, rank, sweeps=1, basis=before.basis)
    offset = np.square(case.answers(case.weight, 0) - case.answers(case.weight, 0).mean(0)).sum(1).mean()
    rounding = 1e-9 * (1 + offset / case.power) if case.power else 1.0
    # Of a pointwise factor that is found by conjugate gradients, few steps are taken anew.
    slack = 1.05 if scheme == POINTWISE_DEPTHWISE else 1
    assert after.objective[-1] <= slack * before.objective[-1] + rounding
