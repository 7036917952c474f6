"""Statistics of channels, against numpy on the values themselves."""

import numpy as np
import onnx
import pytest
from files.onnx.graph.onnx_cases import conv, kernel, model_of, node, run, value_of, values
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbered

from sepconvert.files.onnx.int8.statistics import Channels, channel_statistics

RANKS = {"x": 4, "a": 4, "r": 4, "f": 2}


def net(opset=17, size=(9, 10)):
    """A convolution and what follows, each of whose values is an output."""
    nodes = [
        conv("x w b", "a"), node("Relu", "a", "r"), node("GlobalMaxPool", "r", "p"),
        node("Flatten", "p", "f"),
    ]  # fmt: skip
    return model_of(
        nodes, {"w": kernel(6, 4, 3, 3), "b": values(6, seed=4)}, inputs=[value_of("x", "batch", 4, *size)],
        outputs=("a", "r", "f"), opset=opset,
    )  # fmt: skip


def seen(model, feeds):
    """Each value over all batches, samples first."""
    runs = [(feed["x"], *run(model, feed)) for feed in feeds]
    return {
        name: np.concatenate(found).astype(np.float64)
        for name, found in zip(RANKS, zip(*runs, strict=True), strict=True)
    }


def assert_statistics(found, value):
    """`value` has the channels second."""
    by_channel = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)
    np.testing.assert_array_equal(found.low, by_channel.min(1))
    np.testing.assert_array_equal(found.high, by_channel.max(1))
    scale = np.abs(by_channel).max()
    np.testing.assert_allclose(found.mean, by_channel.mean(1), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(found.square, np.square(by_channel).mean(1), rtol=1e-4)
    assert {each.dtype for each in (found.low, found.high, found.mean, found.square)} == {np.dtype("float64")}
    assert (found.range == np.maximum(by_channel, 0).max(1) - np.minimum(by_channel, 0).min(1)).all()


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_against_numpy(opset):
    """Axes are attributes before opset 18, and inputs from then on."""
    model = net(opset)
    before = model.SerializeToString()
    feeds = [
        {"x": (1 + batch) * values(batch, 4, 9, 10, seed=batch) + np.arange(4, dtype="f").reshape(4, 1, 1)}
        for batch in (1, 5, 2)
    ]
    found = channel_statistics(model, RANKS, iter(feeds))
    assert set(found) == set(RANKS)
    for name, value in seen(model, feeds).items():
        assert_statistics(found[name], value)
    assert model.SerializeToString() == before


@numbered(8)
@given(batches=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 2**20))
def test_batches_are_joined_by_their_samples(batches, seed):
    """However the same images are divided, the statistics are those of all of them."""
    images = values(sum(batches), 4, 5, 6, seed=seed)
    images *= np.exp(values(len(images), 1, 1, 1, seed=seed + 1))
    model = net(size=(5, 6))
    ends = np.cumsum(batches)[:-1]
    apart = channel_statistics(model, RANKS, [{"x": part} for part in np.split(images, ends)])
    for name, value in seen(model, [{"x": images}]).items():
        assert_statistics(apart[name], value)


def test_one_and_three_dimensions():
    for shape in ((7,), (5, 6, 7)):
        model = model_of([node("Relu", "x", "y")], inputs=[value_of("x", "batch", 3, *shape)])
        feed = {"x": values(4, 3, *shape)}
        (found,) = run(model, feed)
        assert_statistics(channel_statistics(model, {"y": 2 + len(shape)}, [feed])["y"], found.astype(float))


def test_of_no_values_nothing_is_run():
    refused = model_of([node("Unheard", "x", "y")])
    assert channel_statistics(refused, {}, [{"x": values(1, 4, 9, 10)}]) == {}


def test_values_in_half_precision():
    """Squares of 300 exceed the largest number of float16."""
    kind = onnx.TensorProto.FLOAT16
    model = model_of(
        [node("Relu", "x", "y")], inputs=[value_of("x", "batch", 2, 3, 3, kind=kind)],
        outputs=[value_of("y", "batch", 2, 3, 3, kind=kind)],
    )  # fmt: skip
    found = channel_statistics(model, {"y": 4}, [{"x": np.full((2, 2, 3, 3), 300, np.float16)}])["y"]
    assert found.high.tolist() == [300, 300]
    assert found.square.tolist() == [90000, 90000]


def test_the_first_input_may_be_a_number():
    model = model_of([node("Mul", "x s", "y")], inputs=[value_of("s"), value_of("x", "batch", 3, 2, 2)])
    feed = {"s": np.array(2, "f"), "x": values(4, 3, 2, 2)}
    assert_statistics(channel_statistics(model, {"y": 4}, [feed])["y"], 2 * feed["x"].astype(float))


def test_no_images():
    assert channel_statistics(net(), RANKS, []) == {}


@pytest.mark.parametrize(
    ("low", "high", "length"), [(-1.0, 3.0, 4.0), (2.0, 3.0, 3.0), (-3.0, -2.0, 3.0), (0.0, 0.0, 0.0)]
)
def test_the_range_holds_zero(low, high, length):
    ends = np.array([low]), np.array([high])
    assert Channels(*ends, ends[0], ends[1]).range.tolist() == [length]
