"""Exact mode: what is converted, what is kept, and why."""

import json

import numpy as np
import pytest
import torch
from conversions import close, convert, decided, decisions, fvcore_macs
from torch import nn
from torch.nn import functional as F

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.network.layers import FactorizedConv2d

CONVERTED = {"stem", "conv2d_0", "body.0"}


def test_layers_under_autocast_are_compared_in_the_dtype_of_their_kernels(planted):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(planted(3, 8), planted(8, 8, seed=1))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.convs(x).float()

    model, x = Cast().eval(), torch.randn(2, 3, 12, 12)
    result = decided(model, x, gate="none")
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"] * 2
    with torch.no_grad():
        expected, actual = model(x), result.model(x)
    # Two roundings to bfloat16 in place of one, in each of two layers.
    assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert not torch.equal(actual, expected)


def test_the_model_is_a_convolution(planted, x):
    dense = planted(3, 8).eval()
    result = decided(dense, x)
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"]
    assert isinstance(result.model, FactorizedConv2d)
    assert close(result.model(x), dense(x))


def test_a_kernel_of_zeros(x):
    model = nn.Conv2d(3, 8, 3)
    nn.init.zeros_(model.weight)
    result = decided(model, x)
    assert [layer["decision"] for layer in result.report["layers"]] == ["converted"]
    assert torch.equal(result.model(x), model(x))
    assert result.report["layers"][0]["weight_error"] == 0


class Filters(nn.Module):
    """An image pipeline, all functional."""

    def __init__(self):
        super().__init__()
        smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
        gauss = torch.exp(-(torch.arange(11) - 5.0).square() / 8).double()
        binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("sobel", torch.outer(smooth, slope)[None, None])
        self.register_buffer("scharr", torch.outer(slope, torch.tensor([3.0, 10.0, 3.0]))[None, None])
        self.register_buffer("binomial", torch.outer(binomial, binomial)[None, None])
        self.register_buffer("gauss", (torch.outer(gauss, gauss) / gauss.sum() ** 2).float()[None, None])

    def forward(self, x):
        smooth = F.conv2d(F.conv2d(x.mean(1, keepdim=True), self.gauss, padding=5), self.binomial, padding=2)
        return F.conv2d(smooth, self.sobel).square() + F.conv2d(smooth, self.scharr).square()


def test_an_image_pipeline(x):
    model = Filters()
    result = decided(model, x)
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert [layers[f"conv2d_{index}"]["macs"] for index in range(2)] == [
        [144 * 121, 144 * 22],
        [144 * 25, 144 * 10],
    ]
    assert [layers[f"conv2d_{index}"]["decision"] for index in range(2)] == ["converted", "converted"]
    # A rank-one 3×3 filter without padding: the first factor has 10×12 outputs, or 12×10.
    for index in (2, 3):
        assert layers[f"conv2d_{index}"]["decision"] == "converted"
        assert layers[f"conv2d_{index}"]["macs"] == [900, 120 * 3 + 100 * 3]
    for name, each in (("original", model), ("converted", result.model)):
        assert result.report[name]["macs"] == fvcore_macs(each, x) / 2
    assert isinstance(result.model, Filters)
    images = torch.randn(3, 3, 30, 17)
    assert close(result.model(images), model(images), 1e-4)
    assert result.report["original"]["params"] == result.report["converted"]["params"] == 0


def test_globs(net, x):
    chosen = decided(
        net, x, selection=sepconvert.Selection(include=("body.*", "stem"), exclude=("*.0",))
    ).report
    assert {name for name, decision in decisions(chosen).items() if decision == "converted"} == {"stem"}
    assert {layer["reason"] for layer in chosen["layers"] if layer["name"] in ("conv2d_0", "body.0")} == {
        "not selected"
    }


@pytest.mark.slow
def test_the_gate_of_measured_time(net, x):
    timed = convert(net, x, gate="latency", timing=sepconvert.Timing(runs=5)).report
    for layer in timed["layers"]:
        assert (layer["decision"] == "kept") == (layer["scheme"] is None)
    # What has a structure is converted, or was measured to be no faster.
    for layer in (each for each in timed["layers"] if each["name"] in CONVERTED):
        assert (layer["decision"] == "kept") == ("is measured" in layer["reason"])
    assert timed["verification"]["passed"]


