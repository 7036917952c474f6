"""Convolution calls inside a module's forward → submodules, by a graph of that forward alone."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sepconvert.base.errors import first_line
from sepconvert.network.calls import bind_arguments, convolution_name
from sepconvert.network.symbolic import (
    UntraceableError,
    agree,
    convolution_nodes,
    exported_graph,
    stand_in,
    symbolic_graph,
)
from sepconvert.network.tensors import Inputs


def call_graph(owner: nn.Module, inputs: Inputs | None, calls: int) -> fx.GraphModule:
    """The forward of `owner` as a graph in which at least `calls` convolutions of its own stand.

    torch.fx keeps submodules and their training mode, and serves unless the forward branches on its
    input's shape or type; then torch.export serves, which fixes the branches taken.

    Raises:
        UntraceableError: neither can trace the forward.
    """
    reasons = []
    for tracer in (symbolic_graph, exported_graph):
        this_mode, other_mode = stand_in(owner, owner.training), stand_in(owner, not owner.training)
        try:
            module = tracer(this_mode, inputs)
            if tracer(other_mode, inputs).code != module.code:
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
    """Let a submodule take the place of each convolution call, by its position among all calls.

    Args:
        owner: gets the new forward, and otherwise stays what it is: its class becomes a subclass of
            its own. Kernels that nothing in the forward uses any more are deleted.
        module: its `call_graph`.
        replacements: the submodules.
        names: what to call them.
    """
    graph, nodes = module.graph, convolution_nodes(module.graph)
    for target in _attributes(graph):  # tensors that the forward makes
        if "." not in target and not hasattr(owner, target):
            owner.register_buffer(target, getattr(module, target).detach(), persistent=False)
    before = _attributes(graph)
    for index, replacement in replacements.items():
        node = nodes[index]
        arguments = bind_arguments(convolution_name(node.target) or "", node.args, node.kwargs)
        for holder in (owner, module):
            holder.add_module(names[index], replacement)
        with graph.inserting_before(node):
            call = graph.call_module(names[index], (arguments["input"],))
        node.replace_all_uses_with(call)
        _erase(graph, node)
    _set_forward(owner, module)
    for target in before - _attributes(graph):
        _delete(owner, target, graph)


def variable_argument(module: fx.GraphModule, index: int) -> str | None:
    """An argument of a convolution call, other than its input, that follows what the forward is given.

    It may follow the dtype, the device and the number of channels, which stay.
    """
    node = convolution_nodes(module.graph)[index]
    arguments = bind_arguments(convolution_name(node.target) or "", node.args, node.kwargs)
    for name, value in arguments.items():
        nodes = [each for each in pytree.tree_leaves(value) if isinstance(each, fx.Node)]
        if name != "input" and any(map(_follows_input, nodes)):
            return name
    return None


def _follows_input(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in seen or _stays(each):
            continue
        seen.add(each)
        if each.op == "placeholder":
            return True
        converts = each.op == "call_method" and each.target in ("to", "type_as", "type")
        waiting.extend(each.all_input_nodes[:1] if converts else each.all_input_nodes)
    return False


def _stays(node: fx.Node) -> bool:
    """Is it a dtype, a device, or the size of the dimension of channels?"""
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
    """Erase a node and what served it alone. (`eliminate_dead_code` takes in-place calls for dead.)"""
    fed = {node}
    for each in reversed(graph.nodes):
        if each is node or (each in fed and not each.users and each.op != "placeholder"):
            fed.update(each.all_input_nodes)
            graph.erase_node(each)


def _delete(owner: nn.Module, target: str, graph: fx.Graph) -> None:
    """Delete a tensor of `owner` by its path, and the submodule that held it if that is out of use, too."""
    path, _, name = target.rpartition(".")
    used = (str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
    if path and not any(f"{each}.".startswith(f"{path}.") for each in used):
        parent, _, name = path.rpartition(".")
        owner.get_submodule(parent)._modules.pop(name, None)
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
    """A subclass of the module class `cls` with another forward; its instances can be copied and pickled."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102  (torch.fx wrote it)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, state, *_ = cls.__reduce_ex__(self, 2)
        return _instance, (cls, source), state

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
    """Keeps a class from what its base does with classes that inherit from it, as registries do."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _instance(cls: Any, source: str) -> nn.Module:
    rewritten = _with_forward(cls, source)
    return rewritten.__new__(rewritten)
