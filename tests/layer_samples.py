"""Layers with samples of their data, in numpy: helpers of the tests of fits.

They judge fits by explicit samples, by numpy's least squares and SVD.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE, RIDGE, Moments
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS

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

    def outputs_of(self, kernel, bias):
        """What a kernel makes of every sample: n × g·O."""
        rows = kernel.reshape(self.rows.shape)
        return np.einsum("gnk,gok->ngo", self.patches, rows).reshape(self.count, -1) + bias

    def error(self, kernel, bias):
        """Mean over the samples of ‖y − ŷ‖²."""
        return np.square(self.outputs - self.outputs_of(kernel, bias)).sum(1).mean()

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
        residual = self.outputs - self.outputs_of(self.weight, self.bias)
        x = self.patches - self.patches.mean(1, keepdims=True)
        e, y = ((each - each.mean(0)).reshape(n, g, -1) for each in (residual, self.outputs))
        return Moments(
            count=n,
            covariance=torch.from_numpy(np.einsum("gnk,gnl->gkl", x, x) / n),
            cross=torch.from_numpy(np.einsum("ngo,gnk->gok", e, x) / n),
            mean=torch.from_numpy(self.patches.mean(1)),
            residual_mean=torch.from_numpy(residual.mean(0)),
            residual_covariance=torch.from_numpy(np.einsum("ngo,ngp->gop", e, e) / n),
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
    outputs = case.outputs_of(weight, bias)
    if drift:
        other = weight + drift * rng.standard_normal(weight.shape)
        noise = rng.standard_normal(outputs.shape)
        outputs = case.outputs_of(other, bias) + size * drift * (noise + np.tanh(outputs / size) + 1)
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
