"""The demo's network: trained, small, deployable, and structured as documented."""

from importlib.resources import files

import numpy as np
import onnxruntime
import pytest
import torch

from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import CHECKPOINT, DigitNet, load, to_input
from sepconvert.cli.demo.train import RANK, accuracy

PLAIN = ["stem", "block.0", "block.1", "narrow", "head"]


@pytest.fixture(scope="module")
def net() -> DigitNet:
    return load()


def kernel(net: DigitNet, layer: str) -> np.ndarray:
    """Return the kernel of `layer` as float64 O×C×K×K."""
    return net.get_submodule(layer).conv.weight.detach().double().numpy()


def rank(matrix: np.ndarray) -> int:
    """Count the singular values above float32's rounding of the weights."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > values[0] * max(matrix.shape) * np.finfo(np.float32).eps).sum())


def spatial_unfolding(weight: np.ndarray) -> np.ndarray:
    outputs, inputs, height, width = weight.shape
    return weight.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width)


def test_the_network_is_trained(net):
    assert not net.training
    assert 0.9 < accuracy(net, evaluation_data(500)) < 1


def test_the_network_is_small(net):
    assert sum(parameter.numel() for parameter in net.parameters()) <= 170_000
    assert len((files("sepconvert.cli.demo") / CHECKPOINT).read_bytes()) < 700_000


@pytest.mark.parametrize("layer", ["contrast.window", "blur1.binomial", "blur2.binomial", "edges.sobel"])
def test_filters_are_rank_one_in_each_channel(net, layer):
    for plane in net.get_buffer(layer).double().numpy()[:, 0]:
        assert rank(plane) == 1


def test_smoothing_filters_keep_the_mean(net):
    for layer in ["contrast.window", "blur1.binomial", "blur2.binomial"]:
        np.testing.assert_allclose(net.get_buffer(layer).sum(dim=(1, 2, 3)), 1, rtol=1e-6)


def test_large_has_the_rank_of_the_pair_it_was_trained_as(net):
    assert rank(spatial_unfolding(kernel(net, "large"))) == RANK


def test_half_of_the_filters_of_widen_are_zero(net):
    weight = kernel(net, "widen")
    assert (weight != 0).any(axis=(1, 2, 3)).sum() == 32
    assert rank(weight.reshape(64, -1)) == 32


def test_elastic_is_zero_but_for_its_core(net):
    weight = kernel(net, "elastic")
    assert (weight[:, :, 1:4, 1:4] != 0).all()
    weight[:, :, 1:4, 1:4] = 0
    assert not weight.any()


@pytest.mark.parametrize("layer", PLAIN)
def test_plain_layers_have_full_rank(net, layer):
    weight = kernel(net, layer)
    spatial, outputs = spatial_unfolding(weight), weight.reshape(len(weight), -1)
    inputs = weight.transpose(1, 0, 2, 3).reshape(weight.shape[1], -1)
    for matrix in (spatial, outputs, inputs):
        assert rank(matrix) == min(matrix.shape)


@pytest.mark.parametrize("batch", [1, 5])
def test_exports_to_onnx_with_a_dynamic_batch(net, onnx_session, batch):
    x = to_input(evaluation_data(batch).x)
    with torch.no_grad():
        expected = net(x).numpy()
    (actual,) = onnx_session.run(None, {onnx_session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_session(net) -> onnxruntime.InferenceSession:
    example = to_input(evaluation_data(2).x)
    program = torch.onnx.export(
        net, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def test_traces_symbolically(net):
    traced = torch.fx.symbolic_trace(net)
    x = to_input(evaluation_data(2).x)
    torch.testing.assert_close(traced(x), net(x))
