"""Model and inputs → every convolution that the forward pass executes, functional ones included."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import TransformType
from torch.nn.modules.conv import _ConvNd

from sepconvert.base.errors import SepconvertError
from sepconvert.factorize.geometry import ConvSpec, PaddingMode, Pair
from sepconvert.network.calls import ConvolutionInterceptor, Frame, HiddenConvolutions
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, floating, fresh, tensors_in


@dataclass(frozen=True)
class DenseConv:
    """A plain two-dimensional convolution, with the input that it had in the model: copies on the CPU."""

    spec: ConvSpec
    weight: Tensor  # O × C/g × kh × kw, detached
    bias: Tensor | None  # O
    inputs: Tensor  # N × C × H × W or C × H × W, of the first call
    device: torch.device  # on which the model holds them


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a model: a module, or a call to a convolution function in a module's forward.

    `name` is the module's path; a functional convolution is named after the module whose forward
    calls it, and its position among that forward's own convolutions: `layer1.0.aa.conv2d_0`.
    """

    name: str
    aliases: tuple[str, ...]  # further paths of the same (shared) module
    kind: str  # class name, or "functional conv2d"
    owner: str  # path of the module to replace or to rewrite
    index: int | None  # position among the owner's own calls; None where the owner is the convolution
    calls: int  # in one forward pass
    sizes: tuple[
        Pair, ...
    ]  # height and width of the input, for each image that the calls convolve for a sample
    macs: int  # of one sample
    params: int  # 0 for fixed filters, which are buffers or constants
    frozen: frozenset[str]  # "weight", "bias": what requires no gradient
    conv: DenseConv | None  # None where it is not a plain two-dimensional convolution
    owner_inputs: Inputs | None  # positional arguments of the owner's forward; None if it takes others too
    obstacle: str | None  # why it cannot be replaced, whatever its kernel

    @property
    def place(self) -> tuple[str, int]:
        """What `ConvolutionInterceptor` knows a call by: path of the owner, position among its calls."""
        return self.owner, self.index or 0

    @property
    def dense(self) -> DenseConv:
        """The plain convolution, where there is one, as in every layer that is replaced.

        Raises:
            ValueError: it is another kind.
        """
        if self.conv is None:
            raise ValueError(f"{self.name} is no plain two-dimensional convolution")
        return self.conv


@dataclass
class _Record:
    """What one convolution call was seen to do."""

    module: nn.Module
    index: int
    function: str
    arguments: dict[str, Any]
    output: Tensor
    module_inputs: Inputs | None
    reads_module_input: bool = False
    returns_output: bool = False


