"""Converted models compute what the originals do in ONNX Runtime, and all else is as it was, byte by byte."""

import numpy as np
import onnx
import pytest
import torch
from files.onnx.graph.onnx_cases import (
    FLOAT,
    assert_all_else_is_kept,
    assert_close,
    composed,
    conv,
    feed_of,
    kernel,
    model_of,
    node,
    one_conv,
    outputs_of,
    run,
    saved_apart,
    separable,
    sparse_rows,
    two_branches,
    value_of,
    values,
    vertical_horizontal,
)
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import put, submodule
from sepconvert.factorize.border import Border
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.network.layers import FactorizedConv2d

BIAS = values(8, seed=9)


def convert(model, inputs=None, **arguments):
    """The result of an exact conversion."""
    return sepconvert.convert(model, inputs, "exact", timing=sepconvert.Timing(runs=0), **arguments)


def kinds(model):
    """The operators of a model, in order."""
    return [each.op_type for each in model.graph.node]


def replace(network, name, scheme, rank, factors, bias=None, border=Border()):  # noqa: B008
    """Put factors in the place of a layer, whose geometry they take over."""
    layer = submodule(network, name)
    (top, left) = layer.padding
    spec = ConvSpec(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, ((top, top), (left, left)),
        layer.dilation, layer.groups, bias=bias is not None,
    )  # fmt: skip
    module = FactorizedConv2d(spec, scheme, rank, border)
    tensors = [torch.from_numpy(np.ascontiguousarray(factor)).to(layer.weight.dtype) for factor in factors]
    module.set_factors(tensors, None if bias is None else torch.from_numpy(bias))
    put(network, name, module)


def assert_converted(original, converted, *, nodes, weights=(), tolerance=2e-5, feed=None, check=True):
    """Hold a converted model against the original: its outputs, its form, and all that is not replaced."""
    if check:
        onnx.checker.check_model(converted, full_check=True)
    feed = feed_of(original) if feed is None else feed
    assert_close(run(converted, feed), run(original, feed), tolerance)
    assert_close(run(converted, feed, optimised=False), run(original, feed, optimised=False), tolerance)
    assert_all_else_is_kept(original, converted, nodes=nodes, weights=weights)


# Factors put in the place of a layer ----------------------------------------------------------------

