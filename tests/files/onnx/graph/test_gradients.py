"""Gradients of ONNX networks: those of torch, where torch computes the same; the reason, where not."""

import numpy as np
import pytest
import torch
from files.onnx.graph.onnx_cases import conv, kernel, model_of, node, value_of, values

from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.graph.gradients import add_gradients, demand_gradients
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.network.tensors import fresh

pytest.importorskip("onnx2pytorch")

X = torch.from_numpy(values(2, 4, 9, 10))


def net(operator="Relu", **attributes):
    """Two Convs with an operator between them, and a sum over both."""
    nodes = [
        conv("x v", "a"), node(operator, "a", "b", **attributes), conv("b w", "c"), node("Add", "b c", "y"),
    ]  # fmt: skip
    inputs = [value_of("x", "batch", 4, 9, 10)]
    padded = kernel(4, 4, 1, 1), kernel(4, 4, 1, 1, seed=1)
    opset = {"": 17, "com.microsoft": 1}
    return open_network(model_of(nodes, {"v": padded[0], "w": padded[1]}, inputs=inputs, opset=opset))


def test_gradients_are_those_of_the_same_network_in_torch():
    network = net()
    assert add_gradients(network, (X,)) is None
    network(X).square().sum().backward()
    v, w = (getattr(network, name).weight for name in ("a", "c"))
    theirs = [value.detach().clone().requires_grad_() for value in (v, w)]
    hidden = torch.conv2d(X, theirs[0]).relu()
    (hidden + torch.conv2d(hidden, theirs[1])).square().sum().backward()
    for mine, other in zip((v, w), theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_without_gradients_onnx_runtime_runs():
    network = net()
    before = network(*fresh((X,))).detach()
    assert not before.requires_grad
    assert add_gradients(network, (X,)) is None
    with torch.no_grad():
        assert torch.equal(network(X), before)


def test_an_operator_that_torch_lacks_is_the_reason():
    network = net("QuickGelu", domain="com.microsoft")
    reason = add_gradients(network, (X,))
    assert "QuickGelu" in reason
    with pytest.raises(SepconvertError, match=r"`finetune`: needs gradients, .*QuickGelu"):
        demand_gradients(reason, "finetune")


def test_a_translation_that_is_wrong_is_not_used(monkeypatch):
    import onnx2pytorch

    class Wrong(torch.nn.Module):
        def __init__(self, model, experimental):
            super().__init__()

        def forward(self, value):
            return 1.01 * value.relu()

    monkeypatch.setattr(onnx2pytorch, "ConvertModel", Wrong)
    network = net()
    assert "torch computes something else than ONNX Runtime" in add_gradients(network, (X,))
    assert not network(X).requires_grad


def test_gradients_are_not_demanded_where_there_are_some():
    demand_gradients(None, "finetune")


def test_norms_in_inference_mode_have_gradients():
    statistics = {name: np.abs(values(4, seed=seed)) + 0.5 for seed, name in enumerate("gbmv")}
    nodes = [
        conv("x w", "a"),
        node("BatchNormalization", "a g b m v", "n", training_mode=0),
        conv("n w", "y"),
    ]
    inputs = [value_of("x", "batch", 4, 9, 10)]
    network = open_network(model_of(nodes, {"w": kernel(4, 4, 1, 1), **statistics}, inputs=inputs))
    assert add_gradients(network, (X,)) is None
    assert torch.autograd.grad(network(X).sum(), network.a.weight)[0].abs().sum() > 0