def test_inspect_decides_as_convert_does(net, x, conversion):
    found = sepconvert.inspect(net, x).to_json()
    keys = ("name", "decision", "reason", "scheme", "rank", "macs", "params", "weight_error", "structures")
    for inspected, converted in zip(found["layers"], conversion[0].report["layers"], strict=True):
        assert {key: inspected[key] for key in keys} == {key: converted[key] for key in keys}
        assert all("best_relative_error" in structure for structure in inspected["structures"])
    json.dumps(found, allow_nan=False)


def test_tolerance(planted, x):
    """A kernel off by 1e-3 is exact only if that is asked for."""
    model = nn.Sequential(planted(3, 8))
    noise = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(5))
    weight = model[0].weight.data
    weight += 3e-4 * noise * (weight.norm() / noise.norm())
    assert decisions(sepconvert.inspect(model, x).to_json()) == {"0": "kept"}
    result = decided(model, x, tol=1e-3)
    assert decisions(result.report) == {"0": "converted"}
    assert 1e-6 < result.report["layers"][0]["weight_error"] <= 1e-3
    assert result.plan["tol"] == 1e-3
    with torch.no_grad():
        assert 0 < (result.model(x) - model(x)).norm() / model(x).norm() < 3e-3


class Standardised(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "ScaledStdConv2d"])
@pytest.mark.filterwarnings("ignore::FutureWarning:timm")
def test_subclasses_of_timm(name, planted, x):
    layers = pytest.importorskip("timm.layers")
    conv = getattr(layers, name)(8, 8, 3, **({"stride": 2} if name == "Conv2dSame" else {"padding": 1}))
    conv.weight.data = planted(8, 8, rank=1).weight.data
    model, images = Standardised(conv).eval(), torch.randn(2, 8, 13, 13)
    result = decided(model, images, gate="none")
    [layer] = result.report["layers"]
    if name == "Conv2dSame":
        assert layer["decision"] == "kept"
        assert "does more than convolve its input" in layer["reason"]
    else:  # subtracting the mean adds one to the rank
        assert (layer["decision"], layer["rank"]) == ("converted", 2)
        torch.testing.assert_close(result.model(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_kernels_that_are_not_finite_are_kept_and_the_others_converted(planted, x, value, broken):
    layers = [planted(3, 8), planted(8, 4)]
    model = nn.Sequential(*layers)
    model[broken].weight.data[0, 0, 0, 0] = value
    result = decided(model, x)
    assert decisions(result.report) == {str(broken): "kept", str(1 - broken): "converted"}
    assert "NaN or Inf" in result.report["layers"][broken]["reason"]
    assert result.report["verification"]["passed"]


class ReadsAWeight(nn.Module):
    """A functional convolution, beside a look at the kernel of a layer that is replaced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("blur", torch.outer(line, line).repeat(8, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(self.layer(x), self.blur, groups=8) + self.layer.weight.mean()


def test_a_forward_may_read_the_weight_of_a_replaced_layer(planted, x):
    model = ReadsAWeight(planted(3, 8, 5))
    result = decided(model, x)
    assert decisions(result.report) == {"layer": "converted", "conv2d_0": "converted"}
    assert close(result.model(x), model(x))


def test_a_kernel_shared_by_two_layers_stays_shared(planted, x):
    model = nn.Sequential(planted(3, 3, 5, rank=1, padding=2), nn.ReLU(), nn.Conv2d(3, 3, 5))
    model[2].weight = model[0].weight
    result = decided(model, x)
    assert decisions(result.report) == {"0": "kept", "2": "kept"}
    assert all("shared with" in layer["reason"] for layer in result.report["layers"])
    assert result.model[2].weight is result.model[0].weight


def test_what_is_within_tol_only_is_not_called_exact(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 5))
    (layer,) = decided(model, x, tol=0.5).report["layers"]
    assert layer["decision"] == "converted"
    assert not layer["exact"]
    assert "within the tolerance only" in layer["reason"]
    assert layer["weight_error"] > 1e-3


def test_a_glob_that_matches_nothing_is_an_error(planted, x):
    with pytest.raises(SepconvertError, match="nosuch: matches none of the 1 convolutions"):
        decided(planted(3, 8), x, selection=sepconvert.Selection(include=["nosuch"]))


class HoldsATensor(nn.Module):
    """A kernel that is neither parameter nor buffer, and so does not follow `.double()`."""

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.kernel = torch.outer(line, line)[None, None].repeat(3, 1, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=3)


def test_plain_tensors_follow_to_float64(x):
    result = decided(HoldsATensor(), x)
    assert decisions(result.report) == {"conv2d_0": "converted"}
    assert result.report["verification"]["torch_dtype"] == "float64"