def trace(model: nn.Module, inputs: Inputs) -> tuple[ConvSite, ...]:
    """Find every convolution of `model`, executed or not, in order of execution.

    Args:
        model: a private copy in eval mode (`private_copy`): a forward pass may change its buffers.
        inputs: positional arguments of its forward, with batch dimension.

    Raises:
        SepconvertError: the model is quantised, or its forward pass fails on these inputs.
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
    records, hidden = _run(model, inputs)
    # One entry for a layer of which some calls are followed and some are not.
    records = [each for each in records if not (isinstance(each.module, _ConvNd) and each.module in hidden)]
    # Weights that the forward pass computes from its input differ on another input, or another batch.
    variable = _variable_weights(model, records, inputs)
    names = _names(model)
    batch = next((value.shape[0] for value in tensors_in(inputs) if value.ndim > 0), 1)
    grouped: dict[tuple[int, int], list[_Record]] = {}
    for record in records:
        grouped.setdefault((id(record.module), record.index), []).append(record)
    sites = _without_ties(
        [
            (_site(calls, names, max(batch, 1), variable), calls[0].arguments["weight"])
            for calls in grouped.values()
        ]
    )
    for module, (kind, obstacle) in hidden.items():
        sites.append(_unseen(module, names[id(module)], kind, obstacle))
    # By their weights too: `conv.forward(x)` is a call by the module that makes it.
    executed = {id(record.module) for record in records} | {id(r.arguments["weight"]) for r in records}
    executed |= set(map(id, hidden))
    for module in model.modules():
        if isinstance(module, _ConvNd) and executed.isdisjoint((id(module), id(module.weight))):
            sites.append(
                _unseen(module, names[id(module)], type(module).__name__, "not executed on these inputs")
            )
    return tuple(sites)


def _run(model: nn.Module, inputs: Inputs) -> tuple[list[_Record], dict[nn.Module, tuple[str, str]]]:
    """What was called, and of modules with calls that cannot be followed their kind and why."""
    records: list[_Record] = []
    hidden: dict[nn.Module, tuple[str, str]] = {}

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output = call()
        if (transform := torch._C._functorch.peek_interpreter_stack()) is not None:
            if transform.key() in (TransformType.Grad, TransformType.Jvp):
                raise SepconvertError(
                    "the model's forward differentiates a convolution (torch.func), which torch's exporters "
                    "leave in disorder; convert the part that is differentiated, and put it back"
                )
            kind = type(module).__name__ if isinstance(module, _ConvNd) else f"functional {function}"
            hidden[module] = kind, "it runs under a transform of torch.func, such as vmap"
            return output
        frame = interceptor.frames[-1]
        reads = any(arguments.get("input") is value for value in frame.inputs)
        module_inputs = None if frame.kwargs else frame.inputs
        records.append(
            _Record(module, index, function, arguments, output, module_inputs, reads_module_input=reads)
        )
        return output

    def on_return(frame: Frame, output: Any) -> None:
        if frame.calls:
            records_of_call = [record for record in records if record.module is frame.module]
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
            shapes = ", ".join("x".join(map(str, value.shape)) for value in tensors_in(inputs))
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = (
                "the command line gives a model one tensor; pass a tuple of all its inputs in Python"
                if isinstance(error, TypeError) and "missing" in reason
                else "check the input's shape"
            )
            raise SepconvertError(
                f"the model's forward pass failed on input {shapes}: {reason}; {advice}"
            ) from error
    for module, count in outside.count.items():
        hidden[module] = "TorchScript or C++", f"{count} convolutions run outside Python"
    return records, hidden


def _quantised(model: nn.Module) -> str | None:
    """The first part of a model that is, by torch.ao or torchao; None if none is."""
    for name, module in model.named_modules():
        kind = type(module)
        if ".quantized." in f"{kind.__module__}.":
            return f"{name or 'the model'} is {kind.__module__.partition('.modules')[0]}.{kind.__name__}"
        for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            if tensor.is_quantized or type(tensor).__module__.startswith("torchao."):
                return f"{name}.{key}".lstrip(".") + f" is a {type(tensor).__name__} of integers"
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if "quantized_decomposed" in str(node.target):
                    return f"{node.target} in its graph"
    return None


def _other_inputs(inputs: Inputs, more: int) -> Inputs:
    """Other values, and `more` samples more."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Tensor) -> Tensor:
        shape = (value.shape[0] + more, *value.shape[1:]) if value.ndim else value.shape
        return torch.rand(shape, generator=generator).to(value)

    return floating(other, inputs)


def _variable_weights(model: nn.Module, records: list[_Record], inputs: Inputs) -> set[tuple[int, int]]:
    try:
        others, _ = _run(model, _other_inputs(inputs, 1))
    except SepconvertError:  # a model of fixed batch size, or with inputs that are not all batches
        others, _ = _run(model, _other_inputs(inputs, 0))
    seen = {(id(record.module), record.index): record for record in others}
    return {
        key
        for record in records
        if (key := (id(record.module), record.index)) in seen and not _same_kernel(record, seen[key])
    }