GEOMETRIES = {
    "no bias": {},
    "bias": {"bias": BIAS},
    "pads": {"bias": BIAS, "pads": [1, 1, 1, 1]},
    "asymmetric pads, stride": {"bias": BIAS, "pads": [1, 0, 2, 3], "strides": [2, 1]},
    "dilation": {"pads": [2, 3, 2, 3], "dilations": [2, 3]},
    "dilation, asymmetric pads": {"pads": [0, 3, 2, 1], "dilations": [2, 3]},
    "groups": {"bias": BIAS, "group": 2, "pads": [1, 1, 1, 1]},
    "kernel_shape": {"kernel_shape": [3, 3], "auto_pad": "NOTSET", "pads": [1, 2, 1, 2]},
    **{
        f"{mode}, {size[2]}×{size[3]}": {
            "bias": BIAS, "auto_pad": mode, "strides": [2, 2], "shape": size
        }
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for size in (("n", 4, 8, 9), ("n", 4, 9, 8))
    },
    "SAME_LOWER, strides that differ": {"auto_pad": "SAME_LOWER", "strides": [1, 2]},
    "IR 3": {"bias": BIAS, "ir": 3, "opset": 8, "pads": [1, 1, 1, 1]},
    "IR 4, overridable": {"bias": BIAS, "ir": 4, "opset": 9, "defaults": ("w", "b")},
    "opset 22": {"ir": 10, "opset": 22, "pads": [1, 1, 1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_factors_compute_what_the_convolution_does(geometry):
    groups, bias = geometry.get("group", 1), geometry.get("bias")
    factors = vertical_horizontal(8, 4 // groups, groups=groups)
    model = one_conv(composed(*factors, groups).astype(np.float32), **geometry)
    network = open_network(model)
    replace(network, "conv", "spatial-vh", 1, factors, bias)
    converted = converted_model(network)
    weights = ("w",) if bias is None else ("w", "b")
    assert_converted(model, converted, nodes=("y",), weights=weights)
    assert_close(outputs_of(network, feed_of(model)), run(model, feed_of(model)))
    assert kinds(converted) == ["Conv", "Conv"]
    if geometry.get("ir", 8) < 4:
        assert {each.name for each in converted.graph.initializer} == {
            each.name for each in converted.graph.input
        } - {"x"}
    else:
        assert [each.name for each in converted.graph.input] == ["x"]


def test_factors_in_float16():
    factors = vertical_horizontal(8, 4)
    weight = composed(*factors).astype(np.float16)
    bias = BIAS.astype(np.float16)
    model = one_conv(weight, bias=bias, kind=TensorProto.FLOAT16, pads=[1, 1, 1, 1])
    network = open_network(model)
    replace(network, "conv", "spatial-vh", 1, factors, bias)
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("y",), weights=("w", "b"), tolerance=5e-3)
    assert {each.data_type for each in converted.graph.initializer} == {TensorProto.FLOAT16}


def test_what_is_not_geometry_is_the_convolution_s_own():
    factors = vertical_horizontal(8, 4)
    model = one_conv(composed(*factors).astype(np.float32))
    model.graph.node[0].doc_string = "the stem"
    model.graph.node[0].metadata_props.add(key="origin", value="layer 1")
    network = open_network(model)
    replace(network, "conv", "spatial-vh", 1, factors)
    for each in converted_model(network).graph.node:
        assert each.doc_string == "the stem"
        assert [(pair.key, pair.value) for pair in each.metadata_props] == [("origin", "layer 1")]


def test_new_names_are_free():
    """Whatever values and nodes there are already."""
    factors = vertical_horizontal(8, 4)
    names = ["conv.branches.0.0", "conv.branches.0.0.output", "conv.branches.0.1", "conv.branches.0.0.weight"]
    nodes = [node("Neg", "x", names[1], name=names[0]), node("Relu", "x", names[2], name=names[3])]
    nodes.append(conv("x w", "y", name="conv"))
    model = model_of(nodes, {"w": composed(*factors).astype(np.float32)}, outputs=("y", names[1], names[2]))
    network = open_network(model)
    replace(network, "conv", "spatial-vh", 1, factors)
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("y",), weights=("w",))
    found = [each.name for each in converted.graph.node]
    assert len({*found}) == len(found)


def branched(nodes, *, outputs=("y",), inputs=None, spare=(), norm=True, bias=BIAS):
    """A model whose Conv `c` has a kernel of two branches, and the network with these in its place."""
    depthwise, pointwise, dense = two_branches(8, 4)
    weights = {"w": dense.astype(np.float32)}
    if bias is not None:
        weights["b"] = bias
    if norm:
        statistics = {"gain": values(8, seed=1), "shift": values(8, seed=2), "mean": values(8, seed=3)}
        weights |= statistics | {"variance": np.abs(values(8, seed=4)) + 0.5}
    first = conv("x w b" if bias is not None else "x w", "c", pads=[2, 2, 2, 2])
    if inputs is not None:
        inputs = [value_of("x", "batch", 4, 9, 10), *inputs]
    weights = {name: value for name, value in weights.items() if name not in spare}
    model = model_of([first, *nodes], weights, outputs=outputs, inputs=inputs)
    kept = {each for nodes in model.graph.node for each in nodes.output} - {*outputs, "m", "v"}
    model.graph.value_info.extend(value_of(name, "batch", 8, 9, 10) for name in sorted(kept))
    network = open_network(model)
    replace(network, "c", "depthwise-pointwise", 2, (depthwise, pointwise), bias)
    return model, network


NORM = "c gain shift mean variance"


def test_branches_are_summed():
    model, network = branched([node("Relu", "c", "y")], norm=False)
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("c",), weights=("w", "b"))
    assert kinds(converted) == ["Conv", "Conv", "Conv", "Conv", "Add", "Relu"]


@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
def test_a_norm_behind_branches_is_folded(bias):
    nodes = [node("BatchNormalization", NORM, "n", epsilon=0.01), node("Relu", "n", "y")]
    model, network = branched(nodes, bias=bias)
    converted = converted_model(network)
    gone = ("w", "gain", "shift", "mean", "variance", *(("b",) if bias is not None else ()))
    assert_converted(model, converted, nodes=("c", "n"), weights=gone)
    assert kinds(converted) == ["Conv", "Conv", "Conv", "Conv", "Add", "Relu"]


def test_weights_of_a_folded_norm_that_others_read_stay():
    nodes = [node("BatchNormalization", NORM, "n"), node("Mul", "mean mean", "m"), node("Relu", "n", "y")]
    model, network = branched(nodes, outputs=("y", "m"))
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("c", "n"), weights=("w", "b", "gain", "shift", "variance"))


