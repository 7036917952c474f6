"""Names of inputs, outputs and the batch dimension of ONNX files that belong together, and their opset."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.exporting import Export
from sepconvert.network.tensors import Inputs, StandIn, tensors_in

BATCH = "batch"
"""Name of an open batch dimension; independent ones after the first are numbered."""

_INPUT, _OUTPUT = "input", "output"


@dataclass(frozen=True)
class Interface:
    """Names and opset that the ONNX files of an original and of its conversions have in common.

    Attributes:
        inputs: names of the inputs.
        outputs: names of the outputs; None for those that `output_names` finds.
        opset: version of ONNX's operators; None for that of the exporter.
        batch_first: whether the first dimension counts samples, which is left open if the model allows it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] | None = None
    opset: int | None = None
    batch_first: bool = True


def interface_of(
    model: nn.Module, inputs: Inputs, options: Export = Export(), *, batch_first: bool = True
) -> Interface:
    """Return the interface that the files of a model have."""
    names = input_names(model, inputs) if options.input_names is None else tuple(options.input_names)
    outputs = None if options.output_names is None else tuple(options.output_names)
    return Interface(names, outputs, options.opset, batch_first)


def check_interface(interface: Interface, model: nn.Module, inputs: Inputs, outputs: int) -> None:
    """Raise `SepconvertError` unless there is a name for each input and output, and none is a parameter's.

    Args:
        interface: the names.
        model: the model.
        inputs: that it is run on.
        outputs: number of tensors that it returns.
    """
    taken = _names_of_state(model)
    for what, names, count in (
        ("input_names", interface.inputs, len(tensors_in(inputs))),
        ("output_names", interface.outputs, outputs),
    ):
        if names is None:
            continue
        if len(names) != count:
            held = "takes" if what == "input_names" else "returns"
            raise SepconvertError(
                f"`{what}`: the model {held} {count} tensor{'s' * (count != 1)}, got {len(names)} names "
                f"({', '.join(names)}); pass one for each"
            )
        if used := taken & {*names}:
            raise SepconvertError(
                f"`{what}`: {min(used)} is the name of a parameter or buffer of the model; pass another name"
            )


