"""ONNX Runtime's activation functions pass, saturated or not; what is wrong behind them is still caught."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sepconvert.base.environment import Runtime
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.latency import Deployed, session
from sepconvert.measure.verification.activations import OPERATOR_ERRORS, ActivationErrors
from sepconvert.measure.verification.outputs import (
    Reference,
    compare_export,
    compare_runs,
    compare_with,
    reference,
)
from sepconvert.network.tensors import cast

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "softmax": lambda x: x.softmax(1),
    "softmin": lambda x: F.softmin(x, 1),
    "log_softmax": lambda x: x.log_softmax(1),
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "glu": lambda x: F.glu(x, 1),
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "tanhshrink": F.tanhshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "sigmoid in place": lambda x: (x + 0).sigmoid_(),
    "sigmoid as a gate": lambda x: x * (x - 4).sigmoid(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}
INPUTS = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LEVELS = {"low": -16.0, "below": -6.0, "middle": 0.0, "high": 16.0}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Saturated(nn.Module):
    """Convolutions whose outputs lie about `level`, and then activations, alone and before convolutions."""

    def __init__(self, names, level):
        super().__init__()
        self.names = names
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 4, 3, padding=1)
            self.third = nn.Conv2d(4, 2, 3)
            self.fourth = nn.Conv2d(2, 2, 3)
        self.second.bias.data += level

    def forward(self, x):
        logits = self.second(self.first(x).relu())
        activated = [ACTIVATIONS[name](logits) for name in self.names]
        inner = [self.fourth(self.third(a)) for a in activated if a.shape[1] == 4]
        return activated + inner


def in_runtime(model, expected, folder):
    """The outputs of a model in ONNX Runtime on the inputs of all cases."""
    save_onnx(export_program(model, (INPUTS,), dynamic_batch=False), folder / "model.onnx")
    runner = session(Deployed(folder / "model.onnx", Runtime(1)))
    return [
        [torch.from_numpy(np.asarray(each)).double() for each in runner.run(None, onnx_feed(model, inputs))]
        for inputs in (cast(inputs, expected.runtime) for inputs in expected.inputs)
    ]


@functools.cache
def alone(name, level, dtype):
    """A model of one activation, and its reference."""
    model = Saturated([name], level).to(dtype).eval()
    return model, reference(model, (INPUTS.to(dtype),), (), {}, 0)


# What is right


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype is torch.bfloat16)) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("level", LEVELS)
def test_activations_in_the_runtime_pass_in_every_place(level, dtype, tmp_path):
    overflows = dtype is torch.float16 and level == "high"
    names = [name for name in ACTIVATIONS if not (overflows and name in ("exp", "expm1"))]
    model = Saturated(names, LEVELS[level]).to(dtype).eval()
    expected = reference(model, (INPUTS.to(dtype),), (), {}, 0)
    runs = in_runtime(model, expected, tmp_path)
    inner = [name for name in names if name != "glu"]
    wrong = []
    for number, name in enumerate([*names, *(f"{name}, inside" for name in inner)]):
        cases = tuple(
            type(case)(case.inputs, [case.outputs[number]], (0.0,), (case.roundings[number],))
            for case in expected.cases
        )
        check = compare_export(
            Reference(cases, expected.dtype, expected.runtime), [[run[number]] for run in runs]
        )
        wrong += [] if check.holds else [(name, check)]
    assert wrong == []


def test_the_errors_that_pytorchs_rounding_does_not_explain_are_those_of_the_runtime(tmp_path):
    """ONNX Runtime's sigmoid of -16 is off by more than sixteen times what PyTorch's is."""
    model, expected = alone("sigmoid", -16.0, torch.float32)
    (run, *_) = in_runtime(model, expected, tmp_path)
    exact = expected.cases[0].outputs[0]
    by_torch = (model(INPUTS)[0].double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    assert (run[0] - exact).abs().max() > 16 * by_torch


# What is wrong


def wrong_kernel(model):
    model.first.weight.data[0, 0, 1, 1] += 0.05


def dropped_bias(model):
    model.first.bias.data.zero_()


def shifted_padding(model):
    model.first.padding = (0, 0)
    model.first.register_forward_pre_hook(lambda _, args: (F.pad(args[0], (2, 0, 1, 1)),))


@pytest.mark.parametrize("break_it", [wrong_kernel, dropped_bias, shifted_padding])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_error_before_a_saturated_activation_is_caught(name, level, break_it):
    model, expected = alone(name, LEVELS[level], torch.float32)
    broken = Saturated([name], LEVELS[level]).eval()
    break_it(broken)
    with torch.no_grad():
        runs = [[each.double() for each in broken(*inputs)] for inputs in expected.inputs]
        right = [[each.double() for each in model(*inputs)] for inputs in expected.inputs]
    assert compare_export(expected, right).holds
    assert not compare_export(expected, runs).holds


class Inner(Saturated):
    """The same convolutions; what the input adds to them varies, so that the output tells nothing of them."""

    def __init__(self, names, level):
        super().__init__(names, level)
        self.third.padding = (1, 1)

    def forward(self, x):
        activated = ACTIVATIONS[self.names[0]](self.second(self.first(x).relu()))
        return [x[:, :2] + self.third(activated if activated.shape[1] == 4 else activated.repeat(1, 2, 1, 1))]


@functools.cache
def inside(name, level):
    """A model of one activation inside, and its reference."""
    model = Inner([name], level).eval()
    return model, reference(model, (INPUTS,), (), {}, 0)


@pytest.mark.parametrize("break_it", [wrong_kernel, dropped_bias, shifted_padding])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["sigmoid", "silu", "softmax", "relu6"])
def test_an_error_before_a_saturated_activation_inside_is_caught(name, level, break_it):
    model, expected = inside(name, LEVELS[level])
    broken = Inner([name], LEVELS[level]).eval()
    break_it(broken)
    with torch.no_grad():
        right, wrong = (
            [[each.double() for each in net(*case)] for case in expected.inputs] for net in (model, broken)
        )
    assert compare_export(expected, right).holds
    assert not compare_export(expected, wrong).holds


class Limited(nn.Module):
    """A convolution, and functions that have no value beyond the range of the activation before them."""

    def __init__(self, name, level):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 2, 3)
        self.conv.bias.data += level
        self.function = LIMITED[name]

    def forward(self, x):
        return self.function(self.conv(x))


LIMITED = {
    "root of sigmoid": lambda x: x.sigmoid().sqrt(),
    "root of sech": lambda x: (1 - x.tanh() ** 2).sqrt(),
    "power of softmax": lambda x: x.softmax(1) ** 0.5,
    "arc of sine": lambda x: x.sin().asin(),
}


@pytest.mark.parametrize("level", [-30.0, -16.0, 0.0, 16.0])
@pytest.mark.parametrize("name", LIMITED)
def test_what_follows_has_a_value_though_an_activation_errs(name, level, tmp_path):
    model = Limited(name, level).eval()
    expected = reference(model, (INPUTS,), (), {}, 0)
    assert all(math.isfinite(rounding) for case in expected.cases for rounding in case.roundings)
    assert compare_export(expected, in_runtime(model, expected, tmp_path)).holds


class Overflowing(nn.Module):
    """An exponential, a part of whose values float16 does not hold."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.second.bias.data += 11

    def forward(self, x):
        return self.second(self.first(x).relu()).exp()