UNFOLDED = {
    "the convolution is an output": ([node("BatchNormalization", NORM, "y")], {"outputs": ("y", "c")}),
    "another reads it": (
        [node("BatchNormalization", NORM, "n"), node("Add", "n c", "y")],
        {},
    ),
    "a graph within a node reads it": (
        [
            node("BatchNormalization", NORM, "n"),
            node(
                "If",
                "on",
                "y",
                **{
                    f"{name}_branch": helper.make_graph(
                        [node("Neg", read, name)],
                        name,
                        [],
                        [helper.make_tensor_value_info(name, FLOAT, None)],
                    )
                    for name, read in (("then", "c"), ("else", "n"))
                },
            ),
        ],
        {"inputs": [value_of("on", kind=TensorProto.BOOL)]},
    ),
    "its statistics are inputs": (
        [node("BatchNormalization", NORM, "y")],
        {"inputs": [value_of("shift", 8)], "spare": ("shift",)},
    ),
    "something lies between": (
        [node("Relu", "c", "r"), node("BatchNormalization", NORM.replace("c ", "r "), "y")],
        {},
    ),
    "it trains": (
        [helper.make_node("BatchNormalization", NORM.split(), ["y", "m", "v"], training_mode=1)],
        {},
    ),
}


@pytest.mark.parametrize(("nodes", "fields"), UNFOLDED.values(), ids=UNFOLDED)
def test_norms_that_are_not_folded(nodes, fields):
    model, network = branched(nodes, **fields)
    converted = converted_model(network)
    assert "BatchNormalization" in kinds(converted)
    assert_converted(model, converted, nodes=("c",), weights=("w", "b"))


def test_a_norm_behind_one_chain_is_left_to_the_runtime():
    factors = vertical_horizontal(8, 4)
    weights = {
        "w": composed(*factors).astype(np.float32),
        **{name: values(8) for name in ("gain", "shift", "mean")},
    }
    nodes = [conv("x w", "c"), node("BatchNormalization", NORM, "y")]
    model = model_of(nodes, {**weights, "variance": np.ones(8, np.float32)})
    network = open_network(model)
    replace(network, "c", "spatial-vh", 1, factors)
    assert_converted(model, converted_model(network), nodes=("c",), weights=("w",))


def test_two_convolutions_merged_into_one():
    """The first layer becomes the product of both, the second the identity."""
    first, second = kernel(6, 4, 3, 3), kernel(8, 6, 1, 1, seed=1)
    nodes = [conv("x w", "c", pads=[1, 1, 1, 1]), conv("c v b", "d"), node("Relu", "d", "y")]
    model = model_of(nodes, {"w": first, "v": second, "b": BIAS})
    network = open_network(model)
    dense = nn.Conv2d(4, 8, 3, padding=1)
    dense.weight.data = torch.from_numpy(np.einsum("os,scij->ocij", second[..., 0, 0], first)).float()
    dense.bias.data = torch.from_numpy(BIAS)
    put(network, "c", dense)
    put(network, "d", nn.Identity())
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("c", "d"), weights=("w", "v", "b"))
    assert kinds(converted) == ["Conv", "Identity", "Relu"]


