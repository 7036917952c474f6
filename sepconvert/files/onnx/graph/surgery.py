"""Surgery on ONNX models: convolutions are exchanged in the user's own graph, and all else stays as it is.

The message is edited, not written anew: other nodes, their order and names, opsets, metadata, functions,
training information, annotations and references to external data are those of the original, byte for byte.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sepconvert.base.modules import submodule
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.factors import branches
from sepconvert.factorize.geometry import ConvSpec, Pair
from sepconvert.files.onnx.graph.convolutions import Convolution, OnnxGraph
from sepconvert.files.onnx.graph.network import OnnxNetwork, layer_of
from sepconvert.files.onnx.graph.protobuf import attribute, constants_of, graphs_of, nodes_in, reads
from sepconvert.network.calls import resolve_padding
from sepconvert.network.layers import Conv, FactorizedConv2d

_GEOMETRY = ("kernel_shape", "strides", "dilations", "group", "pads", "auto_pad")


def converted_model(network: OnnxNetwork, *, embedded: bool = False) -> onnx.ModelProto:
    """Return the file of a network with each convolution as it is in the network.

    Factors take the place of a Conv that was replaced; another kernel or bias, that of its own. A BatchNorm
    right behind factors whose outputs are summed is folded into them: a runtime would fold it into one
    convolution, and not into several. Weights that nothing reads any more are left out, and so are the nodes
    that computed them.

    Args:
        network: the network.
        embedded: whether to hold external data in the message.
    """
    modules = ((each, submodule(network, each.name)) for each in network.graph.convolutions)
    return edited(network.graph, modules, embedded=embedded)


def edited(
    graph: OnnxGraph,
    modules: Iterable[tuple[Convolution, nn.Module]],
    *,
    embedded: bool = False,
    folding: bool = False,
    paths: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the model of a graph with some convolutions as they are in modules; see `converted_model`.

    Args:
        graph: the original.
        modules: what takes the place of convolutions; the others stay.
        embedded: whether to hold external data in the message.
        folding: whether to fold each BatchNorm into the convolution before it, replaced or not.
        paths: names of convolutions, by their outputs, that their factors are named after; None for those
            that they have in the graph.
    """
    edit = _Edit(graph, graph.whole if embedded else graph.model, folding, paths or {})
    others = list(graph.convolutions)
    for convolution, module in modules:
        edit.exchange(convolution, module)
        others.remove(convolution)
    if folding:
        for convolution in others:
            edit.fold(convolution)
    return edit.result()


@dataclass(frozen=True)
class _Factor:
    """A convolution to write: geometry, kernel and bias."""

    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None


