"""Export of torch models to ONNX files and `.pt2` archives."""

import contextlib
import io
import keyword
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from sepconvert.base.documents import writing
from sepconvert.base.errors import ExportError, first_line
from sepconvert.base.modules import hashable, unshadowed
from sepconvert.files.onnx.fold import FoldBatchNormPass
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, fresh, model_dtype, tensor_leaves, tensors_in

# ONNX Runtime's CPU kernels of convolutions take float32 and float16.
_RUNTIME_DTYPES = {torch.float64: torch.float32, torch.bfloat16: torch.float32}

OUTPUTS, MAPPING = "sepconvert.outputs", "mapping"
"""Property of ONNX files whose outputs are those of a mapping, by name, and its value."""

_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # paths on this machine, which are private


@dataclass(frozen=True)
class ExportNote:
    """The way in which a model was exported.

    Attributes:
        dynamic_batch: whether the exported model takes any batch size.
        onnx_dtype: dtype of the ONNX files, such as `float32`.
        reason: why the batch is fixed although a dynamic one was asked for; else None.
        missing: files that torch could not write, with the reasons.
    """

    dynamic_batch: bool
    onnx_dtype: str
    reason: str | None
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """A model exported by torch.export, from which files of both kinds are written.

    Attributes:
        program: the exported program, on the CPU.
        dtype: dtype of its weights and inputs.
        input_names: names of its inputs in ONNX files.
        output_names: those of its outputs, if it returns a mapping; else torch's.
        note: the way in which it was exported.
        prefix: of the names of modules and parameters in the program.
    """

    program: ExportedProgram
    dtype: torch.dtype
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] | None
    note: ExportNote
    prefix: str = ""


def runtime_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which ONNX Runtime executes this model's convolutions."""
    return _RUNTIME_DTYPES.get(model_dtype(model), model_dtype(model))


def onnx_names(inputs: Inputs) -> tuple[str, ...]:
    """Return names for the tensors among the inputs in our ONNX files: `input`, or `input_0`, `input_1`, …

    The tensors of a mapping that is the only argument keep its names.
    """
    if len(inputs) == 1 and (names := _names_in(inputs[0])):
        return names
    count = len(tensors_in(inputs))
    return ("input",) if count == 1 else tuple(f"input_{index}" for index in range(count))


def export_program(
    model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None, *, dynamic_batch: bool = True
) -> Export:
    """Export a model in eval mode by torch.export, which runs it on the inputs.

    Args:
        model: the model, which stays as it is.
        inputs: its positional arguments.
        dtype: dtype of the exported copy; None stands for that of ONNX files: float32 for a float64 or
            bfloat16 model, for whose convolutions ONNX Runtime has no kernels, else the model's own.
        dynamic_batch: whether to export for any batch size, if the model allows it.

    Raises:
        ExportError: torch cannot export the model.
    """
    plain = unshadowed(model)
    named = (*plain.named_modules(), *plain.named_parameters(), *plain.named_buffers())
    words = {word for name, _ in named for word in name.split(".")}
    if reserved := sorted(filter(keyword.iskeyword, words)):
        # torch writes such archives, and cannot load them.
        raise ExportError(
            f"torch.export makes Python of the model, in which the name {reserved[0]!r} of a part of it is "
            "reserved; give it another"
        )
    dtype = dtype or runtime_dtype(model)
    private, inputs = private_copy(model, dtype), fresh(cast(inputs, dtype))
    returned = _returned(private, inputs)
    prefix = "" if _are_known(returned) else "model."
    if prefix:
        private = _Tensors(private)
    program, reason = _exported_dynamically(private, inputs) if dynamic_batch else (None, None)
    is_dynamic = program is not None
    if program is None:
        try:
            program = _exported(private, inputs)
        except Exception as error:  # tracing runs the user's code
            raise _export_error("torch.export", error) from error
    if any(tensor.device.type != "cpu" for tensor in (*plain.parameters(), *plain.buffers())):
        # The machine that loads the file may have no such device.
        with _quiet():
            program = move_to_device_pass(program, "cpu")
    note = ExportNote(is_dynamic, str(dtype).removeprefix("torch."), reason)
    return Export(program, dtype, onnx_names(inputs), _names_in(returned), note, prefix)


def _names_in(values: Any) -> tuple[str, ...] | None:
    """Return the keys of a mapping, or the fields of a dataclass, of different tensors; None for others."""
    if is_dataclass(values) and not isinstance(values, type):
        values = {each.name: getattr(values, each.name) for each in fields(values)}
        values = {name: value for name, value in values.items() if value is not None}
    if not isinstance(values, Mapping) or not values:
        return None
    named = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items())
    different = len({id(value) for value in values.values()}) == len(values)
    return tuple(values) if named and different else None


