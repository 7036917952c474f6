"""Calls of convolutions, as they are seen, described and made in another way."""

import pytest
import torch
from strategies import spec_of
from torch import nn
from torch.nn import functional as F

from sepconvert.network.calls import ConvolutionInterceptor, convolution_name, substitute

OPTIONS = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "grouped": {"groups": 2, "bias": False},
    "same": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
}


def calls_of(model, *inputs):
    found = []

    def on_call(call):
        found.append(call)
        return call.run()

    with torch.no_grad(), ConvolutionInterceptor(model, on_call).watching():
        model(*inputs)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_geometry_of_a_call(options):
    layer, x = nn.Conv2d(4, 6, **{"kernel_size": 3, **options}), torch.randn(2, 4, 9, 11)
    [call] = calls_of(nn.Sequential(layer), x)
    assert call.spec == spec_of(layer)
    assert call.spec.output_size((9, 11)) == tuple(layer(x).shape[-2:])
    assert call.macs(layer(x)) == 2 * call.spec.macs((9, 11))
    assert (call.module, call.place, call.function) == (layer, ("0", 0), "conv2d")


def test_padding_of_other_modes_is_in_the_input():
    layer = nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular")
    [call] = calls_of(nn.Sequential(layer), torch.randn(1, 4, 9, 11))
    assert call.spec.padding == ((0, 0), (0, 0))
    assert call.arguments["input"].shape == (1, 4, 13, 15)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.inner = torch.randn(3, 3, 1, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.inner(F.conv2d(x, self.kernel))
        return F.conv2d(x, 2 * self.kernel)


def test_places_count_the_calls_of_one_forward():
    calls = calls_of(nn.Sequential(Twice()), torch.randn(1, 3, 4, 4))
    assert [call.place for call in calls] == [("0", 0), ("0.inner", 0), ("0", 1)]
    assert [call.name for call in calls[::2]] == ["conv2d_0", "conv2d_1"]
    assert calls[0].same_kernel(calls[0])
    assert not calls[0].same_kernel(calls[2])


def test_names_that_are_taken():
    model = Twice()
    model.conv2d_0 = nn.Identity()
    assert calls_of(model, torch.randn(1, 3, 4, 4))[0].name == "conv2d_0_"


def test_other_kernels_are_run_while_it_is_watched():
    model, x = Twice(), torch.randn(1, 3, 4, 4)
    weight, bias = torch.randn(3, 3, 1, 1).double(), torch.randn(3).double()
    expected = model(x)
    with torch.no_grad(), substitute(model, {("inner", 0): (weight, bias)}).watching():
        actual = model(x)
        outer = F.conv2d(F.conv2d(F.conv2d(x, model.kernel), weight.float(), bias.float()), 2 * model.kernel)
    assert torch.equal(actual, outer)
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_names_of_functions():
    names = [F.conv2d, torch.conv1d, torch.ops.aten.conv2d.default, torch.ops.aten.convolution, F.relu, {}]
    assert [convolution_name(each) for each in names] == [
        "conv2d",
        "conv1d",
        "conv2d",
        "convolution",
        None,
        None,
    ]
