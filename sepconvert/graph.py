"""Convolution calls inside a module's forward → submodules, by a graph of that forward alone."""

import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from sepconvert.errors import first_line
from sepconvert.trace import Inputs, bind_arguments, convolution_name, duplicate

_CONSTANT = "_tensor_constant"  # the name that torch.fx gives to tensors made in a forward


class UntraceableError(Exception):
    """No graph of the module's forward could be made, or it does not show the calls that were seen."""


class _ShallowTracer(fx.Tracer):
    """Follows one forward and leaves every submodule as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def call_graph(owner: nn.Module, inputs: Inputs | None, calls: int) -> fx.GraphModule:
    """The forward of `owner` as a graph in which at least `calls` convolutions of its own stand.

    torch.fx keeps submodules and their training mode, and serves unless the forward branches on its
    input's shape or type; then torch.export serves, which fixes the branches taken.

    Raises:
        UntraceableError: neither can trace the forward.
    """
    reasons = []
    for tracer in (_symbolic, _exported):
        this_mode, other_mode = _stand_in(owner, owner.training), _stand_in(owner, not owner.training)
        try:
            module = tracer(this_mode, inputs)
            if tracer(other_mode, inputs).code != module.code:
                raise UntraceableError("it does other things in training mode than in eval mode")
            if tracer is _exported and not _agree(this_mode, module, inputs or ()):
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


def convolution_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The convolution calls of a forward, in order."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and convolution_name(node.target) is not None
    ]


def expect(conditions: tuple[str, ...], names: tuple[str, ...], *tensors: Tensor) -> None:
    """Refuse inputs for which a forward might have taken another branch than the one in its graph.

    Raises:
        ValueError: with the condition that does not hold, such as `x.size()[3] >= 11`.
    """
    values = {"L": dict(zip(names, tensors, strict=True)), "math": math, **SYMPY_INTERP}
    for condition in conditions:
        if not eval(condition, values):  # noqa: S307  (torch.export wrote them)
            readable = functools.reduce(
                lambda text, name: text.replace(f"L['{name}']", name), names, condition
            )
            raise ValueError(f"the converted forward serves inputs with {readable} alone")


def _stand_in(owner: nn.Module, training: bool) -> nn.Module:
    """A shallow copy without hooks, whose forward may set attributes and write to its buffers."""
    copied = type(owner).__new__(type(owner))
    vars(copied).update(vars(owner))  # not copy.copy, which parametrised modules refuse
    buffers = {name: None if value is None else value.clone() for name, value in owner._buffers.items()}
    vars(copied).update(_buffers=buffers, training=training)
    vars(copied).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    return copied


@contextmanager
def _refusing_side_effects(owner: nn.Module) -> Iterator[None]:
    """Raise if attributes are set in here, for a graph would not set them."""
    before = dict(vars(owner))
    yield
    for name, value in vars(owner).items():
        if value is not before.get(name) and not name.startswith(_CONSTANT):
            raise UntraceableError(f"it sets the attribute {name}")


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
    return type(cls.__name__, (cls,), members)


def _instance(cls: Any, source: str) -> nn.Module:
    rewritten = _with_forward(cls, source)
    return rewritten.__new__(rewritten)


def _symbolic(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    if isinstance(owner, fx.GraphModule):
        graph = fx.Graph()
        graph.set_codegen(owner.graph._codegen)
        graph.output(graph.graph_copy(owner.graph, {}))
        return fx.GraphModule(owner, graph)
    versions = {name: buffer._version for name, buffer in owner.named_buffers(recurse=False)}
    with _refusing_side_effects(owner):
        graph = _ShallowTracer().trace(owner)
    for name, buffer in owner.named_buffers(recurse=False):
        if buffer._version != versions.get(name):
            raise UntraceableError(f"it changes the buffer {name}")
    return fx.GraphModule(owner, graph)


def _exported(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    if inputs is None or not all(isinstance(value, Tensor) for value in inputs):
        raise UntraceableError("its forward takes other arguments than tensors")
    if any(True for _ in owner.children()):
        raise UntraceableError("torch.export would dissolve its submodules")
    probe = _stand_in(owner, False)
    with torch.no_grad(), _refusing_side_effects(probe):
        probe(*inputs)
    inputs = tuple(value.clone() for value in inputs)  # a tensor given twice would become one input
    shapes = tuple(dict.fromkeys(range(value.ndim), Dim.AUTO) for value in inputs)
    with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        # Sizes 0 and 1 are sizes like others here.
        program = torch.export.export(owner, inputs, dynamic_shapes=shapes, strict=False)
        unlifted = program.module()
    if not program.call_spec.out_spec.is_leaf():
        raise UntraceableError("its forward returns something else than a tensor")
    _free_dtype(unlifted.graph)
    graph = fx.Graph()
    outputs = graph.graph_copy(unlifted.graph, {})
    graph.output(outputs[0] if isinstance(outputs, tuple | list) else outputs)
    _expect_shapes(graph, program)
    for node in graph.nodes:
        node.meta = {}  # holds what cannot be pickled
    return fx.GraphModule(unlifted, graph)


def _free_dtype(graph: fx.Graph) -> None:
    """Let kernels that the forward makes follow their input's dtype, as they did before the export."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    for node in convolution_nodes(graph):
        arguments = bind_arguments(convolution_name(node.target) or "", node.args, node.kwargs)
        weight = arguments["weight"]
        with graph.inserting_before(node):
            node.replace_input_with(weight, graph.call_method("to", (weight, arguments["input"])))
    graph.eliminate_dead_code()


def _expect_shapes(graph: fx.Graph, program: ExportedProgram) -> None:
    """Put the conditions under which the graph is the forward in the place of torch's own check."""
    check = next((node for node in graph.nodes if node.target == "_guards_fn"), None)
    if check is None:
        raise UntraceableError("torch.export does not say for which sizes the graph holds")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(check):
        names = tuple(str(node.target) for node in placeholders)
        graph.call_function(expect, (tuple(program._guards_code), names, *placeholders))
    graph.erase_node(check)


def _agree(owner: nn.Module, module: nn.Module, inputs: Inputs) -> bool:
    """Does the graph compute in float64 what the forward computes there, if that takes float64 at all?"""
    double = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    with torch.no_grad():
        try:
            expected = duplicate(owner).double()(*double)
        except Exception:  # the user's code
            return True
        actual = duplicate(module).double()(*double)
    eps = max(torch.finfo(value.dtype).eps for value in inputs if value.is_floating_point())
    return float((actual - expected).abs().max()) <= 100 * eps * float(expected.abs().max())
