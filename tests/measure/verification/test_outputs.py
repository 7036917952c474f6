"""A right conversion passes, and a wrong one is caught, however little is wrong."""

import copy

import numpy as np
import pytest
import torch
from exact_kernels import conv_with, factors
from strategies import ROUNDOFF, plant
from torch import nn
from torch.nn import functional as F

from sepconvert.measure.verification.outputs import (
    OutputCheck,
    compare_export,
    compare_runs,
    compare_with,
    float64_outputs,
    random_like,
    reference,
)
from sepconvert.network.copies import private_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.trace import trace, traced

INPUTS = torch.randn(2, 6, 12, 11, generator=torch.Generator().manual_seed(0))


# The whole model


class Heads(nn.Module):
    """A stem and two heads, the second with small outputs."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.stem = conv_with()
        self.norm = nn.BatchNorm2d(10)
        self.left = nn.Conv2d(10, 4, 3)
        self.right = nn.Conv2d(10, 4, 3)
        weight = plant("spatial-hv", {"g": 1, "o": 4, "c": 10, "i": 3, "j": 3}, 2, np.random.default_rng(1))
        self.right.weight.data = torch.from_numpy(weight).float() * 1e-3
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.to(dtype)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return {"left": self.left(x), "aux": (self.right(x), self.steps, "text"), "none": None}


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    model = Heads(dtype).eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return model


def conversion(model, inputs, schemes):
    """(sites, converted model, tolerances by layer)"""
    found = traced(model, inputs)
    sites = found.sites
    replacements, tolerances = {}, {}
    for site in sites:
        if site.name in schemes:
            factorization = factors(model.get_submodule(site.name), schemes[site.name])
            assert factorization.certificate.holds
            replacements[site.name] = Replacement(
                factorization.scheme,
                factorization.rank,
                factorization.border,
                factorization.weights,
                site.conv.bias,
            )
            tolerances[site.name] = factorization.certificate.channel_tolerance
    return sites, rewrite(found, replacements), tolerances


SCHEMES = {"stem": "spatial-vh", "right": "spatial-hv"}


def judged(dtype, change):
    """The verdict on a conversion to which `change` was done afterwards."""
    model = model_of(dtype)
    inputs = (INPUTS.to(dtype),)
    sites, converted, tolerances = conversion(model, inputs, SCHEMES)
    assert isinstance(converted.stem, FactorizedConv2d)
    expected = reference(model, inputs, sites, tolerances, 0)
    assert expected.dtype == torch.float64
    with torch.no_grad():
        change(converted)
    return compare_with(expected, converted)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_conversion_passes(dtype):
    comparison = judged(dtype, lambda model: None)
    assert comparison.holds
    assert comparison.dtype == "float64"
    assert 0 < comparison.max_abs_diff <= comparison.tolerance


def kernel_of_stem(relative):
    def change(model):
        model.stem.convolutions[0].weight *= 1 + relative

    return change


def one_channel_of_stem(relative):
    def change(model):
        model.stem.convolutions[1].weight[3] *= 1 + relative

    return change


def head(relative):
    """The head whose outputs are a thousand times smaller than the other's."""

    def change(model):
        model.right.convolutions[1].weight *= 1 + relative

    return change


def untouched(relative):
    """A layer that was not converted at all has no excuse."""

    def change(model):
        model.left.weight *= 1 + relative

    return change


def bias(relative):
    def change(model):
        model.stem.bias.add_(10 * relative)  # outputs are of that order

    return change


@pytest.mark.parametrize("change", [kernel_of_stem, one_channel_of_stem, head, untouched, bias])
@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.float32, 5e-4)],
    ids=str,
)
def test_a_slightly_wrong_conversion_is_caught(change, dtype, relative):
    assert not judged(dtype, change(relative)).holds


@pytest.mark.parametrize("change", [kernel_of_stem, head])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_hide_no_more_than_their_rounding(change, dtype):
    """Bounds of narrow types are wide; a factor of two is still beyond them."""
    assert not judged(dtype, change(1.0)).holds


def test_an_output_that_is_not_a_number_is_caught():
    def change(model):
        model.right.bias[0] = np.nan

    comparison = judged(torch.float32, change)
    assert not comparison.holds
    assert np.isnan(comparison.max_abs_diff)


class OneHead(Heads):
    def forward(self, x):
        return super().forward(x)["left"]


def test_another_number_of_outputs_is_an_error():
    model = model_of()
    expected = reference(model, (INPUTS,), (), {}, 0)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        compare_with(expected, OneHead().eval())


def test_all_tensors_among_the_outputs_count():
    left, right, steps = float64_outputs(model_of(), (INPUTS,))
    assert left.dtype == right.dtype == steps.dtype == torch.float64
    assert left.shape == right.shape == (2, 4, 10, 9)
    assert not left.requires_grad
    expected = model_of()(INPUTS)
    assert torch.equal(left, expected["left"].double())
    assert torch.equal(right, expected["aux"][0].double())