@pytest.mark.parametrize("which", ["weight", "bias", "both"])
@pytest.mark.parametrize("ir", [3, 8])
def test_fine_tuned_weights_are_written(which, ir):
    weights = {"w": kernel(8, 4, 3, 3), "b": BIAS}
    model = one_conv(weights["w"], bias=weights["b"], ir=ir, opset=9, pads=[1, 0, 2, 3])
    network = open_network(model)
    layer = submodule(network, "conv")
    changed = {"weight": kernel(8, 4, 3, 3, seed=5), "bias": values(8, seed=6)}
    for name, value in changed.items():
        if which in (name, "both"):
            getattr(layer, name).data = torch.from_numpy(value)
            weights["w" if name == "weight" else "b"] = value
    expected = one_conv(weights["w"], bias=weights["b"], ir=ir, opset=9, pads=[1, 0, 2, 3])
    converted = converted_model(network)
    onnx.checker.check_model(converted, full_check=True)
    feed = feed_of(model)
    assert_close(run(converted, feed), run(expected, feed), 1e-6)
    gone = {"weight": ("w",), "bias": ("b",), "both": ("w", "b")}[which]
    assert_all_else_is_kept(model, converted, nodes=("y",), weights=gone)


def test_a_bias_that_fine_tuning_adds():
    model = one_conv(kernel(8, 4, 3, 3))
    network = open_network(model)
    submodule(network, "conv").bias = nn.Parameter(torch.from_numpy(BIAS))
    converted = converted_model(network)
    expected = one_conv(kernel(8, 4, 3, 3), bias=BIAS)
    assert_close(run(converted, feed_of(model)), run(expected, feed_of(model)), 1e-6)
    assert_all_else_is_kept(model, converted, nodes=("y",))


def test_one_of_two_that_share_a_weight_is_fine_tuned():
    shared = kernel(4, 4, 3, 3)
    nodes = [conv("x w", "a"), conv("a w", "y")]
    model = model_of(nodes, {"w": shared})
    network = open_network(model)
    submodule(network, "y").weight.data.mul_(2)
    converted = converted_model(network)
    feed = feed_of(model)
    assert_close(run(converted, feed), [2 * each for each in run(model, feed)])
    assert_all_else_is_kept(model, converted, nodes=("y",))


def test_an_unchanged_network_is_the_file():
    model = one_conv(kernel(8, 4, 3, 3), bias=BIAS)
    assert converted_model(open_network(model)).SerializeToString() == model.SerializeToString()


def test_a_module_that_no_operator_stands_for():
    network = open_network(one_conv(kernel(8, 4, 3, 3)))
    put(network, "conv", nn.ReLU())
    with pytest.raises(TypeError, match="no way to write a ReLU"):
        converted_model(network)


# Conversions ----------------------------------------------------------------------------------------

DEPTHWISE = np.einsum("ci,cj->cij", values(4, 5), values(4, 5, seed=1))[:, None].astype(np.float32) / 5
POINTWISE = two_branches(8, 4)[2].astype(np.float32)

