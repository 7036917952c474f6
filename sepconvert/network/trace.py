"""Finding of every convolution that a model's forward pass executes, functional ones included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import TransformType
from torch.nn.modules.conv import _ConvNd

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import modules, named_modules, unshadowed
from sepconvert.factorize.geometry import ConvSpec, Pair
from sepconvert.network.calls import (
    Call,
    ConvolutionInterceptor,
    Frame,
    HiddenConvolutions,
    OtherOperator,
    Place,
    geometry,
    is_plain,
    layer_input,
    same_values,
)
from sepconvert.network.copies import private_copy
from sepconvert.network.layers import Conv, ListedConvolution
from sepconvert.network.tensors import Inputs, fresh, random_like, tensors_in


@dataclass(frozen=True)
class DenseConv:
    """A plain two-dimensional convolution and its input in the model, as copies on the CPU."""

    spec: ConvSpec
    weight: Tensor  # O × C/g × kh × kw, detached
    bias: Tensor | None  # O
    inputs: Tensor  # N × C × H × W or C × H × W, of the first call
    device: torch.device  # of the weight in the model


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a model: a module, or a call to a convolution function in a module's forward.

    `name` is the module's path; a functional convolution is named after the module whose forward
    calls it, and its position among that forward's own convolutions: `layer1.0.aa.conv2d_0`.

    `sizes` holds the height and width of every image that is convolved for one sample: one per call, or
    several where the sample is cut into images that a call convolves as a batch.
    """

    name: str
    aliases: tuple[str, ...]  # further paths of the same (shared) module
    kind: str  # class name, or "functional conv2d"
    owner: str  # path of the module to replace, or of the one whose forward is rewritten
    index: int | None  # position among the calls of the owner's forward; None if the owner is the convolution
    calls: int  # in one forward pass
    sizes: tuple[Pair, ...]  # of the input
    macs: int  # of one sample
    params: int  # 0 for fixed filters, which are buffers or constants
    frozen: frozenset[str]  # "weight" and "bias", as far as they require no gradient
    conv: DenseConv | None  # None if it is not a plain two-dimensional convolution
    owner_inputs: Inputs | None  # arguments of the owner's forward; None if it takes keyword arguments
    obstacle: str | None  # why it cannot be replaced, whatever its kernel
    is_convolution: bool = True  # or perhaps something else, made of the same operator
    labels: tuple[str, ...] = ()  # further names that it is selected by

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it is selected by."""
        return (self.name, *self.labels)

    @property
    def place(self) -> Place:
        """Place by which `ConvolutionInterceptor` reports a call of this convolution."""
        return self.owner, self.index or 0

    @property
    def dense(self) -> DenseConv:
        """The plain convolution of a layer that has one, as every layer that is replaced does.

        Raises:
            ValueError: it is another kind of convolution.
        """
        if self.conv is None:
            raise ValueError(f"{self.name} is no plain two-dimensional convolution")
        return self.conv


@dataclass(frozen=True)
class TracedModel:
    """A model, the inputs that it was run on, and all its convolutions in order of execution.

    This is what convolutions are found in and replaced in. Nothing that takes one changes the model.
    """

    model: nn.Module  # in any mode
    inputs: Inputs  # positional arguments of its forward, with batch dimension
    sites: tuple[ConvSite, ...]


def traced(model: nn.Module, inputs: Inputs) -> TracedModel:
    """Return `model` with its convolutions, as `trace` finds them in a private copy.

    Raises:
        SepconvertError: the model is TorchScript or quantised, or its forward pass fails on these inputs.
    """
    return TracedModel(model, inputs, trace(private_copy(model), inputs))


@dataclass
class _Record:
    """A convolution call that was made, and how its module used it."""

    call: Call
    output: Tensor
    module_inputs: Inputs | None
    reads_module_input: bool = False
    returns_output: bool = False


@dataclass(frozen=True)
class _Hidden:
    """A module of which some convolutions cannot be followed, a kind for them, and the reason."""

    module: nn.Module
    kind: str
    obstacle: str


@dataclass(frozen=True)
class _Found:
    """Convolutions of one forward pass: calls that were followed, and others, by path of their modules."""

    records: list[_Record]
    hidden: Mapping[str, _Hidden]
    others: Sequence[OtherOperator]


def trace(model: nn.Module, inputs: Inputs) -> tuple[ConvSite, ...]:
    """Find every convolution of `model`, executed or not, in order of execution.

    Args:
        model: a private copy in eval mode (`private_copy`): a forward pass may change its buffers.
        inputs: positional arguments of its forward, with batch dimension.

    Raises:
        SepconvertError: the model is TorchScript or quantised, or its forward pass fails on these inputs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise SepconvertError(
            "the model is TorchScript, whose layers cannot be replaced; pass the module that was scripted"
        )
    if (found := _quantised(model)) is not None:
        raise SepconvertError(
            f"the model is quantised ({found}), and factors need kernels in floating point; convert the "
            "model before it is quantised, and quantise the result"
        )
    seen = _run(model, inputs)
    # One entry for a layer of which some calls are followed and some are not.
    records = [
        record
        for record in seen.records
        if not (isinstance(record.call.module, _ConvNd) and record.call.place[0] in seen.hidden)
    ]
    # Weights that the forward pass computes from its input differ on another input, or another batch.
    variable = _variable_weights(model, records, inputs)
    names = _names(model)
    batch = next((value.shape[0] for value in tensors_in(inputs) if value.ndim > 0), 1)
    grouped: dict[Place, list[_Record]] = {}
    for record in records:
        grouped.setdefault(record.call.place, []).append(record)
    sites = _without_ties(
        [
            (_site(calls, names, max(batch, 1), variable), calls[0].call.arguments["weight"])
            for calls in grouped.values()
        ]
    )
    for each in seen.hidden.values():
        sites.append(_unseen(each.module, names[id(each.module)], each.kind, each.obstacle))
    sites += [_other_site(other, names, max(batch, 1)) for other in seen.others]
    # By their weights too: `conv.forward(x)` is a call by the module that makes it.
    executed = {id(each.module) for each in seen.hidden.values()} | {id(each.module) for each in seen.others}
    executed |= {id(record.call.module) for record in records}
    executed |= {id(record.call.arguments["weight"]) for record in records}
    for module in modules(model):
        if isinstance(module, _ConvNd) and executed.isdisjoint((id(module), id(module.weight))):
            sites.append(
                _unseen(module, names[id(module)], type(module).__name__, "not executed on these inputs")
            )
    for module in modules(model):
        if isinstance(module, ListedConvolution):
            listed = _unseen(module, names[id(module)], module.operator, module.obstacle)
            sites.append(replace(listed, macs=module.macs, params=module.params))
    return tuple(sites)


