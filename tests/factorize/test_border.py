import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, run, spec_of
from torch.nn import functional as F

from sepconvert.factorize.border import Border, zero_border
from sepconvert.factorize.geometry import ConvSpec

NOTHING = torch.zeros(1)


def framed(core, top, bottom, left, right):
    return torch.from_numpy(np.pad(core, ((0, 0), (0, 0), (top, bottom), (left, right))))


@pytest.mark.parametrize(
    "cut", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 1), (1, 2, 3, 1), (2, 2, 0, 0)]
)
def test_the_widest_border_is_found(cut):
    weight = framed(np.random.default_rng(0).standard_normal((4, 3, 3, 2)), *cut)
    border = zero_border(weight, NOTHING)
    assert border == Border(*cut)
    assert bool(border) == any(cut)
    assert border.trim(weight).shape == (4, 3, 3, 2)
    assert torch.equal(border.restore(border.trim(weight)), weight)


def test_zeros_inside_are_no_border():
    weight = torch.zeros(2, 2, 5, 5)
    weight[..., 0, 2] = weight[..., 4, 3] = 1
    assert zero_border(weight, NOTHING) == Border(0, 0, 2, 1)


def test_one_channel_keeps_a_border_that_all_others_could_spare():
    weight = framed(np.ones((64, 16, 1, 1)), 1, 1, 1, 1)
    weight[63, 15, 0, 2] = 1e-30
    assert zero_border(weight, NOTHING) == Border(0, 1, 1, 0)


def test_a_kernel_of_zeros_keeps_one_tap():
    border = zero_border(torch.zeros(3, 2, 4, 5), NOTHING)
    assert border.trim(torch.zeros(3, 2, 4, 5)).shape == (3, 2, 1, 1)


def test_allowance_is_what_each_channel_may_lose_in_all():
    weight = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    weight[:, :, 1, 1] = 1
    weight[0, :, 0, 1] = weight[0, :, 2, 1] = 3e-4
    both = 3e-4 * 8**0.5
    cases = (([1.0, 0.0], (1, 1)), ([both * 1.01, 0], (1, 1)), ([both * 0.99, 0], (1, 0)), ([0, 1.0], (0, 0)))
    for allowance, (top, bottom) in cases:
        assert zero_border(weight, torch.tensor(allowance)) == Border(top, bottom, 1, 1)


@given(geometries(), st.data())
def test_the_trimmed_geometry_computes_the_same(geometry, data):
    kh, kw = geometry.kernel_size
    top, left = data.draw(st.integers(0, kh - 1)), data.draw(st.integers(0, kw - 1))
    border = Border(
        top, data.draw(st.integers(0, kh - 1 - top)), left, data.draw(st.integers(0, kw - 1 - left))
    )
    conv = geometry.conv().double()
    conv.weight[:] = border.restore(border.trim(conv.weight))
    inputs = geometry.inputs().double()
    trimmed = border.trim_spec(spec_of(conv))
    assert trimmed.kernel_size == tuple(border.trim(conv.weight).shape[2:])
    assert trimmed.output_size(geometry.size) == spec_of(conv).output_size(geometry.size)
    # Padding by what the dense layer pads, then cropping what the smaller one does not want.
    (top_pad, bottom_pad), (left_pad, right_pad) = spec_of(conv).padding
    (new_top, new_bottom), (new_left, new_right) = trimmed.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, (left_pad, right_pad, top_pad, bottom_pad), mode=mode)
    cropped = F.pad(
        padded, (new_left - left_pad, new_right - right_pad, new_top - top_pad, new_bottom - bottom_pad)
    )
    smaller = F.conv2d(
        cropped, border.trim(conv.weight), conv.bias, conv.stride, 0, conv.dilation, conv.groups
    )
    torch.testing.assert_close(smaller, run(conv, inputs), rtol=1e-12, atol=1e-12)


def test_trimming_keeps_the_rest_of_the_geometry():
    spec = ConvSpec(4, 6, (5, 4), (2, 1), ((2, 2), (1, 2)), (3, 2), 2, "circular", bias=True)
    assert Border(1, 2, 0, 3).trim_spec(spec) == ConvSpec(
        4, 6, (2, 1), (2, 1), ((-1, -4), (1, -4)), (3, 2), 2, "circular", bias=True
    )
    assert Border().trim_spec(spec) == spec