def _same_kernel(a: _Record, b: _Record) -> bool:
    for name in ("weight", "bias"):
        one, other = a.arguments.get(name), b.arguments.get(name)
        if one is not other and (one is None or other is None or not _same(one, other)):
            return False
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _site(
    calls: list[_Record], names: Mapping[int, list[str]], batch: int, variable: set[tuple[int, int]]
) -> ConvSite:
    first = calls[0]
    module, weight = first.module, first.arguments["weight"]
    owner, *others = names[id(module)]
    is_module = isinstance(module, _ConvNd)
    suffix = "" if is_module else f"{'.' if owner else ''}{_call_name(first)}"
    bias = first.arguments.get("bias")
    # A parametrised module has other parameters than its weight.
    trained = tuple(module.parameters()) if is_module else (weight, bias)
    spec, obstacle = _geometry(first)
    if obstacle is None and not bool(torch.isfinite(weight).all()):
        obstacle = "its kernel holds NaN or Inf"
    if obstacle is None and not all(_same_kernel(call, first) for call in calls):
        obstacle = "it is called with different kernels or biases"
    if obstacle is None and any(_geometry(call)[0] != spec for call in calls):
        obstacle = "it is called with different geometries"
    if obstacle is None and (id(module), first.index) in variable:
        obstacle = "its kernel or bias is computed from the input"
    if obstacle is None and is_module and not _plain(module):
        obstacle = _own_forward_obstacle(first)
    return ConvSite(
        name=f"{owner}{suffix}",
        aliases=tuple(
            f"{other}{'.' if other else ''}{suffix.lstrip('.')}" if suffix else other for other in others
        ),
        kind=type(module).__name__ if is_module else f"functional {first.function}",
        owner=owner,
        index=None if is_module else first.index,
        calls=len(calls),
        sizes=tuple(size for call in calls for size in _sizes(call, spec, batch)),
        macs=sum(_macs(call) for call in calls) // batch,
        params=sum(value.numel() for value in trained if isinstance(value, nn.Parameter)),
        frozen=_frozen(module if is_module else None, weight, bias),
        conv=None
        if spec is None
        else DenseConv(
            spec,
            weight.detach().cpu(),
            None if bias is None else bias.detach().cpu(),
            _layer_input(first, spec).detach().cpu(),
            weight.device,
        ),
        owner_inputs=None if is_module else first.module_inputs,
        obstacle=obstacle,
    )


def _frozen(module: nn.Module | None, weight: Tensor, bias: Tensor | None) -> frozenset[str]:
    """Of a module, which may be parametrised, by its parameters; else by the tensors themselves.

    A bias that is none goes with the weight.
    """
    trained = {"weight": weight.requires_grad, "bias": (weight if bias is None else bias).requires_grad}
    if module is not None:
        named = list(module.named_parameters())
        of_bias = {name for name, _ in named if name.removeprefix("parametrizations.").startswith("bias")}
        trained["weight"] = any(each.requires_grad for name, each in named if name not in of_bias)
        biases = [each for name, each in named if name in of_bias]
        trained["bias"] = any(each.requires_grad for each in biases) if biases else trained["weight"]
    return frozenset(name for name, wanted in trained.items() if not wanted)


def _without_ties(sites: list[tuple[ConvSite, Tensor]]) -> list[ConvSite]:
    """Keep convolutions that share a parameter: factors of their own would untie them in training."""
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


def _call_name(record: _Record) -> str:
    """`conv2d_0`, unless an earlier conversion has left a submodule of that name."""
    name = f"{record.function}_{record.index}"
    while hasattr(record.module, name):
        name += "_"
    return name


def _unseen(module: nn.Module, names: list[str], kind: str, obstacle: str) -> ConvSite:
    params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
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


def _plain(module: nn.Module) -> bool:
    """Does it compute what `nn.Conv2d` computes? Parametrised classes do: they only make the weight."""
    cls = type(module)
    return cls.forward is nn.Conv2d.forward and getattr(cls, "_conv_forward", None) is nn.Conv2d._conv_forward


