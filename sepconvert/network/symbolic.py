"""Graphs of a module's forward, by symbolic tracing or by torch.export."""

import copy
import functools
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from sepconvert.base.modules import unshadowed
from sepconvert.network.calls import bind_arguments, convolution_name
from sepconvert.network.copies import duplicate
from sepconvert.network.tensors import Inputs, fresh

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


_CONSTANT = "_tensor_constant"  # the name that torch.fx gives to tensors made in a forward


class UntraceableError(Exception):
    """Raised if no graph of a forward can be made, or if the graph lacks calls that were seen."""


class _ShallowTracer(fx.Tracer):
    """Traces one forward; calls of submodules stay calls."""

    def __init__(self) -> None:
        super().__init__()
        self._settings = _settings()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Trace buffers as well: what a forward computes from them would be a constant otherwise."""
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in unshadowed(self.root).named_buffers():
                if buffer is attr_val:
                    if name not in parameter_proxy_cache:
                        parameter_proxy_cache[name] = self.create_proxy(
                            "get_attr", name, (), {}, proxy_factory_fn=partial(_BufferProxy, self, buffer)
                        )
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse operations under other settings than those of the trace, since a graph has no settings."""
        if _settings() != self._settings:
            raise UntraceableError("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True: no submodule is traced."""
        return True


class _BufferProxy(fx.Proxy):
    """Stands for a buffer, whose shape is a constant: a forward may loop over the taps of a kernel."""

    def __init__(self, tracer: fx.Tracer, buffer: Tensor, node: fx.Node) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = buffer.shape, buffer.ndim
        self.size, self.dim, self.numel = buffer.size, buffer.dim, buffer.numel

    def __len__(self) -> int:
        return self.shape[0]


def _settings() -> tuple[bool, ...]:
    """Return the settings of context managers that operations obey: gradients, inference mode, autocast."""
    autocast = map(torch.is_autocast_enabled, _autocasting())
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _autocasting() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for device in _autocasting():
            stack.enter_context(torch.autocast(device, enabled=enabled))
        yield


def convolution_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the convolution calls of a forward, in order."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and convolution_name(node.target) is not None
    ]


def node_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a convolution node by parameter name, without those left to their defaults."""
    return bind_arguments(convolution_name(node.target) or "", node.args, node.kwargs)


def expect(conditions: tuple[str, ...], names: tuple[str, ...], *tensors: Tensor) -> None:
    """Refuse inputs for which a forward might have taken another branch than the one in its graph.

    Args:
        conditions: guards of torch.export, as Python expressions.
        names: of the forward's inputs.
        tensors: the inputs.

    Raises:
        ValueError: with the condition that does not hold, such as `x.size()[3] >= 11`.
    """
    values = {"L": dict(zip(names, tensors, strict=True)), "math": math, **SYMPY_INTERP}
    for condition in conditions:
        if not eval(condition, values):  # noqa: S307  (torch.export wrote them)
            readable = functools.reduce(
                lambda text, name: text.replace(f"L['{name}']", name), names, condition
            )
            raise ValueError(f"the converted forward only serves inputs with {readable}")


def stand_in(owner: nn.Module, training: bool) -> nn.Module:
    """Return a shallow copy without hooks, whose forward may set attributes, fill lists and write buffers."""
    copied = type(owner).__new__(type(owner))
    vars(copied).update(vars(owner))  # not copy.copy, which parametrised modules refuse
    vars(copied).update({name: copy.copy(value) for name, value in _containers(owner).items()})
    buffers = {name: None if value is None else value.clone() for name, value in owner._buffers.items()}
    vars(copied).update(_buffers=buffers, training=training)
    vars(copied).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    return copied


@contextmanager
def _refusing_side_effects(owner: nn.Module) -> Iterator[None]:
    """Raise `UntraceableError` if attributes are set or filled in here, for a graph would not do so."""
    before = dict(vars(owner))
    items = {name: _identities(value) for name, value in _containers(owner).items()}
    yield
    for name, held in items.items():
        if held != _identities(vars(owner)[name]):
            raise UntraceableError(f"it changes what the attribute {name} holds")
    for name, value in vars(owner).items():
        if value is not before.get(name) and not name.startswith(_CONSTANT):
            raise UntraceableError(f"it sets the attribute {name}")


def _containers(owner: nn.Module) -> dict[str, Any]:
    """Return the lists, dictionaries and sets that are attributes of a module, other than torch's own."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, list | dict | set | deque) and name not in _MODULE_ATTRIBUTES
    }


