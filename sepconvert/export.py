"""Model → files: ONNX and torch.export archive."""

import contextlib
import functools
import hashlib
import io
import keyword
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from sepconvert.errors import ExportError, SepconvertError, first_line
from sepconvert.fold import fold_batchnorms
from sepconvert.load import MAX_INPUT_ELEMENTS
from sepconvert.measure.accuracy import tensor_leaves
from sepconvert.seal import read_file
from sepconvert.spec import ConvSpec
from sepconvert.trace import Inputs, floating, fresh, private_copy, tensors_in

# ONNX Runtime's CPU kernels for convolutions take float32 and float16.
_RUNTIME_DTYPES = {torch.float64: torch.float32, torch.bfloat16: torch.float32}

_MOST_BYTES = 2**31  # of a protobuf message
_OPSET, _IR_VERSION = 20, 10  # that torch's exporter writes as well
_STACK_TRACE = "pkg.torch.onnx.stack_trace"  # paths and lines of this machine, which are nobody's business
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True)
class ExportNote:
    """How a model was exported."""

    dynamic_batch: bool
    onnx_dtype: str
    reason: str | None  # why the batch is fixed although a dynamic one was asked for
    missing: Mapping[str, str] = field(default_factory=dict)  # files that torch could not write, and why


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter or buffer; float32 if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def runtime_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which ONNX Runtime executes this model's convolutions."""
    return _RUNTIME_DTYPES.get(model_dtype(model), model_dtype(model))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating-point tensors among the inputs in another dtype."""
    return floating(lambda value: value.to(dtype), inputs)


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


def layer_onnx(branches: Sequence[Sequence[ConvSpec]], shape: Sequence[int]) -> bytes:
    """ONNX model of a layer, for timing: chains of convolutions that are summed, with random weights.

    It stands between two poolings of one pixel, and a ReLU follows: the runtime then keeps its blocked layout
    around the layer, as within a network, and fuses what it fuses there.

    Args:
        branches: geometry of the convolutions of each chain.
        shape: N × C × H × W of the input.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(value: npt.NDArray[Any]) -> str:
        constants.append(onnx.numpy_helper.from_array(value, f"constant_{len(constants)}"))
        return str(constants[-1].name)

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(operator, inputs, [f"value_{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def convolve(value: str, spec: ConvSpec) -> str:
        (top, bottom), (left, right) = spec.padding
        pads = [top, left, bottom, right]
        if min(pads) < 0 or spec.padding_mode != "zeros":
            # Padding comes before cropping, as in the layer itself.
            for part, mode in (([max(p, 0) for p in pads], _PAD_MODES[spec.padding_mode]),
                               ([min(p, 0) for p in pads], "constant")):  # fmt: skip
                if any(part):
                    widths = np.array([0, 0, *part[:2], 0, 0, *part[2:]])
                    value = add("Pad", value, constant(widths), mode=mode)
            pads = [0, 0, 0, 0]
        arrays = [rng.standard_normal(spec.weight_shape, np.float32)]
        if spec.bias:
            arrays.append(rng.standard_normal(spec.out_channels, np.float32))
        return add(
            "Conv", value, *map(constant, arrays), kernel_shape=spec.kernel_size, strides=spec.stride,
            dilations=spec.dilation, group=spec.groups, pads=pads,
        )  # fmt: skip

    pooled = add("MaxPool", "input", kernel_shape=[1, 1])
    total = ""
    for chain in branches:
        value = functools.reduce(convolve, chain, pooled)
        total = add("Add", total, value) if total else value
    add("MaxPool", add("Relu", total), kernel_shape=[1, 1])
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, list("nchw"))],
        constants,
    )
    opsets = [onnx.helper.make_opsetid("", _OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


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


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file says of itself: inputs, parameters, and MACs of convolutions and matrix products.

    `shapes` has the shape of each input, None for a size that is open. `macs` are of one sample: one fused
    multiply-add is 1. Operators that are not counted, or whose shapes cannot be inferred, are in
    `uncounted_ops`. `peak_activation_bytes` are what is alive at once, of one batch (one sample, if the
    batch is open), when each value lives from the operator that writes it to the last that reads it; None
    where a shape cannot be inferred. `sizes` are as in `onnx_sizes`.
    """

    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]
    params: int
    macs: int
    uncounted_ops: dict[str, int]
    peak_activation_bytes: int | None
    sizes: tuple[int, int]
    sha256: str


def read_onnx(path: Path) -> OnnxFile:
    """Look into an ONNX file.

    Raises:
        SepconvertError: no such file, or no ONNX model.
    """
    try:
        content = read_file(path, _MOST_BYTES)
        model = onnx.load_from_string(content)
    except SepconvertError:
        raise
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except Exception as error:  # protobuf's own
        raise SepconvertError(f"{path}: not an ONNX model ({first_line(error)}); export it anew") from error
    if not model.graph.node:
        raise SepconvertError(f"{path}: not an ONNX model (it has no operators); export it anew")
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in known]
    for value in inputs:
        if value.type.tensor_type.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
            raise SepconvertError(
                f"{path}: its input {value.name} is no tensor of numbers; take a file whose inputs all are"
            )
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim if size.HasField("dim_value")]
        if not (all(size >= 0 for size in sizes) and math.prod(sizes) <= MAX_INPUT_ELEMENTS):
            raise SepconvertError(
                f"{path}: its input {value.name} has the shape {'×'.join(map(str, sizes))}, of more than "
                f"{MAX_INPUT_ELEMENTS:,} elements; export it anew for a smaller one"
            )
    shapes = tuple(
        tuple(
            size.dim_value if size.HasField("dim_value") else None
            for size in value.type.tensor_type.shape.dim
        )
        for value in inputs
    )
    batch = _fix_batch(model, [value.name for value in inputs])
    with contextlib.suppress(Exception):  # what cannot be inferred is not counted
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = _types_of_values(model)
    macs, uncounted = _macs_of_graph(model, {name: shape for name, (shape, _) in types.items()} | known)
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE,
                onnx.TensorProto.BFLOAT16}  # fmt: skip
    return OnnxFile(
        shapes,
        tuple(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in inputs),
        sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floating),
        macs // batch,
        uncounted,
        _peak_of_values(model, types),
        _sizes(model, path),
        hashlib.sha256(content).hexdigest(),
    )


def onnx_sizes(path: Path) -> tuple[int, int]:
    """Bytes of an ONNX file, with the files beside it that hold weights, and bytes of the weights."""
    return _sizes(onnx.load(str(path), load_external_data=False), path)


def _sizes(model: onnx.ModelProto, path: Path) -> tuple[int, int]:
    tensors = model.graph.initializer
    weights = sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in tensors
    )
    beside = {
        path.parent / entry.value
        for tensor in tensors
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum(each.stat().st_size for each in beside if each.is_file()), weights


def _fix_batch(model: onnx.ModelProto, inputs: Sequence[str]) -> int:
    """Give an open batch the size 1, and tell the largest there is."""
    batch = 1
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name in inputs and len(sizes):
            if not sizes[0].HasField("dim_value"):
                sizes[0].dim_value = 1
            batch = max(batch, sizes[0].dim_value)
    del model.graph.value_info[:]  # it names the batch that has just been fixed
    return batch


def _types_of_values(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and element type of each value of which they are known."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            found.setdefault(
                value.name, (tuple(size.dim_value for size in kind.shape.dim), int(kind.elem_type))
            )
    return found


def _peak_of_values(model: onnx.ModelProto, types: Mapping[str, tuple[tuple[int, ...], int]]) -> int | None:
    """Bytes of the values that are alive at once, weights and constants left out."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {output for node in model.graph.node if node.op_type == "Constant" for output in node.output}
    last_read = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    returned = {value.name for value in model.graph.output}
    sizes: dict[str, int] = {}

    def begin(names: Iterable[str]) -> bool:
        for name in names:
            if name and name not in constants:
                if name not in types:
                    return False
                shape, kind = types[name]
                sizes[name] = math.prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        return True

    if not begin(value.name for value in model.graph.input):
        return None
    peak = 0
    for index, node in enumerate(model.graph.node):
        if not begin(node.output):
            return None
        peak = max(peak, sum(sizes.values()))
        for name in [name for name in sizes if last_read.get(name, -1) <= index and name not in returned]:
            del sizes[name]
    return peak


def _macs_of_graph(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, dict[str, int]]:
    """Of one batch, and the operators left out with their number."""
    total, uncounted = 0, dict[str, int]()
    for node in model.graph.node:
        macs = _macs_of_node(node, shapes)
        if macs is None:
            uncounted[node.op_type] = uncounted.get(node.op_type, 0) + 1
        else:
            total += macs
    return total, uncounted


def _macs_of_node(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    left, right, output = (shapes.get(name) for name in (*node.input[:2], node.output[0]))
    if left is None or right is None or output is None:
        return None
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(output) * left[0 if transposed else -1]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise when they cannot write `path` into one line.

    It tells the name alone: a result directory has another until it is whole.
    """
    try:
        yield
    except SepconvertError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SepconvertError(f"{path.name}: cannot be written: {reason}; pass another --out") from error
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        reason = first_line(error)
        raise SepconvertError(f"{path.name}: cannot be written: {reason}; pass another --out") from error


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
