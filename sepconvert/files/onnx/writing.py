"""ONNX files of models: by torch's exporter, or, of a model that came from a file, by surgery on that."""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import nn

from sepconvert.base.documents import writing
from sepconvert.base.errors import ExportError, SepconvertError, first_line
from sepconvert.base.options.exporting import Export
from sepconvert.base.progress import Progress, Stage, stage
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.export import (
    Exported,
    ExportNote,
    check_opset,
    export_program,
    runtime_dtype,
    save_archive,
    save_onnx,
)
from sepconvert.files.onnx.graph.convolutions import OnnxGraph
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.protobuf import external_files
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.files.onnx.naming import Interface, check_interface, interface_of
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, fresh, model_dtype, tensor_leaves

_LOG = logging.getLogger(__name__)

_NO_ARCHIVE = "the model is an ONNX file, of which torch.export makes no archive"


def checked_interface(
    model: nn.Module, inputs: Inputs, options: Export, *, batch_first: bool = True
) -> Interface:
    """Return the names and the opset of a model's ONNX files, tried on the model where they are given.

    Raises:
        SepconvertError: they do not suit the model, or the exporter.
    """
    interface = interface_of(model, inputs, options, batch_first=batch_first)
    given = options.given()
    if given and isinstance(model, OnnxNetwork):
        raise SepconvertError(
            f"`{given[0]}`: an ONNX file keeps the names and the opset that it has; leave it out"
        )
    if interface.opset is not None:
        check_opset(interface.opset)
    if given:
        with torch.no_grad():
            returned = private_copy(model)(*fresh(inputs))
        check_interface(interface, model, inputs, len(list(tensor_leaves(returned))))
    return interface


@stage(Stage.EXPORT)
def write_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    interface: Interface | None = None,
) -> ExportNote:
    """Write one self-contained ONNX file.

    Args:
        model: a torch model, which is exported, or the network of an ONNX file, which is edited.
        inputs: positional arguments.
        path: the file.
        dynamic_batch: whether to export for any batch size, if the model allows it; a file keeps its own.
        check: see `save_onnx`.
        interface: names and opset of the file of a torch model; None for those that follow from it.

    Raises:
        ExportError: torch cannot export the model, or the file does not pass the check.
        SepconvertError: the file cannot be written.
    """
    if isinstance(model, OnnxNetwork):
        save_edited(converted_model(model, embedded=True), path, check=check)
        return note_of(model)
    export = export_program(model, inputs, dynamic_batch=dynamic_batch, interface=interface)
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


def save_files(graph: OnnxGraph, models: Mapping[Path, onnx.ModelProto]) -> None:
    """Write an ONNX file and edited copies of it to one folder, with the external data that they name.

    What equals the original is written byte for byte as it was. The other files have to pass
    `onnx.checker`, with shape inference, unless the original does not pass it either.

    Args:
        graph: the original.
        models: by the path to write to.

    Raises:
        ExportError: a file does not pass the check.
        SepconvertError: a file cannot be written.
    """
    for path, model in models.items():
        with writing(path):
            for location in external_files(graph.model):
                if graph.folder is not None:
                    target = path.parent / location
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(graph.folder / location, target)
            if model == graph.model:
                path.write_bytes(graph.content)
    edited = {path: model for path, model in models.items() if model != graph.model}
    for path, model in edited.items():
        save_edited(model, path, check=passes_check(graph.whole))


def passes_check(model: onnx.ModelProto) -> bool:
    """Return whether a model passes onnx's check; what is wrong with the user's is not ours to report."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:  # the checker's errors share no base class
        return False
    return True


class ExportedFiles:
    """Writes the files of a torch model and its conversion; what they share is exported once.

    Each method raises `ExportError` if torch cannot export the model, and `SepconvertError` if the file
    cannot be written.
    """

    def __init__(self, drafts: Drafts, converted: nn.Module, *, dynamic_batch: bool) -> None:
        self._drafts, self._original, self._converted = drafts, drafts.original, converted
        self._dynamic_batch, self._dtype = dynamic_batch, runtime_dtype(converted)
        self._exports = dict[tuple[int, torch.dtype], Exported]()

    def write_original(self, path: Path) -> ExportNote:
        """Write the ONNX file of the original."""
        export = self._export(self._original, self._dtype)
        save_onnx(export, path)
        return export.note

    def write_converted(self, path: Path) -> ExportNote:
        """Write the ONNX file of the conversion, if possible by exchanging layers in that of the original."""
        written = path.with_name("original.onnx")
        if self._converted is self._original and written.exists():
            shutil.copyfile(written, path)
            return self._export(self._original, self._dtype).note
        draft = self._drafts.delivered(self._converted) if self._dynamic_batch else None
        export = self._export(self._converted, self._dtype) if draft is None else self._drafts.export
        save_onnx(export, path, model=draft)
        return export.note

    def write_archive(self, path: Path) -> None:
        """Write the torch.export archive of the conversion, in its own dtype."""
        save_archive(self._export(self._converted, model_dtype(self._converted)), path)

    def _export(self, model: nn.Module, dtype: torch.dtype) -> Exported:
        key = id(model), dtype
        if key not in self._exports:
            drafted = self._dynamic_batch and model is self._original and dtype == self._dtype
            self._exports[key] = (
                self._drafts.export
                if drafted
                else export_program(
                    model,
                    self._drafts.inputs,
                    dtype,
                    dynamic_batch=self._dynamic_batch,
                    interface=self._drafts.interface,
                )
            )
        return self._exports[key]


@stage(Stage.EXPORT)
def write_models(
    drafts: Drafts,
    converted: nn.Module,
    folder: Path,
    dynamic_batch: bool,
    progress: Progress,
) -> ExportNote:
    """Write `original.onnx`, `converted.onnx` and `converted.pt2`, as far as torch exports the models.

    A model that cannot be exported is still converted: the note says which files are missing, and why. The
    network of an ONNX file is not exported; its conversion is an edited copy of the file.
    """
    model = drafts.original
    if isinstance(model, OnnxNetwork) and isinstance(converted, OnnxNetwork):
        edited = {"original.onnx": model.graph.model, "converted.onnx": converted_model(converted)}
        save_files(model.graph, {folder / name: each for name, each in edited.items()})
        return replace(note_of(model), missing={"converted.pt2": _NO_ARCHIVE})
    files = ExportedFiles(drafts, converted, dynamic_batch=dynamic_batch)
    writers: Mapping[str, Callable[[Path], ExportNote | None]] = {
        "original.onnx": files.write_original,
        "converted.onnx": files.write_converted,
        "converted.pt2": files.write_archive,
    }
    note, missing = ExportNote(False, str(runtime_dtype(converted)).removeprefix("torch."), None), {}
    for name in progress(list(writers), "exporting"):
        try:
            note = writers[name](folder / name) or note
        except ExportError as error:
            (folder / name).unlink(missing_ok=True)
            _LOG.debug("%s is not written", name, exc_info=error)
            missing[name] = str(error)
    drafts.forget()
    return replace(note, missing=missing)