def _geometry(record: _Record) -> tuple[ConvSpec | None, str | None]:
    """Geometry of a two-dimensional convolution, or the reason why there is none."""
    arguments = record.arguments
    weight: Tensor = arguments["weight"]
    if "transpose" in record.function or arguments.get("transposed"):
        return None, "transposed convolutions are not factorised"
    if weight.ndim != 4:
        return None, f"{weight.ndim - 2}-D convolutions are not factorised"
    if not weight.is_floating_point():
        return None, f"kernels of {weight.dtype} are not factorised"
    stride, dilation = _pair(arguments.get("stride", 1)), _pair(arguments.get("dilation", 1))
    module = record.module
    mode: PaddingMode = "zeros"
    padding = arguments.get("padding", 0)
    if isinstance(module, nn.Conv2d) and _plain(module):
        # Seen from outside, a padding mode other than zeros is a call to F.pad.
        mode, padding = module.padding_mode, module.padding
    return ConvSpec(
        in_channels=weight.shape[1] * arguments.get("groups", 1),
        out_channels=weight.shape[0],
        kernel_size=(weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=resolve_padding(padding, (weight.shape[2], weight.shape[3]), dilation),
        dilation=dilation,
        groups=arguments.get("groups", 1),
        padding_mode=mode,
        bias=arguments.get("bias") is not None,
    ), None


def resolve_padding(padding: Any, kernel_size: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """(before, after) per axis. 'same' puts the odd element after, as torch does."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        vertical, horizontal = ((total // 2, total - total // 2) for total in totals)
        return vertical, horizontal
    vertical_padding, horizontal_padding = _pair(padding)
    return (vertical_padding, vertical_padding), (horizontal_padding, horizontal_padding)


def _pair(value: Any) -> Pair:
    """An int, or a sequence of one or two ints, as a pair."""
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def _layer_input(record: _Record, spec: ConvSpec) -> Tensor:
    """The input of the layer: a padding mode other than zeros pads before it calls the convolution."""
    called: Tensor = record.arguments["input"]
    if spec.padding_mode == "zeros":
        return called
    (top, bottom), (left, right) = spec.padding
    return called[..., top : called.shape[-2] - bottom, left : called.shape[-1] - right]


def _sizes(record: _Record, spec: ConvSpec | None, batch: int) -> tuple[Pair, ...]:
    """Input size of one sample, once per image that the call convolves for it."""
    if spec is None:
        return ()
    inputs = _layer_input(record, spec)
    images = inputs.shape[0] if inputs.ndim == 4 else 1
    return ((inputs.shape[-2], inputs.shape[-1]),) * max(images // batch, 1)


def _macs(record: _Record) -> int:
    """Multiply-adds as fvcore counts them: positions of the output (input if transposed) × weights."""
    weight, transposed = record.arguments["weight"], "transpose" in record.function
    positions: Tensor = record.arguments["input"] if transposed else record.output
    dims = weight.ndim - 2
    images = positions.shape[0] if positions.ndim == weight.ndim else 1
    return images * math.prod(positions.shape[-dims:]) * int(weight.numel())


def _own_forward_obstacle(record: _Record) -> str | None:
    """None if a subclass with a forward of its own is seen to do nothing but convolve its input."""
    cls = f"{type(record.module).__module__}.{type(record.module).__name__}"
    reason = f"the forward of {cls} does more than convolve its input"
    if record.index != 0 or not (record.reads_module_input and record.returns_output):
        return reason
    # Padding by the size of the input may have been nothing at the size seen so far.
    inputs, weight = record.arguments["input"], record.arguments["weight"]
    module = private_copy(record.module)
    for extra in range(4):
        size = [
            _pair(record.arguments.get("dilation", 1))[axis] * weight.shape[2 + axis] + 4 + extra
            for axis in (0, 1)
        ]
        try:
            seen, _ = _run(module, (inputs.new_zeros(*inputs.shape[:-2], *size),))
        except SepconvertError:  # it takes other arguments too
            return reason
        if len(seen) != 1 or not (seen[0].reads_module_input and seen[0].returns_output):
            return reason
        if _geometry(replace(seen[0], module=record.module)) != _geometry(record):
            return reason
        if not _same(seen[0].arguments["weight"], weight):
            return reason
    return None