EXACT = {
    "spatial": lambda: one_conv(separable(8, 4), bias=BIAS, pads=[1, 1, 1, 1]),
    "groups": lambda: one_conv(separable(8, 4, 5, 5, groups=2), group=2, pads=[2, 2, 2, 2]),
    "depthwise": lambda: one_conv(DEPTHWISE, group=4, bias=BIAS[:4]),
    "branches": lambda: one_conv(POINTWISE, bias=BIAS, pads=[2, 1, 0, 3], strides=[2, 1]),
    "subspace": lambda: one_conv(
        np.einsum("os,scij->ocij", values(12, 2), kernel(2, 6, 3, 3)).astype(np.float32)
    ),
    "SAME_UPPER": lambda: one_conv(separable(8, 4), auto_pad="SAME_UPPER", strides=[2, 2]),
    "asymmetric": lambda: one_conv(separable(8, 4), pads=[0, 1, 2, 0]),
    "fixed batch": lambda: one_conv(separable(8, 4), shape=(2, 4, 9, 10)),
    "IR 3": lambda: one_conv(separable(8, 4), ir=3, opset=9),
    "overridable": lambda: one_conv(separable(8, 4), ir=7, opset=9, defaults=("w",)),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_exact_conversions(case):
    model = case()
    before = model.SerializeToString()
    result = convert(model)
    weights = [each.name for each in model.graph.initializer]
    assert [each["decision"] for each in result.report["layers"]] == ["converted"]
    assert_converted(model, result.onnx_model, nodes=("y",), weights=weights)
    assert result.report["converted"]["macs"] < result.report["original"]["macs"]
    assert model.SerializeToString() == before


def test_an_exact_conversion_in_float16():
    """Of integers, whose products float16 holds."""
    lines = np.array([1, 2, 1]), np.array([1, 0, -1])
    weight = np.round(values(8, 1, 1, 1) * 3) * np.outer(*lines) * np.ones((1, 4, 1, 1))
    model = one_conv(weight.astype(np.float16), kind=TensorProto.FLOAT16, pads=[1, 1, 1, 1])
    result = convert(model)
    assert_converted(model, result.onnx_model, nodes=("y",), weights=("w",), tolerance=2e-3)


def annotated():
    """A model with a value in every field, in which the first of two convolutions separates."""
    function = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [node("Add", "a a", "b")],
        [helper.make_opsetid("", 17)],
        doc_string="twice",
    )
    nodes = [
        conv("x w b", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r", doc_string="the first", name="relu"),
        node("Twice", "r", "t", domain="own"),
        conv("t v", "d", doc_string="stays"),
        node("Mul", "d sparse", "y"),
    ]
    weights = {"unread": values(3), "w": separable(8, 4), "v": kernel(5, 8, 3, 3, seed=3), "b": BIAS}
    model = model_of(nodes, weights, opset={"": 17, "own": 1}, functions=[function], doc_string="a model")
    model.producer_version, model.domain, model.model_version = "1.2", "org.example", 7
    helper.set_model_props(model, {"stride": "8", "names": "{0: 'a'}"})
    graph = model.graph
    graph.doc_string = "a graph"
    graph.value_info.extend(
        [value_of("c", "batch", 8, 9, 10), value_of("r", "batch", 8, 9, 10), value_of("d", "batch", 5, 7, 8)]
    )
    for name in ("r", "w", "d", "c"):
        entry = graph.quantization_annotation.add(tensor_name=name)
        entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unread")
    stored = helper.make_tensor("sparse", FLOAT, [2], [2.0, -1.0])
    places = helper.make_tensor("", TensorProto.INT64, [2], [0, 6])
    graph.sparse_initializer.append(helper.make_sparse_tensor(stored, places, [8]))
    graph.metadata_props.add(key="graph", value="kept")
    training = model.training_info.add()
    training.algorithm.name = "step"
    training.algorithm.node.append(node("Identity", "v", "new_v"))
    training.update_binding.add(key="v", value="new_v")
    return model


def test_all_other_fields_are_kept():
    model = annotated()
    result = convert(model)
    assert_all_else_is_kept(model, result.onnx_model, nodes=("c",), weights=("w", "b"))
    assert_close(run(result.onnx_model, feed_of(model)), run(model, feed_of(model)))
    assert [each.tensor_name for each in result.onnx_model.graph.quantization_annotation] == ["r", "d", "c"]


def test_fields_that_this_version_of_onnx_does_not_know_are_kept():
    model = one_conv(separable(8, 4))
    unknown = b"\xfa\x7f\x05hello"  # field 2047, of bytes
    extended = onnx.ModelProto.FromString(model.SerializeToString() + unknown)
    assert unknown in extended.SerializeToString()
    assert unknown in convert(extended).onnx_model.SerializeToString()


def separated(model, *names, factors=None):
    """The model with factors of `separable` in the place of some of its layers."""
    network = open_network(model)
    for name in names:
        layer = submodule(network, name)
        bias = None if layer.bias is None else layer.bias.detach().numpy()
        replace(network, name, "spatial-vh", 1, factors or vertical_horizontal(*layer.weight.shape[:2]), bias)
    return converted_model(network)


def shared():
    """Two convolutions of one separable kernel, the second of which has a stride."""
    nodes = [conv("x w", "a", pads=[1, 1, 1, 1]), conv("a w", "y", strides=[2, 2])]
    return model_of(nodes, {"w": separable(4, 4)})


def test_a_shared_weight_stays_while_it_is_read():
    converted = separated(shared(), "a")
    assert_converted(shared(), converted, nodes=("a",))
    assert "w" in [each.name for each in converted.graph.initializer]


def test_a_shared_weight_goes_with_its_last_reader():
    assert_converted(shared(), separated(shared(), "a", "y"), nodes=("a", "y"), weights=("w",))


READERS = {
    "another operator": ([node("Mul", "w w", "z")], ("y", "z")),
    "the graph's outputs": ([], ("y", value_of("w", 8, 4, 3, 3))),
    "a graph within a node": (
        [
            node("If", "on", "z", **{
                f"{name}_branch": helper.make_graph(
                    [node("Neg", read, name)], name, [], [helper.make_tensor_value_info(name, FLOAT, None)]
                )
                for name, read in (("then", "w"), ("else", "x"))
            }),
        ],
        ("y", "z"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "outputs"), READERS.values(), ids=READERS)
def test_a_weight_that_is_read_elsewhere_stays(nodes, outputs):
    inputs = [value_of("x", "batch", 4, 9, 10)]
    if nodes and nodes[0].op_type == "If":
        inputs.append(value_of("on", kind=TensorProto.BOOL))
    model = model_of(
        [conv("x w b", "y"), *nodes], {"w": separable(8, 4), "b": BIAS}, outputs=outputs, inputs=inputs
    )
    converted = separated(model, "y")
    assert_converted(model, converted, nodes=("y",), weights=("b",))
    assert "w" in [each.name for each in converted.graph.initializer]


W = separable(8, 4)
CHAINS = {
    "Constant": ([helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W))], {}, ("w",)),
    "Identity": ([node("Identity", "v", "u"), node("Identity", "u", "w")], {"v": W}, ("u", "w")),
    "Constant, Identity": (
        [
            helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(W)),
            node("Identity", "v", "w"),
        ],
        {},
        ("v", "w"),
    ),
    "Cast": ([node("Cast", "v", "w", to=FLOAT)], {"v": W.astype(np.float64)}, ("w",)),
    "Reshape": ([node("Reshape", "v shape", "w")], {"v": W.ravel(), "shape": np.array(W.shape)}, ("w",)),
    "ConstantOfShape": (
        [node("ConstantOfShape", "shape", "w", value=numpy_helper.from_array(np.array([0.5], np.float32)))],
        {"shape": np.array(W.shape)},
        ("w",),
    ),
}