class _Edit:
    """A copy of a model while it is edited."""

    def __init__(
        self, graph: OnnxGraph, model: onnx.ModelProto, folding: bool, paths: Mapping[str, str]
    ) -> None:
        self._original, self._folding, self._paths = graph, folding, paths
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        self._instead: dict[str, list[onnx.NodeProto]] = {}  # by output of the node that they replace
        self._released: list[str] = []  # values that replaced nodes no longer read
        self._lost = set[str]()  # values that are made no more, or in another shape
        self._weights: list[onnx.TensorProto] = []
        self._taken = {node.name for node in nodes_in(self._graph.node)}
        self._taken |= {name for graph in graphs_of(self._model) for name in _values_of(graph)}

    def exchange(self, convolution: Convolution, module: nn.Module) -> None:
        """Write a module in the place of a convolution, unless it is what stands there."""
        if isinstance(module, FactorizedConv2d):
            self._replace(convolution, _chains(convolution, module))
            if _is_merged(module.spec, convolution):
                self._lost.add(convolution.output)
        elif isinstance(module, Conv):
            self._update(convolution, module)
        elif isinstance(module, nn.Conv2d):  # the dense form of this and the next one
            spec = _with_padding(_spec_of(module), convolution)
            self._replace(convolution, [[_Factor(spec, module.weight, module.bias)]])
            self._lost.add(convolution.output)
        elif isinstance(module, nn.Identity):  # it is part of the one before
            node = convolution.node
            self._released += node.input[1:]
            name = self._free(self._path(convolution, "merged"))
            identity = onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]], name=name)
            self._instead[convolution.output] = [identity]
        else:
            raise TypeError(f"{convolution.name}: there is no way to write a {type(module).__name__}")

    def fold(self, convolution: Convolution) -> None:
        """Fold the BatchNorm behind a convolution into it, if there is one."""
        if _norm_behind(self._original, convolution) is not None:
            layer = layer_of(convolution)
            spec = _with_padding(_spec_of(layer), convolution)
            self._replace(convolution, [[_Factor(spec, layer.weight, layer.bias)]])

    def result(self) -> onnx.ModelProto:
        """Return the edited model."""
        nodes = [
            new
            for node in self._graph.node
            for new in self._instead.get(node.output[0] if node.output else "", [node])
        ]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        _drop_unread(self._graph, self._released, self._lost)
        self._graph.initializer.extend(self._weights)
        if self._model.ir_version < 4:  # every initializer has to be an input, too
            self._graph.input.extend(
                onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims)
                for each in self._weights
            )
        return self._model

    def _update(self, convolution: Convolution, module: Conv) -> None:
        """Give a Conv the kernel and bias of a module, as far as they differ from its own."""
        node = onnx.NodeProto()
        node.CopyFrom(convolution.node)
        pairs = (1, convolution.weight, module.weight), (2, convolution.bias, module.bias)
        for index, before, value in pairs:
            if value is None:
                continue
            after = value.detach().double().cpu().numpy()  # NumPy has no bfloat16
            if before is not None and np.array_equal(before, after.astype(before.dtype), equal_nan=True):
                continue
            name = self._path(convolution, ("weight", "bias")[index - 1])
            name = self._constant(name, value, convolution)
            if len(node.input) > index:
                node.input[index] = name
            else:
                node.input.append(name)
        if list(node.input) != list(convolution.node.input):
            self._released += convolution.node.input[1:]
            self._instead[convolution.output] = [node]

    def _replace(self, convolution: Convolution, chains: list[list[_Factor]]) -> None:
        """Write a sum of chains of factors in the place of a Conv."""
        node, output = convolution.node, convolution.output
        self._released += node.input[1:]
        foldable = self._folding or len(chains) > 1
        norm = _norm_behind(self._original, convolution) if foldable else None
        if norm is not None:
            chains, output = _folded(chains, norm), norm.node.output[0]
            self._lost.add(convolution.output)
            self._released += norm.node.input[1:]
            self._instead[norm.node.output[0]] = []
        nodes: list[onnx.NodeProto] = []
        total = ""
        for branch, chain in enumerate(chains):
            value = convolution.input
            for place, factor in enumerate(chain):
                is_factor = len(chains) > 1 or len(chain) > 1  # or else a BatchNorm is folded into a layer
                path = self._path(convolution, *["branches", branch, place] * is_factor)
                last = len(chains) == 1 and place == len(chain) - 1
                nodes += self._written(convolution, factor, path, value, output if last else None)
                value = nodes[-1].output[0]
            if total:
                last = branch == len(chains) - 1
                name = self._free(self._path(convolution, "sum", branch))
                total_name = output if last else self._free(f"{name}.output")
                nodes.append(onnx.helper.make_node("Add", [total, value], [total_name], name=name))
                value = total_name
            total = value
        self._instead[convolution.output] = nodes

    def _written(
        self, convolution: Convolution, factor: _Factor, path: str, value: str, output: str | None
    ) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of a factor: a Conv, behind a Pad where it crops its input."""
        node = onnx.NodeProto()
        node.CopyFrom(convolution.node)
        kept = [each for each in node.attribute if each.name not in _GEOMETRY]
        del node.attribute[:]
        node.attribute.extend(kept)
        spec = factor.spec
        (top, bottom), (left, right) = spec.padding
        pads = [top, left, bottom, right]
        set_pads = {"pads": pads}
        if convolution.pads is None:
            set_pads = {"auto_pad": convolution.auto_pad}  # type: ignore[dict-item]
        elif min(pads) < 0:
            value = yield from self._padded(path, value, pads)
            set_pads = {"pads": [0, 0, 0, 0]}
        for name, given in {
            "kernel_shape": list(spec.kernel_size), "strides": list(spec.stride),
            "dilations": list(spec.dilation), "group": spec.groups, **set_pads,
        }.items():  # fmt: skip
            node.attribute.append(onnx.helper.make_attribute(name, given))
        node.name = self._free(path)
        node.ClearField("output")
        node.output.append(output or self._free(f"{path}.output"))
        del node.input[:]
        node.input.extend([value, self._constant(f"{path}.weight", factor.weight, convolution)])
        if factor.bias is not None:
            node.input.append(self._constant(f"{path}.bias", factor.bias, convolution))
        yield node

    def _padded(self, path: str, value: str, pads: Sequence[int]) -> Generator[onnx.NodeProto, None, str]:
        """Yield a Pad, which crops where amounts are negative: a Conv takes none that are."""
        name = self._free(f"{path}.pad")
        amounts = [0, 0, *pads[:2], 0, 0, *pads[2:]]
        output = self._free(f"{name}.output")
        if self._opset < 11:
            node = onnx.helper.make_node("Pad", [value], [output], name=name, pads=amounts)
        else:
            widths = numpy_helper.from_array(np.array(amounts), self._free(f"{name}.widths"))
            self._weights.append(widths)
            node = onnx.helper.make_node("Pad", [value, widths.name], [output], name=name)
        yield node
        return output

    @property
    def _opset(self) -> int:
        versions = [each.version for each in self._model.opset_import if each.domain in ("", "ai.onnx")]
        return int(versions[0]) if versions else 1

    def _path(self, convolution: Convolution, *parts: object) -> str:
        """Return the name of a part of what takes the place of a convolution; the model itself has none."""
        names = self._paths.get(convolution.output, convolution.name), *map(str, parts)
        return ".".join(filter(None, names))

    def _constant(self, name: str, value: Tensor, convolution: Convolution) -> str:
        """Add a weight to the model, in the dtype of the kernel, and return its name."""
        array = value.detach().double().cpu().numpy().astype(convolution.weight.dtype)
        self._weights.append(numpy_helper.from_array(array, self._free(name)))
        return str(self._weights[-1].name)

    def _free(self, name: str) -> str:
        """Return a name that no node and no value has, and take it."""
        found = next(
            each
            for each in itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
            if each not in self._taken
        )
        self._taken.add(found)
        return found


@dataclass(frozen=True)
class _Norm:
    """A BatchNorm with constant statistics, as a factor and a term of each channel."""

    node: onnx.NodeProto
    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def _chains(convolution: Convolution, module: FactorizedConv2d) -> list[list[_Factor]]:
    """Return the chains of factors of a layer, with the padding of the Conv in the file."""
    # What a layer pads by another mode than zeros, a file pads before the Conv. A runtime that pads by itself
    # goes by the kernel's extent: what was cut is put back as zeros.
    border = Border() if convolution.pads is None else module.border
    spec = _as_in_file(module.spec, convolution)
    layout = branches(spec, module.scheme, module.rank, border)
    chains = []
    for branch, geometries in zip(module.branches, layout, strict=True):
        layers = [each for each in branch._modules.values() if isinstance(each, nn.Conv2d)]
        chains.append(
            [
                _Factor(each, _extended(layer.weight, each.kernel_size, module.border), layer.bias)
                for each, layer in zip(geometries, layers, strict=True)
            ]
        )
    return chains


def _norm_behind(onnx_graph: OnnxGraph, convolution: Convolution) -> "_Norm | None":
    """Return the BatchNorm that alone reads a convolution's output, if its statistics are constant."""
    graph, output = onnx_graph.whole.graph, convolution.output
    readers = [node for node in graph.node if output in reads(node)]
    returned = any(value.name == output for value in graph.output)
    if returned or len(readers) != 1 or readers[0].op_type != "BatchNormalization":
        return None
    node = readers[0]
    if node.input[0] != output or len(node.output) != 1 or attribute(node, "training_mode", 0):
        return None
    values = [onnx_graph.constant(name) for name in node.input[1:]]
    if any(value is None for value in values):
        return None
    gain, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
    scale = gain / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
    return _Norm(node, scale, shift - mean * scale)