def input_names(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return names for the tensors among the inputs: those of the arguments of the model's forward.

    The tensors of a mapping that is the only argument keep its names, and those of another list or mapping
    are `argument_key`. What has no name, as the arguments behind an asterisk, is `input`, or `input_0`,
    `input_1`, …
    """
    if len(inputs) == 1 and (named := _named_tensors(inputs[0])):
        return _without(tuple(named), _names_of_state(model))
    found = [name for argument, value in _arguments(model, inputs) for name in _names_of(argument, value)]
    count = len(tensors_in(inputs))
    if len(found) != count or len({*found}) != count:
        found = [_INPUT] if count == 1 else [f"{_INPUT}_{index}" for index in range(count)]
    return _without(found, _names_of_state(model))


def output_names(returned: Any, count: int, taken: Collection[str]) -> tuple[str, ...]:
    """Return names for the tensors that a model returns.

    They are the keys of a mapping or the fields of a dataclass of tensors, else `output`, or `output_0`,
    `output_1`, …

    Args:
        returned: what the model returns.
        count: number of tensors in it.
        taken: names of inputs and parameters.
    """
    found = names_in(returned) or ()
    if not found:
        found = (_OUTPUT,) if count == 1 else tuple(f"{_OUTPUT}_{index}" for index in range(count))
    return tuple(f"{name}_out" if name in taken else name for name in found)


def names_in(values: Any) -> tuple[str, ...] | None:
    """Return the keys of a mapping, or the fields of a dataclass, of different tensors; None for others."""
    tensors = _named_tensors(values)
    different = len({id(value) for value in tensors.values()}) == len(tensors)
    return tuple(tensors) if tensors and different else None


def _named_tensors(values: Any) -> Mapping[str, Tensor]:
    """Return a mapping, or the fields of a dataclass, of tensors; empty for others."""
    if is_dataclass(values) and not isinstance(values, type):
        values = {each.name: getattr(values, each.name) for each in fields(values)}
        values = {name: value for name, value in values.items() if value is not None}
    if not isinstance(values, Mapping):
        return {}
    named = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items())
    return values if named else {}


class NamingPass(InPlacePass):
    """Name inputs, outputs, and the open first dimensions of inputs.

    Requires as many names as there are inputs and outputs, all different. Works in place. Ensures that no
    other value bears one of them.
    """

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str], *, batch_first: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.batch_first = inputs, outputs, batch_first

    def call(self, model: ir.Model) -> PassResult:
        """Rename in place."""
        _separate_outputs(model.graph)
        ends = [*model.graph.inputs, *model.graph.outputs]
        names = [*self.inputs, *self.outputs]
        own = {id(value) for value in ends}
        used = {value.name for value in _values(model)}
        for value in list(_values(model)):
            if value.name in names and id(value) not in own:
                value.name = _free(str(value.name), {*used, *names})
                used.add(value.name)
        for value, name in zip(ends, names, strict=True):
            value.name = name
        if self.batch_first:
            _name_batch(model)
        return PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Raise `PostconditionError` if two values have one name, or an end of the graph has another."""
        found = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
        if found != [*self.inputs, *self.outputs]:
            raise PostconditionError(f"inputs and outputs are called {found}")
        counts = Counter(value.name for value in _values(model))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise PostconditionError(f"several values are called {', '.join(sorted(map(str, twice)))}")


def _separate_outputs(graph: ir.Graph) -> None:
    """Copy, by an operator, what is an output twice, or an input or constant too: it takes another name."""
    taken = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for index, value in enumerate(graph.outputs):
        if id(value) in taken:
            copied = ir.Node("", "Identity", [value])
            graph.append(copied)
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
            copied.outputs[0].name = _free(str(value.name), {value.name})
            graph.outputs[index] = copied.outputs[0]
        taken.add(id(value))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield each value of the main graph once: what it takes, holds and computes."""
    seen = set[int]()
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        if value.name and id(value) not in seen:
            seen.add(id(value))
            yield value


def _name_batch(model: ir.Model) -> None:
    """Name the open first dimensions of inputs wherever they occur, also within products such as 2*s0."""
    symbols = dict[str, str]()
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, ir.SymbolicDim) and first.value is not None and first.value not in symbols:
            symbols[first.value] = f"{BATCH}_{len(symbols) + 1}" if symbols else BATCH
    if not symbols:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in _values(model):
        if value.shape is None or value.shape.is_static():
            continue
        # A new shape, since those of some values are frozen.
        value.shape = ir.Shape(
            pattern.sub(lambda found: symbols[found[1]], size.value)
            if isinstance(size, ir.SymbolicDim) and size.value is not None
            else size
            for size in value.shape
        )


def _free(name: str, taken: set[Any]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _without(names: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    """Return names of inputs that no parameter has: both would be values of one graph."""
    return tuple(f"{_INPUT}_{name}" if name in taken else name for name in names)


def _names_of_state(model: nn.Module) -> set[str]:
    plain = unshadowed(model)
    return {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}


def _arguments(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Yield the inputs with the names of the arguments of a forward; of those that have none, nothing."""
    while isinstance(model, StandIn):
        model = model.stands_for
    forward: Callable[..., Any] = model.forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # a forward in C++
        return
    positional = [
        each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    for parameter, value in zip(positional, inputs, strict=False):
        yield parameter.name, value


def _names_of(argument: str, value: Any) -> list[str]:
    """Return names of the tensors in the value of an argument."""
    if isinstance(value, Tensor):
        return [argument]
    keys = tuple(_named_tensors(value)) or range(len(tensors_in(value)))
    return [f"{argument}_{key}" for key in keys]
