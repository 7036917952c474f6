"""Fake quantization of a model in training."""

import copy

import pytest
import torch
from torch import nn

from sepconvert.distillation.fake_quantization import with_fake_quantization, without_fake_quantization
from sepconvert.network.tensors import InputBatch

X = torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(1)) * 3 - 1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


def quantized(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Values rounded to 256 steps between the ends of a range that holds 0."""
    step = (max(high, 0.0) - min(low, 0.0)) / 255
    zero = round(-min(low, 0.0) / step)
    return ((values / step).round().add(zero).clamp(0, 255) - zero) * step


def test_kernels_and_inputs_are_rounded_as_int8_would():
    """Kernels per output channel, symmetric; inputs as a whole."""
    conv = nn.Conv2d(3, 6, 3)
    rounded = with_fake_quantization(nn.Sequential(conv), 127, InputBatch((X,)))
    step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    kernel = (conv.weight.detach() / step).round() * step
    x = quantized(X, float(X.min()), float(X.max()))
    expected = nn.functional.conv2d(x, kernel, conv.bias)
    torch.testing.assert_close(rounded(X), expected, atol=2e-5, rtol=1e-4)
    assert (rounded(X) - conv(X)).abs().max() > 1e-3


@pytest.mark.parametrize("levels", [127, 64])
def test_a_kernel_has_no_more_values_than_levels_allow(levels):
    rounded = with_fake_quantization(net(), levels, InputBatch((X,)))
    kernel = rounded[3].weight.detach()
    for channel in kernel:
        assert len(channel.unique()) <= 2 * levels + 1
        steps = channel / (channel.abs().max() / levels)
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_parameters_get_gradients_through_the_rounding():
    rounded = with_fake_quantization(net(), 127, InputBatch((X,)))
    rounded(X).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in rounded.parameters())


def test_the_model_is_left_as_it_is():
    model = net()
    before, expected = copy.deepcopy(model.state_dict()), model(X)
    with_fake_quantization(model, 127, InputBatch((X,)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), expected)
    assert type(model[0]) is nn.Conv2d


def test_what_was_trained_is_taken_over_without_the_rounding():
    model = net()
    rounded = with_fake_quantization(model, 127, InputBatch((X,)))
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1.5)
        rounded[1].running_mean.add_(0.25)
    found = without_fake_quantization(rounded, model)
    assert list(found.state_dict()) == list(model.state_dict())
    assert torch.equal(found[3].weight, 1.5 * model[3].weight)
    assert torch.equal(found[1].running_mean, model[1].running_mean + 0.25)
    assert type(found[0]) is nn.Conv2d
    # The rounded one is left as it is, and so are copies of it.
    assert torch.isfinite(copy.deepcopy(rounded)(X)).all()


def test_layers_that_are_kept_are_not_rounded():
    model = net()
    rounded = with_fake_quantization(model, 127, InputBatch((X,)), kept={"0", "3", "5"})
    assert torch.equal(rounded(X), model(X))
    rounded = with_fake_quantization(model, 127, InputBatch((X,)), kept={"0"})
    assert torch.equal(rounded[0].weight, model[0].weight)
    assert not torch.equal(rounded[3].weight, model[3].weight)