def _identities(container: Any) -> list[int]:
    """Return the identities of a container's values, which may be tensors."""
    return list(map(id, container.values() if isinstance(container, dict) else container))


def symbolic_graph(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    """Return the forward of `owner` as torch.fx traces it, for inputs of any size.

    Raises:
        UntraceableError: the forward has effects that a graph does not have. Torch raises its own errors.
    """
    if isinstance(owner, fx.GraphModule):
        graph = fx.Graph()
        graph.set_codegen(owner.graph._codegen)
        graph.output(graph.graph_copy(owner.graph, {}))
        return fx.GraphModule(owner, graph)
    versions = {name: buffer._version for name, buffer in unshadowed(owner).named_buffers(recurse=False)}
    state = torch.get_rng_state()
    with _refusing_side_effects(owner):
        for on in (True, False):  # a forward that sets one of them differs from one of the two
            with torch.set_grad_enabled(on), _autocast(on):
                graph = _ShallowTracer().trace(owner)
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        raise UntraceableError("it draws random numbers that do not depend on its input")
    for name, buffer in unshadowed(owner).named_buffers(recurse=False):
        if buffer._version != versions.get(name):
            raise UntraceableError(f"it changes the buffer {name}")
    return fx.GraphModule(owner, graph)


def exported_graph(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    """Return the forward of `owner` as torch.export traces it, for inputs that take the same branches.

    Raises:
        UntraceableError: the forward cannot be exported alone, or has effects that a graph does not have.
            Torch raises its own errors.
    """
    if inputs is None or not all(isinstance(value, Tensor) for value in inputs):
        raise UntraceableError("its forward takes other arguments than tensors")
    if any(child is not None for child in owner._modules.values()):
        raise UntraceableError("torch.export would dissolve its submodules")
    probe = stand_in(owner, False)
    with torch.no_grad(), _refusing_side_effects(probe):
        probe(*fresh(inputs))
    inputs = fresh(inputs)  # a tensor given twice would become one input
    shapes = tuple(dict.fromkeys(range(value.ndim), Dim.AUTO) for value in inputs)
    with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        # Sizes 0 and 1 are sizes like others here.
        program = torch.export.export(unshadowed(owner), inputs, dynamic_shapes=shapes, strict=False)
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
    """Cast kernels that the forward makes to their input's dtype, as the forward did before the export."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    for node in convolution_nodes(graph):
        arguments = node_arguments(node)
        weight = arguments["weight"]
        with graph.inserting_before(node):
            node.replace_input_with(weight, graph.call_method("to", (weight, arguments["input"])))
    graph.eliminate_dead_code()


def _expect_shapes(graph: fx.Graph, program: ExportedProgram) -> None:
    """Replace torch's own check of the inputs by `expect`, with the conditions of the graph."""
    if not hasattr(program, "_guards_code"):
        raise UntraceableError(
            "torch.export says for which sizes the graph holds only in torch 2.9 and newer"
        )
    check = next((node for node in graph.nodes if node.target == "_guards_fn"), None)
    if check is None:
        raise UntraceableError("torch.export does not say for which sizes the graph holds")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(check):
        names = tuple(str(node.target) for node in placeholders)
        graph.call_function(expect, (tuple(program._guards_code), names, *placeholders))
    graph.erase_node(check)


def agree(owner: nn.Module, module: nn.Module, inputs: Inputs) -> bool:
    """Tell whether graph and forward compute the same in float64; True if the forward does not take it."""
    double = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    with torch.no_grad():
        try:
            expected = _in_double(owner)(*fresh(double))
        except Exception:  # the user's code
            return True
        actual = _in_double(module)(*double)
    eps = max(torch.finfo(value.dtype).eps for value in inputs if value.is_floating_point())
    return float((actual - expected).abs().max()) <= 100 * eps * float(expected.abs().max())


def _in_double(module: nn.Module) -> nn.Module:
    return unshadowed(duplicate(module)).double()
