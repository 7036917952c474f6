"""Biases take back what rounding does to the mean of each output, as torch computes it in float64."""

import numpy as np
import onnx
import pytest
import torch
from files.onnx.graph.onnx_cases import conv, kernel, model_of, node, one_conv, run, value_of, values
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from strategies import numbered
from torch.nn import functional as F

from sepconvert.files.onnx.int8.bias import convolutions_in, with_corrected_biases
from sepconvert.files.onnx.int8.quantizer import Number, measured_ranges, prepared, quantized, unknown_ranges
from sepconvert.files.onnx.int8.statistics import Channels, channel_statistics

NUMBER = Number("uint8", reduced=False)
W, U = kernel(6, 4, 3, 3), kernel(6, 4, 3, 3, seed=2)


def constants(model):
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def channels_of(mean):
    """Statistics of channels that vary about a mean."""
    mean = np.asarray(mean, np.float64)
    return Channels(mean - 1, mean + 1, mean, np.square(mean) + 0.25)


def rounded(file, name):
    """A kernel of a quantized model, in float64."""
    held = {key: value.astype(np.float64) for key, value in constants(file).items()}
    scale = held[f"{name}_scale"].reshape(-1, 1, 1, 1)
    assert not held[f"{name}_zero_point"].any()
    return held[f"{name}_quantized"] * scale


def means_of(x, weight, bias, groups):
    """The mean of each output channel, by torch in float64."""
    arrays = [torch.from_numpy(np.array(each, np.float64)) for each in (x, weight, bias)]
    return F.conv2d(*arrays, groups=groups).mean((0, 2, 3)).numpy()


