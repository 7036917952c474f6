import warnings

import torch
from hypothesis import given
from strategies import geometries, run, spec_of

from sepconvert.factorize.geometry import ConvSpec, chain_macs, chain_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts one of its losses on import
    from fvcore.nn.jit_handles import conv_flop_count


@given(geometries())
def test_sizes_and_costs_are_those_of_torch_and_fvcore(geometry):
    conv = geometry.conv()
    spec = spec_of(conv)
    with torch.device("meta"):
        output = run(conv.to("meta"), torch.empty(1, geometry.in_channels, *geometry.size).to(geometry.dtype))
    assert spec.output_size(geometry.size) == tuple(output.shape[2:])
    assert spec.weight_shape == tuple(conv.weight.shape)
    assert spec.params == sum(parameter.numel() for parameter in conv.parameters())
    input_shape = [1, geometry.in_channels, *geometry.size]
    assert spec.macs(geometry.size) == conv_flop_count(input_shape, conv.weight.shape, output.shape)


def test_costs_by_hand():
    spec = ConvSpec(8, 12, (5, 3), stride=(2, 1), padding=((2, 2), (1, 1)), groups=4, bias=True)
    assert spec.weight_shape == (12, 2, 5, 3)
    assert spec.params == 12 * 2 * 15 + 12
    assert spec.output_size((16, 10)) == (8, 10)
    assert spec.macs((16, 10)) == 80 * 12 * 2 * 15


def test_negative_padding_crops():
    spec = ConvSpec(1, 1, (1, 1), padding=((-1, 0), (-2, -1)))
    assert spec.output_size((5, 6)) == (4, 3)


def test_each_axis_of_the_geometry_goes_its_own_way():
    spec = ConvSpec(4, 6, (5, 3), (2, 3), ((2, 1), (0, 4)), (3, 2), 2, "reflect", bias=True)
    vertical = ConvSpec(4, 6, (5, 1), (2, 1), ((2, 1), (0, 0)), (3, 1), 2, "reflect", bias=True)
    horizontal = ConvSpec(4, 6, (1, 3), (1, 3), ((0, 0), (0, 4)), (1, 2), 2, "reflect", bias=True)
    assert spec.restricted_to((True, False)) == vertical
    assert spec.restricted_to((False, True)) == horizontal
    assert spec.restricted_to((True, True)) == spec
    pointwise = spec.restricted_to((False, False))
    assert pointwise == ConvSpec(4, 6, (1, 1), groups=2, padding_mode="reflect", bias=True)
    size = (20, 30)
    assert horizontal.output_size(vertical.output_size(size)) == spec.output_size(size)


def test_other_channels_keep_the_geometry():
    spec = ConvSpec(4, 6, (5, 3), (2, 3), ((2, 1), (0, 4)), (3, 2), 2, "reflect", bias=True)
    assert spec.with_channels(6, 9, 3, bias=False) == ConvSpec(
        6, 9, (5, 3), (2, 3), ((2, 1), (0, 4)), (3, 2), 3, "reflect", bias=False
    )


def test_a_chain_costs_the_sum_of_its_links_each_at_its_own_size():
    first = ConvSpec(3, 4, (3, 1), stride=(2, 1))
    second = ConvSpec(4, 5, (1, 3), bias=True)
    # 7 × 9 → 3 × 9 → 3 × 7
    assert chain_macs((first, second), (7, 9)) == 3 * 9 * 4 * 3 * 3 + 3 * 7 * 5 * 4 * 3
    assert chain_params((first, second)) == 4 * 3 * 3 + 5 * 4 * 3 + 5
    assert chain_macs((), (7, 9)) == chain_params(()) == 0