def _run(model: nn.Module, inputs: Inputs) -> _Found:
    """Run the model; return the calls that were followed, and the modules that make others."""
    records: list[_Record] = []
    hidden: dict[str, _Hidden] = {}

    def on_call(call: Call) -> Tensor:
        output = call.run()
        if (transform := torch._C._functorch.peek_interpreter_stack()) is not None:
            if transform.key() in (TransformType.Grad, TransformType.Jvp):
                raise SepconvertError(
                    "the model's forward differentiates a convolution (torch.func), which torch's exporters "
                    "cannot translate; convert the part that is differentiated, and put it back"
                )
            is_module = isinstance(call.module, _ConvNd)
            kind = type(call.module).__name__ if is_module else f"functional {call.function}"
            reason = "it runs under a transform of torch.func, such as vmap"
            hidden[call.place[0]] = _Hidden(call.module, kind, reason)
            return output
        frame = interceptor.frames[-1]
        reads = any(call.arguments.get("input") is value for value in frame.inputs)
        module_inputs = None if frame.kwargs else frame.inputs
        records.append(_Record(call, output, module_inputs, reads_module_input=reads))
        return output

    def on_return(frame: Frame, output: Any) -> None:
        if frame.calls:
            records_of_call = [record for record in records if record.call.module is frame.module]
            if records_of_call:  # or the call failed
                records_of_call[-1].returns_output = output is records_of_call[-1].output

    interceptor = ConvolutionInterceptor(model, on_call)
    outside = HiddenConvolutions(interceptor)
    with torch.no_grad(), outside, interceptor.watching(on_return):
        try:
            model(*fresh(inputs))
        except SepconvertError:
            raise
        except Exception as error:  # the model's own code may raise anything
            raise _failed(inputs, error) from error
    for path, (module, count) in outside.count.items():
        reason = f"{count} convolutions run outside Python"
        hidden[path] = _Hidden(module, "TorchScript or C++", reason)
    return _Found(records, hidden, list(outside.others.values()))


