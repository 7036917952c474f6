"""Replacement of convolution calls in a module's forward by submodules, through a graph of that forward."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sepconvert.base.errors import first_line
from sepconvert.base.modules import has, hashable, put, submodule
from sepconvert.network.symbolic import (
    UntraceableError,
    agree,
    convolution_nodes,
    exported_graph,
    node_arguments,
    stand_in,
    symbolic_graph,
)
from sepconvert.network.tensors import Inputs


def call_graph(owner: nn.Module, inputs: Inputs | None, calls: int) -> fx.GraphModule:
    """Return the forward of `owner` as a graph that shows at least `calls` convolutions of its own.

    torch.fx keeps submodules and their training mode, and is used unless the forward branches on its
    input's shape or type; then torch.export is, which fixes the branches taken.

    Args:
        owner: the module, left as it is.
        inputs: positional arguments of its forward; None if it takes keyword arguments.
        calls: convolutions that its forward was seen to call.

    Raises:
        UntraceableError: neither can trace the forward.
    """
    reasons = []
    for tracer in (symbolic_graph, exported_graph):
        this_mode, other_mode = stand_in(owner, owner.training), stand_in(owner, not owner.training)
        try:
            with hashable(owner):
                module = tracer(this_mode, inputs)
                other = tracer(other_mode, inputs)
            if other.code != module.code:
                raise UntraceableError("it does other things in training mode than in eval mode")
            if tracer is exported_graph and not agree(this_mode, module, inputs or ()):
                raise UntraceableError("it does other things in float64")
        except Exception as error:  # tracing runs the user's code on stand-ins, which may raise anything
            reasons.append(first_line(error))
            continue
        if len(convolution_nodes(module.graph)) >= calls:
            return module
        reasons.append("a convolution is missing from the graph")
    raise UntraceableError("; ".join(dict.fromkeys(reasons)))


def replace_calls(
    owner: nn.Module,
    module: fx.GraphModule,
    replacements: Mapping[int, nn.Module],
    names: Mapping[int, str],
) -> None:
    """Replace convolution calls of a forward by submodules.

    Args:
        owner: gets the new forward and otherwise stays what it is, though its class becomes a subclass of
            the present one. Kernels that the forward no longer uses are deleted.
        module: its `call_graph`.
        replacements: the submodules, by position of the call among the forward's convolutions.
        names: their names, likewise.
    """
    graph, nodes = module.graph, convolution_nodes(module.graph)
    for target in _attributes(graph):  # tensors that the forward makes
        if "." not in target and not has(owner, target):
            nn.Module.register_buffer(owner, target, getattr(module, target).detach(), persistent=False)
    before = _attributes(graph)
    for index, replacement in replacements.items():
        node = nodes[index]
        for holder in (owner, module):
            put(holder, names[index], replacement)
        with graph.inserting_before(node):
            call = graph.call_module(names[index], (node_arguments(node)["input"],))
        node.replace_all_uses_with(call)
        _erase(graph, node)
    _set_forward(owner, module)
    for target in before - _attributes(graph):
        _delete(owner, target, graph)


def variable_argument(module: fx.GraphModule, index: int) -> str | None:
    """Return the name of an argument of a convolution call that is computed from the forward's inputs.

    The input of the convolution is left out. Other arguments may depend on the dtype, the device and the
    number of channels of the inputs, which do not change.
    """
    for name, value in node_arguments(convolution_nodes(module.graph)[index]).items():
        nodes = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]
        if name != "input" and any(map(_depends_on_inputs, nodes)):
            return name
    return None


def _depends_on_inputs(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if source in seen or _is_invariant(source):
            continue
        seen.add(source)
        if source.op == "placeholder":
            return True
        converts = source.op == "call_method" and source.target in ("to", "type_as", "type")
        waiting.extend(source.all_input_nodes[:1] if converts else source.all_input_nodes)
    return False


def _is_invariant(node: fx.Node) -> bool:
    """Tell whether a node is a dtype, a device, or the size of the channel dimension."""
    if node.target is getattr:
        return node.args[1] in ("dtype", "device")
    is_size = (
        (node.op == "call_method" and node.target == "size")
        or node.target is torch.ops.aten.sym_size.int
        or (node.target is operator.getitem and _is_shape(node.args[0]))
    )
    return bool(is_size and len(node.args) > 1 and node.args[1] == 1)


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    return node.target is getattr and bool(node.args[1] == "shape")


def _attributes(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and those that only it used. (`eliminate_dead_code` takes in-place calls for dead.)"""
    fed = {node}
    for candidate in reversed(graph.nodes):
        unused = candidate in fed and not candidate.users and candidate.op != "placeholder"
        if candidate is node or unused:
            fed.update(candidate.all_input_nodes)
            graph.erase_node(candidate)


def _delete(owner: nn.Module, target: str, graph: fx.Graph) -> None:
    """Delete a tensor of `owner` by its path, with the submodule that held it if that is unused too."""
    path, _, name = target.rpartition(".")
    used = (str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
    if path and not any(f"{other}.".startswith(f"{path}.") for other in used):
        parent, _, name = path.rpartition(".")
        submodule(owner, parent)._modules.pop(name, None)
    elif not path:
        owner._parameters.pop(name, None)
        owner._buffers.pop(name, None)


def _set_forward(owner: nn.Module, module: fx.GraphModule) -> None:
    if isinstance(owner, fx.GraphModule):
        owner.graph = module.graph
        return
    module.recompile()
    _, (_, imports) = module.__reduce__()
    cls = vars(type(owner)).get("_converted_from", type(owner))
    owner.__class__ = _with_forward(cls, f"{imports}\n{module.code}")


@functools.cache
def _with_forward(cls: Any, source: str) -> type[nn.Module]:
    """Return a subclass of `cls` with another forward, whose instances can be copied and pickled."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102  (torch.fx wrote it)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, state, *_ = cls.__reduce_ex__(self, 2)
        return _new_instance, (cls, source), state

    members = {
        "forward": namespace["forward"],
        "_converted_from": cls,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (_Unregistered, cls), members)


class _Unregistered:
    """Hides a class from the `__init_subclass__` of its other base, which may register subclasses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _new_instance(cls: Any, source: str) -> nn.Module:
    rewritten = _with_forward(cls, source)
    return rewritten.__new__(rewritten)
