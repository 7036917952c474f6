"""Equalized scales keep the function, and lower the noise of rounding as simulated with numpy."""

import numpy as np
import onnx
import pytest
import torch
from files.onnx.graph.onnx_cases import conv, kernel, model_of, node, run, value_of, values
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from strategies import numbered
from torch.nn import functional as F

from sepconvert.files.onnx.int8.equalize import best_scale, equalized, noise, pairs_in, quieter, rotated
from sepconvert.files.onnx.int8.quantizer import Number, measured_ranges, prepared, quantized
from sepconvert.files.onnx.int8.statistics import Channels, channel_statistics

X, A, Y = (value_of(name, "n", name + "c", name + "h", name + "w") for name in "xay")


def channels_of(ranges, squares=None):
    """Statistics of channels from 0 to their ranges, by default of equal frequency."""
    ranges = np.asarray(ranges, np.float64)
    squares = np.square(ranges) / 3 if squares is None else np.asarray(squares, np.float64)
    return Channels(np.zeros_like(ranges), ranges, ranges / 2, squares)


def constants(model):
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def same_graph(one, other):
    """Whether two models differ in their constants alone, if at all."""
    graphs = []
    for model in (one, other):
        graph = onnx.GraphProto()
        graph.CopyFrom(model.graph)
        del graph.initializer[:]
        graphs.append(graph)
    return graphs[0] == graphs[1]


