"""ONNX Runtime's answers and shapes, and its refusals in one line."""

import numpy as np
import pytest
import torch
from files.onnx.graph.onnx_cases import (
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
from onnx import TensorProto

from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.graph.running import answers, feed_by_name, opened, shapes_of

W = kernel(8, 4, 3, 3)


def cut():
    """A Conv, and two parts of its output."""
    nodes = [conv("x w", "c"), node("Split", "c a b", "a b", axis=1)]
    nodes[1].input[:] = ["c", "parts"]
    return model_of(nodes, {"w": W, "parts": np.array([3, 5])}, outputs=("b", "a"))


@pytest.mark.parametrize("optimised", [True, False])
def test_answers_are_the_outputs_in_their_order(optimised):
    model = cut()
    feed = feed_of(model)
    found = answers(model, feed, optimised=optimised)
    assert [each.shape for each in found] == [(2, 5, 7, 8), (2, 3, 7, 8)]
    for one, other in zip(found, run(model, feed, optimised=optimised), strict=True):
        np.testing.assert_array_equal(one, other)


def test_shapes_of_values_of_all_kinds():
    """Inputs, weights, outputs, values within, and scalars; the model stays as it is."""
    nodes = [conv("x w", "c"), node("ReduceMean", "c", "mean", keepdims=0), node("Add", "c mean", "y")]
    model = model_of(nodes, {"w": W})
    before = model.SerializeToString()
    found = shapes_of(model, feed_of(model, batch=3), ["x", "w", "c", "mean", "y"])
    assert found == {
        "x": (3, 4, 9, 10), "w": (8, 4, 3, 3), "c": (3, 8, 7, 8), "mean": (), "y": (3, 8, 7, 8),
    }  # fmt: skip
    assert model.SerializeToString() == before


def test_no_shapes_are_asked_for():
    model = one_conv(W)
    assert shapes_of(model, feed_of(model), []) == {}


def test_names_that_ours_could_clash_with():
    nodes = [conv("x w", "sepconvert.shape.0"), node("Relu", "sepconvert.shape.0", "y")]
    model = model_of(nodes, {"w": W})
    assert shapes_of(model, feed_of(model), ["sepconvert.shape.0", "y"]) == {
        "sepconvert.shape.0": (2, 8, 7, 8), "y": (2, 8, 7, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        model_of([node("NoSuchOperator", "x", "y")]),
        model_of([node("Relu", "nowhere", "y")]),
        model_of([node("Relu", "x", "y")], opset=999),
        model_of([node("Relu", "x", "y")], opset={}),
        model_of([node("Relu", "b", "a"), node("Relu", "a", "b")], outputs=("b",)),
    ],
    ids=["unknown operator", "unknown value", "future opset", "no opset", "cycle"],
)
def test_models_that_are_refused(model):
    with pytest.raises(SepconvertError, match="ONNX Runtime cannot load the model: ") as caught:
        opened(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "feed",
    [{"x": values(1, 3, 9, 10)}, {"x": values(4, 9)}, {"x": values(1, 4, 9, 10, dtype=np.float64)}, {}],
    ids=["channels", "dimensions", "dtype", "nothing"],
)
@pytest.mark.parametrize("asked", [answers, lambda model, feed: shapes_of(model, feed, ["y"])])
def test_inputs_that_do_not_fit(feed, asked):
    with pytest.raises(
        SepconvertError, match="ONNX Runtime cannot run the model on these inputs: "
    ) as caught:
        asked(one_conv(W), feed)
    assert "\n" not in str(caught.value)


def test_tensors_become_arrays_in_order():
    x = torch.arange(6.0).reshape(2, 3).t().requires_grad_()  # neither contiguous nor detached
    found = feed_by_name(["b", "a"], (x, torch.tensor(3)))
    assert list(found) == ["b", "a"]
    np.testing.assert_array_equal(found["b"], [[0, 3], [1, 4], [2, 5]])
    assert found["a"].shape == ()
    with pytest.raises(ValueError, match="zip"):
        feed_by_name(["a"], (x, x))


def test_sequences_have_no_shape():
    model = model_of(
        [node("SequenceConstruct", "x x", "both"), node("SequenceLength", "both", "y")],
        outputs=[value_of("y", kind=TensorProto.INT64)],
    )
    with pytest.raises(SepconvertError, match="ONNX Runtime cannot load the model"):
        shapes_of(model, feed_of(model), ["both"])