def test_values_beyond_the_range_of_the_dtype_are_left_out_and_the_others_compared(tmp_path):
    model, inputs = Overflowing().half().eval(), (INPUTS.half(),)
    expected = reference(model, inputs, (), {}, 0)
    (exact,) = expected.cases[0].outputs
    assert 0 < (exact > torch.finfo(torch.float16).max).double().mean() < 0.9
    assert compare_with(expected, model).holds
    runs = in_runtime(model, expected, tmp_path)
    assert runs[0][0].isinf().any()
    assert compare_export(expected, runs).holds
    assert compare_runs(expected, runs, runs).holds
    broken = Overflowing().half().eval()
    wrong_kernel(broken)
    assert not compare_with(expected, broken).holds
    assert not compare_export(expected, in_runtime(broken, expected, tmp_path)).holds


# The model of the errors


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if "place" not in name])
def test_every_activation_is_moved_by_its_bound_and_what_is_exact_is_not(name):
    x = torch.linspace(-8, 8, 64, dtype=torch.float64).reshape(1, 4, 4, 4)
    with ActivationErrors(1e-6, "equal", 0) as errors:
        moved = ACTIVATIONS[name](x) - ACTIVATIONS[name](x.clone())
    assert moved.abs().max() == 0  # both were moved alike
    with ActivationErrors(1e-6, "random", 0) as errors:
        moved = ACTIVATIONS[name](x)
    exact = {"softsign", "hardtanh", "relu6", "relu", "leaky_relu", "softshrink", "hardshrink"}
    assert bool(errors.count) == (name not in exact)
    difference = (moved - ACTIVATIONS[name](x)).abs().max()
    assert (difference > 1e-7) == (name not in exact)
    assert difference < 1e-3 * max(1, ACTIVATIONS[name](x).abs().max())


def test_activations_that_are_only_counted_are_not_moved():
    x = torch.linspace(-8, 8, 64)
    with ActivationErrors(1e-6, "none", 0) as errors:
        y = x.sigmoid()
    assert errors.count == 1
    assert torch.equal(y, x.sigmoid())


def test_saturated_activations_are_known_by_their_order():
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)
    with ActivationErrors(1e-7, "none", 0) as errors:
        F.relu(x), F.relu(x - 2), torch.sigmoid(x + 40), torch.tanh(x), F.relu6(x + 7), x[:1].sigmoid()
    assert errors.flat == {2, 3, 5}


def test_bounds_are_of_operators_that_torch_has():
    assert [name for name in OPERATOR_ERRORS if not hasattr(torch.ops.aten, name)] == []
