"""ONNX graphs of single layers, arranged to run as they do within a network."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from sepconvert.factorize.geometry import ConvSpec

_OPSET, _IR_VERSION = 20, 10  # those of torch's exporter

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def layer_onnx(branches: Sequence[Sequence[ConvSpec]], shape: Sequence[int]) -> bytes:
    """Return an ONNX model of a layer, for timing: chains of convolutions with random weights, summed.

    The layer stands between two poolings of one pixel, and a ReLU follows: the runtime then keeps its blocked
    layout around the layer, and fuses operators, as it does within a network.

    Args:
        branches: geometry of the convolutions of each chain.
        shape: N × C × H × W of the input.

    Returns:
        The serialised model, with the input `input`.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(value: npt.NDArray[Any]) -> str:
        constants.append(onnx.numpy_helper.from_array(value, f"constant_{len(constants)}"))
        return str(constants[-1].name)

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(operator, inputs, [f"value_{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def convolve(value: str, spec: ConvSpec) -> str:
        (top, bottom), (left, right) = spec.padding
        pads = [top, left, bottom, right]
        if min(pads) < 0 or spec.padding_mode != "zeros":
            # Padding comes before cropping, as in the layer itself.
            for part, mode in (([max(p, 0) for p in pads], _PAD_MODES[spec.padding_mode]),
                               ([min(p, 0) for p in pads], "constant")):  # fmt: skip
                if any(part):
                    widths = np.array([0, 0, *part[:2], 0, 0, *part[2:]])
                    value = add("Pad", value, constant(widths), mode=mode)
            pads = [0, 0, 0, 0]
        arrays = [rng.standard_normal(spec.weight_shape, np.float32)]
        if spec.bias:
            arrays.append(rng.standard_normal(spec.out_channels, np.float32))
        return add(
            "Conv", value, *map(constant, arrays), kernel_shape=spec.kernel_size, strides=spec.stride,
            dilations=spec.dilation, group=spec.groups, pads=pads,
        )  # fmt: skip

    pooled = add("MaxPool", "input", kernel_shape=[1, 1])
    total = ""
    for chain in branches:
        value = functools.reduce(convolve, chain, pooled)
        total = add("Add", total, value) if total else value
    add("MaxPool", add("Relu", total), kernel_shape=[1, 1])
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, list("nchw"))],
        constants,
    )
    opsets = [onnx.helper.make_opsetid("", _OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
