"""ONNX files that are written: exported, or copied and edited."""

import onnx
import onnxruntime
import pytest
import torch
from files.onnx.graph.onnx_cases import model_of, node, one_conv, separable
from torch import nn

from sepconvert.base.errors import ExportError, SepconvertError
from sepconvert.files.onnx.graph.convolutions import OnnxGraph
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.files.onnx.writing import note_of, save_edited, save_files, write_onnx

MODEL = one_conv(separable(8, 4))
X = torch.randn(3, 4, 9, 10, generator=torch.Generator().manual_seed(0))


def test_feeds_have_the_names_of_the_file():
    assert onnx_feed(open_network(MODEL), (X,)).keys() == {"x"}
    assert onnx_feed(nn.Conv2d(4, 8, 3), (X,)).keys() == {"input"}


def test_feeds_have_the_dtypes_of_the_file():
    assert onnx_feed(open_network(MODEL), (X.double(),))["x"].dtype == "float32"
    assert onnx_feed(nn.Conv2d(4, 8, 3).double(), (X.double(),))["input"].dtype == "float32"


@pytest.mark.parametrize("model", [open_network(MODEL), nn.Conv2d(4, 8, 3)], ids=["file", "torch"])
def test_both_kinds_of_models_are_written(model, tmp_path):
    path = tmp_path / "model.onnx"
    note = write_onnx(model.eval(), (X,), path)
    assert note.dynamic_batch
    runner = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        expected = model(X)
    assert torch.allclose(torch.from_numpy(runner.run(None, onnx_feed(model, (X,)))[0]), expected, atol=1e-5)


def test_a_fixed_batch_is_noted():
    note = note_of(open_network(one_conv(separable(8, 4), shape=(2, 4, 9, 10))))
    assert (note.dynamic_batch, note.reason) == (False, "the file fixes the batch size")


def test_what_did_not_change_is_written_as_it_was(tmp_path):
    content = MODEL.SerializeToString() + b"\xb2\x3f\x01x"  # a field that protobuf does not know
    graph = OnnxGraph(onnx.load_from_string(content), None, content)
    save_files(graph, {tmp_path / "a.onnx": graph.model})
    assert (tmp_path / "a.onnx").read_bytes() == content


def broken():
    """A model that ONNX Runtime runs, and the checker does not pass: a node without an output type."""
    model = model_of([node("Relu", "x", "y")])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    return model


def test_a_file_that_does_not_pass_the_check_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"does not pass onnx's check: .*; report this"):
        save_edited(broken(), tmp_path / "model.onnx")


def test_a_fault_of_the_original_is_not_reported(tmp_path):
    edited = broken()
    edited.doc_string = "edited"
    save_files(OnnxGraph(broken()), {tmp_path / "model.onnx": edited})
    assert onnx.load(tmp_path / "model.onnx").doc_string == "edited"


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(SepconvertError, match="cannot be written"):
        save_edited(MODEL, tmp_path / "missing/model.onnx")