def save_archive(export: Export, path: Path) -> None:
    """Write a torch.export archive (.pt2) that loads without the user's code.

    Raises:
        SepconvertError: the file cannot be written.
    """
    # In memory first: on a full disk torch's own writer ends the process.
    archive = io.BytesIO()
    with _quiet(), writing(path):
        torch.export.save(export.program, archive)
        path.write_bytes(archive.getbuffer())


def translated(export: Export, *, optimize: bool = True) -> ir.Model:
    """Translate an exported model to ONNX.

    Args:
        export: the exported model.
        optimize: whether the exporter folds constants, and BatchNorms into the convolutions before them.

    Raises:
        ExportError: torch cannot translate the exported program.
    """
    with _quiet():
        try:
            exported = torch.onnx.export(
                export.program, dynamo=True, verbose=False, input_names=export.input_names,
                output_names=export.output_names, optimize=optimize,
            )  # fmt: skip
            assert exported is not None  # noqa: S101  (it is None only without dynamo)
            for node in exported.model.graph.all_nodes():
                node.metadata_props.pop(_STACK_TRACE, None)
            if optimize:
                FoldBatchNormPass()(exported.model)
            return exported.model
        except Exception as error:  # the exporter raises errors of many kinds
            raise _export_error("ONNX", error) from error


def save_onnx(export: Export, path: Path, *, check: bool = True) -> None:
    """Write one self-contained ONNX file.

    Args:
        export: the exported model.
        path: the file.
        check: whether onnx checks the file, which takes longer than to write it. Files that are timed once
            and thrown away are left to the runtime.

    Raises:
        ExportError: torch cannot translate the exported program, or the file does not pass the check.
        SepconvertError: the file cannot be written.
    """
    model = translated(export)
    with _quiet(), writing(path):
        try:
            if export.output_names is not None:
                model.metadata_props[OUTPUTS] = MAPPING
            ir.save(model, str(path))
        except OSError:
            raise
        except Exception as error:
            raise _export_error("ONNX", error) from error
        try:
            if check:
                onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise _export_error("ONNX", error) from error


def _exported_dynamically(model: nn.Module, inputs: Inputs) -> tuple[ExportedProgram | None, str | None]:
    """Export a model for any batch size; return None and the reason if it fixes the batch."""
    # torch.export takes a size of one for a constant.
    wide = pytree.tree_map_only(
        Tensor, lambda value: torch.cat([value, value]) if value.shape[:1] == (1,) else value, inputs
    )
    shapes = pytree.tree_map(
        lambda value: {0: Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None, wide
    )
    try:
        program = _exported(model, wide, shapes)
    except Exception as error:  # a fixed batch may still work
        return None, first_line(error)
    return (program, None) if _is_dynamic(program) else (None, "the model fixes the batch size")


def _exported(model: nn.Module, inputs: Inputs, shapes: Any = None) -> ExportedProgram:
    given = unshadowed(model)
    if shapes is not None and (given is not model or isinstance(model, _Tensors)):
        shapes = (shapes,)  # its forward takes all inputs as one parameter, `*inputs`
    with _quiet(), torch.no_grad(), hashable(model):
        return torch.export.export(given, inputs, dynamic_shapes=shapes, strict=False)


class _Tensors(nn.Module):
    """Wrapper of a model that returns only the tensors among its outputs, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Return the tensors in the order of `tensor_leaves`."""
        return tuple(tensor_leaves(self.model(*inputs)))


def _returned(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model returns; None if it fails, which the exporter reports better."""
    try:
        with _quiet(), torch.no_grad():
            return model(*fresh(inputs))
    except Exception:
        return None


def _are_known(returned: Any) -> bool:
    """Return whether torch can flatten a model's outputs and store their structure.

    Classes of the user's own must be registered with it.
    """
    leaves, structure = pytree.tree_flatten(returned)
    try:
        pytree.treespec_dumps(structure)
    except Exception:  # torch refuses a namedtuple, for example
        return False
    return all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves)


def _is_dynamic(program: ExportedProgram) -> bool:
    """Return whether the batch size of every input is open."""
    inputs = set(program.graph_signature.user_inputs)
    sizes = [
        node.meta["val"].shape[:1]
        for node in program.graph.nodes
        if node.name in inputs and node.op == "placeholder"
    ]
    # A size that the model has fixed may still be a SymInt.
    return not any(is_concrete_int(size[0]) for size in sizes if len(size))


def _export_error(stage: str, error: Exception) -> ExportError:
    """Return the error to raise when an exporter fails at a stage."""
    # The outer errors say at which node or step, the innermost what is wrong.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        f"{stage} cannot export this model: {first_line(cause)}; the exporter's own message: `debug`"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters within the block: logging, warnings, and the standard streams of Python.

    All of these are process-wide: the block is not thread-safe, and whatever other threads log or
    print meanwhile is lost.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