@pytest.mark.parametrize(("nodes", "weights", "dead"), CHAINS.values(), ids=CHAINS)
def test_nodes_that_computed_a_weight_are_gone(nodes, weights, dead):
    model = model_of([*nodes, conv("x w", "y")], weights)
    same = np.full((1, 4, 3, 1), 0.5), np.ones((8, 1, 1, 3))
    converted = separated(model, "y", factors=same if "ConstantOfShape" in kinds(model) else None)
    assert_converted(model, converted, nodes=("y", *dead), weights=tuple(weights))
    assert kinds(converted) == ["Conv", "Conv"]


def test_nodes_of_a_weight_stay_as_far_as_others_read_them():
    nodes = [
        node("Identity", "v", "u"),
        node("Cast", "u", "w", to=FLOAT),
        conv("x w", "y"),
        node("Neg", "u", "z"),
    ]
    model = model_of(nodes, {"v": W}, outputs=("y", "z"))
    assert_converted(model, separated(model, "y"), nodes=("y", "w"))


def test_a_node_of_two_outputs_stays_while_one_is_read():
    nodes = [node("Split", "v", "w u", axis=0, num_outputs=2), conv("x w", "y"), node("Neg", "u", "z")]
    model = model_of(nodes, {"v": np.concatenate([W, 2 * W])}, outputs=("y", "z"), opset=18)
    assert_converted(model, separated(model, "y"), nodes=("y",))