def _is_merged(spec: ConvSpec, convolution: Convolution) -> bool:
    """Return whether a layer in the place of a Conv also does what the next one does, by its geometry."""
    own = convolution.weight.shape, convolution.stride, convolution.dilation
    return (spec.weight_shape, spec.stride, spec.dilation) != own


def _as_in_file(spec: ConvSpec, convolution: Convolution) -> ConvSpec:
    """Return the geometry of a layer with the padding that the Conv in the file does."""
    if convolution.pads is None or _is_merged(spec, convolution):
        return spec
    return replace(spec, padding=convolution.padding((0, 0)), padding_mode="zeros")


def _with_padding(spec: ConvSpec, convolution: Convolution) -> ConvSpec:
    """Return the geometry with the padding that a network does before it calls the layer."""
    if convolution.is_symmetric or convolution.pads is None:
        return spec
    return replace(spec, padding=convolution.padding((0, 0)))


def _extended(weight: Tensor, size: Pair, border: Border) -> Tensor:
    """Return a kernel with the border of zeros along each axis in which it is smaller than `size`."""
    vertical, horizontal = (weight.shape[2 + axis] < size[axis] for axis in (0, 1))
    return Border(
        vertical * border.top, vertical * border.bottom, horizontal * border.left, horizontal * border.right
    ).restore(weight)


