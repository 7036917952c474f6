"""The convolutions of an ONNX file: where they are, what they compute, and why some cannot be replaced."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from sepconvert.base.errors import SepconvertError
from sepconvert.factorize.geometry import Pair
from sepconvert.files.onnx.graph.protobuf import (
    attribute,
    bodies,
    extracted,
    inputs_of,
    is_standard,
    nodes_in,
    reads,
    with_data,
)
from sepconvert.files.onnx.graph.running import answers

Array = npt.NDArray[Any]

_CONVOLUTION = re.compile(r"Conv(?!er)")  # in names of operators; Convert is none
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial")
_RESERVED = ("training", "_watch", "_orig_mod")  # attributes of modules that are set on copies, or looked for
_INTEGERS = ("ConvInteger", "QLinearConv")
_FLOATS = (np.float32, np.float16)


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of the main graph that factors may take the place of: a 2-D Conv of constant weights.

    `pads` are (top, left, bottom, right) as ONNX orders them; None where `auto_pad` computes them.
    """

    name: str  # unique in the file, and a path of modules
    node: onnx.NodeProto
    weight: Array  # O × C/g × kh × kw
    bias: Array | None  # O
    stride: Pair
    dilation: Pair
    groups: int
    auto_pad: str
    pads: tuple[int, int, int, int] | None

    @property
    def input(self) -> str:
        """Name of the value that it convolves."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """Name of its output."""
        return str(self.node.output[0])

    @property
    def is_symmetric(self) -> bool:
        """Whether it pads as much after as before, whatever the size of its input."""
        return self.pads is not None and self.pads[:2] == self.pads[2:]

    def padding(self, size: Sequence[int]) -> tuple[Pair, Pair]:
        """Return the padding (before, after) per axis for an input of height and width `size`."""
        if self.pads is not None:
            return (self.pads[0], self.pads[2]), (self.pads[1], self.pads[3])
        kernel = self.weight.shape[2:]
        # https://onnx.ai/onnx/operators/onnx__Conv.html: the output has ceil(size / stride) elements.
        totals = [
            max((-(-size[a] // self.stride[a]) - 1) * self.stride[a] + self.dilation[a] * (kernel[a] - 1) + 1
                - size[a], 0)
            for a in (0, 1)
        ]  # fmt: skip
        smaller_first = self.auto_pad == "SAME_UPPER"
        halves = [(total // 2, total - total // 2)[:: 1 if smaller_first else -1] for total in totals]
        return halves[0], halves[1]


@dataclass(frozen=True)
class KeptConvolution:
    """A convolution that cannot be replaced, and the reason; `node` is None outside the main graph."""

    name: str
    operator: str
    reason: str
    node: onnx.NodeProto | None
    params: int


class OnnxGraph:
    """The graph of an ONNX file and its convolutions; it is never changed.

    Attributes:
        model: the file's content as it is, with external data left where they are.
        folder: the folder of external data.
        content: the bytes of the file.
        whole: the model with all data.
        convolutions: those that may be replaced, in the order of the file.
        kept: all others, with reasons.
    """

    def __init__(
        self, model: onnx.ModelProto, folder: Path | None = None, content: bytes | None = None
    ) -> None:
        """Find the convolutions; `content` are the bytes that the model was read from.

        Raises:
            SepconvertError: the model is not valid, or ONNX Runtime cannot run it.
        """
        _check_text(model)
        self.model, self.folder = model, folder
        self.content = model.SerializeToString() if content is None else content
        self.whole = with_data(model, folder)
        self._initializers = {tensor.name: tensor for tensor in self.whole.graph.initializer}
        self._producers = {name: node for node in self.whole.graph.node for name in node.output if name}
        self._sparse = {each.values.name for each in self.whole.graph.sparse_initializer}
        self._names = _Names(model)
        self._functions: set[tuple[str, str]] = set()  # those whose convolutions are listed
        self.convolutions: list[Convolution] = []
        self.kept: list[KeptConvolution] = []
        for node in self.whole.graph.node:
            if _is_convolution(node):
                self._add(node)
            self._list_inner(node)

    def __deepcopy__(self, memo: object) -> "OnnxGraph":
        return self

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that a caller must give."""
        return tuple(value.name for value in inputs_of(self.model.graph))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(value.name for value in self.model.graph.output)

    def constant(self, name: str) -> Array | None:
        """Return the value of a constant; None if it depends on an input.

        Defaults of inputs count as constants: exporters that list all weights as inputs mean no others.
        """
        tensor = self._initializers.get(name)
        return self._folded.get(name) if tensor is None else numpy_helper.to_array(tensor)

    @cached_property
    def _folded(self) -> Mapping[str, Array]:
        """Weights and biases of convolutions that constant nodes compute, as ONNX Runtime evaluates them."""
        graph = self.whole.graph
        wanted = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]}
        wanted = {
            name
            for name in wanted
            if name in self._sparse or (name in self._producers and self._is_constant(name))
        }
        if not wanted:
            return {}
        ancestors = set[int]()
        for name in wanted:
            ancestors |= self._ancestors(name)
        nodes = [node for node in graph.node if id(node) in ancestors]
        names = sorted(wanted)
        outputs = [f"{name}.sepconvert" for name in names]
        # ONNX Runtime returns no sparse initializer itself, but a copy of one.
        copies = [
            onnx.helper.make_node("Identity", [name], [output])
            for name, output in zip(names, outputs, strict=True)
        ]
        part = extracted(self.whole, [*nodes, *copies], [], outputs)
        return dict(zip(names, answers(part, {}, optimised=False), strict=True))

    def _ancestors(self, name: str) -> set[int]:
        """Return the identities of the nodes that a value is computed by."""
        found, waiting = set[int](), [name]
        while waiting:
            node = self._producers.get(waiting.pop())
            if node is not None and id(node) not in found:
                found.add(id(node))
                waiting += reads(node)
        return found

    def _is_constant(self, name: str) -> bool:
        """Return whether a value depends on no input, and on no random number."""
        by_identity = {id(node): node for node in self.whole.graph.node}
        nodes = [by_identity[each] for each in self._ancestors(name)]
        made = {output for node in nodes for output in node.output}
        made |= self._initializers.keys() | self._sparse
        return all(node.op_type not in _RANDOM and not any(bodies(node)) for node in nodes) and all(
            reads(node) <= made for node in nodes
        )

    def _add(self, node: onnx.NodeProto) -> None:
        name = self._names.of(node)
        found = self._described(name, node)
        if isinstance(found, Convolution):
            self.convolutions.append(found)
        else:
            self._keep(name, node, found)

    def _keep(self, name: str, node: onnx.NodeProto, reason: str, *, in_main_graph: bool = True) -> None:
        place_of_weight = 3 if node.op_type == "QLinearConv" else 1
        names = node.input[place_of_weight : place_of_weight + 1]
        weight = self._initializers.get(names[0]) if names else None
        params = 0 if weight is None else int(np.prod(weight.dims))
        place = node if in_main_graph else None
        self.kept.append(KeptConvolution(name, node.op_type, reason, place, params))

    def _described(self, name: str, node: onnx.NodeProto) -> Convolution | str:
        """Return a convolution that may be replaced, or the reason why a node is none."""
        if attribute(node, "group", 1) < 1:  # by which old releases of ONNX Runtime divide
            raise SepconvertError(f"the model's {name} has {attribute(node, 'group')} groups; export it anew")
        if not is_standard(node):
            return f"it is an operator of {node.domain}, and only ONNX's own are replaced"
        if node.op_type in _INTEGERS:
            return "it is quantised, and factors need kernels in floating point"
        if node.op_type == "ConvTranspose":
            return "transposed convolutions are not factorised"
        if node.op_type == "DeformConv":
            return "a deformable convolution reads its input at computed positions, as no separable form does"
        if node.op_type != "Conv":
            return f"{node.op_type} is not factorised"
        if self._is_dequantised(node.input[1]):
            return "its kernel is quantised (DequantizeLinear), and factors need kernels in floating point"
        weight = self.constant(node.input[1])
        if weight is None:
            return "its kernel is computed from the input"
        if weight.ndim != 4:
            return f"{weight.ndim - 2}-D convolutions are not factorised"
        if weight.dtype not in _FLOATS:
            return f"kernels of {weight.dtype} are not factorised"
        if not weight.size:
            return "its kernel is empty"
        if not np.isfinite(weight).all():
            return "its kernel holds NaN or Inf"
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = self.constant(node.input[2])
            if bias is None:
                return "its bias is computed from the input"
        return _convolution(name, node, weight, bias)

    def _is_dequantised(self, name: str) -> bool:
        node = self._producers.get(name)
        return node is not None and node.op_type == "DequantizeLinear"

    def _list_inner(self, node: onnx.NodeProto) -> None:
        """List the convolutions in the graphs within a node, and in the function that it calls."""
        for body in bodies(node):
            for inner in nodes_in(body.node):
                if _is_convolution(inner):
                    name = self._names.of(inner)
                    reason = f"it lies in the body of a {node.op_type}, where convolutions are not replaced"
                    self._keep(name, inner, reason, in_main_graph=False)
        for each in nodes_in([node]):
            for function, inner in self._within(each, frozenset()):
                name = self._names.of(inner, f"{function}.{self._names.plain(inner)}")
                reason = f"it lies in the function {function}, where convolutions are not replaced"
                self._keep(name, inner, reason, in_main_graph=False)

    def _within(
        self, node: onnx.NodeProto, calling: frozenset[tuple[str, str]]
    ) -> Iterator[tuple[str, onnx.NodeProto]]:
        """Yield the convolutions in the function that a node calls, and in those that this one calls."""
        key = node.domain, node.op_type
        if key in calling:
            raise SepconvertError(f"the model's function {node.op_type} calls itself; export it anew")
        if key in self._functions:
            return
        for function in self.model.functions:
            if (function.domain, function.name) == key:
                for inner in nodes_in(function.node):
                    if _is_convolution(inner):
                        yield node.op_type, inner
                    yield from self._within(inner, calling | {key})
                self._functions.add(key)


