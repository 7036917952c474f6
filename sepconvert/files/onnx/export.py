"""Export of torch models to ONNX files and `.pt2` archives."""

import contextlib
import copy
import io
import keyword
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
from sepconvert.base.errors import ExportError, SepconvertError, first_line
from sepconvert.base.modules import hashable, unshadowed
from sepconvert.base.options.exporting import LEAST_OPSET
from sepconvert.files.onnx.graph.running import answers
from sepconvert.files.onnx.naming import Interface, NamingPass, interface_of, names_in, output_names
from sepconvert.files.onnx.passes import FoldBatchNormPass, LogSigmoidPass
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, fresh, model_dtype, tensor_leaves

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
class Exported:
    """A model exported by torch.export, from which files of both kinds are written.

    Attributes:
        program: the exported program, on the CPU.
        dtype: dtype of its weights and inputs.
        interface: names and opset of its ONNX files.
        returned: what the model returns; None if that is not known.
        note: the way in which it was exported.
        prefix: of the names of modules and parameters in the program.
    """

    program: ExportedProgram
    dtype: torch.dtype
    interface: Interface
    returned: Any
    note: ExportNote
    prefix: str = ""

    @cached_property
    def translation(self) -> "torch.onnx.ONNXProgram":
        """The program in ONNX as the exporter translates it, not optimized; whoever edits it makes a copy.

        Raises:
            ExportError: torch cannot translate it.
        """
        with _quiet():
            try:
                made = torch.onnx.export(
                    self.program,
                    dynamo=True,
                    verbose=False,
                    optimize=False,
                    opset_version=self.interface.opset,
                )
                assert made is not None  # noqa: S101  (it is None only without dynamo)
                for node in made.model.graph.all_nodes():
                    node.metadata_props.pop(_STACK_TRACE, None)
                LogSigmoidPass()(made.model)
                self._name(made.model)
            except Exception as error:  # the exporter raises errors of many kinds
                raise _export_error("ONNX", error) from error
        return made

    def optimized(self, model: ir.Model) -> ir.Model:
        """Return a model of this export as the exporter optimizes it, in place.

        Constants are folded, and BatchNorms into the convolutions before them.
        """
        made = copy.copy(self.translation)
        with _quiet():
            made.model = model
            made.optimize()
            FoldBatchNormPass()(made.model)
            self._name(made.model)
        return made.model

    def _name(self, model: ir.Model) -> None:
        """Name inputs, outputs and the batch of a model as the interface says."""
        interface = self.interface
        outputs = interface.outputs or output_names(
            self.returned,
            len(model.graph.outputs),
            taken={*interface.inputs, *self.program.state_dict},
        )
        NamingPass(interface.inputs, outputs, batch_first=interface.batch_first)(model)


def runtime_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which ONNX Runtime executes this model's convolutions."""
    return _RUNTIME_DTYPES.get(model_dtype(model), model_dtype(model))


def export_program(
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    *,
    dynamic_batch: bool = True,
    interface: Interface | None = None,
) -> Exported:
    """Export a model in eval mode by torch.export, which runs it on the inputs.

    Args:
        model: the model, which stays as it is.
        inputs: its positional arguments.
        dtype: dtype of the exported copy; None stands for that of ONNX files: float32 for a float64 or
            bfloat16 model, for whose convolutions ONNX Runtime has no kernels, else the model's own.
        dynamic_batch: whether to export for any batch size, if the model allows it.
        interface: names and opset of its ONNX files; None for those that follow from the model.

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
    return Exported(program, dtype, interface or interface_of(model, inputs), returned, note, prefix)


def save_archive(export: Exported, path: Path) -> None:
    """Write a torch.export archive (.pt2) that loads without the user's code.

    Raises:
        SepconvertError: the file cannot be written.
    """
    # In memory first: on a full disk torch's own writer ends the process.
    archive = io.BytesIO()
    with _quiet(), writing(path):
        torch.export.save(export.program, archive)
        path.write_bytes(archive.getbuffer())


def translated(export: Exported, *, optimize: bool = True) -> ir.Model:
    """Translate an exported model to ONNX.

    Args:
        export: the exported model.
        optimize: whether the exporter folds constants, and BatchNorms into the convolutions before them.

    Raises:
        ExportError: torch cannot translate the exported program, or not to the opset that is asked for.
    """
    opset, plain = export.interface.opset, export.translation.model
    try:
        model = plain.clone()  # which shares the weights
        model = export.optimized(model) if optimize else model
    except Exception as error:  # the exporter raises errors of many kinds
        raise _export_error("ONNX", error) from error
    made = model.opset_imports.get("")
    if opset is not None and made != opset:
        raise ExportError(f"`opset` {opset}: torch's exporter writes opset {made}; pass that")
    return model


def check_opset(opset: int) -> None:
    """Raise `SepconvertError` unless a small model is written in an opset, and runs in ONNX Runtime."""
    layer, image = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval(), (torch.zeros(1, 1, 2, 2),)
    try:
        model = translated(export_program(layer, image, interface=Interface(("input",), None, opset)))
        answers(ir.to_proto(model), {"input": image[0].numpy()})
    except SepconvertError as error:
        raise SepconvertError(
            f"`opset` {opset}: these versions of torch, onnxscript and ONNX Runtime do not write or run it; "
            f"pass a lower one, from {LEAST_OPSET}, or leave it out"
        ) from error


def save_onnx(export: Exported, path: Path, *, model: ir.Model | None = None, check: bool = True) -> None:
    """Write one self-contained ONNX file.

    Args:
        export: the exported model.
        path: the file.
        model: a conversion's file, made from that of `export`, which is written instead.
        check: whether onnx checks the file, which takes longer than to write it. Files that are timed once
            and thrown away are left to the runtime.

    Raises:
        ExportError: torch cannot translate the exported program, or the file does not pass the check.
        SepconvertError: the file cannot be written.
    """
    model = model or translated(export)
    with _quiet(), writing(path):
        try:
            if export.interface.outputs is None and names_in(export.returned):
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
