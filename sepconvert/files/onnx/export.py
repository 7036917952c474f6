"""Export of torch models to ONNX files and `.pt2` archives."""

import contextlib
import io
import keyword
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from sepconvert.base.documents import writing
from sepconvert.base.errors import ExportError, first_line
from sepconvert.files.onnx.fold import fold_batchnorms
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, cast, fresh, model_dtype, tensor_leaves, tensors_in

# ONNX Runtime's CPU kernels for convolutions take float32 and float16.
_RUNTIME_DTYPES = {torch.float64: torch.float32, torch.bfloat16: torch.float32}


_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # paths and lines of this machine, which are nobody's business


@dataclass(frozen=True)
class ExportNote:
    """How a model was exported."""

    dynamic_batch: bool
    onnx_dtype: str
    reason: str | None  # why the batch is fixed although a dynamic one was asked for
    missing: Mapping[str, str] = field(default_factory=dict)  # files that torch could not write, and why


def runtime_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which ONNX Runtime executes this model's convolutions."""
    return _RUNTIME_DTYPES.get(model_dtype(model), model_dtype(model))


def onnx_names(inputs: Inputs) -> list[str]:
    """Names of the tensors among the inputs in our ONNX files: `input`, or `input_0`, `input_1`, …"""
    count = len(tensors_in(inputs))
    return ["input"] if count == 1 else [f"input_{index}" for index in range(count)]


def onnx_feed(inputs: Inputs) -> dict[str, npt.NDArray[Any]]:
    """The inputs as ONNX Runtime takes them."""
    arrays = (np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors_in(inputs))
    return dict(zip(onnx_names(inputs), arrays, strict=True))


def save_archive(model: nn.Module, inputs: Inputs, path: Path, *, dynamic_batch: bool = True) -> None:
    """Write a torch.export archive (.pt2) that loads without the user's code.

    Raises:
        ExportError: torch cannot export the model.
        SepconvertError: the file cannot be written.
    """
    program, _ = _program(private_copy(model), inputs, dynamic_batch)
    # In memory first: on a full disk torch's own writer ends the process.
    archive = io.BytesIO()
    with _quiet(), writing(path):
        torch.export.save(program, archive)
        path.write_bytes(archive.getbuffer())


def save_onnx(
    model: nn.Module, inputs: Inputs, path: Path, *, dynamic_batch: bool = True, check: bool = True
) -> ExportNote:
    """Write one self-contained ONNX file.

    Float64 and bfloat16 models are exported in float32, for which the runtime has kernels. To `check` a file
    takes longer than to write it: those that are timed once and thrown away are left to the runtime.

    Raises:
        ExportError: torch cannot export the model.
        SepconvertError: the file cannot be written.
    """
    dtype = runtime_dtype(model)
    program, note = _program(private_copy(model, dtype), cast(inputs, dtype), dynamic_batch)
    with _quiet(), writing(path):
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=onnx_names(inputs))
            assert exported is not None  # noqa: S101  (it is None on the non-dynamo path alone)
            for node in exported.model.graph.all_nodes():
                node.metadata_props.pop(_STACK_TRACE, None)
            fold_batchnorms(exported.model)
            exported.save(str(path), external_data=False)
        except OSError:
            raise
        except Exception as error:  # the exporter raises errors of many kinds
            raise _export_error("ONNX", error) from error
        try:
            if check:
                onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise _export_error("ONNX", error) from error
    return note


def _program(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> tuple[ExportedProgram, ExportNote]:
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    words = {word for name, _ in named for word in name.split(".")}
    if reserved := sorted(filter(keyword.iskeyword, words)):
        # It writes such archives, and cannot load them.
        raise ExportError(
            f"torch.export makes Python of the model, in which the name {reserved[0]!r} of a part of it is "
            "reserved; give it another"
        )
    program, note = _exported(model, inputs, dynamic_batch)
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        # Whoever loads the file may have no such device.
        with _quiet():
            program = move_to_device_pass(program, "cpu")
    return program, note


def _exported(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> tuple[ExportedProgram, ExportNote]:
    dtype = str(model_dtype(model)).removeprefix("torch.")
    reason = None
    # A tensor given twice would become one input.
    inputs = fresh(inputs)
    if not _is_known(model, inputs):
        model = _Tensors(model)
    if dynamic_batch:
        # torch.export takes a size of one for a constant.
        wide = pytree.tree_map_only(
            Tensor, lambda value: torch.cat([value, value]) if value.shape[:1] == (1,) else value, inputs
        )
        shapes = pytree.tree_map(
            lambda value: {0: Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None, wide
        )
        with _quiet(), torch.no_grad():
            try:
                program = torch.export.export(model, wide, dynamic_shapes=shapes)
                if _is_dynamic(program):
                    return program, ExportNote(True, dtype, None)
                reason = "the model fixes the batch size"
            except Exception as error:  # a fixed batch may still work
                reason = first_line(error)
    with _quiet(), torch.no_grad():
        try:
            return torch.export.export(model, inputs), ExportNote(False, dtype, reason)
        except Exception as error:  # tracing runs the user's code
            raise _export_error("torch.export", error) from error


class _Tensors(nn.Module):
    """A model that answers the tensors alone of what it answers, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """In the order of `tensor_leaves`."""
        return tuple(tensor_leaves(self.model(*inputs)))


def _is_known(model: nn.Module, inputs: Inputs) -> bool:
    """Can torch take the model's answer apart, and write down how? Classes must be made known to it."""
    try:
        with _quiet(), torch.no_grad():
            leaves, structure = pytree.tree_flatten(model(*fresh(inputs)))
    except Exception:  # which the exporter gives a better account of
        return True
    try:
        pytree.treespec_dumps(structure)
    except Exception:  # torch's own; of a namedtuple, say
        return False
    return all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves)


def _is_dynamic(program: ExportedProgram) -> bool:
    inputs = set(program.graph_signature.user_inputs)
    sizes = [
        node.meta["val"].shape[:1]
        for node in program.graph.nodes
        if node.name in inputs and node.op == "placeholder"
    ]
    # A size that the model has fixed may still be a SymInt.
    return not any(is_concrete_int(size[0]) for size in sizes if len(size))


def _export_error(stage: str, error: Exception) -> ExportError:
    # The outer errors say at which node or step, the innermost what is wrong.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        f"{stage} cannot export this model: {first_line(cause)}; the exporter's own message: --debug"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter off the user's terminal."""
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