BORDERS = {
    "inside the pads": {"pads": [2, 2, 2, 2]},
    "beyond the pads": {},
    "beyond one pad": {"pads": [2, 2, 2, 1]},
    "dilated": {"dilations": [1, 2], "pads": [0, 1, 0, 1]},
    "strided": {"strides": [2, 3]},
    "SAME_UPPER": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "SAME_LOWER": {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
    "VALID": {"auto_pad": "VALID"},
}


@pytest.mark.parametrize("opset", [10, 11, 18])
@pytest.mark.parametrize("geometry", BORDERS.values(), ids=BORDERS)
def test_a_trimmed_border(geometry, opset):
    """A kernel whose outer rows and columns are zero; only a Pad takes negative pads."""
    weight = sparse_rows(8, 4, border=((1, 0), (0, 2)))
    model = one_conv(weight, bias=BIAS, shape=("n", 4, 11, 12), opset=opset, **geometry)
    network = open_network(model)
    inner = weight[:, :, 1:, :-2]
    replace(network, "conv", "zero-border", 12, (inner,), BIAS, Border(top=1, right=2))
    feed = feed_of(model)
    assert_close(outputs_of(network, feed), run(model, feed))
    converted = converted_model(network)
    assert_converted(model, converted, nodes=("y",), weights=("w", "b"))
    for each in converted.graph.node:
        if each.op_type == "Pad":
            assert len(each.input) == (1 if opset < 11 else 2)
    crops = geometry != {"pads": [2, 2, 2, 2]} and "SAME" not in geometry.get("auto_pad", "")
    assert ("Pad" in kinds(converted)) == crops


@pytest.mark.parametrize("name", ["beyond one pad", "dilated", "SAME_UPPER"])
def test_a_border_around_a_separable_kernel(name):
    inner = separable(8, 4, 3, 3)
    model = one_conv(np.pad(inner, ((0, 0), (0, 0), (2, 0), (1, 1))), shape=("n", 4, 11, 12), **BORDERS[name])
    result = convert(model)
    assert_converted(model, result.onnx_model, nodes=("y",), weights=("w",))
    assert [each["decision"] for each in result.report["layers"]] == ["converted"]


def test_a_border_in_float16():
    weight = sparse_rows(8, 4, dtype=np.float16)
    model = one_conv(weight, kind=TensorProto.FLOAT16)
    result = convert(model)
    assert_converted(model, result.onnx_model, nodes=("y",), weights=("w",), tolerance=5e-3)


def test_a_border_in_an_old_format():
    """The widths of a Pad are an initializer, and so an input."""
    model = one_conv(sparse_rows(8, 4), ir=3, opset=11)
    result = convert(model)
    assert "Pad" in kinds(result.onnx_model)
    assert_converted(model, result.onnx_model, nodes=("y",), weights=("w",))


# Files ----------------------------------------------------------------------------------------------


def test_where_nothing_separates_the_file_is_copied(tmp_path):
    """Byte by byte: a message has more than one form, and this is not the one that protobuf would write."""
    content = one_conv(kernel(8, 4, 3, 3)).SerializeToString() + b"\x12\x03abc"  # another producer
    assert onnx.ModelProto.FromString(content).SerializeToString() != content
    (tmp_path / "model.onnx").write_bytes(content)
    result = convert(tmp_path / "model.onnx", out=tmp_path / "out")
    assert [each["decision"] for each in result.report["layers"]] == ["kept"]
    for name in ("original.onnx", "converted.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == content
    assert (tmp_path / "model.onnx").read_bytes() == content


@pytest.mark.parametrize(
    "model",
    [
        model_of([node("Relu", "x", "y")]),
        model_of([node("ConvTranspose", "x w", "y")], {"w": kernel(4, 8, 2, 2)}),
        model_of([node("MatMul", "x w", "y")], {"w": values(10, 3)}),
    ],
    ids=["Relu", "ConvTranspose", "MatMul"],
)
def test_files_without_a_convolution_to_replace_are_copied(model, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    convert(tmp_path / "model.onnx", out=tmp_path / "out")
    assert (tmp_path / "out" / "converted.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two_convolutions():
    """One that separates, and one that does not."""
    nodes = [conv("x w b", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "r"), conv("r v", "y")]
    return model_of(nodes, {"v": kernel(6, 8, 3, 3), "w": separable(8, 4), "b": BIAS})


@pytest.mark.parametrize("location", ["weights.bin", "data/deep/weights.bin"])
def test_external_data(location, tmp_path, monkeypatch):
    model = two_convolutions()
    path = saved_apart(model, tmp_path / "given" / "model.onnx", location)
    before = content_of(tmp_path / "given")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = convert(path, out="out")
    feed = feed_of(model)
    expected = run(path, feed)
    for name in ("original.onnx", "converted.onnx"):
        assert_close(run(tmp_path / "elsewhere" / "out" / name, feed), expected)
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert_close(run(tmp_path / "moved" / "out" / "converted.onnx", feed), expected)
    assert content_of(tmp_path / "given") == before
    written = onnx.load(tmp_path / "moved" / "out" / "converted.onnx", load_external_data=False)
    assert_all_else_is_kept(
        onnx.load(path, load_external_data=False), written, nodes=("c",), weights=("w", "b")
    )
    assert_close(run(result.onnx_model, feed), expected)
    assert not [each for each in result.onnx_model.graph.initializer if each.external_data]


def test_external_data_of_a_file_in_which_nothing_separates(tmp_path):
    model = one_conv(kernel(8, 4, 3, 3))
    path = saved_apart(model, tmp_path / "given" / "model.onnx", "data/weights.bin")
    convert(path, out=tmp_path / "out")
    assert (tmp_path / "out" / "converted.onnx").read_bytes() == path.read_bytes()
    assert_close(run(tmp_path / "out" / "converted.onnx", feed_of(model)), run(model, feed_of(model)))


@pytest.mark.parametrize("location", ["converted.onnx", "report.html"])
def test_external_data_that_bear_the_name_of_a_result(location, tmp_path):
    """They are refused, or both files are whole."""
    model = two_convolutions()
    path = saved_apart(model, tmp_path / "given" / "model.onnx", location)
    before = content_of(tmp_path / "given")
    try:
        convert(path, out=tmp_path / "out")
    except SepconvertError:
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    else:
        for name in ("original.onnx", "converted.onnx"):
            assert_close(run(tmp_path / "out" / name, feed_of(model)), run(model, feed_of(model)))
    assert content_of(tmp_path / "given") == before


def test_a_failure_takes_external_data_along(tmp_path, monkeypatch):
    """What was written before it is removed, folders included."""

    def fail(*arguments):
        raise SepconvertError("on purpose")

    monkeypatch.setattr("sepconvert.pipeline.convert.verify", fail)
    path = saved_apart(two_convolutions(), tmp_path / "given" / "model.onnx", "data/weights.bin")
    with pytest.raises(SepconvertError, match="on purpose"):
        convert(path, out=tmp_path / "out")
    assert content_of(tmp_path / "out") == {}