def _spec_of(module: nn.Conv2d) -> ConvSpec:
    """Return the geometry of a layer that pads with zeros."""
    kernel_size, dilation = (int(module.kernel_size[0]), int(module.kernel_size[1])), module.dilation
    return ConvSpec(
        module.in_channels,
        module.out_channels,
        kernel_size,
        (module.stride[0], module.stride[1]),
        resolve_padding(module.padding, kernel_size, (dilation[0], dilation[1])),
        (dilation[0], dilation[1]),
        module.groups,
        bias=module.bias is not None,
    )


def _folded(chains: list[list[_Factor]], norm: _Norm) -> list[list[_Factor]]:
    """Return chains whose sum is what a BatchNorm makes of theirs, computed in float64 and cast once."""
    scale, shift = torch.from_numpy(norm.scale), torch.from_numpy(norm.shift)
    folded = []
    for chain in chains:
        *others, last = chain
        weight = last.weight.double() * scale.reshape(-1, 1, 1, 1)
        terms = [] if last.bias is None else [last.bias.double() * scale]
        if chain is chains[-1]:
            terms.append(shift)  # once
        bias = sum(terms[1:], terms[0]) if terms else None
        folded.append([*others, _Factor(last.spec, weight, bias)])
    return folded


def _drop_unread(graph: onnx.GraphProto, released: Iterable[str], lost: Collection[str]) -> None:
    """Remove what only replaced nodes have read: weights, and nodes that computed these.

    Args:
        graph: edited in place.
        released: values that replaced nodes no longer read.
        lost: values that are made no more, or in another shape, whose description goes.
    """
    waiting, gone = list(released), set[str]()
    returned = {value.name for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output if name}
    uses = Counter(name for node in graph.node for name in reads(node))
    dead = set[int]()
    constants = constants_of(graph)
    while waiting:
        name = waiting.pop()
        if not name or name in gone or uses[name] or name in returned:
            continue
        gone.add(name)
        node = producers.get(name)
        if node is None or any(uses[each] or each in returned for each in node.output if each):
            continue
        dead.add(id(node))
        for read in reads(node):
            uses[read] -= 1
            waiting.append(read)
    nodes = [node for node in graph.node if id(node) not in dead]
    _keep(graph.node, nodes)
    removed = gone & constants
    vanished = removed.union(lost)
    vanished |= {name for name in gone if name in producers and id(producers[name]) in dead}
    _keep(graph.initializer, [each for each in graph.initializer if each.name not in removed])
    _keep(
        graph.sparse_initializer,
        [each for each in graph.sparse_initializer if each.values.name not in removed],
    )
    _keep(graph.input, [each for each in graph.input if each.name not in removed])
    _keep(graph.value_info, [each for each in graph.value_info if each.name not in vanished])
    _keep(
        graph.quantization_annotation,
        [each for each in graph.quantization_annotation if each.tensor_name not in vanished],
    )


def _values_of(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of all values of a graph, without those of the graphs within its nodes."""
    yield from (value.name for value in (*graph.input, *graph.output, *graph.value_info))
    yield from constants_of(graph)
    for node in graph.node:
        yield from node.input
        yield from node.output


def _keep(field: Any, kept: list[Any]) -> None:
    """Leave only some of the messages in a repeated field, which stays as it is if all are kept."""
    if len(kept) < len(field):
        copies = [copy.deepcopy(each) for each in kept]
        del field[:]
        field.extend(copies)
