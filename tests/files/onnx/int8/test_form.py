"""The int8 form of small networks: files that compute what the networks do, in their structure."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from files.onnx.graph.onnx_cases import conv, feed_of, kernel, model_of, node, run, value_of
from onnx import helper, numpy_helper
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Int8
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.int8.form import MOST_IMAGES, Int8Form
from sepconvert.network.tensors import InputBatch, arguments, tensor_leaves

INT8 = {"QuantizeLinear", "DequantizeLinear"}


def images(*counts, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, channels, size, size, generator=generator) for count in counts]


class Net(nn.Module):
    """Two convolutions, and a function of their output and of further inputs."""

    def __init__(self, answer=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.answer = answer

    def forward(self, x, *others):
        return self.answer(self.second(torch.relu(self.first(x))), *others)


def made(model, batches, settings=Int8("on"), axis=0):  # noqa: B008
    """The form of a model, and the inputs of its first batch."""
    samples = [InputBatch(each if isinstance(each, tuple) else (each,), axis) for each in batches]
    return Int8Form(settings, model.eval(), samples[0].inputs, samples), samples[0].inputs


def kinds(model):
    return [each.op_type for each in model.graph.node]


def assert_near(found, expected):
    """The same tensors up to what 8 bits lose, and not to the last digit."""
    pairs = list(zip(tensor_leaves(found), tensor_leaves(expected), strict=True))
    for one, other in pairs:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert (one - other).abs().max() < 0.05 * other.abs().max()
    assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def plain():
    """A network whose form is made once, the form, and its inputs."""
    model = Net().eval()
    return model, *made(model, images(4, 4, 3))


def test_the_file(plain):
    model, form, inputs = plain
    file = form.model(model)
    onnx.checker.check_model(file, full_check=True)
    assert set(kinds(file)) == INT8 | {"Conv"}
    assert kinds(file).count("Conv") == 2
    kernels = [numpy_helper.to_array(each) for each in file.graph.initializer]
    assert {each.dtype for each in kernels if each.ndim == 4} == {np.dtype("int8")}
    (name,) = (value.name for value in file.graph.input)
    for batch in (1, 7):
        (x,) = images(batch, seed=5)
        assert_near(torch.from_numpy(run(file, {name: x.numpy()})[0]), model(x))
    with torch.no_grad():
        assert_near(form.module(model)(*inputs), model(*inputs))


def test_note(plain):
    model, form, _ = plain
    note, file = form.note(model), form.model(model)
    assert (note.method, note.images) == ("minmax", 11)
    assert note.activations == form.number.activations
    assert note.weights == ("int8 in the range of 7 bits" if form.number.reduced else "int8")
    assert next(each.version for each in file.opset_import if not each.domain) == note.opset
    assert note.ir_version == file.ir_version


def test_the_same_call_gives_the_same_file(plain):
    model, form, _ = plain
    other, _ = made(model, images(4, 4, 3))
    assert form.model(model) == form.model(model)
    assert other.model(model).SerializeToString() == form.model(model).SerializeToString()
    assert other.timed(model) == form.timed(model)


def test_images_decide_about_the_ranges(plain):
    model, form, _ = plain
    brighter, _ = made(model, [3 * each for each in images(4)])
    scales = []
    for each in (form, brighter):
        file = each.model(model)
        name = next(node for node in file.graph.node if node.op_type == "QuantizeLinear").input[1]
        scales += [numpy_helper.to_array(held).item() for held in file.graph.initializer if held.name == name]
    assert 2 < scales[1] / scales[0] < 4


def test_the_timed_file_has_the_operators_and_the_size_of_what_is_timed(plain):
    model, form, inputs = plain
    quantized, single = (
        onnx.load_model_from_string(form.timed(model, quantize=each)) for each in (True, False)
    )
    for each in (quantized, single):
        (value,) = each.graph.input
        assert [size.dim_value for size in value.type.tensor_type.shape.dim] == [4, 3, 8, 8]
    assert sorted(kinds(quantized)) == sorted(kinds(form.model(model)))
    assert not INT8 & {*kinds(single)}
    feed = {value.name: inputs[0].numpy()}
    np.testing.assert_allclose(run(single, feed)[0], model(*inputs).detach(), atol=1e-5)
    assert run(quantized, feed)[0].shape == (4, 4, 4, 4)


def test_a_copy_shares_the_files(plain):
    model, form, _ = plain
    copy = Net().eval()
    copy.first.weight.data *= 0
    form.share(model, copy)
    assert form.model(copy) == form.model(model)
    assert form.float_model(copy) == form.float_model(model)


def test_models_are_left_as_they_are(plain):
    model, form, _ = plain
    fresh = Net()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in fresh.state_dict().items())
    assert not model.training
    assert not form.module(model).training


# The structure of outputs -----------------------------------------------------------------------------


@dataclass
class Answer:
    maps: torch.Tensor


STRUCTURES = {
    "a pair": lambda y: (y, 2 * y),
    "a list": lambda y: [y],
    "by name": lambda y: {"b": y, "a": y + 1},
    "nested": lambda y: {"b": (y, [2 * y]), "a": y.mean((2, 3))},
    "one twice": lambda y: (y, y),
    "a tuple of one": lambda y: (y,),
    "with-None": lambda y: (y, None),
    "a class": lambda y: Answer(y),
    "a class of several": lambda y: Answer({"a": y, "b": 2 * y}),
    "by number": lambda y: {0: y, 1: 2 * y},
}
QUICK = "by name", "nested", "with-None"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(answer, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, answer in STRUCTURES.items()
    ],
)
def test_the_module_returns_what_the_model_does(answer):
    model = Net(answer).eval()
    form, inputs = made(model, images(6))
    with torch.no_grad():
        expected, found = model(*inputs), form.module(model)(*inputs)
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    if isinstance(expected, Answer):
        found, expected = vars(found), vars(expected)
    assert_near(found, expected)


# Inputs -----------------------------------------------------------------------------------------------


def test_several_inputs():
    """The second has one value for each image; the third one for all."""

    def answer(y, scale, offset):
        return y * scale.reshape(-1, 1, 1, 1) + offset

    scales = [torch.rand(len(each), generator=torch.Generator().manual_seed(1)) + 1 for each in images(4, 3)]
    batches = [
        (x, scale, torch.tensor(0.5)) for x, scale in zip(images(4, 3), scales, strict=True)
    ]  # fmt: skip
    model = Net(answer).eval()
    form, inputs = made(model, batches)
    assert len(form.model(model).graph.input) == 3
    with torch.no_grad():
        assert_near(form.module(model)(*inputs), model(*inputs))


def test_inputs_by_name_are_taken_as_the_model_takes_them():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, left, right):
            return self.conv(left - 2 * right)

    torch.manual_seed(0)
    model, left, right = Difference().eval(), torch.rand(8, 3, 8, 8), torch.rand(8, 3, 8, 8)
    form = Int8Form(Int8("on"), model, (left[:1], right[:1]), [InputBatch((left, right))])
    running = form.module(model)
    with torch.no_grad():
        assert_near(running(*arguments(running, {"right": right, "left": left})), model(left, right))


def test_a_number_before_the_images():
    class Scaled(Net):
        def forward(self, scale, x):
            return self.second(self.first(x * scale))

    model = Scaled().eval()
    form, inputs = made(model, [(torch.tensor(2.0), each) for each in images(4)])
    with torch.no_grad():
        assert_near(form.module(model)(*inputs), model(*inputs))


class Fixed(Net):
    """Export fixes its batch."""

    def forward(self, x):
        return super().forward(x).reshape(4, -1)


def test_a_batch_that_is_fixed():
    """Images are taken in batches of that size; what is left of them has no place."""
    model = Fixed().eval()
    form, inputs = made(model, images(4, 9, 3))
    file = form.model(model)
    (value,) = file.graph.input
    assert value.type.tensor_type.shape.dim[0].dim_value == 4
    assert next(iter(form.example(model).values())).shape == (4, 3, 8, 8)
    with torch.no_grad():
        assert_near(form.module(model)(*inputs), model(*inputs))
    joined = torch.cat(images(4, 9, 3))
    for others in ([joined[:4], joined[4:]], [joined[:4], joined[4:9], joined[9:], joined[:3]]):
        same, _ = made(model, others)
        assert same.model(model) == file


def test_batches_that_are_smaller_than_the_fixed_one():
    """Together they have enough images."""
    file = model_of([conv("x w", "a"), node("Relu", "a", "y")], {"w": kernel(6, 4, 3, 3)},
                    inputs=[value_of("x", 4, 4, 9, 10)])  # fmt: skip
    network = open_network(file)
    samples = [InputBatch((torch.randn(3, 4, 9, 10),)) for _ in range(4)]
    form = Int8Form(Int8("on"), network, (torch.randn(4, 4, 9, 10),), samples)
    assert {*kinds(form.model(network))} > INT8


def test_samples_along_another_dimension():
    class Turned(Net):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = Turned().eval()
    form, inputs = made(model, [each.transpose(0, 1) for each in images(4, 4)], axis=1)
    with torch.no_grad():
        assert_near(form.module(model)(*inputs), model(*inputs))


def test_the_first_images_are_used():
    model = nn.Sequential(nn.Conv2d(1, 2, 1)).eval()
    batches = images(100, 100, 100, 50, channels=1, size=2)
    form, _ = made(model, batches)
    assert form.note(model).images == MOST_IMAGES
    first, _ = made(model, [*batches[:2], batches[2][: MOST_IMAGES - 200]])
    assert first.model(model) == form.model(model)


def test_no_images():
    with pytest.raises(SepconvertError):
        Int8Form(Int8("on"), Net().eval(), (images(1)[0],), [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = Net().to(dtype).eval()
    form, inputs = made(model, [each.to(dtype) for each in images(4)])
    with torch.no_grad():
        found, expected = form.module(model)(*inputs), model(*inputs)
    assert (found.double() - expected.double()).abs().max() < 0.05 * expected.double().abs().max()


class OfALogarithm(nn.Module):
    def forward(self, x):
        return x.log()


# Errors -----------------------------------------------------------------------------------------------


def test_a_constant_activation():
    model = Net().eval()
    model.first.weight.data *= 0
    model.first.bias.data[:] = 1
    form, _ = made(model, images(4))
    with pytest.raises(SepconvertError) as caught:
        form.model(model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("`int8`: the outputs of ")
    assert "the same number for all calibration images" in str(caught.value)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_an_activation_that_is_not_finite(method):
    """The logarithm of a number below 0, which is not the first."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), OfALogarithm())
    model[0].weight.data[:] = 1
    form, _ = made(model, [torch.tensor([2.0, -1.0]).reshape(1, 1, 1, 2)], Int8("on", method))
    with pytest.raises(SepconvertError) as caught:
        form.model(model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("`int8`: ")


# ONNX files -------------------------------------------------------------------------------------------


def network(opset=17, batch="batch"):
    """A network of a file."""
    return open_network(
        model_of(
            [conv("x w", "a"), conv("a v", "c"), node("Relu", "c", "r"), node("Neg", "c", "n")],
            {"w": kernel(6, 4, 3, 3), "v": kernel(5, 6, 1, 1)}, inputs=[value_of("x", batch, 4, 9, 10)],
            outputs=("r", "n"), opset=opset,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("opset", "batch"), [(11, "batch"), (12, 2), (17, "batch"), (20, 2)])
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_the_network_of_a_file(opset, batch, method):
    model = network(opset, batch).eval()
    content = model.graph.model.SerializeToString()
    batches = [torch.from_numpy(feed_of(model.graph.model, 2, seed)["x"]) for seed in (0, 1)]
    form, inputs = made(model, batches, Int8("on", method))
    assert form.note(model).method == method
    file = form.model(model)
    onnx.checker.check_model(file, full_check=True)
    assert {*kinds(file)} > INT8
    found, expected = form.module(model)(*inputs), model(*inputs)
    assert isinstance(found, tuple)
    assert_near(found, expected)
    assert model.graph.model.SerializeToString() == content


def test_a_file_that_is_quantized_already():
    model = network()
    form, inputs = made(model, [torch.from_numpy(feed_of(model.graph.model)["x"])])
    again = open_network(form.model(model))
    other, _ = made(again, [inputs[0]])
    with pytest.raises(SepconvertError, match="quantized already") as caught:
        other.model(again)
    assert "\n" not in str(caught.value)


def test_an_operator_that_the_quantizer_does_not_know():
    """It stays in floating point, and so does the input of the convolution behind it, which has no bias."""
    gelu = helper.make_node("Gelu", ["a"], ["g"], domain="com.microsoft")
    model = model_of(
        [conv("x w", "a"), gelu, conv("g v", "y")], {"w": kernel(6, 4, 3, 3), "v": kernel(5, 6, 3, 3)},
        inputs=[value_of("x", "batch", 4, 9, 10)], opset={"": 20, "com.microsoft": 1},
    )  # fmt: skip
    x = torch.randn(16, 4, 9, 10, generator=torch.Generator().manual_seed(0))
    network = open_network(model)
    form = Int8Form(Int8("on"), network, (x[:1],), [InputBatch((x,))])
    expected, found = network(x), form.module(network)(x)
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert {each.op_type for each in form.model(network).graph.node} >= {"Gelu", "QuantizeLinear"}


def test_files_import_no_more_than_they_use():
    model = Net().eval()
    form, _ = made(model, images(4))
    assert {each.domain for each in form.model(model).opset_import} == {""}
