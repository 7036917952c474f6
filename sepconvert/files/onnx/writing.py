"""ONNX files of models: by torch's exporter, or, of a model that came from a file, by surgery on that."""

import contextlib
import shutil
from pathlib import Path

import onnx
from torch import nn

from sepconvert.base.documents import writing
from sepconvert.base.errors import ExportError, first_line
from sepconvert.files.onnx.export import (
    ExportNote,
    export_program,
    onnx_names,
    runtime_dtype,
    save_onnx,
)
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.protobuf import external_files
from sepconvert.files.onnx.graph.running import Feed, feed_by_name
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.network.tensors import Inputs, cast


def onnx_feed(model: nn.Module, inputs: Inputs) -> Feed:
    """Return the inputs of a model as its ONNX file takes them."""
    if isinstance(model, OnnxNetwork):
        return model.feed(inputs)
    return feed_by_name(onnx_names(inputs), cast(inputs, runtime_dtype(model)))


def write_onnx(
    model: nn.Module, inputs: Inputs, path: Path, *, dynamic_batch: bool = True, check: bool = True
) -> ExportNote:
    """Write one self-contained ONNX file.

    Args:
        model: a torch model, which is exported, or the network of an ONNX file, which is edited.
        inputs: positional arguments.
        path: the file.
        dynamic_batch: whether to export for any batch size, if the model allows it; a file keeps its own.
        check: see `save_onnx`.

    Raises:
        ExportError: torch cannot export the model, or the file does not pass the check.
        SepconvertError: the file cannot be written.
    """
    if isinstance(model, OnnxNetwork):
        save_edited(converted_model(model, embedded=True), path, check=check)
        return note_of(model)
    export = export_program(model, inputs, dynamic_batch=dynamic_batch)
    save_onnx(export, path, check=check)
    return export.note


def note_of(network: OnnxNetwork) -> ExportNote:
    """Return how the file of a network is written: with the batch and the dtypes of the original."""
    dtype = str(runtime_dtype(network)).removeprefix("torch.")
    return ExportNote(
        network.batch is None, dtype, "the file fixes the batch size" if network.batch else None
    )


def save_edited(model: onnx.ModelProto, path: Path, *, check: bool = True) -> None:
    """Write an ONNX model as it is; files of external data lie beside it already.

    Raises:
        ExportError: it does not pass the check.
        SepconvertError: the file cannot be written.
    """
    with writing(path):
        path.write_bytes(model.SerializeToString())
    if check:
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"the converted file does not pass onnx's check: {first_line(error)}; report this as a defect"
            ) from error


def save_files(original: OnnxNetwork, converted: OnnxNetwork, paths: tuple[Path, Path]) -> None:
    """Write the file of a network as it was given, and that of its conversion, with their external data.

    A conversion in which nothing changed is a copy of the original. The check is that of `onnx.checker`,
    with shape inference, unless the original does not pass it either.

    Raises:
        ExportError: the converted file does not pass the check.
        SepconvertError: a file cannot be written.
    """
    before, after = paths
    graph = original.graph
    content = graph.content
    with writing(before):
        before.write_bytes(content)
        for location in external_files(graph.model):
            assert graph.folder is not None  # noqa: S101  (only a file has any)
            target = before.parent / location
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(graph.folder / location, target)
    edited = converted_model(converted)
    if edited == graph.model:
        with writing(after):
            after.write_bytes(content)
        return
    passes = False
    with contextlib.suppress(Exception):  # whatever the checker finds was there before
        onnx.checker.check_model(str(before), full_check=True)
        passes = True
    save_edited(edited, after, check=passes)