# The function -----------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """Two convolutions of any groups, the kernels of some channels being 0, and statistics between them."""
    first_groups, groups = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((1, 2, 6, 6)))
    inner, seed = 6, draw(st.integers(0, 2**20))
    random = np.random.default_rng(seed)
    sizes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    v = random.normal(size=(inner, 2, sizes[0], 1)) * np.exp(2 * random.normal(size=(inner, 1, 1, 1)))
    outputs = groups * draw(st.integers(1, 3))
    w = random.normal(size=(outputs, inner // groups, 1, sizes[1]))
    w *= np.exp(2 * random.normal(size=(1, inner // groups, 1, 1)))
    ranges = np.exp(2 * random.normal(size=inner))
    dead = draw(st.lists(st.integers(0, inner - 1), max_size=inner))
    if draw(st.booleans()):
        ranges[dead] = 0
    else:
        w.reshape(groups, -1, *w.shape[1:])[[each // w.shape[1] for each in dead], :, [
            each % w.shape[1] for each in dead
        ]] = 0  # fmt: skip
    weights = {"v": v, "w": w}
    if draw(st.booleans()):
        weights |= {"b": random.normal(size=inner), "c": random.normal(size=outputs)}
    return weights, first_groups, groups, channels_of(ranges)


def chained(weights, first_groups, groups, **options):
    """The pair as a model in float64."""
    names = ("x v b", "a w c") if "b" in weights else ("x v", "a w")
    nodes = [conv(names[0], "a", group=first_groups), conv(names[1], "y", group=groups)]
    inputs, outputs = ([value_of(name, "n", None, None, None, kind=TensorProto.DOUBLE)] for name in "xy")
    return model_of(nodes, weights, inputs=inputs, outputs=outputs, **options)


def computed(weights, first_groups, groups, x):
    """What the pair makes of an input, by torch."""
    held = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    between = F.conv2d(torch.from_numpy(x), held["v"], held.get("b"), groups=first_groups)
    return F.conv2d(between, held["w"], held.get("c"), groups=groups).numpy()


@numbered(15)
@given(pairs())
def test_the_product_is_unchanged(pair):
    weights, first_groups, groups, between = pair
    model = chained(weights, first_groups, groups)
    before = model.SerializeToString()
    found = equalized(model, {"a": between})
    assert model.SerializeToString() == before
    assert same_graph(model, found)
    changed = constants(found)
    x = np.random.default_rng(0).normal(size=(2, 2 * first_groups, 5, 5))
    expected = computed(weights, first_groups, groups, x)
    size = computed({name: np.abs(each) for name, each in weights.items()}, first_groups, groups, np.abs(x))
    np.testing.assert_array_less(
        np.abs(computed(changed, first_groups, groups, x) - expected), 1e-13 * size + 1e-300
    )
    assert all(np.isfinite(each).all() for each in changed.values())
    # Each channel is scaled as a whole, its bias included, by a positive number.
    ratio = changed["v"] / weights["v"]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-12)
    assert (ratio > 0).all()
    if "b" in weights:
        np.testing.assert_allclose(changed["b"], weights["b"] * ratio[:, 0, 0, 0], rtol=1e-12)
        np.testing.assert_array_equal(changed["c"], weights["c"])


@given(pairs())
def test_the_scale_is_never_noisier_than_none(pair):
    weights, _, groups, between = pair
    scale = best_scale(weights["w"], groups, between)
    assert scale.shape == (6,)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    chosen, plain = (noise(weights["w"], groups, between, each) for each in (scale, np.ones(6)))
    assert chosen <= plain
    # A dead channel sets the scale of no other.
    assert (scale * between.range).max() <= 1.0001 * (scale * between.range)[between.range > 0].max(initial=0)


@given(pairs(), st.floats(1e-3, 1e3))
def test_noise_does_not_depend_on_the_unit_between(pair, factor):
    """One factor for all channels changes nothing: the first kernel takes it up."""
    weights, _, groups, between = pair
    scale = np.exp(np.random.default_rng(0).normal(size=6))
    one, other = (noise(weights["w"], groups, between, each) for each in (scale, factor * scale))
    assert other == pytest.approx(one, rel=1e-9)


def test_channels_of_unequal_range_gain():
    """A range of 100 beside ranges of 1, which one step would leave 2 or 3 of 255 numbers."""
    weight = kernel(16, 8, 1, 3, dtype=np.float64)
    between = channels_of([100, *[1] * 7])
    weight[:, 0] /= 100
    scale = best_scale(weight, 1, between)
    assert noise(weight, 1, between, scale) < noise(weight, 1, between, np.ones(8)) / 100
    assert scale[1] / scale[0] == pytest.approx(100, rel=0.3)


def test_equal_channels_stay_as_they_are_to_each_other():
    weight = np.ones((4, 5, 3, 1))
    scale = best_scale(weight, 1, channels_of([2.0] * 5))
    np.testing.assert_allclose(scale, scale[0])


@pytest.mark.parametrize("dead", ["values", "weights"])
def test_of_dead_values_nothing_is_changed(dead):
    weight = kernel(4, 6, 1, 3, dtype=np.float64) * (dead == "values")
    ranges = np.ones(6) * (dead == "weights")
    np.testing.assert_array_equal(best_scale(weight, 1, channels_of(ranges)), np.ones(6))


@pytest.mark.parametrize(
    ("weights", "length"),
    [
        pytest.param(1.0, 0.0, id="never seen"),
        pytest.param(0.0, 1.0, id="never read"),
        pytest.param(1000.0, 0.0, id="never seen, large weights"),
        pytest.param(0.0, 1000.0, id="never read, large values"),
    ],
)
def test_a_dead_channel_costs_the_others_nothing(weights, length):
    """Beside others that differ: the noise is what it is without it, but for what it may take up itself."""
    random = np.random.default_rng(0)
    others, ranges = random.normal(size=(12, 7, 1, 3)), np.exp(2 * random.normal(size=7))
    alone = channels_of(ranges)
    expected = noise(others, 1, alone, best_scale(others, 1, alone))
    weight = np.concatenate([others, weights * random.normal(size=(12, 1, 1, 3))], axis=1)
    between = channels_of([*ranges, length])
    assert noise(weight, 1, between, best_scale(weight, 1, between)) < 2 * expected


# The noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "taps"), [(8, 12, 1, (1, 3)), (16, 4, 4, (1, 1)), (12, 1, 12, (3, 1))]
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_noise_is_that_of_rounding(outputs, inputs, groups, taps, spread):
    """Simulated: values and kernels are rounded, of many kernels alike but for the last digits."""
    random = np.random.default_rng(0)
    channels, size = groups * inputs, (groups, outputs // groups, inputs, *taps)
    ranges = np.exp(spread * random.normal(size=channels))
    scale = np.exp(0.5 * spread * random.normal(size=channels))
    by_group = (groups, 1, inputs, 1, 1)
    simulated, predicted = [], []
    for _ in range(60):
        weight = random.uniform(-1, 1, size) / np.sqrt(inputs * np.prod(taps))
        x = random.uniform(size=(300, *by_group[:3], *taps)) * ranges.reshape(by_group)
        inner, scaled = x * scale.reshape(by_group), weight / scale.reshape(by_group)
        step = (ranges * scale).max() / 255
        steps = np.abs(scaled).max((2, 3, 4), keepdims=True) / 127
        rounded = np.einsum("ngocij,gocij->ngo", np.round(inner / step) * step + 0 * scaled,
                            np.round(scaled / steps) * steps)  # fmt: skip
        exact = np.einsum("ngocij,gocij->ngo", x + 0 * weight, weight)
        simulated.append(np.square(rounded - exact).mean(0).sum())
        flat = weight.reshape(outputs, inputs, *taps)
        predicted.append(noise(flat, groups, channels_of(ranges), scale))
    assert np.mean(simulated) == pytest.approx(np.mean(predicted), rel=0.25)


def test_files_become_more_accurate():
    """In ONNX Runtime, of a pair whose inner channels differ by three orders of magnitude."""
    by_channel = np.logspace(-2, 1, 8).reshape(-1, 1, 1, 1)
    v = kernel(8, 4, 3, 1, dtype=np.float64) * by_channel
    w = kernel(6, 8, 1, 3, dtype=np.float64) / by_channel.reshape(1, -1, 1, 1)
    weights = {"v": v.astype("f"), "w": w.astype("f")}
    model = prepared(model_of([conv("x v", "a"), conv("a w", "y")], weights))
    feed = {"x": values(8, 4, 9, 10)}
    between = channel_statistics(model, {"a": 4}, [feed])
    expected, errors = run(model, feed)[0], []
    for each in (model, equalized(model, between)):
        np.testing.assert_allclose(run(each, feed)[0], expected, atol=1e-4)
        file = quantized(each, measured_ranges(each, [feed], "minmax"), Number("uint8", reduced=False))
        errors.append(np.sqrt(np.square(run(file, feed)[0] - expected).mean()))
    assert errors[1] < errors[0] / 10


# What is touched --------------------------------------------------------------------------------------

V, W = kernel(6, 4, 3, 1), kernel(5, 6, 1, 3, seed=3)
BETWEEN = channels_of(np.logspace(0, 3, 6))


def nested():
    """The value between is read by a branch of an If, too."""
    name = value_of("t", None, None, None, None)
    branch = [
        helper.make_graph([node(kind, "a", "t")], kind, [], [name]) for kind in ("Identity", "Neg")
    ]  # fmt: skip
    chosen = helper.make_node("If", ["k"], ["z"], then_branch=branch[0], else_branch=branch[1])
    return model_of(
        [conv("x v", "a"), conv("a w", "y"), chosen], {"v": V, "w": W, "k": np.array(True)},
        outputs=[Y, value_of("z", None, None, None, None)],
    )  # fmt: skip


UNTOUCHED = {
    "read twice": lambda: model_of(
        [conv("x v", "a"), conv("a w", "y"), node("Relu", "a", "z")], {"v": V, "w": W}, outputs=("y", "z")
    ),
    "returned": lambda: model_of([conv("x v", "a"), conv("a w", "y")], {"v": V, "w": W}, outputs=("y", "a")),
    "read in a branch": nested,
    "an activation between": lambda: model_of(
        [conv("x v", "r"), node("Relu", "r", "a"), conv("a w", "y")], {"v": V, "w": W}
    ),
    "a kernel that is computed": lambda: model_of(
        [conv("x v", "a"), node("Relu", "u", "w"), conv("a w", "y")], {"v": V},
        inputs=[value_of("x", "n", 4, 9, 10), value_of("u", 5, 6, 1, 3)],
    ),
    "a bias that is an input": lambda: model_of(
        [conv("x v b", "a"), conv("a w", "y")], {"v": V, "w": W},
        inputs=[value_of("x", "n", 4, 9, 10), value_of("b", 6)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_pair(model):
    made = model()
    assert pairs_in(made) == []
    assert equalized(made, {}) == made


SQUARE = kernel(6, 6, 1, 1)
SHARED = {
    "one kernel in both": ([conv("x u", "a"), conv("a u", "y")], {"u": SQUARE}, 6),
    "the first elsewhere": (
        [conv("x v", "a"), conv("a w", "y"), conv("x v", "z")], {"v": V, "w": W}, 4,
    ),
    "the second elsewhere": (
        [conv("x v", "a"), conv("a w", "y"), conv("s w", "z")], {"v": V, "w": W}, 4,
    ),
    "a bias": ([conv("x v b", "a"), conv("a u b", "y")], {"v": V, "u": SQUARE, "b": values(6)}, 4),
    "a bias, in a sum": (
        [conv("x v b", "a"), conv("a w", "y"), node("Sum", "b", "z")], {"v": V, "w": W, "b": values(6)}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "weights", "inputs"), SHARED.values(), ids=SHARED)
def test_constants_that_others_read_are_left_alone(nodes, weights, inputs):
    graph_inputs = [value_of("x", "n", inputs, 9, 10)]
    if any("s" in each.input for each in nodes):
        graph_inputs.append(value_of("s", "n", 6, 9, 10))
    model = model_of(nodes, weights, inputs=graph_inputs, outputs=[each.output[0] for each in nodes][1:])
    assert [pair.between for pair in pairs_in(model)] == ["a"]
    assert equalized(model, {"a": BETWEEN}) == model


def test_a_kernel_that_the_graph_returns_is_left_alone():
    model = model_of(
        [conv("x v", "a"), conv("a w", "y")], {"v": V, "w": W}, outputs=["y", value_of("w", *W.shape)]
    )
    np.testing.assert_array_equal(constants(equalized(model, {"a": BETWEEN}))["w"], W)


def test_three_in_a_row():
    """The middle one is the second of a pair and the first of another."""
    u = kernel(3, 5, 1, 1, seed=7)
    model = model_of(
        [conv("x v b", "a"), conv("a w c", "d"), conv("d u", "y")],
        {"v": V, "w": W, "u": u, "b": values(6), "c": values(5)},
    )
    assert [pair.between for pair in pairs_in(model)] == ["a", "d"]
    statistics = {"a": BETWEEN, "d": channels_of(np.logspace(2, 0, 5))}
    found = equalized(model, statistics)
    feed = {"x": values(2, 4, 9, 10)}
    expected = run(model, feed)[0]
    np.testing.assert_allclose(run(found, feed)[0], expected, atol=1e-4 * np.abs(expected).max())
    assert all((constants(found)[name] != constants(model)[name]).any() for name in "vwubc")
    onnx.checker.check_model(found, full_check=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_are_kept(dtype):
    weights = {"v": V.astype(dtype), "w": W.astype(dtype)}
    found = constants(equalized(chained({**weights}, 1, 1), {"a": channels_of([1, 2, 4, 8, 4, 2])}))
    assert {each.dtype for each in found.values()} == {np.dtype(dtype)}
    assert any((found[name] != weights[name]).any() for name in weights)


# Mixtures of channels ---------------------------------------------------------------------------------


def statistics_of(value):
    flat = np.moveaxis(value.astype(np.float64), 1, 0).reshape(value.shape[1], -1)
    return Channels(flat.min(1), flat.max(1), flat.mean(1), np.square(flat).mean(1))


def with_outputs(model, *names):
    """The model with values of its own as outputs, too."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return shown


def test_mixing_channels_leaves_the_product_as_it_is():
    model = model_of(
        [conv("x v d", "a"), conv("a w", "y")],
        {"v": V.astype(np.float64), "d": np.linspace(-1, 1, len(V)), "w": W.astype(np.float64)},
        inputs=[value_of("x", "batch", V.shape[1], 9, 10, kind=onnx.TensorProto.DOUBLE)],
        outputs=[value_of("y", kind=onnx.TensorProto.DOUBLE)],
    )
    x = np.random.default_rng(0).normal(size=(3, V.shape[1], 9, 10))
    evaluator = ReferenceEvaluator(with_outputs(model, "a"))
    expected, between = evaluator.run(None, {"x": x})
    mixed = rotated(model, {"a": statistics_of(between)})
    found, mixture = ReferenceEvaluator(with_outputs(mixed, "a")).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert np.abs(mixture - between).max() > 0.1


def test_outliers_of_one_channel_are_spread_over_all():
    """The value between has one channel that is large at times: the noise at the output falls by much."""
    random = np.random.default_rng(0)
    value = random.normal(size=(64, 16, 8, 8))
    value[:, 3] *= np.where(random.random((64, 8, 8)) < 0.01, 50, 1)
    weight = random.normal(size=(12, 16, 1, 1))
    model = model_of(
        [conv("x v", "a"), conv("a w", "y")],
        {"v": np.eye(16, dtype="f")[..., None, None], "w": weight.astype("f")},
        inputs=[value_of("x", "batch", 16, 8, 8)],
    )
    before = {"a": statistics_of(value)}
    mixed = rotated(model, before)
    mixture = np.einsum("sr,brij->bsij", constants(mixed)["v"][..., 0, 0], value)
    after = {"a": statistics_of(mixture)}
    kernels = [constants(each)["w"].astype(np.float64) for each in (model, mixed)]
    first, second = (
        noise(kernel, 1, known["a"], best_scale(kernel, 1, known["a"]))
        for kernel, known in zip(kernels, (before, after), strict=True)
    )
    assert second < 0.5 * first
    taken, channels = quieter(model, mixed, (before, after))
    np.testing.assert_array_equal(constants(taken)["w"], constants(mixed)["w"])
    assert channels["a"] is after["a"]
    kept, channels = quieter(mixed, model, (after, before))
    np.testing.assert_array_equal(constants(kept)["w"], constants(mixed)["w"])
    assert channels["a"] is after["a"]


def test_channels_of_depthwise_convolutions_are_not_mixed():
    weights = {"v": kernel(6, 4, 3, 3), "w": kernel(6, 1, 3, 3)}
    model = model_of([conv("x v", "a"), conv("a w", "y", group=6)], weights)
    found = constants(rotated(model, {"a": channels_of(np.ones(6))}))
    assert all(np.array_equal(found[name], value) for name, value in weights.items())