def _failed(inputs: Inputs, error: Exception) -> SepconvertError:
    shapes = ", ".join("x".join(map(str, value.shape)) for value in tensors_in(inputs))
    reason = first_line(error)
    advice = (
        "the command line gives a model one tensor; pass a tuple of all its inputs in Python"
        if isinstance(error, TypeError) and "missing" in reason
        else "check the input's shape"
    )
    return SepconvertError(f"the model's forward pass failed on input {shapes}: {reason}; {advice}")


def _quantised(model: nn.Module) -> str | None:
    """Describe the first part of a model that torch.ao or torchao has quantised; None if there is none."""
    for name, module in named_modules(model):
        kind = type(module)
        if ".quantized." in f"{kind.__module__}.":
            return f"{name or 'the model'} is {kind.__module__.partition('.modules')[0]}.{kind.__name__}"
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is None:
                continue
            if tensor.is_quantized or type(tensor).__module__.startswith("torchao."):
                return f"{name}.{key}".lstrip(".") + f" is a {type(tensor).__name__} of integers"
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if "quantized_decomposed" in str(node.target):
                    return f"{node.target} in its graph"
    return None


def _variable_weights(model: nn.Module, records: list[_Record], inputs: Inputs) -> set[Place]:
    """Return the places of calls whose weight or bias differs on other inputs."""
    try:
        others = _run(model, random_like(inputs, 1)).records
    except SepconvertError:  # a model of fixed batch size, or with inputs that are not all batches
        others = _run(model, random_like(inputs, 0)).records
    seen = {record.call.place: record.call for record in others}
    calls = (record.call for record in records if record.call.place in seen)
    return {call.place for call in calls if not call.same_kernel(seen[call.place])}


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Return all paths of each module, by its identity."""
    names: dict[int, list[str]] = {}
    for name, module in named_modules(model, duplicates=True):
        names.setdefault(id(module), []).append(name)
    return names


def _site(
    records: list[_Record], names: Mapping[int, list[str]], batch: int, variable: set[Place]
) -> ConvSite:
    first, calls = records[0], [record.call for record in records]
    call, module = first.call, first.call.module
    weight, bias = call.arguments["weight"], call.arguments.get("bias")
    owner, *others = names[id(module)]
    is_module = isinstance(module, _ConvNd)
    suffix = "" if is_module else f"{'.' if owner else ''}{call.name}"
    # A parametrised module has other parameters than its weight.
    trained = tuple(unshadowed(module).parameters()) if is_module else (weight, bias)
    spec, obstacle = geometry(call)
    conv = None
    if spec is not None:
        conv = DenseConv(
            spec,
            weight.detach().cpu(),
            None if bias is None else bias.detach().cpu(),
            layer_input(call, spec).detach().cpu(),
            weight.device,
        )
    return ConvSite(
        name=f"{owner}{suffix}",
        aliases=tuple(
            f"{other}{'.' if other else ''}{suffix.lstrip('.')}" if suffix else other for other in others
        ),
        kind=type(module).__name__ if is_module else f"functional {call.function}",
        owner=owner,
        index=None if is_module else call.place[1],
        calls=len(calls),
        sizes=tuple(size for each in calls for size in _sizes(each, spec, batch)),
        macs=sum(record.call.macs(record.output) for record in records) // batch,
        params=sum(value.numel() for value in trained if isinstance(value, nn.Parameter)),
        frozen=_frozen(module if is_module else None, weight, bias),
        conv=conv,
        owner_inputs=None if is_module else first.module_inputs,
        labels=module.labels if isinstance(module, Conv) else (),
        obstacle=obstacle or _obstacle(records, spec, computed=call.place in variable),
    )


def _obstacle(records: list[_Record], spec: ConvSpec | None, *, computed: bool) -> str | None:
    """Reason not to replace a plain convolution, by how it is called; None if there is none."""
    first, calls = records[0], [record.call for record in records]
    if not bool(torch.isfinite(first.call.arguments["weight"]).all()):
        return "its kernel holds NaN or Inf"
    if not all(call.same_kernel(first.call) for call in calls):
        return "it is called with different kernels or biases"
    if any(geometry(call)[0] != spec for call in calls):
        return "it is called with different geometries"
    if computed:
        return "its kernel or bias is computed from the input"
    if isinstance(first.call.module, _ConvNd) and not is_plain(first.call.module):
        return _own_forward_obstacle(first)
    return None


def _frozen(module: nn.Module | None, weight: Tensor, bias: Tensor | None) -> frozenset[str]:
    """Return which of weight and bias require no gradient; an absent bias goes with the weight.

    The parameters of a module decide, which may be parametrised; without a module, the tensors themselves.
    """
    trained = {"weight": weight.requires_grad, "bias": (weight if bias is None else bias).requires_grad}
    if module is not None:
        named = list(unshadowed(module).named_parameters())
        of_bias = {name for name, _ in named if name.removeprefix("parametrizations.").startswith("bias")}
        weights = [parameter for name, parameter in named if name not in of_bias]
        biases = [parameter for name, parameter in named if name in of_bias]
        trained["weight"] = any(parameter.requires_grad for parameter in weights)
        trained["bias"] = any(parameter.requires_grad for parameter in biases or weights)
    return frozenset(name for name, is_trained in trained.items() if not is_trained)


def _without_ties(sites: list[tuple[ConvSite, Tensor]]) -> list[ConvSite]:
    """Give convolutions that share a parameter an obstacle: separate factors would untie them in training."""
    untied = []
    for site, weight in sites:
        others = [other.name for other, tensor in sites if tensor is weight and other is not site]
        if others and isinstance(weight, nn.Parameter) and site.obstacle is None:
            reason = (
                f"its kernel is a parameter shared with {', '.join(others)}, which conversion would untie"
            )
            site = replace(site, obstacle=reason)
        untied.append(site)
    return untied


def _unseen(module: nn.Module, names: list[str], kind: str, obstacle: str) -> ConvSite:
    """Return the entry for a module whose convolutions were not followed."""
    params = sum(parameter.numel() for parameter in module._parameters.values() if parameter is not None)
    return ConvSite(
        name=names[0],
        aliases=tuple(names[1:]),
        kind=kind,
        owner=names[0],
        index=None,
        calls=0,
        sizes=(),
        macs=0,
        params=params,
        frozen=frozenset(),
        conv=None,
        owner_inputs=None,
        obstacle=obstacle,
    )


def _other_site(other: OtherOperator, names: Mapping[int, list[str]], batch: int) -> ConvSite:
    """Return the entry for an operator that no convolution function of torch has called."""
    paths, kind = names[id(other.module)], f"functional {other.function}"
    if other.is_module:
        kind = type(other.module).__name__
    else:
        paths = [f"{path}.{other.name}".lstrip(".") for path in paths]
    return replace(
        _unseen(other.module, paths, kind, other.obstacle),
        owner=other.path,
        calls=other.calls,
        macs=other.macs // batch,
        params=other.params,
        is_convolution=other.convolves,
    )


def _sizes(call: Call, spec: ConvSpec | None, batch: int) -> tuple[Pair, ...]:
    """Return the input size, once for each image that the call convolves for one sample."""
    if spec is None:
        return ()
    inputs = layer_input(call, spec)
    images = inputs.shape[0] if inputs.ndim == 4 else 1
    return ((inputs.shape[-2], inputs.shape[-1]),) * max(images // batch, 1)


def _own_forward_obstacle(record: _Record) -> str | None:
    """Return None if a subclass with a forward of its own is seen to do nothing but convolve its input."""
    call, spec = record.call, record.call.spec
    cls = f"{type(call.module).__module__}.{type(call.module).__name__}"
    reason = f"the forward of {cls} does more than convolve its input"
    if call.place[1] != 0 or not (record.reads_module_input and record.returns_output):
        return reason
    # Padding by the size of the input may have been nothing at the size seen so far.
    inputs, weight = call.arguments["input"], call.arguments["weight"]
    module = private_copy(call.module)
    for extra in range(4):
        size = [spec.dilation[axis] * spec.kernel_size[axis] + 4 + extra for axis in (0, 1)]
        try:
            seen = _run(module, (inputs.new_zeros(*inputs.shape[:-2], *size),)).records
        except SepconvertError:  # it takes other arguments too
            return reason
        if len(seen) != 1 or not (seen[0].reads_module_input and seen[0].returns_output):
            return reason
        if geometry(replace(seen[0].call, module=call.module)) != geometry(call):
            return reason
        if not same_values(seen[0].call.arguments["weight"], weight):
            return reason
    return None
