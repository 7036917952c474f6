"""An ONNX file as a torch module: its convolutions are layers, and ONNX Runtime runs what lies between.

No operator has to be translated, so that every file that ONNX Runtime runs can be converted. ONNX Runtime
does not differentiate: where gradients are recorded, an island runs in torch, if it has been translated.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import submodule
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.onnx.graph.convolutions import Convolution, OnnxGraph
from sepconvert.files.onnx.graph.cost import macs_of_node, measured_shapes
from sepconvert.files.onnx.graph.protobuf import (
    constants_of,
    extracted,
    inputs_of,
    parsed,
    read_content,
    reads,
)
from sepconvert.files.onnx.graph.running import Feed, feed_by_name, opened
from sepconvert.network.layers import Conv, ListedConvolution
from sepconvert.network.tensors import Inputs, NamedInputs

_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT, "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE, "tensor(bool)": onnx.TensorProto.BOOL,
    "tensor(int8)": onnx.TensorProto.INT8, "tensor(uint8)": onnx.TensorProto.UINT8,
    "tensor(int16)": onnx.TensorProto.INT16, "tensor(uint16)": onnx.TensorProto.UINT16,
    "tensor(int32)": onnx.TensorProto.INT32, "tensor(uint32)": onnx.TensorProto.UINT32,
    "tensor(int64)": onnx.TensorProto.INT64, "tensor(uint64)": onnx.TensorProto.UINT64,
}  # fmt: skip


_GROWTH = 32  # of open sizes: most networks halve an image at most five times


def open_network(source: str | os.PathLike[str] | onnx.ModelProto) -> "OnnxNetwork":
    """Return an ONNX file, or a model in memory, as a module.

    Raises:
        SepconvertError: it is no ONNX model, or ONNX Runtime cannot load it.
    """
    if isinstance(source, onnx.ModelProto):
        return _network(source, None, None, "model")
    path = Path(source)
    content = read_content(path)
    return _network(parsed(content, path), path.parent, content, str(path))


def _network(model: onnx.ModelProto, folder: Path | None, content: bytes | None, where: str) -> "OnnxNetwork":
    try:
        return OnnxNetwork(OnnxGraph(model, folder, content)).eval()
    except SepconvertError as error:
        raise SepconvertError(f"{where}: {error}") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        raise SepconvertError(
            f"{where}: is no valid ONNX model ({type(error).__name__}: {first_line(error)}); export it anew"
        ) from error


class Island:
    """Nodes between convolutions, run by ONNX Runtime. What it computes never changes: a copy is itself."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.module: nn.Module | None = None  # the same in torch, run where gradients are recorded
        self.inputs = tuple(value.name for value in inputs_of(model.graph))
        self.outputs = tuple(value.name for value in model.graph.output)

    def __deepcopy__(self, memo: object) -> "Island":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_session"}

    @cached_property
    def _session(self) -> Any:
        return opened(self.model, spinning=False)

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for values of the inputs."""
        if self.module is not None and torch.is_grad_enabled():
            returned = self.module(*values)
            return list(returned) if isinstance(returned, list | tuple) else [returned]
        arrays = (value.detach().cpu().contiguous().numpy() for value in values)
        found = self._session.run(list(self.outputs), dict(zip(self.inputs, arrays, strict=True)))
        return [torch.from_numpy(np.asarray(each)) for each in found]


Watch = Callable[[Island, Sequence[Tensor], Sequence[Tensor]], None]
"""Called after a run of an island, with the island, its inputs and its outputs."""


@dataclass(frozen=True, eq=False)
class _Stage:
    """Nodes that can run once the convolutions of earlier stages have, and convolutions that then can."""

    island: Island | None
    convolutions: tuple[Convolution, ...]
    finished: frozenset[str]  # values that no later stage reads


class OnnxNetwork(NamedInputs, nn.Module):
    """The graph of an ONNX file as a module.

    Inputs are the file's, in its order; floating-point ones are cast to the dtypes that it takes. The output
    is a tensor, or a tuple where the file has several. Where the file fixes the batch, other numbers of
    samples run in parts of that size.

    Attributes:
        graph: the file.
        batch: number of samples that the file fixes; None if it is open.
    """

    batch: int | None

    def __init__(self, graph: OnnxGraph) -> None:
        """Make the layers, and cut the graph between them.

        Raises:
            SepconvertError: ONNX Runtime cannot load the file, or an input is no tensor of numbers.
        """
        super().__init__()
        self.graph = graph
        self.input_names = graph.input_names
        self._stages = _stages(graph)
        self._constants = _constants(graph)
        inputs = inputs_of(graph.model.graph)
        sizes = {size.dim_value for value in inputs for size in value.type.tensor_type.shape.dim[:1]}
        self.batch = next(iter(sizes)) or None if len(sizes) == 1 else None
        self._dtypes = [_dtype(value) for value in inputs]
        self._watch: Watch | None = None
        # Last: a convolution may have the name of an attribute.
        for convolution in graph.convolutions:
            _put(self, convolution.name, layer_of(convolution))
        for each in graph.kept:
            _put(self, each.name, ListedConvolution(each.operator, each.reason, each.params))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs of the graph."""
        given = self.own_inputs(inputs)
        found = [self._run(part) for part in self._parts(given)]
        outputs = found[0]
        if self.batch is not None and self.samples(given) != self.batch:
            outputs = [torch.cat(each)[: self.samples(given)] for each in zip(*found, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def own_inputs(self, inputs: Inputs) -> Inputs:
        """Return floating-point inputs in the dtypes that the file takes."""
        if len(inputs) != len(self.input_names):
            raise SepconvertError(
                f"expected as many inputs as the ONNX file takes ({', '.join(self.input_names)}), got "
                f"{len(inputs)}; pass them in this order"
            )
        return tuple(
            value.to(dtype) if value.is_floating_point() and dtype.is_floating_point else value
            for value, dtype in zip(inputs, self._dtypes, strict=True)
        )

    def example(self) -> Inputs | None:
        """Return zeros of the shapes that the file gives; None if it leaves more open than the batch."""
        found = []
        for value, dtype in zip(inputs_of(self.graph.model.graph), self._dtypes, strict=True):
            sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
            if not value.type.tensor_type.HasField("shape") or not all(sizes[1:]):
                return None
            if min(sizes, default=0) < 0 or math.prod(size or 1 for size in sizes) > MAX_INPUT_ELEMENTS:
                shape = "×".join(map(str, sizes))
                raise SepconvertError(
                    f"the model's input {value.name} has the shape {shape}, which is none, or of more than "
                    f"{MAX_INPUT_ELEMENTS:,} elements; export it anew for a smaller one"
                )
            found.append(torch.zeros([sizes[0] or 1, *sizes[1:]] if sizes else [], dtype=dtype))
        return tuple(found)

    @property
    def input_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Shapes of the inputs, with None for each size that is open."""
        return tuple(
            tuple(size.dim_value or None for size in value.type.tensor_type.shape.dim)
            for value in inputs_of(self.graph.model.graph)
        )

    @property
    def described_inputs(self) -> str:
        """Names and shapes of the inputs, with ? for each size that is open."""
        shapes = ("×".join(str(size or "?") for size in shape) for shape in self.input_shapes)
        return ", ".join(f"{name}: {shape}" for name, shape in zip(self.input_names, shapes, strict=True))

    def other_shapes(self, inputs: Inputs) -> Iterator[list[list[int]]]:
        """Yield shapes of inputs with one more sample, and with other open sizes grown by `_GROWTH`."""
        open_sizes = [
            [size is None for size in shape] or [False] * value.ndim
            for shape, value in zip(self.input_shapes, inputs, strict=True)
        ]
        if any(mask[:1] == [True] for mask in open_sizes):
            yield [
                [size + (place == 0 and mask[0]) for place, size in enumerate(value.shape)]
                for value, mask in zip(inputs, open_sizes, strict=True)
            ]
        if any(any(mask[1:]) for mask in open_sizes):
            yield [
                [size + _GROWTH * (place > 0 and mask[place]) for place, size in enumerate(value.shape)]
                for value, mask in zip(inputs, open_sizes, strict=True)
            ]

    def note_costs(self, inputs: Inputs) -> None:
        """Give the convolutions that are only listed their MACs, as counted for these inputs.

        Raises:
            SepconvertError: ONNX Runtime cannot run the file on them.
        """
        shapes = measured_shapes(self.graph.whole, self.feed(inputs))
        for each in self.graph.kept:
            macs = None if each.node is None else macs_of_node(each.node, shapes)
            if macs is not None:
                vars(submodule(self, each.name))["macs"] = macs // self.samples(inputs)

    def samples(self, inputs: Inputs) -> int:
        """Return the number of samples among inputs: the first dimension of the first that has one."""
        return next((len(value) for value in inputs if value.ndim), 1)

    def feed(self, inputs: Inputs) -> Feed:
        """Return inputs as ONNX Runtime takes them."""
        return feed_by_name(self.input_names, self.own_inputs(inputs))

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Report each run of an island within the block: the island, its inputs and its outputs."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def _parts(self, inputs: Inputs) -> list[Inputs]:
        """Return the inputs in parts of the batch that the file fixes; the last is filled up."""
        size, batch = self.samples(inputs), self.batch
        if batch is None or size in (0, batch):
            return [inputs]
        count = -(-size // batch)

        def parts(value: Tensor) -> Sequence[Tensor]:
            if value.ndim == 0 or len(value) != size:  # it belongs to all samples
                return [value] * count
            missing = value[-1:].expand(count * batch - size, *value.shape[1:])
            return torch.split(torch.cat([value, missing]), batch)

        return list(zip(*map(parts, inputs), strict=True))

    def _run(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        values = self._constants | dict(zip(self.input_names, inputs, strict=True))
        for stage in self._stages:
            if stage.island is not None:
                given = [values[name] for name in stage.island.inputs]
                made = stage.island.run(given)
                if self._watch is not None:
                    self._watch(stage.island, given, made)
                values.update(zip(stage.island.outputs, made, strict=True))
            for convolution in stage.convolutions:
                values[convolution.output] = self._convolve(convolution, values[convolution.input])
            for name in stage.finished:
                values.pop(name, None)
        return [values[name] for name in self.graph.output_names]

    def _convolve(self, convolution: Convolution, value: Tensor) -> Tensor:
        if not convolution.is_symmetric:
            (top, bottom), (left, right) = convolution.padding(value.shape[-2:])
            value = F.pad(value, (left, right, top, bottom))
        output: Tensor = submodule(self, convolution.name)(value)
        return output


def layer_of(convolution: Convolution) -> Conv:
    """Return a convolution as a layer, without padding where that of `nn.Conv2d` cannot express its own."""
    outputs, inputs, *kernel = convolution.weight.shape
    pads = convolution.pads
    layer = Conv(
        inputs * convolution.groups,
        outputs,
        (kernel[0], kernel[1]),
        stride=convolution.stride,
        padding=pads[:2] if pads is not None and convolution.is_symmetric else 0,
        dilation=convolution.dilation,
        groups=convolution.groups,
        bias=False,
        device="meta",
    )
    layer.labels = (convolution.output,)
    layer.weight = nn.Parameter(torch.from_numpy(convolution.weight.copy()))
    if convolution.bias is not None:
        layer.bias = nn.Parameter(torch.from_numpy(convolution.bias.copy()))
    return layer


def _dtype(value: onnx.ValueInfoProto) -> torch.dtype:
    kind = value.type.tensor_type.elem_type
    if kind not in _TYPES.values():
        raise SepconvertError(
            f"the model's input {value.name} is no tensor of numbers; take a file whose inputs all are"
        )
    array = np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(kind))
    return torch.from_numpy(array).dtype


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path, with containers for the levels above it."""
    *levels, last = path.split(".")
    place = network
    for level in levels:
        found = place._modules.setdefault(level, nn.Module())
        assert found is not None  # noqa: S101  (no module of this network is)
        place = found
    place._modules[last] = module


def _stages(graph: OnnxGraph) -> list[_Stage]:
    """Cut the graph into islands and convolutions, by the number of convolutions that come before."""
    convolutions = {id(each.node): each for each in graph.convolutions}
    depth: dict[str, int] = {}
    parts: dict[int, list[onnx.NodeProto]] = {}
    layers: dict[int, list[Convolution]] = {}
    for node in _in_order(graph.whole.graph):
        found = convolutions.get(id(node))
        read = reads(node) if found is None else {found.input}
        before = max((depth.get(name, 0) for name in read), default=0)
        if found is None:
            parts.setdefault(before, []).append(node)
        else:
            layers.setdefault(before, []).append(found)
        depth.update(dict.fromkeys(node.output, before if found is None else before + 1))
    levels = range(max([*parts, *layers, 0]) + 1)
    made = [{name for node in parts.get(level, ()) for name in node.output} for level in levels]
    read_by_nodes = [set[str]().union(*map(reads, parts.get(level, ()))) for level in levels]
    convolved = [{each.input for each in layers.get(level, ())} for level in levels]
    wanted = set(graph.output_names)
    later: list[set[str]] = []  # values that are read after each level
    for level in reversed(levels):
        later.insert(0, set(wanted))
        wanted |= read_by_nodes[level] | convolved[level]
    crossing = [sorted(made[level] & (later[level] | convolved[level])) for level in levels]
    types = {value.name: value for value in inputs_of(graph.whole.graph)}
    outputs = {each.output for each in graph.convolutions}.union(*crossing)
    types |= _types_of(graph.whole, sorted(outputs))
    stages = []
    for level in levels:
        needed = [types[name] for name in sorted(read_by_nodes[level] - made[level]) if name in types]
        island = None
        if crossing[level]:
            island = Island(extracted(graph.whole, parts[level], needed, crossing[level]))
        finished = (read_by_nodes[level] | convolved[level]) - later[level]
        stages.append(_Stage(island, tuple(layers.get(level, ())), frozenset(finished)))
    return stages


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph in an order in which they can run, which should be that of the file.

    Raises:
        SepconvertError: they depend on each other in a circle.
    """
    nodes = list(graph.node)
    makers = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    needs = {
        place: {makers[name] for name in reads(node) if name in makers} for place, node in enumerate(nodes)
    }
    if all(need < place for place, each in needs.items() for need in each):
        return nodes
    try:
        return [nodes[place] for place in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        raise SepconvertError("the model's nodes depend on each other in a circle; export it anew") from error


def _constants(graph: OnnxGraph) -> dict[str, Tensor]:
    """Return the constants that the graph returns, or that a convolution takes for its input."""
    names = {*graph.output_names, *(each.input for each in graph.convolutions)}
    found = {name: graph.constant(name) for name in names & constants_of(graph.whole.graph)}
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items() if value is not None}


def _types_of(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, onnx.ValueInfoProto]:
    """Return the types of values, as ONNX Runtime infers them.

    Raises:
        SepconvertError: ONNX Runtime cannot load the model, or a value is no tensor of numbers.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {value.name for value in whole.graph.output}
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    found = {}
    for each in opened(whole, optimised=False).get_outputs():
        if each.name not in names:
            continue
        if each.type not in _TYPES:
            raise SepconvertError(
                f"the model's value {each.name} is a {each.type}, and only tensors of numbers can pass "
                "between layers and be returned; export the model without it"
            )
        found[each.name] = onnx.helper.make_tensor_value_info(each.name, _TYPES[each.type], each.shape)
    return found
