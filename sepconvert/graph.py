"""Convolution calls inside a module's forward → submodules, by a graph of that forward alone."""

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from sepconvert.errors import first_line
from sepconvert.trace import Inputs, bind_arguments, convolution_name


class UntraceableError(Exception):
    """No graph of the module's forward could be made, or it does not show the calls that were seen."""


class _ShallowTracer(fx.Tracer):
    """Follows one forward and leaves every submodule as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def call_graph(owner: nn.Module, inputs: Inputs | None, calls: int) -> fx.GraphModule:
    """`owner` as a graph in which at least `calls` convolutions of its own forward stand.

    torch.fx keeps submodules and their training mode, and serves unless the forward branches on its
    input's shape or type; then torch.export serves, which fixes the branches taken.

    Raises:
        UntraceableError: neither can trace the forward.
    """
    reasons = []
    for tracer in (_symbolic, _exported):
        try:
            module = tracer(owner, inputs)
        except Exception as error:  # tracing runs the user's code on stand-ins, which may raise anything
            reasons.append(first_line(error))
            continue
        if len(convolution_nodes(module.graph)) >= calls:
            return module
        reasons.append("a convolution is missing from the graph")
    raise UntraceableError("; ".join(reasons))


def replace_calls(
    module: fx.GraphModule, replacements: Mapping[int, nn.Module], names: Mapping[int, str]
) -> None:
    """Let a submodule take the place of each convolution call, by its position among all calls. In place."""
    nodes = convolution_nodes(module.graph)
    for index, replacement in replacements.items():
        node = nodes[index]
        arguments = bind_arguments(_function(node), node.args, node.kwargs)
        module.add_submodule(names[index], replacement)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(names[index], (arguments["input"],))
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def convolution_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The convolution calls of a forward, in order."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and convolution_name(node.target) is not None
    ]


def _function(node: fx.Node) -> str:
    return convolution_name(node.target) or ""


def _symbolic(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    if isinstance(owner, fx.GraphModule):
        graph = fx.Graph()
        graph.set_codegen(owner.graph._codegen)
        graph.output(graph.graph_copy(owner.graph, {}))
    else:
        graph = _ShallowTracer().trace(owner)
    module = fx.GraphModule(owner, graph, type(owner).__name__)
    for name, value in vars(owner).items():  # attributes that other modules may read
        if not name.startswith("_") and name not in vars(module):
            setattr(module, name, value)
    return module


def _exported(owner: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    if inputs is None or not all(isinstance(value, Tensor) for value in inputs):
        raise UntraceableError("its forward takes other arguments than tensors")
    if any(True for _ in owner.children()):
        raise UntraceableError("torch.export would dissolve its submodules")
    # Size one would be taken for a constant.
    wide = tuple(
        torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value for value in inputs
    )
    shapes = tuple(dict.fromkeys(range(value.ndim), Dim.AUTO) for value in wide)
    program = torch.export.export(owner, wide, dynamic_shapes=shapes, strict=False)
    unlifted = program.module()
    graph = fx.Graph()
    outputs = graph.graph_copy(unlifted.graph, {})
    if not (isinstance(outputs, tuple | list) and len(outputs) == 1):
        raise UntraceableError("its forward returns more than one tensor")
    graph.output(outputs[0])
    for node in list(graph.nodes):
        if node.target == "_guards_fn":
            graph.erase_node(node)
    _check_shapes(graph, program)
    for node in graph.nodes:
        node.meta = {}  # holds what cannot be pickled
    return fx.GraphModule(unlifted, graph, type(owner).__name__)


def _check_shapes(graph: fx.Graph, program: torch.export.ExportedProgram) -> None:
    """Refuse inputs for which the forward might have taken another branch than the exported one."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    user_inputs = set(program.graph_signature.user_inputs)
    exported = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in user_inputs
    ]
    after_inputs = placeholders[-1].next
    for node, value in zip(placeholders, exported, strict=True):
        for axis, size in enumerate(value.shape):
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            lowest = size if isinstance(size, int) else int(bounds.lower) if bounds is not None else 0
            relation = operator.eq if isinstance(size, int) else operator.ge
            with graph.inserting_before(after_inputs):
                actual = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                holds = graph.call_function(relation, (actual, lowest))
                sign = "==" if isinstance(size, int) else ">="
                graph.call_function(
                    torch._assert, (holds, f"axis {axis} of {node.name}: expected size {sign} {lowest}")
                )
