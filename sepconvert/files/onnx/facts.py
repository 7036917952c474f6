"""Facts read from an ONNX file: inputs, parameters, MACs, activation memory and size."""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sepconvert.base.errors import SepconvertError
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.onnx.graph.cost import macs_of_graph, weights_of
from sepconvert.files.onnx.graph.protobuf import parsed, read_content


@dataclass(frozen=True)
class OnnxFile:
    """Facts about an ONNX file.

    Attributes:
        names: name of each input.
        shapes: shape of each input, with None for each size that is open.
        dtypes: dtype of each input.
        params: number of floating-point weights.
        macs: MACs of convolutions and matrix products for one sample; one fused multiply-add is 1.
        uncounted_ops: number of operators of each kind that `macs` leaves out: those that are neither, and
            those whose shapes cannot be inferred.
        peak_activation_bytes: largest size of all values that are alive at once, for one batch (for one
            sample, if the batch is open), if each lives from the operator that writes it to the last
            that reads it; None if a shape cannot be inferred.
        sizes: bytes of the file and of its weights, as `onnx_sizes` returns them.
        sha256: SHA-256 of the file, in hexadecimal.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]
    params: int
    macs: int
    uncounted_ops: dict[str, int]
    peak_activation_bytes: int | None
    sizes: tuple[int, int]
    sha256: str


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file without running it.

    Raises:
        SepconvertError: there is no such file, it is no ONNX model, or its inputs are no tensors of numbers.
    """
    content = read_content(path)
    model = parsed(content, path)
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in known]
    shapes = tuple(_input_shape(value, path) for value in inputs)
    batch = _fix_batch(model, [value.name for value in inputs])
    with contextlib.suppress(Exception):  # operators whose shapes cannot be inferred are not counted
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = _types_of_values(model)
    macs, uncounted = macs_of_graph(model.graph, {name: shape for name, (shape, _) in types.items()} | known)
    return OnnxFile(
        tuple(value.name for value in inputs),
        shapes,
        tuple(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in inputs),
        weights_of(model),
        macs // batch,
        uncounted,
        _peak_of_values(model, types),
        _sizes(model, path),
        hashlib.sha256(content).hexdigest(),
    )


def _input_shape(value: onnx.ValueInfoProto, path: Path) -> tuple[int | None, ...]:
    """Return the shape of an input, with None for each open size; raise `SepconvertError` if it is no use."""
    if value.type.tensor_type.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise SepconvertError(
            f"{path}: its input {value.name} is no tensor of numbers; take a file whose inputs all are"
        )
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim
    )
    sizes = [size for size in shape if size is not None]
    if not (all(size >= 0 for size in sizes) and math.prod(sizes) <= MAX_INPUT_ELEMENTS):
        raise SepconvertError(
            f"{path}: its input {value.name} has the shape {'×'.join(map(str, sizes))}, of more than "
            f"{MAX_INPUT_ELEMENTS:,} elements; export it anew for a smaller one"
        )
    return shape


def onnx_sizes(path: Path) -> tuple[int, int]:
    """Return the bytes of an ONNX file, with files of weights beside it, and the bytes of its weights."""
    return _sizes(onnx.load(str(path), load_external_data=False), path)


def _sizes(model: onnx.ModelProto, path: Path) -> tuple[int, int]:
    """Return the sizes of a model that was read from `path`."""
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
    return path.stat().st_size + sum(file.stat().st_size for file in beside if file.is_file()), weights


def _fix_batch(model: onnx.ModelProto, inputs: Sequence[str]) -> int:
    """Give an open batch the size 1, in place, and return the largest batch of an input."""
    batch = 1
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name in inputs and len(sizes):
            if not sizes[0].HasField("dim_value"):
                sizes[0].dim_value = 1
            batch = max(batch, sizes[0].dim_value)
    del model.graph.value_info[:]  # its shapes have the batch open that has just been fixed
    return batch


def _types_of_values(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the shapes and element types of all values for which both are known."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            found.setdefault(
                value.name, (tuple(size.dim_value for size in kind.shape.dim), int(kind.elem_type))
            )
    return found


def _peak_of_values(model: onnx.ModelProto, types: Mapping[str, tuple[tuple[int, ...], int]]) -> int | None:
    """Return the most bytes of values, without constants, that are alive at once; None if one is unknown."""
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