@numbered(25)
@given(
    groups=st.sampled_from((1, 2, 4)), outputs=st.sampled_from((4, 8, 12)), size=st.integers(1, 3),
    has_bias=st.booleans(), reduced=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_the_mean_of_each_output_is_kept(groups, outputs, size, has_bias, reduced, seed):
    """On images of which each channel has one mean at every place that a tap sees."""
    random = np.random.default_rng(seed)
    weight = kernel(outputs, 4 // groups, size, size, seed=seed)
    before = values(outputs, seed=seed + 1) if has_bias else np.zeros(outputs, "f")
    model = one_conv(weight, bias=before if has_bias else None, group=groups)
    file = quantized(model, unknown_ranges(model), Number("uint8", reduced=reduced))
    mean = 3 * random.normal(size=4)
    # Each image and its reflection about the mean.
    spread = random.normal(size=(2, 4, 9, 10))
    x = mean.reshape(4, 1, 1) + np.concatenate([spread, -spread])
    content = model.SerializeToString()
    found = with_corrected_biases(model, file, {"x": channels_of(mean)})
    assert model.SerializeToString() == content
    (changed,) = found.graph.node
    after = constants(found)[changed.input[2]]
    assert after.dtype == np.float32
    kept = means_of(x, weight, before, groups)
    np.testing.assert_allclose(means_of(x, rounded(file, "w"), after, groups), kept, rtol=1e-5, atol=1e-5)
    moved = means_of(x, rounded(file, "w"), before, groups) - kept
    np.testing.assert_allclose(before - after, moved, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(constants(found)["w"], weight)
    onnx.checker.check_model(found, full_check=True)


def test_outputs_of_files_are_unbiased():
    """In ONNX Runtime, of measured statistics, against the file without the correction."""
    weight = kernel(8, 16, 1, 1) + 0.3
    model = prepared(one_conv(weight, shape=("batch", 16, 8, 8)))
    feed = {"x": (np.abs(values(16, 16, 8, 8)) + 2).astype("f")}
    ranges = measured_ranges(model, [feed], "minmax")
    rough = quantized(model, ranges, NUMBER)
    corrected = with_corrected_biases(model, rough, channel_statistics(model, {"x": 4}, [feed]))
    exact = run(model, feed)[0].mean((0, 2, 3))
    errors = [
        np.abs(run(quantized(each, ranges, NUMBER), feed, optimised=False)[0].mean((0, 2, 3)) - exact).max()
        for each in (model, corrected)
    ]
    assert errors[1] < errors[0] / 4


def two(weights, second="x u", **fields):
    """Two convolutions of the input, `a` and `y`, which are returned."""
    return model_of([conv("x w", "a"), conv(second, "y")], weights, outputs=("a", "y"), **fields)


def corrected(model, mean=(1.0, -2.0, 0.5, 3.0), **options):
    file = quantized(model, unknown_ranges(model), NUMBER, **options)
    return with_corrected_biases(model, file, {"x": channels_of(mean)})


def test_kept_layers_are_untouched():
    model = two({"w": W, "u": U})
    found = corrected(model, kept=["a"])
    kept, changed = found.graph.node
    assert kept == model.graph.node[0]
    assert len(changed.input) == 3
    assert {*constants(found)} == {"w", "u", changed.input[2]}


def test_where_nothing_is_quantized_nothing_is_changed():
    model = two({"w": W, "u": U})
    assert corrected(model, kept=["a", "y"]) == model


@pytest.mark.parametrize("shared", ["kernel", "bias"])
def test_convolutions_that_share_a_constant_get_biases_of_their_own(shared):
    weights = {"w": W, "u": U, "b": values(6)}
    nodes = {
        "kernel": [conv("x w b", "a"), conv("z w b", "y")],
        "bias": [conv("x w b", "a"), conv("z u b", "y")],
    }[shared]
    used = {name for each in nodes for name in each.input}
    model = model_of(
        nodes, {name: each for name, each in weights.items() if name in used}, outputs=("a", "y"),
        inputs=[value_of(name, "batch", 4, 9, 10) for name in "xz"],
    )  # fmt: skip
    file = quantized(model, unknown_ranges(model), NUMBER)
    means = {"x": np.array([1.0, 2.0, 3.0, 4.0]), "z": np.array([-3.0, 5.0, 0.0, 1.0])}
    found = with_corrected_biases(model, file, {name: channels_of(mean) for name, mean in means.items()})
    held = constants(found)
    np.testing.assert_array_equal(held["b"], weights["b"])
    for each in found.graph.node:
        x = np.broadcast_to(means[each.input[0]].reshape(4, 1, 1), (1, 4, 5, 5))
        name = each.input[1]
        np.testing.assert_allclose(
            means_of(x, rounded(file, name), held[each.input[2]], 1),
            means_of(x, weights[name], weights["b"], 1),
            atol=1e-5,
        )


@pytest.mark.parametrize("left_out", ["absent", "empty"])
def test_a_bias_may_be_left_out_in_two_ways(left_out):
    model = one_conv(W)
    if left_out == "empty":
        model.graph.node[0].input.append("")
    (found,) = corrected(model).graph.node
    assert [*found.input[:2]] == ["x", "w"]
    assert len(found.input) == 3
    assert found.input[2]


def test_a_bias_that_is_no_constant():
    """It cannot be changed; the rest of the model can be quantized all the same."""
    model = two({"w": W, "u": U}, "x u b", inputs=[value_of("x", "batch", 4, 9, 10), value_of("b", 6)])
    found = corrected(model)
    assert found.graph.node[1].input[2] == "b"


def test_which_convolutions_have_constant_kernels():
    nodes = [
        conv("x w", "a"), conv("x t", "b"), node("Conv", "x w", "c", domain="com.stranger"),
        node("Relu", "s", "t"), node("ConvTranspose", "a v", "d"),
    ]  # fmt: skip
    inputs = [value_of("x", "batch", 4, 9, 10), value_of("s", 6, 4, 3, 3)]
    model = model_of(
        nodes, {"w": W, "v": kernel(6, 2, 3, 3)}, inputs=inputs, outputs=("a", "b", "c", "d"),
        opset={"": 17, "com.stranger": 1},
    )  # fmt: skip
    assert [each.output[0] for each in convolutions_in(model)] == ["a"]
