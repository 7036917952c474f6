"""Merging of two convolutions with nothing in between into the one dense convolution that equals both."""

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import put, submodule
from sepconvert.factorize.geometry import ConvSpec, Pair
from sepconvert.network.calls import resolve_padding
from sepconvert.network.copies import duplicate, private_copy
from sepconvert.network.tensors import fresh
from sepconvert.network.trace import ConvSite, DenseConv, TracedModel

M = TypeVar("M", bound=nn.Module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class LinearPair:
    """Two convolutions of which the second is the only reader of the first's output, unchanged."""

    first: ConvSite
    second: ConvSite


def linear_pairs(traced: TracedModel) -> tuple[LinearPair, ...]:
    """Return the pairs of convolutions between which nothing happens, in order of execution.

    The model, left as it is, is run on its inputs: nothing but the second convolution may take the first's
    output, ask for its shape, or keep it (as a container of features does, or a model that returns it).
    Modules that return their input itself may lie between, such as `nn.Identity`, and dropout in eval mode.

    Both must be plain `nn.Conv2d` under one name, called once, without hooks, which would see the output
    that is gone, and the same parameters of both must be frozen.
    """
    model = private_copy(traced.model)
    candidates = {submodule(model, site.owner): site for site in traced.sites if _is_plain(model, site)}
    watch = _Watch(candidates)
    handles = [
        handle
        for module in candidates
        for handle in (
            nn.Module.register_forward_pre_hook(module, watch.enter),
            nn.Module.register_forward_hook(module, watch.leave),
        )
    ]
    with torch.no_grad(), watch:
        outputs = model(*fresh(traced.inputs))
    for handle in handles:
        handle.remove()
    pairs = tuple(
        LinearPair(seen.site, seen.readers[0])
        for seen in watch.seen
        if not seen.used and len(seen.readers) == 1 and seen.output() is None
        if seen.site.frozen == seen.readers[0].frozen
    )
    del outputs  # held until here, since an output of a convolution may be part of it
    return pairs


def obstacle(first: ConvSpec, second: ConvSpec) -> str | None:
    """Return the reason why two convolutions in a row equal no `nn.Conv2d`; None if they equal one.

    Kernels of extents k₁ and k₂, strides s, dilations d and paddings p make taps at s₁d₂·j + d₁·i. Along each
    axis:

    - where both extend (k > 1), s₁d₂ = d₁: otherwise the dense kernel had holes or too many taps;
    - where the second pads with zeros, the first must return zeros everywhere outside its input: it has no
      bias, and pads by d₁(k₁ - 1) or more on both sides;
    - where the second pads in another mode, it repeats values of the first's output, and the first must
      leave that axis alone (k₁ = s₁ = 1, p₁ = 0);
    - if both pad, even along different axes, they pad in the same mode;
    - the padding of the dense kernel, p₁ + s₁p₂, is the same on both sides, or that of 'same'.
    """
    modes = {spec.padding_mode for spec in (first, second) if any(map(any, spec.padding))}
    if len(modes) > 1:
        return f"one pads with {first.padding_mode}, the other with {second.padding_mode}"
    for axis in (0, 1):
        step, second_step = first.dilation[axis], first.stride[axis] * second.dilation[axis]
        extent = step * (first.kernel_size[axis] - 1)
        if extent and second.kernel_size[axis] > 1 and step != second_step:
            return f"the taps of the first are {step} pixels apart, those of the second {second_step}"
        if not any(second.padding[axis]):
            continue
        if second.padding_mode == "zeros":
            if first.bias:
                return "the second pads with zeros, not with the bias of the first"
            if min(first.padding[axis]) < extent:
                return "the second pads with zeros what the first cut off"
        elif extent or first.stride[axis] > 1 or any(first.padding[axis]):
            return f"the second pads ({second.padding_mode}) an axis that the first does not leave as it is"
    padding = dense_spec(first, second).padding
    if _conv2d_padding(dense_spec(first, second)) is None:
        return f"nn.Conv2d takes no padding {padding}"
    return None


def dense_spec(first: ConvSpec, second: ConvSpec) -> ConvSpec:
    """Return the geometry of the dense form of two convolutions in a row, if there is one (`obstacle`)."""

    def pad(axis: int) -> Pair:
        own, other = first.padding[axis], second.padding[axis]
        return own[0] + first.stride[axis] * other[0], own[1] + first.stride[axis] * other[1]

    def dilation(axis: int) -> int:
        if first.kernel_size[axis] > 1:
            return first.dilation[axis]
        return first.stride[axis] * second.dilation[axis]

    return ConvSpec(
        in_channels=first.in_channels,
        out_channels=second.out_channels,
        kernel_size=(
            first.kernel_size[0] + second.kernel_size[0] - 1,
            first.kernel_size[1] + second.kernel_size[1] - 1,
        ),
        stride=(first.stride[0] * second.stride[0], first.stride[1] * second.stride[1]),
        padding=(pad(0), pad(1)),
        dilation=(dilation(0), dilation(1)),
        groups=math.gcd(first.groups, second.groups),
        padding_mode=(second if any(map(any, second.padding)) else first).padding_mode,
        bias=first.bias or second.bias,
    )


def compose(first: DenseConv, second: DenseConv) -> DenseConv:
    """Return the dense form of two convolutions in a row, in float64.

    W[o,c] = Σ_r W₂[o,r] * W₁[r,c], products of polynomials in the taps, and b = b₂ + Σ_rij W₂[o,r,i,j] b₁[r].
    """
    spec = dense_spec(first.spec, second.spec)
    groups = spec.groups
    inner = _coarsened(first.weight.double(), first.spec.groups, groups)  # R × C/g × k₁
    outer = _coarsened(second.weight.double(), second.spec.groups, groups)  # O × R/g × k₂
    outer = outer.view(groups, -1, *outer.shape[1:])  # g × O/g × R/g × k₂
    # A transposed convolution multiplies polynomials; the output channels of a group are its batch.
    product = F.conv_transpose2d(outer.transpose(0, 1).flatten(1, 2), inner, groups=groups)
    product = product.view(product.shape[0], groups, -1, *product.shape[2:])  # O/g × g × C/g × k
    bias = None if second.bias is None else second.bias.double()
    if first.bias is not None:
        passed = (outer.sum((-2, -1)) @ first.bias.double().view(groups, -1, 1)).flatten()
        bias = passed if bias is None else bias + passed
    return DenseConv(spec, product.transpose(0, 1).flatten(0, 1), bias, first.inputs, first.device)


def merge(traced: TracedModel, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    """Return a copy of the model in which pairs of convolutions are merged, as a plan says.

    Args:
        traced: the model, left as it is, and its convolutions.
        pairs: names of first and second convolution, in the order of merging.

    Raises:
        SepconvertError: the model has no such convolutions, or they have no dense form.
    """
    plain = [site for site in traced.sites if _is_plain(traced.model, site)]
    convs = {site.name: site.dense for site in plain}
    places: dict[str, str] = {}
    for first, second in pairs:
        if first not in convs or second not in convs:
            reason: str | None = "the model has no two plain convolutions of these names"
        else:
            reason = obstacle(convs[first].spec, convs[second].spec)
        if reason is not None:
            raise SepconvertError(f"plan: cannot merge {second} into {first}: {reason}; use the plan's model")
        convs[first] = compose(convs[first], convs.pop(second))
        places[second] = first
    return with_merged(duplicate(traced.model), convs, places)


def with_merged(model: M, convs: Mapping[str, DenseConv], places: Mapping[str, str]) -> M:
    """Replace first convolutions by dense ones and second ones by `nn.Identity`; return the model.

    Args:
        model: changed in place.
        convs: dense convolutions by name of the first.
        places: the name of the first by that of each second.
    """
    for second in places:
        put(model, second, nn.Identity().train(submodule(model, second).training))
    for first in dict.fromkeys(places.values()):
        module = conv2d_at(model, first)
        layer = _layer(convs[first]).to(module.weight).train(module.training)
        layer.weight.requires_grad_(module.weight.requires_grad)
        if layer.bias is not None:  # frozen as the first's bias, or as its weight if it has none
            layer.bias.requires_grad_((module.weight if module.bias is None else module.bias).requires_grad)
        put(model, first, layer)
    return model


def conv2d_at(model: nn.Module, name: str) -> nn.Conv2d:
    """Return the submodule of that name, which is known to be a plain `nn.Conv2d`."""
    module = submodule(model, name)
    assert isinstance(module, nn.Conv2d)  # noqa: S101  (`_is_plain` looked)
    return module


@dataclass
class _Seen:
    """The output of a convolution, and how it was used."""

    site: ConvSite
    output: weakref.ref[Tensor]
    version: int
    readers: list[ConvSite] = field(default_factory=list)
    used: bool = False  # by anything else


class _Watch(TorchFunctionMode):
    """Records which convolutions read the outputs of others, and which outputs are used in another way."""

    def __init__(self, candidates: Mapping[nn.Module, ConvSite]) -> None:
        super().__init__()
        self._candidates = candidates
        self._by_id: dict[int, _Seen] = {}
        self._reading = False
        self.seen: list[_Seen] = []

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note the reader of an output: a convolution is called."""
        seen = self._find(inputs[0]) if inputs else None
        if seen is not None:
            seen.readers.append(self._candidates[module])
            self._reading = True

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Note the output of a convolution."""
        self._reading = False
        if not output.is_inference():  # such tensors do not show that they were changed
            seen = _Seen(self._candidates[module], weakref.ref(output), output._version)
            self._by_id[id(output)] = seen
            self.seen.append(seen)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call on, reads of attributes such as `shape` included, and note the tensors used."""
        result = func(*args, **(kwargs or {}))
        if not self._reading:
            for value in pytree.tree_leaves((args, kwargs)):
                seen = self._find(value)
                # Dropout in eval mode returns its input itself; so do operations in place.
                if seen is not None and not (result is value and value._version == seen.version):
                    seen.used = True
        return result

    def _find(self, value: object) -> _Seen | None:
        seen = self._by_id.get(id(value))
        return seen if seen is not None and seen.output() is value else None


def _is_plain(model: nn.Module, site: ConvSite) -> bool:
    if site.conv is None or site.obstacle is not None or site.index is not None:
        return False
    module = submodule(model, site.owner)
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and site.calls == 1
        and not site.aliases
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _coarsened(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Return the kernel of a grouped convolution for `fewer` groups, with zeros for the added channels."""
    ratio, out_channels = groups // fewer, len(weight)
    channels = torch.arange(out_channels)
    wide = weight.new_zeros(out_channels, ratio, *weight.shape[1:])
    wide[channels, channels // (out_channels // groups) % ratio] = weight
    return wide.flatten(1, 2)


def _layer(conv: DenseConv) -> nn.Conv2d:
    spec = conv.spec
    padding = _conv2d_padding(spec)
    assert padding is not None  # noqa: S101  (`obstacle` looked)
    layer = nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        spec.stride,
        padding,
        spec.dilation,
        spec.groups,
        spec.bias,
        spec.padding_mode,
        device="meta",
    )
    layer.weight = nn.Parameter(conv.weight.clone())
    layer.bias = None if conv.bias is None else nn.Parameter(conv.bias.clone())
    return layer


def _conv2d_padding(spec: ConvSpec) -> Pair | str | None:
    """Return the padding as an argument of `nn.Conv2d`; None if that cannot express it."""
    (top, bottom), (left, right) = spec.padding
    if (top, left) == (bottom, right):
        return top, left
    same = resolve_padding("same", spec.kernel_size, spec.dilation)
    return "same" if spec.stride == (1, 1) and spec.padding == same else None