def _convolution(name: str, node: onnx.NodeProto, weight: Array, bias: Array | None) -> Convolution:
    auto_pad = str(attribute(node, "auto_pad", "NOTSET"))
    pads: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    if auto_pad.startswith("SAME"):
        pads = None
    elif auto_pad == "NOTSET":
        pads = tuple(attribute(node, "pads", [0, 0, 0, 0]))
    return Convolution(
        name,
        node,
        weight,
        bias,
        tuple(attribute(node, "strides", [1, 1])),
        tuple(attribute(node, "dilations", [1, 1])),
        int(attribute(node, "group", 1)),
        auto_pad,
        pads,
    )


def _check_text(model: onnx.ModelProto) -> None:
    """Raise `SepconvertError` if a name is no text: protobuf gives bytes that are not UTF-8 as they are."""
    nodes = (*nodes_in(model.graph.node), *(n for each in model.functions for n in nodes_in(each.node)))
    names = [name for node in nodes for name in (node.name, node.op_type, *node.input, *node.output)]
    names += [each.name for each in (*model.graph.initializer, *model.graph.input, *model.graph.output)]
    if not all(isinstance(name, str) for name in names):
        raise SepconvertError("a name in the model is no text in UTF-8; export it anew")


def _is_convolution(node: onnx.NodeProto) -> bool:
    return _CONVOLUTION.search(node.op_type) is not None


class _Names:
    """Unique names for convolutions: the node's own, or that of its output.

    A name is a path of modules, in which dots part the levels; no name is the beginning of another.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._own = Counter(node.name for node in nodes_in(model.graph.node))
        self._taken: set[str] = set()
        self._levels: set[str] = set()

    def plain(self, node: onnx.NodeProto) -> str:
        """Return the node's name or, if it has none of its own, that of its output."""
        return str(node.name if node.name and self._own[node.name] <= 1 else node.output[0])

    def of(self, node: onnx.NodeProto, wanted: str | None = None) -> str:
        """Return a name that no other convolution has."""
        name = wanted or self.plain(node)
        if not all(name.split(".")) or self._clashes(name) or name.partition(".")[0] in _RESERVED:
            name = name.replace(".", "_") or node.op_type
        number, found = 1, name
        while self._clashes(found) or found in _RESERVED:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        self._levels.update(_levels_above(found))
        return found

    def _clashes(self, name: str) -> bool:
        return name in self._taken or name in self._levels or not self._taken.isdisjoint(_levels_above(name))


def _levels_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
