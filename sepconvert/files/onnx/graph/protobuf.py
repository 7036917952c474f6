"""ONNX models as protobuf messages: read with care, walked, and cut into pieces."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper

from sepconvert.base.documents import read_file
from sepconvert.base.errors import SepconvertError, first_line

MOST_BYTES = 2**31
"""Size that a protobuf message cannot exceed."""


_STANDARD = ("", "ai.onnx")


def read_content(path: Path) -> bytes:
    """Return the bytes of an ONNX file.

    Raises:
        SepconvertError: there is no such file, or it is larger than a message can be.
    """
    try:
        return read_file(path, MOST_BYTES)
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error


def parsed(content: bytes, path: Path) -> onnx.ModelProto:
    """Return the model in the bytes of a file; data in files beside it are left there.

    Raises:
        SepconvertError: it is no ONNX model, or names data outside its folder.
    """
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own
        raise SepconvertError(f"{path}: not an ONNX model ({first_line(error)}); export it anew") from error
    if not model.graph.node:
        raise SepconvertError(f"{path}: not an ONNX model (it has no operators); export it anew")
    for location in external_files(model):
        check_location(location, path)
    return model


def check_location(location: str, path: Path) -> None:
    """Raise `SepconvertError` unless a file of external data lies in the folder of its model."""
    folder = path.parent.resolve()
    try:
        found = (folder / location).resolve()
        inside = location != "" and not Path(location).is_absolute() and found.is_relative_to(folder)
        missing = not found.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a loop of links
        inside = missing = True
    if not inside:
        raise SepconvertError(
            f"{path}: names data at {location!r}, outside its own folder, which are not read; put them "
            "beside it, and save the model with their relative path"
        )
    if missing:
        raise SepconvertError(f"{path}: its weights are in {location!r}, which is missing; copy it, too")


def external_files(model: onnx.ModelProto) -> list[str]:
    """Return the locations of external data, relative to the folder of the file, each once."""
    return list(
        dict.fromkeys(
            entry.value
            for tensor in tensors_of(model)
            if tensor.data_location == onnx.TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        )
    )


def with_data(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """Return the model with all data in the message: a copy, unless it holds them already.

    Raises:
        SepconvertError: they are missing, damaged, or larger than a message can be.
    """
    if not external_files(model):
        return model
    whole = copy.deepcopy(model)
    try:
        if folder is None:
            raise ValueError("a model without a file names data in others")
        external_data_helper.load_external_data_for_model(whole, str(folder))
    except Exception as error:  # onnx's errors for sizes and places share no base class
        raise SepconvertError(
            f"the model's external data cannot be read: {first_line(error)}; save it anew"
        ) from error
    if (size := whole.ByteSize()) >= MOST_BYTES:
        raise SepconvertError(
            f"the model holds {size / 1e9:.1f} GB with its external data, and at most {MOST_BYTES / 1e9:.1f} "
            "can be converted; convert its parts"
        )
    return whole


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a model stores: initializers and attributes, in bodies and functions too."""
    for graph in graphs_of(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in (*nodes_in(model.graph.node), *(n for f in model.functions for n in nodes_in(f.node))):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph of a model and the graphs within its nodes and functions."""
    yield model.graph
    for node in nodes_in(model.graph.node):
        yield from bodies(node)
    for function in model.functions:
        for node in nodes_in(function.node):
            yield from bodies(node)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that are attributes of a node: branches of an If, bodies of loops."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, each followed by those of the graphs within it."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from nodes_in(body.node)


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the values that a node reads, those of the graphs within it included."""
    found = {name for name in node.input if name}
    for body in bodies(node):
        own = {value.name for value in (*body.input, *body.initializer)}
        own |= {sparse.values.name for sparse in body.sparse_initializer}
        for inner in body.node:
            found |= reads(inner) - own
            own |= set(inner.output)
        found |= {value.name for value in body.output} - own
    return found


def is_standard(node: onnx.NodeProto) -> bool:
    """Return whether a node is an operator of ONNX itself."""
    return node.domain in _STANDARD


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or the default: strings as `str`, lists as lists."""
    for each in node.attribute:
        if each.name == name:
            value = onnx.helper.get_attribute_value(each)
            return value.decode() if isinstance(value, bytes) else value
    return default


def constants_of(graph: onnx.GraphProto) -> set[str]:
    """Return the names of a graph's initializers, sparse ones included."""
    return {tensor.name for tensor in graph.initializer} | {
        sparse.values.name for sparse in graph.sparse_initializer
    }


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a graph that have no default."""
    constants = constants_of(graph)
    return [value for value in graph.input if value.name not in constants]


def extracted(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[str],
) -> onnx.ModelProto:
    """Return a model of some of the nodes, with the weights that these read.

    Args:
        model: is left as it is.
        nodes: in an order in which they can run.
        inputs: types of the values that they read and do not make.
        outputs: names of the values to return.
    """
    needed = set[str]().union(*map(reads, nodes), outputs)
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = "part"
    part.graph.node.extend(nodes)
    part.graph.input.extend(inputs)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    graph = model.graph
    part.graph.initializer.extend(each for each in graph.initializer if each.name in needed)
    part.graph.sparse_initializer.extend(
        each for each in graph.sparse_initializer if each.values.name in needed
    )
    if model.ir_version < 4:  # initializers have to be inputs, too
        part.graph.input.extend(each for each in graph.input if each.name in constants_of(part.graph))
    return part
