"""Reverse: two convolutions in a row with nothing between them → the dense one that they amount to."""

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sepconvert.distributed import once
from sepconvert.errors import SepconvertError, first_line
from sepconvert.measure.latency import Speedup
from sepconvert.progress import Progress, silent
from sepconvert.spec import ConvSpec, Pair, chain_macs
from sepconvert.timing import Clock
from sepconvert.trace import ConvSite, DenseConv, Inputs, duplicate, fresh, private_copy, resolve_padding
from sepconvert.verify import Reference, compare_with, reference

M = TypeVar("M", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class LinearPair:
    """Two convolutions of which the second alone reads what the first returns, unchanged."""

    first: ConvSite
    second: ConvSite


@dataclass(frozen=True)
class Merge:
    """What becomes of a linear pair. MACs are those of one sample."""

    first: str  # the convolution that takes both places
    second: str
    decision: Literal["merged", "kept"]
    reason: str
    spec: ConvSpec | None  # of the dense form; None where there is none
    macs: tuple[int, int] | None  # of the pair, and of the dense form
    speedup: Speedup | None  # of the dense form over the pair, where it was measured

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return {**asdict(self), "speedup": None if self.speedup is None else self.speedup.to_dict()}


def linear_pairs(model: nn.Module, inputs: Inputs, sites: Sequence[ConvSite]) -> tuple[LinearPair, ...]:
    """The pairs of convolutions among `sites` between which nothing happens, in order of execution.

    A forward pass is watched: nothing but the second convolution may be given the first's output, ask for its
    shape, or keep it (as a container of features does, or the model that returns it). Modules that return
    their very input may lie between, such as `nn.Identity`, and dropout in eval mode.

    Both must be plain `nn.Conv2d` in one place and called once, without hooks, which would see the output
    that is no more, and the same of both must be frozen.
    """
    model = private_copy(model)
    candidates = {model.get_submodule(site.owner): site for site in sites if _is_plain(model, site)}
    watch = _Watch(candidates)
    handles = [
        handle
        for module in candidates
        for handle in (
            module.register_forward_pre_hook(watch.enter),
            module.register_forward_hook(watch.leave),
        )
    ]
    with torch.no_grad(), watch:
        outputs = model(*fresh(inputs))
    for handle in handles:
        handle.remove()
    pairs = tuple(
        LinearPair(seen.site, seen.readers[0])
        for seen in watch.seen
        if not seen.used and len(seen.readers) == 1 and seen.output() is None
        if seen.site.frozen == seen.readers[0].frozen
    )
    del outputs  # held until here, for it may hold what a convolution returned
    return pairs


def obstacle(first: ConvSpec, second: ConvSpec) -> str | None:
    """Why two convolutions in a row are no single `nn.Conv2d`; None where they are.

    Kernels of extents k₁ and k₂, strides s, dilations d and paddings p make taps at s₁d₂·j + d₁·i. Along each
    axis:

    - where both extend (k > 1), s₁d₂ = d₁, or the dense kernel had holes or too many taps;
    - where the second pads with zeros, the first must return zeros for all that lies outside its input: it
      has no bias, and pads by d₁(k₁ - 1) or more on both sides;
    - where the second pads otherwise, it repeats values of the first, which must leave that axis alone
      (k₁ = s₁ = 1, p₁ = 0);
    - if both pad, even along different axes, it is in the same mode;
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
    """Geometry of the dense form of two convolutions in a row, if there is one (`obstacle`)."""

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
    """The dense form of two convolutions in a row, in float64.

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


def merge_pairs(
    model: nn.Module,
    inputs: Inputs,
    pairs: Sequence[LinearPair],
    *,
    gate: str,
    clock: Clock,
    seed: int,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[Merge, ...]]:
    """Merge the pairs whose dense form pays, and say of each what became of it.

    Under the gate "latency" that is a form measured to be faster in ONNX Runtime, as forms of layers are
    (`Clock`); under "macs" and "none" one without more MACs. Where pairs continue one another, the dense
    form of one is the first convolution of the next.

    The model with each further pair merged is held against the original in float64, on given and on random
    inputs, where no more than float64's rounding may separate them; a pair that fails is kept.

    Args:
        model: is left as it is.
        inputs: positional arguments of its forward.
        pairs: `linear_pairs` of both.
        gate: "macs", "latency" or "none".
        clock: measures; when its time is up, pairs are kept.
        seed: of random inputs.
        progress: shows the progress.

    Returns:
        A copy in which a dense `nn.Conv2d` takes the place of each first convolution and `nn.Identity` that
        of the second, or `model` itself if nothing was merged; and a decision for each pair.
    """
    sites = {site.name: site for pair in pairs for site in (pair.first, pair.second)}
    convs = {name: site.conv for name, site in sites.items() if site.conv is not None}
    places: dict[str, str] = {}  # of each second convolution that was merged, the first
    decisions = []

    @functools.cache
    def expected() -> Reference:
        eps = torch.finfo(torch.float64).eps
        tolerances = {name: eps * site.conv.weight[0].numel() for name, site in sites.items() if site.conv}
        return reference(model, inputs, tuple(sites.values()), tolerances, seed)

    for pair in progress(pairs, "merging"):
        name, second = places.get(pair.first.name, pair.first.name), pair.second.name
        specs = convs[name].spec, convs[second].spec
        reason = obstacle(*specs)
        if reason is not None:
            decisions.append(Merge(name, second, "kept", reason, None, None, None))
            continue
        spec = dense_spec(*specs)
        macs = (
            sum(chain_macs(specs, size) for size in sites[name].sizes),
            sum(spec.macs(size) for size in sites[name].sizes),
        )
        ratio = None
        if gate == "latency":
            ratio = once(lambda: clock.pair(specs, spec, convs[name].inputs))  # noqa: B023  (called at once)
            pays = ratio is not None and ratio.significant and ratio.median > 1
            reason = (
                "was not timed within --measure-seconds"
                if ratio is None
                else f"the dense form is measured {ratio.median:.2f}× as fast "
                f"[{ratio.ci95.lo:.2f}, {ratio.ci95.hi:.2f}]"
            )
        else:
            pays = macs[1] <= macs[0]
            reason = f"the dense form has {macs[1]:,} MACs instead of {macs[0]:,}"
        if pays:
            trial = {**convs, name: compose(convs[name], convs[second])}, {**places, second: name}
            failure = _failure(model, expected(), *trial)
            if failure is None:
                convs, places = trial
            pays, reason = failure is None, failure or reason
        decisions.append(Merge(name, second, "merged" if pays else "kept", reason, spec, macs, ratio))
    merged = _rewritten(duplicate(model), convs, places) if places else model
    return merged, tuple(decisions)


def merge(model: nn.Module, sites: Sequence[ConvSite], pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """A copy in which these pairs of names, first and second, are merged in their order: a plan's, repeated.

    Raises:
        SepconvertError: the model has no such convolutions, or they have no dense form.
    """
    convs = {site.name: site.conv for site in sites if site.conv is not None and _is_plain(model, site)}
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
    return _rewritten(duplicate(model), convs, places)


def _rewritten(model: M, convs: Mapping[str, DenseConv], places: Mapping[str, str]) -> M:
    """The model, with each second convolution of `places` gone, and dense ones for the first; in place."""
    for second in places:
        model.set_submodule(second, nn.Identity().train(model.get_submodule(second).training))
    for first in dict.fromkeys(places.values()):
        module = _conv2d(model, first)
        layer = _layer(convs[first]).to(module.weight).train(module.training)
        layer.weight.requires_grad_(module.weight.requires_grad)
        if layer.bias is not None:  # if it is the second's, it goes with the weight of the first
            layer.bias.requires_grad_((module.weight if module.bias is None else module.bias).requires_grad)
        model.set_submodule(first, layer)
    return model


def _failure(
    model: nn.Module, expected: Reference, convs: Mapping[str, DenseConv], places: Mapping[str, str]
) -> str | None:
    """What the merged model does that the original does not."""
    for first in set(places.values()):
        dtype = _conv2d(model, first).weight.dtype
        if not convs[first].weight.to(dtype).isfinite().all():
            return f"the dense kernel overflows {dtype}"
    try:
        # In float64 from the beginning: rounding to the model's own dtype would hide small differences.
        merged = _rewritten(private_copy(model, expected.dtype), convs, places)
        comparison = compare_with(expected, merged)
    except Exception as error:  # the user's code may read the weight of a convolution that is gone
        return f"the model does not run without it: {first_line(error)}"
    if comparison.holds:
        return None
    moved, tolerance = comparison.max_abs_diff, comparison.tolerance
    return f"merged, the outputs of the model move by {moved:.3g}, tolerance {tolerance:.3g}"


@dataclass
class _Seen:
    """What a convolution returned, and what was done with it."""

    site: ConvSite
    output: weakref.ref[Tensor]
    version: int
    readers: list[ConvSite] = field(default_factory=list)
    used: bool = False  # by anything else


class _Watch(TorchFunctionMode):
    """Follows the outputs of convolutions: who reads them, and are they used in any other way?"""

    def __init__(self, candidates: Mapping[nn.Module, ConvSite]) -> None:
        super().__init__()
        self._candidates = candidates
        self._by_id: dict[int, _Seen] = {}
        self._reading = False
        self.seen: list[_Seen] = []

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A convolution is called."""
        found = self._find(inputs[0]) if inputs else None
        if found is not None:
            found.readers.append(self._candidates[module])
            self._reading = True

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """It returns."""
        self._reading = False
        if not output.is_inference():  # such tensors do not show that they were changed
            seen = _Seen(self._candidates[module], weakref.ref(output), output._version)
            self._by_id[id(output)] = seen
            self.seen.append(seen)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call on; attributes such as `shape` come here, too."""
        result = func(*args, **(kwargs or {}))
        if not self._reading:
            for value in pytree.tree_leaves((args, kwargs)):
                found = self._find(value)
                # Dropout in eval mode returns its very input; so do operations in place.
                if found is not None and not (result is value and value._version == found.version):
                    found.used = True
        return result

    def _find(self, value: object) -> _Seen | None:
        seen = self._by_id.get(id(value))
        return seen if seen is not None and seen.output() is value else None


def _is_plain(model: nn.Module, site: ConvSite) -> bool:
    if site.conv is None or site.obstacle is not None or site.index is not None:
        return False
    module = model.get_submodule(site.owner)
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and site.calls == 1
        and not site.aliases
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _coarsened(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The kernel of a grouped convolution with zeros for what fewer groups read besides."""
    ratio, out_channels = groups // fewer, len(weight)
    channels = torch.arange(out_channels)
    wide = weight.new_zeros(out_channels, ratio, *weight.shape[1:])
    wide[channels, channels // (out_channels // groups) % ratio] = weight
    return wide.flatten(1, 2)


def _conv2d(model: nn.Module, name: str) -> nn.Conv2d:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Conv2d)  # noqa: S101  (`_is_plain` looked)
    return module


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
    """As `nn.Conv2d` takes it; None where it cannot be had."""
    (top, bottom), (left, right) = spec.padding
    if (top, left) == (bottom, right):
        return top, left
    same = resolve_padding("same", spec.kernel_size, spec.dilation)
    return "same" if spec.stride == (1, 1) and spec.padding == same else None
