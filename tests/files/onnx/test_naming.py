"""Names of what ONNX files take and return: those of the forward's arguments, or those that are asked for."""

from collections import OrderedDict

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.exporting import Export
from sepconvert.files.onnx.export import check_opset
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.naming import check_interface, input_names, interface_of
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.files.onnx.writing import checked_interface, write_onnx
from sepconvert.network.tensors import tensor_leaves

X = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)


class Model(nn.Module):
    """A model of one convolution, which the forward of a subclass uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)


class Two(Model):
    def forward(self, left, right):
        return self.conv(left) - self.conv(right)


class Nested(Model):
    def forward(self, a, b):
        return {"sum": self.conv(a + b[0]), "more": [self.conv(b[1])]}


class Mapped(Model):
    def forward(self, given):
        return OrderedDict(out=self.conv(given["l"]), aux=given["l"] + given["r"])


class Starred(Model):
    def forward(self, *images):
        return self.conv(images[0] + images[1])


class Twice(Model):
    """One output twice, and an input as an output."""

    def forward(self, x):
        y = self.conv(x)
        return y, y, x


class Clashing(Model):
    """Names that parameters, buffers and outputs have already."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("output", torch.full((1,), 2.0))

    def forward(self, weight):
        return self.conv(weight) * self.weight + self.output


class Output(Model):
    def forward(self, output):
        return self.conv(output)


CASES = {
    "a module of torch": (nn.Conv2d(3, 4, 3), (X,), ["input"], ["output"]),
    "two": (Two(), (X, X + 1), ["left", "right"], ["output"]),
    "nested": (Nested(), (X, [X, X + 1]), ["a", "b_0", "b_1"], ["output_0", "output_1"]),
    "mappings": (Mapped(), ({"l": X, "r": X},), ["l", "r"], ["out", "aux"]),
    "behind an asterisk": (Starred(), (X, X), ["input_0", "input_1"], ["output"]),
    "twice": (Twice(), (X,), ["x"], ["output_0", "output_1", "output_2"]),
    "names of parameters": (Clashing(), (X,), ["input_weight"], ["output_out"]),
    "the name of an output": (Output(), (X,), ["output"], ["output_out"]),
}


def opened(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return (
        session,
        [each.name for each in session.get_inputs()],
        [each.name for each in session.get_outputs()],
    )


@pytest.mark.parametrize(("model", "inputs", "taken", "returned"), CASES.values(), ids=CASES)
def test_files_take_the_arguments_of_the_forward(tmp_path, model, inputs, taken, returned):
    write_onnx(model.eval(), inputs, tmp_path / "m.onnx")
    session, *names = opened(tmp_path / "m.onnx")
    assert names == [taken, returned]
    with torch.no_grad():
        expected = list(tensor_leaves(model(*inputs)))
    for found, value in zip(session.run(None, onnx_feed(model, inputs)), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [Two(), nn.Sequential(nn.SiLU()), nn.Sequential(nn.LogSigmoid())])
def test_the_batch_is_called_so_everywhere(tmp_path, model):
    """Also where the exporter makes several operators of one, whose shapes cannot be changed."""
    write_onnx(model.eval(), (X, X) if isinstance(model, Two) else (X,), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = [*graph.input, *graph.output, *graph.value_info]
    named = {each.type.tensor_type.shape.dim[0].dim_param for each in values}
    assert named - {""} == {"batch"}
    assert all(each.type.tensor_type.shape.dim[0].dim_param for each in (*graph.input, *graph.output))


def test_independent_dimensions_have_different_names(tmp_path):
    class Apart(nn.Module):
        def forward(self, x, table):
            return x.mean((1, 2, 3)), table.mean(1)

    write_onnx(Apart().eval(), (X, torch.ones(5, 4)), tmp_path / "m.onnx")
    session, *_ = opened(tmp_path / "m.onnx")
    assert [each.shape[0] for each in session.get_inputs()] == ["batch", "batch_2"]


def test_a_first_dimension_that_counts_no_samples_is_not_called_batch(tmp_path):
    interface = interface_of(nn.ReLU(), (X,), batch_first=False)
    write_onnx(nn.ReLU(), (X,), tmp_path / "m.onnx", interface=interface)
    session, *_ = opened(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape[0] not in ("batch", 1)


@pytest.mark.parametrize("opset", [18, 19, 21, 22])
def test_names_and_opset_are_those_that_are_asked_for(tmp_path, opset):
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), more=nn.Conv2d(4, 4, 1))).eval()
    # Names that other values of the graph would have.
    options = Export(["conv2d"], ["relu"], opset)
    interface = checked_interface(model, (X,), options)
    write_onnx(model, (X,), tmp_path / "m.onnx", interface=interface)
    session, *names = opened(tmp_path / "m.onnx")
    assert names == [["conv2d"], ["relu"]]
    assert {each.domain: each.version for each in onnx.load(tmp_path / "m.onnx").opset_import}[""] == opset
    (found,) = session.run(None, onnx_feed(model, (X,), interface))
    torch.testing.assert_close(torch.from_numpy(found), model(X).detach(), rtol=1e-4, atol=1e-5)


MISTAKES = {
    "`input_names`: the model takes 1 tensor, got 2 names (a, b); pass": {"input_names": ["a", "b"]},
    "`output_names`: the model returns 1 tensor, got 2 names (a, b); pass": {"output_names": ["a", "b"]},
    "`input_names`: conv.bias is the name of a parameter or buffer": {"input_names": ["conv.bias"]},
    "`output_names`: output is the name of a parameter or buffer": {"output_names": ["output"]},
    "`opset` 99: these versions of torch, onnxscript and ONNX Runtime do not write or run it": {"opset": 99},
}  # fmt: skip


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_what_does_not_suit_the_model_is_refused(message, options):
    with pytest.raises(SepconvertError) as caught:
        checked_interface(Clashing().eval(), (X,), Export(**options))
    assert str(caught.value).startswith(message)


def test_a_file_keeps_its_own(tmp_path):
    write_onnx(Two().eval(), (X, X), tmp_path / "m.onnx")
    network = open_network(tmp_path / "m.onnx")
    with pytest.raises(SepconvertError, match="`opset`: an ONNX file keeps the names and the opset"):
        checked_interface(network, (X, X), Export(opset=20))
    assert checked_interface(network, (X, X), Export()).inputs


def test_the_parts_check_alone():
    assert input_names(Two(), (X, X)) == ("left", "right")
    check_interface(interface_of(Two(), (X, X)), Two(), (X, X), 1)
    check_opset(20)
