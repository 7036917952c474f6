"""Quantized files, against onnx's reference and numpy's rounding; errors are of one line."""

import logging
import math

import numpy as np
import onnx
import pytest
from files.onnx.graph.onnx_cases import (
    assert_close,
    conv,
    feed_of,
    kernel,
    model_of,
    node,
    one_conv,
    run,
    value_of,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from strategies import numbered

from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.int8.quantizer import (
    Number,
    measured_ranges,
    prepared,
    quantized,
    unknown_ranges,
    widest,
)

NUMBERS = {
    "uint8": Number("uint8", reduced=False),
    "uint8, 7 bits": Number("uint8", reduced=True),
    "int8": Number("int8", reduced=False),
}
HERE = Number.of_this_machine()
# Without VNNI, sums of products by weights of 8 bits saturate: the runtime computes something else.
COMPUTED = {name: number for name, number in NUMBERS.items() if number.reduced or not HERE.reduced}
ACTIVATIONS = {"uint8": np.uint8, "int8": np.int8}
W, V = kernel(6, 4, 3, 3), kernel(5, 6, 3, 3, seed=3)


def chain(opset=17, **fields):
    """Two convolutions, the first of which has a bias and a ReLU."""
    nodes = [
        conv("x w b", "a", pads=[1, 1, 1, 1]), node("Relu", "a", "r"), conv("r v", "c"),
        node("GlobalAveragePool", "c", "y"),
    ]  # fmt: skip
    return model_of(nodes, {"w": W, "b": values(6, seed=5), "v": V}, opset=opset, **fields)


def branches():
    """A depthwise convolution, added to what it is of, and a matrix."""
    nodes = [
        conv("x d", "a", group=4, pads=[1, 1, 1, 1]), node("Add", "a x", "s"),
        node("MaxPool", "s", "p", kernel_shape=[2, 2]), node("Flatten", "p", "f"), node("Gemm", "f m b", "y"),
    ]  # fmt: skip
    weights = {"d": kernel(4, 1, 3, 3), "m": kernel(4 * 8 * 9, 3), "b": values(3)}
    return model_of(nodes, weights)


def joined():
    """Two convolutions of one value, of which the second has strides, joined along the channels."""
    nodes = [
        conv("x w", "a", pads=[1, 1, 1, 1]), node("Relu", "a", "r"), conv("x u b", "c", pads=[1, 1, 1, 1]),
        node("Concat", "r c", "y", axis=1),
    ]  # fmt: skip
    return model_of(nodes, {"w": W, "u": kernel(3, 4, 3, 3, seed=8), "b": values(3)})


NETS = {"chain": chain, "branches": branches, "joined": joined}


def array(model, name):
    """A constant of a model."""
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def kinds(model):
    return [each.op_type for each in model.graph.node]


def copied(model):
    found = onnx.ModelProto()
    found.CopyFrom(model)
    return found


def referenced(model, feed):
    """What onnx's reference makes of a model; it has the operators of QDQ from opset 19 on alone."""
    later = copied(model)
    for each in later.graph.node:
        if each.op_type == "FusedConv":  # ONNX Runtime's name of a Conv that it leaves as it is
            each.op_type, each.domain = "Conv", ""
    for each in later.opset_import:
        each.version = max(each.version, 21) if each.domain in ("", "ai.onnx") else each.version
    return ReferenceEvaluator(later).run(None, feed)


def in_int8(model, feeds, number=HERE, method="minmax", **options):
    """A model prepared and quantized."""
    ready = prepared(model)
    return quantized(ready, measured_ranges(ready, feeds, method), number, **options)


def step_of(model, output):
    """The step that an output of a quantized model is rounded to."""
    last = next(each for each in model.graph.node if output in each.output)
    assert last.op_type == "DequantizeLinear"
    return float(array(model, last.input[1]))


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# What is computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("number", COMPUTED.values(), ids=COMPUTED)
def test_the_runtime_computes_what_the_file_says(net, number):
    model = net()
    feed = feed_of(model, batch=6)
    file = in_int8(model, [feed], number)
    onnx.checker.check_model(file, full_check=True)
    (expected,), (plain,) = referenced(file, feed), run(model, feed)
    step = step_of(file, "y")
    for optimised in (True, False):
        (found,) = run(file, feed, optimised=optimised)
        assert np.abs(found - expected).max() <= 1.001 * step
        np.testing.assert_allclose(found / step, np.round(found / step), rtol=0, atol=1e-3)
    error = np.abs(expected - plain)
    assert 0 < error.max() < 0.2 * np.abs(plain).max()
    assert np.sqrt(np.square(error).mean()) < 0.06 * np.sqrt(np.square(plain).mean())


@numbered(5)
@given(
    groups=st.sampled_from((1, 2, 4)), size=st.integers(1, 3), stride=st.integers(1, 2),
    pad=st.integers(0, 1), bias=st.booleans(), number=st.sampled_from(list(COMPUTED.values())),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_one_convolution_of_any_geometry(groups, size, stride, pad, bias, number, seed):
    weight = kernel(8, 4 // groups, size, size, seed=seed)
    model = one_conv(
        weight, bias=values(8, seed=seed + 1) if bias else None, group=groups, strides=[stride, stride],
        pads=[pad, pad, pad, pad],
    )  # fmt: skip
    feed = feed_of(model, batch=3, seed=seed)
    file = in_int8(model, [feed], number)
    assert np.abs(run(file, feed)[0] - referenced(file, feed)[0]).max() <= 1.001 * step_of(file, "y")


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_the_file(number):
    """Weights are symmetric, each output's largest at the end of the range; activations take 8 bits."""
    model = chain()
    feed = feed_of(model, batch=4)
    file = in_int8(model, [feed], number)
    for name, weight in (("w", W), ("v", V)):
        codes, scale = array(file, f"{name}_quantized"), array(file, f"{name}_scale")
        assert codes.dtype == np.int8
        assert scale.shape == (len(weight),)
        assert not array(file, f"{name}_zero_point").any()
        assert (np.abs(codes.astype(int)).max((1, 2, 3)) == number.levels).all()
        largest = np.abs(weight).max((1, 2, 3))
        np.testing.assert_allclose(scale, largest / number.levels, rtol=1e-6)
        by_output = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(codes * by_output - weight) <= 0.5001 * by_output).all()
    zero = array(file, "x_zero_point")
    assert zero.dtype == ACTIVATIONS[number.activations]
    low, high = feed["x"].min(), feed["x"].max()
    step = float(array(file, "x_scale"))
    assert step == pytest.approx((high - low) / 255, rel=1e-5)
    lowest = np.iinfo(zero.dtype).min
    assert (lowest - int(zero)) * step == pytest.approx(low, abs=0.51 * step)


def test_what_is_given_is_left_as_it_is():
    model = chain()
    feed = feed_of(model)
    before = model.SerializeToString()
    ready = prepared(model)
    ranges = measured_ranges(ready, [feed], "minmax")
    kept = ready.SerializeToString()
    first = quantized(ready, ranges, NUMBERS["uint8"])
    assert quantized(ready, ranges, NUMBERS["uint8"]) == first
    assert (model.SerializeToString(), ready.SerializeToString()) == (before, kept)


def test_nodes_that_are_kept_stay_in_floating_point():
    model = chain()
    feed = feed_of(model, batch=4)
    file, whole = in_int8(model, [feed], kept=["c"]), in_int8(model, [feed])
    names = {each.name for each in file.graph.initializer}
    assert {"w_quantized", "v"} <= names
    assert "v_quantized" not in names
    np.testing.assert_array_equal(array(file, "v"), V)
    assert {"w_quantized", "v_quantized"} <= {each.name for each in whole.graph.initializer}
    onnx.checker.check_model(file, full_check=True)
    (found,), (expected,) = run(file, feed, optimised=False), referenced(file, feed)
    assert np.abs(found - expected).max() <= 1.001 * step_of(file, "y")


def test_nodes_that_are_kept_are_computed_in_floating_point():
    model = chain()
    feed = feed_of(model, batch=4)
    file = in_int8(model, [feed], kept=["c"])
    assert np.abs(run(file, feed)[0] - referenced(file, feed)[0]).max() <= 1.001 * step_of(file, "y")


# Preparation ------------------------------------------------------------------------------------------


def normalised(opset):
    """A convolution and a BatchNorm, whose kernel a node computes."""
    nodes = [
        node("Transpose", "t", "w", perm=[3, 2, 0, 1]), conv("x w", "c", pads=[1, 0, 1, 0]),
        node("BatchNormalization", "c s b m v", "n"), node("Relu", "n", "y"),
    ]  # fmt: skip
    weights = {
        "t": np.transpose(W, (2, 3, 1, 0)), "s": values(6, seed=1), "b": values(6, seed=2),
        "m": values(6, seed=3), "v": np.square(values(6, seed=4)) + 0.5,
    }  # fmt: skip
    return model_of(nodes, {name: np.ascontiguousarray(each) for name, each in weights.items()}, opset=opset)


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 17, 20])
def test_preparation_folds_and_computes_the_same(opset):
    model = normalised(opset)
    feed, before = feed_of(model), model.SerializeToString()
    found = prepared(model)
    assert kinds(found) == ["Conv", "Relu"]
    assert {each.name for each in found.graph.value_info} >= {found.graph.node[0].output[0]}
    assert_close(run(found, feed), run(model, feed))
    assert model.SerializeToString() == before
    version = next(each.version for each in found.opset_import if not each.domain)
    assert version == max(opset, 13)


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 20, 21])
def test_files_of_any_opset_are_quantized(opset):
    """Before 13 weights have no scale for each channel: such files are brought to 13."""
    model = chain(opset, ir=8 if opset < 21 else 10)
    feed = feed_of(model, batch=4)
    file = in_int8(model, [feed])
    onnx.checker.check_model(file, full_check=True)
    assert array(file, "w_scale").shape == (6,)
    assert np.abs(run(file, feed)[0] - referenced(file, feed)[0]).max() <= 1.001 * step_of(file, "y")


