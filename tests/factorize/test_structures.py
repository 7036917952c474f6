import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    PLANTS,
    SCHEMES,
    distinct_schemes,
    factor_shapes,
    geometries,
    spec_of,
    unfolded,
)
from torch.nn import functional as F

from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import BY_NAME, STRUCTURES


@st.composite
def structured(draw, **options):
    """A geometry and a structure that says something about its kernels."""
    geometry = draw(geometries(multiplied=draw(st.booleans()), **options))
    schemes = distinct_schemes(geometry.axes)
    assume(schemes)
    return geometry, BY_NAME[draw(st.sampled_from(schemes))]


def test_the_table_is_complete():
    assert tuple(structure.name for structure in STRUCTURES) == SCHEMES
    assert tuple(BY_NAME) == SCHEMES


@given(geometries(), st.booleans())
def test_a_structure_applies_unless_another_is_the_same(geometry, depthwise):
    conv = geometry.conv()
    applying = [structure.name for structure in STRUCTURES if structure.applies(spec_of(conv))]
    assert applying == [scheme for scheme in SCHEMES if scheme in distinct_schemes(geometry.axes)]


@given(structured())
def test_unfolding_is_the_one_of_the_mathematics_and_is_invertible(case):
    geometry, structure = case
    conv = geometry.conv().double()
    spec, weight = spec_of(conv), conv.weight
    matrices = structure.unfold(spec, weight)
    expected = unfolded(structure.name, weight.numpy(), geometry.groups)
    assert structure.full_rank(spec) == min(expected.shape[1:]) == min(matrices.shape[1:])
    np.testing.assert_allclose(
        np.linalg.svd(matrices.numpy(), compute_uv=False),
        np.linalg.svd(expected, compute_uv=False),
        rtol=0, atol=1e-12,
    )  # fmt: skip
    assert torch.equal(structure.fold(spec, matrices), weight)


@given(structured())
def test_every_kernel_has_the_form_at_full_rank(case):
    """M = K: the identity that everything rests on."""
    geometry, structure = case
    conv = geometry.conv().double()
    spec = spec_of(conv)
    left, values, right = torch.linalg.svd(structure.unfold(spec, conv.weight), full_matrices=False)
    assert values.shape[-1] == structure.full_rank(spec)
    first, second = structure.kernels(spec, left * values[:, None], right)
    composed = structure.compose(spec, first, second)
    torch.testing.assert_close(composed, conv.weight, rtol=0, atol=1e-13)
    specs = structure.split(spec, values.shape[-1])
    assert [tuple(first.shape), tuple(second.shape)] == [factor.weight_shape for factor in specs]


@given(structured(), st.integers(1, 5))
def test_two_convolutions_of_the_split_geometry_are_the_composed_one(case, rank):
    """Any two factors, in torch's own convolutions: composing and splitting tell the same story."""
    geometry, structure = case
    dense = spec_of(geometry.conv())
    specs = structure.split(dense, rank)
    generator = torch.Generator().manual_seed(geometry.seed)
    first, second = (
        torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64) for spec in specs
    )
    assert first.numel() + second.numel() == sum(
        int(np.prod(shape)) for shape in factor_shapes(structure.name, geometry.axes, rank)
    )
    assert [spec.bias for spec in specs] == [False, dense.bias]
    composed = structure.compose(dense, first, second)
    inputs = geometry.inputs().double()
    outputs = inputs
    for spec, weight in zip(specs, (first, second), strict=True):
        outputs = padded_convolution(outputs, spec, weight)
    expected = padded_convolution(inputs, dense, composed)
    torch.testing.assert_close(outputs, expected, rtol=1e-11, atol=1e-11)


def padded_convolution(inputs, spec, weight):
    (top, bottom), (left, right) = spec.padding
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(inputs, (left, right, top, bottom), mode=mode)
    return F.conv2d(padded, weight, None, spec.stride, 0, spec.dilation, spec.groups)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rank", [1, 3])
def test_kernels_are_laid_out_as_the_formula_says(scheme, rank):
    axes = {"g": 2, "o": 4, "c": 1 if scheme.startswith("channelwise") else 3, "i": 5, "j": 2}
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal(shape) for shape in factor_shapes(scheme, axes, rank)]
    expected = np.einsum(PLANTS[scheme], *factors).reshape(8, -1, 5, 2)
    spec = ConvSpec(2 * axes["c"], 8, (5, 2), groups=2)
    kernels = [
        torch.from_numpy(factor).reshape(part.weight_shape)
        for factor, part in zip(factors, BY_NAME[scheme].split(spec, rank), strict=True)
    ]
    composed = BY_NAME[scheme].compose(spec, *kernels)
    np.testing.assert_allclose(composed.numpy(), expected, rtol=0, atol=1e-13)