def test_an_unconverted_model_must_be_the_same_but_for_float64s_rounding():
    model = model_of()
    expected = reference(model, (INPUTS,), trace(private_copy(model), (INPUTS,)), {}, 0)
    comparison = compare_with(expected, model)
    assert comparison.max_abs_diff == 0
    assert comparison.tolerance < 1e-12
    assert comparison.holds


def test_the_tolerance_grows_with_what_the_certificates_permit():
    model = model_of()
    sites = trace(private_copy(model), (INPUTS,))
    widths = []
    for tolerance in (0.0, 1e-6, 1e-4):
        expected = reference(model, (INPUTS,), sites, {"stem": tolerance}, 0)
        widths.append(expected.cases[0].tolerances)
    for nothing, little, much in list(zip(*widths, strict=True))[:2]:
        assert nothing < 0.01 * little
        assert 50 * little < much < 200 * little
    # a head's own tolerance concerns that head alone
    expected = reference(model, (INPUTS,), sites, {"right": 1e-4}, 0)
    assert expected.cases[0].tolerances[0] == widths[0][0]
    assert expected.cases[0].tolerances[1] > 100 * widths[0][1]


@pytest.mark.parametrize("index", [0, 1])
def test_no_error_that_a_certificate_permits_is_called_wrong(index):
    """Every kernel element moved by τ|W|, all in one direction or in random ones: the function may follow."""
    model = model_of()
    inputs = (INPUTS,)
    sites = trace(private_copy(model), inputs)
    tau = 1e-4
    expected = reference(model, inputs, sites, {"stem": tau, "right": tau}, 0)
    generator = torch.Generator().manual_seed(0)
    for layer in (model.stem, model.right):
        signs = torch.randint(0, 2, layer.weight.shape, generator=generator) * 2.0 - 1
        layer.weight.data *= 1 + tau * (signs if index else 1)
    assert compare_with(expected, model).holds


class Float32Only(nn.Module):
    """A forward that insists on its dtype."""

    def __init__(self):
        super().__init__()
        self.conv = conv_with()

    def forward(self, x):
        return self.conv(x.float() + torch.ones(1)).to(torch.float32)


def test_a_model_of_fixed_dtype_is_compared_in_its_own():
    model = Float32Only().eval()
    sites, converted, tolerances = conversion(model, (INPUTS,), {"conv": "spatial-vh"})
    expected = reference(model, (INPUTS,), sites, tolerances, 0)
    assert expected.dtype == torch.float32
    comparison = compare_with(expected, converted)
    assert comparison.holds
    assert comparison.dtype == "float32"
    with torch.no_grad():
        converted.conv.convolutions[0].weight *= 1.001
    assert not compare_with(expected, converted).holds


def test_neither_model_is_changed_by_the_comparison():
    model = model_of().train()
    state = copy.deepcopy(model.state_dict())
    inputs = (INPUTS,)
    sites, converted, tolerances = conversion(model, inputs, SCHEMES)
    compare_with(reference(model, inputs, sites, tolerances, 0), converted)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    for each in (model, converted):
        assert each.training
        assert each.norm.training
        assert each.stem.weight.dtype == torch.float32


def test_runtimes_may_differ_by_their_own_rounding_and_no_more():
    model = model_of()
    expected = reference(model, (INPUTS,), (), {}, 0)
    exact = [case.outputs for case in expected.cases]
    u = ROUNDOFF[torch.float32]

    def moved(times):
        return [[out + times * u * out.abs().max() for out in outs] for outs in exact]

    export = compare_export(expected, moved(8))
    runs = compare_runs(expected, moved(8), moved(-8))
    assert export.holds
    assert runs.holds
    assert export.dtype == runs.dtype == "float32"
    assert not compare_runs(expected, moved(8), moved(1000)).holds
    # A wrong export of the original is no excuse for the converted one.
    assert not compare_export(expected, moved(1000)).holds
    nan = [[out * np.nan for out in outs] for outs in exact]
    assert not compare_runs(expected, moved(1), nan).holds
    assert not compare_export(expected, nan).holds


def test_a_comparison_compares():
    assert OutputCheck(1.0, 1.0, "float64").holds
    assert not OutputCheck(1.1, 1.0, "float64").holds
    assert not OutputCheck(float("nan"), 1.0, "float64").holds
    assert not OutputCheck(1.0, float("nan"), "float64").holds
    assert OutputCheck(1e9, None, "float64").holds


def test_random_inputs_are_normal_seeded_and_of_the_same_kind():
    inputs = (torch.zeros(3, 4, 50, 50, dtype=torch.float16), torch.arange(5), None, 2)
    once, again, other = random_like(inputs, 0), random_like(inputs, 0), random_like(inputs, 1)
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[0], other[0])
    assert once[0].dtype == torch.float16
    assert once[0].shape == inputs[0].shape
    assert abs(float(once[0].double().std()) - 1) < 0.02
    assert once[1] is inputs[1]
    assert once[2:] == (None, 2)