def test_files_of_ir_3():
    model = model_of([conv("x w", "a"), node("Relu", "a", "y")], {"w": W}, ir=3, opset=9)
    file = in_int8(model, [feed_of(model)])
    onnx.checker.check_model(file, full_check=True)


SCALES = {"s": np.float32(0.1), "z": np.uint8(3), "ws": np.float32(0.02), "wz": np.uint8(128)}
BYTES = [value_of("x", 2, 4, 5, 5, kind=TensorProto.UINT8)]
QUANTIZED = {
    "QDQ": lambda: in_int8(chain(), [feed_of(chain())]),
    "QLinearConv": lambda: model_of(
        [node("QLinearConv", "x s z q ws wz s z", "y")], {**SCALES, "q": np.ones((8, 4, 3, 3), np.uint8)},
        inputs=BYTES, outputs=[value_of("y", 2, 8, 3, 3, kind=TensorProto.UINT8)],
    ),
    "ConvInteger": lambda: model_of(
        [node("ConvInteger", "x q z wz", "y")], {**SCALES, "q": np.ones((8, 4, 3, 3), np.uint8)},
        inputs=BYTES, outputs=[value_of("y", 2, 8, 3, 3, kind=TensorProto.INT32)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", QUANTIZED.values(), ids=QUANTIZED)
def test_a_model_that_is_quantized_already(model):
    with pytest.raises(SepconvertError) as caught:
        prepared(model())
    one_line(caught, "`int8`", "quantized already", "floating point")


def test_a_model_that_is_quantized_dynamically():
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulInteger", "q k z", "i"),
        node("Cast", "i", "c", to=TensorProto.FLOAT), node("Mul", "c s", "y"),
    ]  # fmt: skip
    with pytest.raises(SepconvertError, match="quantized already"):
        prepared(model_of(nodes, {"k": np.ones((10, 3), np.int8)}))


def test_a_model_that_cannot_be_prepared():
    """Its weights are in a file that is not there."""
    model, level = one_conv(W), logging.root.manager.disable
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="missing.bin")
    with pytest.raises(SepconvertError) as caught:
        prepared(model)
    one_line(caught, "`int8`", "cannot prepare")
    assert logging.root.manager.disable == level


# Ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [12, 13, 20])
def test_ranges_are_those_of_the_values(opset):
    """Of all batches, which may be of unequal size; held against onnx's reference, value by value."""
    model = prepared(chain(opset))
    feeds = [feed_of(model, batch=batch, seed=seed) for seed, batch in enumerate((1, 5, 2))]
    ranges = measured_ranges(model, feeds, "minmax")
    seen = {"x": [feed["x"] for feed in feeds]}
    for each in model.graph.node:
        asked = copied(model)
        del asked.graph.output[:]
        asked.graph.output.append(value_of(each.output[0]))
        seen[each.output[0]] = [ReferenceEvaluator(asked).run(None, feed)[0] for feed in feeds]
    assert set(ranges.keys()) == set(seen)
    for name, found in seen.items():
        low, high = (each.item() for each in ranges[name].range_value)
        flat = np.concatenate([each.ravel() for each in found])
        assert low == pytest.approx(flat.min(), abs=1e-5)
        assert high == pytest.approx(flat.max(), abs=1e-5)
        assert widest(ranges, name) == pytest.approx(np.ptp(flat), abs=2e-5)


def test_percentiles_leave_outliers_out():
    """One value in 100,000."""
    model = prepared(one_conv(W, shape=("batch", 4, 90, 100)))
    feeds = [feed_of(model, batch=4)]
    feeds[0]["x"][0, 0, 0, 0] = 1000.0
    whole, found = (measured_ranges(model, feeds, each) for each in ("minmax", "percentile"))
    assert widest(whole, "x") > 1000
    assert 8 < widest(found, "x") < 10


def test_entropy_leaves_tails_out():
    model = prepared(one_conv(W))
    feeds = [feed_of(model, batch=40, seed=seed) for seed in range(3)]
    feeds[1]["x"][0] *= 5
    whole, found = (measured_ranges(model, feeds, each) for each in ("minmax", "entropy"))
    assert 8 < widest(found, "x") < 0.9 * widest(whole, "x")


def test_a_value_without_a_range_and_a_constant_one():
    model = prepared(
        model_of([conv("x w b", "c"), node("Relu", "c", "y")], {"w": 0 * W, "b": np.ones(6, "f")})
    )
    ranges = measured_ranges(model, [feed_of(model)], "minmax")
    assert widest(ranges, "y") == 0
    assert math.isnan(widest(ranges, "stranger"))


def undefined(kind):
    """A model whose output is NaN, or infinite where values are large."""
    after = {"nan": [node("Sub", "c c", "d"), node("Div", "d d", "y")], "inf": [node("Exp", "c", "y")]}[kind]
    return model_of([conv("x w", "c"), *after], {"w": 1000 * W})


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_are_not_finite(kind, method):
    model = prepared(undefined(kind))
    with pytest.raises(SepconvertError) as caught:
        measured_ranges(model, [feed_of(model)], method)
    one_line(caught, "`int8`", "NaN or Inf" if method == "minmax" else "")


@pytest.mark.parametrize("numbers", [[2, -1], [-1, 2]], ids=["last", "first"])
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_one_value_that_is_not_a_number(method, numbers):
    """The logarithm of -1."""
    model = prepared(model_of([node("Log", "x", "y")], inputs=[value_of("x", "batch", 2)]))
    with pytest.raises(SepconvertError):
        measured_ranges(model, [{"x": np.array([numbers], np.float32)}], method)


def test_inputs_that_the_model_does_not_take():
    model, level = prepared(chain()), logging.root.manager.disable
    with pytest.raises(SepconvertError) as caught:
        measured_ranges(model, [{"x": values(1, 3, 9, 10)}], "minmax")
    one_line(caught, "`int8`", "cannot calibrate")
    assert logging.root.manager.disable == level


def test_no_images():
    with pytest.raises(SepconvertError) as caught:
        measured_ranges(prepared(one_conv(W)), [], "minmax")
    one_line(caught, "`int8`")


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_nothing_is_printed(method, capfd):
    model = one_conv(W)
    in_int8(model, [feed_of(model)], method=method)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_unknown_ranges_give_a_file_of_the_same_operators(net):
    model = net()
    ready, feed = prepared(model), feed_of(model)
    ranges = unknown_ranges(ready)
    assert set(ranges.keys()) >= {"x", *(name for each in ready.graph.node for name in each.output)}
    file = quantized(ready, ranges, NUMBERS["uint8"])
    onnx.checker.check_model(file, full_check=True)
    assert kinds(file) == kinds(in_int8(model, [feed]))
    assert [each.shape for each in run(file, feed)] == [each.shape for each in run(model, feed)]


# Processors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "activations", "levels"),
    [
        (("NEON",), "int8", 127),
        (("AVX2", "FMA"), "uint8", 64),
        (("AVX2", "AVX-512"), "uint8", 64),
        (("AVX2", "AVX-512", "AVX-512 VNNI"), "uint8", 127),
        (("AVX2", "AVX-VNNI"), "uint8", 127),
        (("AVX2", "AMX"), "uint8", 127),
        ((), "uint8", 64),
    ],
)
def test_numbers_of_processors(sets, activations, levels):
    found = Number.of(sets)
    assert (found.activations, found.levels) == (activations, levels)


def test_the_largest_products_do_not_saturate_here():
    """255 · levels twice in one 16-bit sum is what processors without VNNI overflow at."""
    number = Number.of_this_machine()
    model = one_conv(np.ones((16, 64, 3, 3), np.float32), shape=(1, 64, 6, 6))
    feed = {"x": np.full((1, 64, 6, 6), 2.0, np.float32)}
    file = in_int8(model, [feed], number)
    np.testing.assert_allclose(run(file, feed)[0], 2 * 64 * 9, rtol=0.01)
