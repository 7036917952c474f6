"""Modules take each other's place; everything around them stays. The oracle is the original model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sepconvert.network.layers import FactorizedConv2d

OLD_NORM = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def close(actual, expected, tolerance=1e-5):
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def x():
    return torch.randn(2, 6, 9, 11, generator=torch.Generator().manual_seed(0))


WRAPPERS = {
    "plain": lambda conv: conv,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": lambda conv: torch.nn.utils.weight_norm(conv),
    "old spectral norm": nn.utils.spectral_norm,
    "pruned": lambda conv: prune.identity(conv, "weight"),
}


@OLD_NORM
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_that_are_computed(wrap, training, planted, separated, x):
    model = nn.Sequential(wrap(planted(6, 8, padding=1)), nn.ReLU())
    model.train()(x)  # spectral norm estimates
    model.train(training)
    converted, names, _ = separated(model, x)
    assert names == {"0"}
    assert converted.training == converted[0].training == converted[0].branches[0][0].training == training
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))  # noqa: S301
    assert close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 2, "dilation": 2, "padding_mode": "reflect", "bias": False},
        {"groups": 2, "padding": (1, 2), "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_what_models_read_of_a_convolution(options, planted, separated, x):
    dense = planted(6, 8, **options)
    converted, names, _ = separated(nn.Sequential(dense), x)
    layer = converted[0]
    assert names == {"0"}
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode",
        "transposed", "output_padding",
    ):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name), name
    assert close(layer.weight, dense.weight)
    assert (layer.bias is None) == (dense.bias is None)
    assert dense.bias is None or torch.equal(layer.bias, dense.bias)
    assert close(layer(x), dense(x))


def test_the_model_may_be_one_convolution(planted, separated, x):
    dense = planted(6, 8)
    converted, names, _ = separated(dense, x)
    assert names == {""}
    assert isinstance(converted, FactorizedConv2d)
    assert close(converted(x), dense(x))


def test_shared_convolutions_stay_shared(planted, separated, x):
    conv = planted(6, 6, padding=1)
    block = nn.Sequential(conv, nn.ReLU())
    model = nn.ModuleDict({"a": nn.Sequential(conv), "b": block, "c": nn.Sequential(block, nn.ReLU())})

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["c"](self.parts["b"](self.parts["a"](x)))

    chain = Chain()
    converted, names, _ = separated(chain, x)
    assert names == {"parts.a.0"}
    layers = {
        id(converted.get_submodule(path)) for path in ("parts.a.0", "parts.b.0", "parts.c.0.0")
    }  # all one object
    assert len(layers) == 1
    assert close(converted(x), chain(x))
    assert not any(isinstance(module, nn.Conv2d) for module in model.modules() if module is not conv)


def test_frozen_parameters_stay_frozen(planted, separated, x):
    model = nn.Sequential(planted(6, 8).requires_grad_(False), planted(8, 8, seed=1))
    converted, _, _ = separated(model, x)
    assert {p.requires_grad for p in converted[0].parameters()} == {False}
    assert {p.requires_grad for p in converted[1].parameters()} == {True}


def test_hooks_are_kept_in_their_order_and_with_their_options(planted, separated, x):
    seen = []

    class Probe:
        """Deep-copied with the model, and yet the same list."""

        def __init__(self, name):
            self.name = name

        def __deepcopy__(self, memo):
            return self

        def __call__(self, module, *values):
            seen.append((self.name, len(values)))

    model = nn.Sequential(planted(6, 8), nn.ReLU())
    model[0].register_forward_pre_hook(Probe("before"))
    model[0].register_forward_pre_hook(Probe("before, keywords"), with_kwargs=True)
    model[0].register_forward_hook(Probe("after"))
    model[0].register_forward_hook(Probe("after, keywords"), with_kwargs=True, always_call=True)
    model[0].register_forward_hook(Probe("first"), prepend=True)
    model.register_forward_hook(Probe("root"))
    converted, names, _ = separated(model, x)
    assert names == {"0"}
    seen.clear()
    model(x)
    expected = list(seen)
    seen.clear()
    converted(x)
    assert seen == expected
    assert len(expected) == 6


def test_hooks_that_change_values(planted, separated, x):
    model = nn.Sequential(planted(6, 8))
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    model[0].register_forward_hook(lambda module, inputs, output: output - 1)
    converted, _, _ = separated(model, x)
    assert close(converted(x), model(x))


def test_the_original_is_left_alone(planted, separated, x):
    model = nn.Sequential(planted(6, 8), nn.BatchNorm2d(8), planted(8, 8, seed=1)).train()
    before, modules = copy.deepcopy(model.state_dict()), [id(module) for module in model.modules()]
    converted, _, _ = separated(model, x)
    with torch.no_grad():
        for value in converted.state_dict().values():
            value.zero_()
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_reach_the_factors(planted, separated, x):
    model = nn.Sequential(planted(6, 8), nn.Flatten(), nn.Linear(8 * 7 * 9, 3))
    converted, _, _ = separated(model, x)
    optimizer = torch.optim.SGD(converted.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = converted(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
