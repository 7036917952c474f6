"""Graphs of single layers compute what the layer computes. The oracle is PyTorch."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from strategies import geometries, numbered, spec_of
from torch import nn
from torch.nn import functional as F

from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.factorize.exact.factors import branches as branches_of
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.factorize.structures import FORMS
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.network.layers import FactorizedConv2d

PLAIN = ConvSpec(4, 6, (3, 1), padding=((1, 1), (0, 0)), bias=True)
LAYERS = {
    "one convolution": [[PLAIN]],
    "a chain": [[PLAIN, ConvSpec(6, 6, (1, 5), stride=(2, 1), dilation=(1, 2), groups=3)]],
    "branches": [[PLAIN], [ConvSpec(4, 2, (1, 1)), ConvSpec(2, 6, (1, 1), bias=True)]],
    "asymmetric padding": [[ConvSpec(4, 6, (2, 4), padding=((0, 1), (2, 1)))]],
    "cropping": [[ConvSpec(4, 6, (3, 3), padding=((-1, 2), (0, -2)))]],
    **{
        mode: [[ConvSpec(4, 6, (3, 3), padding=((1, 1), (2, 0)), padding_mode=mode)]]
        for mode in ("reflect", "replicate", "circular")
    },
}


def computed(branches, x, weights):
    total = 0
    for chain in branches:
        value = x
        for spec in chain:
            (top, bottom), (left, right) = spec.padding
            mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
            value = F.pad(value, [max(side, 0) for side in (left, right, top, bottom)], mode=mode)
            value = F.pad(value, [min(side, 0) for side in (left, right, top, bottom)])
            kernel = next(weights)
            bias = next(weights) if spec.bias else None
            value = F.conv2d(value, kernel, bias, spec.stride, 0, spec.dilation, spec.groups)
        total = total + value
    return total.relu()


@pytest.mark.parametrize("branches", LAYERS.values(), ids=LAYERS)
def test_the_graph_computes_the_layer(branches):
    x = torch.randn(2, 4, 11, 12, generator=torch.Generator().manual_seed(0))
    content = layer_onnx(branches, x.shape)
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": x.numpy()})
    constants = map(numpy_helper.to_array, onnx.load_from_string(content).graph.initializer)
    weights = (torch.tensor(value) for value in constants if value.dtype == np.float32)
    with torch.no_grad():
        expected = computed(branches, x, weights)
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_same_layer_is_the_same_file():
    """Times are remembered by what is timed."""
    assert layer_onnx([[PLAIN]], (1, 4, 8, 8)) == layer_onnx([[PLAIN]], (1, 4, 8, 8))


@numbered(120)
@given(geometries(), st.data())
def test_the_model_that_is_timed_is_the_layer(geometry, data):
    spec = spec_of(geometry.conv())
    offered = [ZERO_BORDER, *(name for name, form in FORMS.items() if form.applies(spec))]
    scheme = data.draw(st.sampled_from(offered))
    rank = 0 if scheme == ZERO_BORDER else data.draw(st.integers(1, FORMS[scheme].full_rank(spec)))
    x = torch.randn(2, *geometry.inputs().shape[-3:])
    model = onnx.load_model_from_string(layer_onnx(branches_of(spec, scheme, rank, Border()), x.shape))
    onnx.checker.check_model(model, full_check=True)
    layer = FactorizedConv2d(spec, scheme, rank, Border())
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    for convolution, node in zip(layer.convolutions, nodes, strict=True):
        for name, constant in zip(("weight", "bias"), node.input[1:], strict=False):
            setattr(convolution, name, nn.Parameter(torch.from_numpy(weights[constant].copy())))
    expected = layer(x).relu().detach()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"input": x.numpy()})
    scale = float(expected.abs().max()) or 1.0
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4 * scale)
