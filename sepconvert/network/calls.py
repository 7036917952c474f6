"""Interception of the convolution calls of a forward pass, and what one such call computes."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.base.modules import has, named_modules
from sepconvert.factorize.geometry import ConvSpec, Pair

Place = tuple[str, int]
"""Path of a module, and position among the convolutions that its forward calls."""


Kernel = tuple[Tensor, Tensor]
"""Weight O × C/g × kh × kw and bias O that replace those of a convolution."""


_FUNCTIONS = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
    torch.convolution: "convolution",
}


_DISPATCHED = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)


# Names of operators that compute a convolution; others prepare weights, or compute gradients.
_CONVOLUTION = re.compile(r"(?!.*(backward|weight|pack)).*conv(?!er)")


DEFORMABLE = "deform_conv2d"
"""Name of torchvision's operator, which does as many multiply-adds as a dense convolution."""


# Operators of which convolutions are made by hand, and other things too: a name, and what they do there.
_PARTS = {
    "aten.im2col": ("unfold", "it cuts out patches, for a convolution or for something else"),
    "aten.unfold": ("unfold", "it cuts out patches, for a convolution or for something else"),
    "aten.as_strided": ("as_strided", "it cuts out patches, for a convolution or for something else"),
    "aten.col2im": ("fold", "it adds up patches, for a transposed convolution or for something else"),
    "aten._fft_c2r": ("fft", "it transforms a spectrum back, for a convolution or for something else"),
    "aten._fft_c2c": ("fft", "it transforms a spectrum back, for a convolution or for something else"),
}


_VIEWS = (torch.ops.aten.unfold.default, torch.ops.aten.as_strided.default)  # which also cut into pieces


_OWN = ("aten", "prim", "torchvision")  # namespaces whose operators are known


_PARAMETERS = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": (
        "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
    ),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
}  # fmt: skip


def convolution_name(function: object) -> str | None:
    """Return "conv2d" for `torch.conv2d`, `F.conv2d` and `aten.conv2d.*` alike; None for other functions."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
        name = str(packet).removeprefix("aten.")
        return name if str(packet) == f"aten.{name}" and name in _FUNCTIONS.values() else None
    try:
        return _FUNCTIONS.get(function)  # type: ignore[call-overload,no-any-return]
    except TypeError:  # unhashable, so it is no function of torch's
        return None


def bind_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a convolution call by parameter name, without those left to their defaults."""
    return dict(zip(_PARAMETERS[name.rstrip("123d")], args, strict=False)) | dict(kwargs)


def _is_kernel(value: object) -> bool:
    """Return whether an argument is a trained tensor with the dimensions of a kernel."""
    return isinstance(value, nn.Parameter) and value.ndim > 2


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a convolution function by the forward of a module, not made yet."""

    module: nn.Module
    place: Place
    function: str  # "conv2d", …
    arguments: Mapping[str, Any]  # by parameter name, without those left to their defaults
    run: Callable[..., Tensor]
    """Make the call, with the keyword arguments given here in place of its own; return the output."""

    def run_with(self, kernel: Kernel | None) -> Tensor:
        """Make the call with the values of another kernel, if there is one, in the dtype of its own."""
        if kernel is None:
            return self.run()
        weight, bias = (value.to(self.arguments["weight"]) for value in kernel)
        return self.run(weight=weight, bias=bias)

    @property
    def spec(self) -> ConvSpec:
        """Geometry of a two-dimensional call, which pads with zeros (other modes pad the input first)."""
        weight: Tensor = self.arguments["weight"]
        kernel_size = weight.shape[2], weight.shape[3]
        dilation, groups = _pair(self.arguments.get("dilation", 1)), self.arguments.get("groups", 1)
        return ConvSpec(
            in_channels=weight.shape[1] * groups,
            out_channels=weight.shape[0],
            kernel_size=kernel_size,
            stride=_pair(self.arguments.get("stride", 1)),
            padding=resolve_padding(self.arguments.get("padding", 0), kernel_size, dilation),
            dilation=dilation,
            groups=groups,
            bias=self.arguments.get("bias") is not None,
        )

    @property
    def name(self) -> str:
        """Name for a submodule in the place of the call: `conv2d_0`, or a longer one if that is taken."""
        return _free_name(self.module, f"{self.function}_{self.place[1]}")

    def macs(self, output: Tensor) -> int:
        """Count multiply-adds as fvcore does: positions of `output` (input if transposed) × weights."""
        return _macs(
            self.arguments["weight"], self.arguments["input"] if "transpose" in self.function else output
        )

    def same_kernel(self, other: "Call") -> bool:
        """Tell whether weight and bias of both calls are equal."""
        for name in ("weight", "bias"):
            mine, others = self.arguments.get(name), other.arguments.get(name)
            if mine is not others and (mine is None or others is None or not same_values(mine, others)):
                return False
        return True


def _free_name(module: nn.Module, name: str) -> str:
    while has(module, name):  # left by an earlier conversion
        name += "_"
    return name


def _macs(weight: Tensor, positions: Tensor) -> int:
    dims = weight.ndim - 2
    images = positions.shape[0] if positions.ndim == weight.ndim else 1
    return images * math.prod(positions.shape[-dims:]) * weight.numel()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are one object, or have the same shape and values."""
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def resolve_padding(padding: Any, kernel_size: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Return the padding (before, after) per axis; 'same' puts the odd element after, as torch does."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        vertical, horizontal = ((total // 2, total - total // 2) for total in totals)
        return vertical, horizontal
    vertical_padding, horizontal_padding = _pair(padding)
    return (vertical_padding, vertical_padding), (horizontal_padding, horizontal_padding)


def _pair(value: Any) -> Pair:
    """Return an int, or a sequence of one or two ints, as a pair."""
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def is_plain(module: nn.Module) -> bool:
    """Tell whether it computes what `nn.Conv2d` does; parametrised classes do, they only make the weight."""
    cls = type(module)
    return cls.forward is nn.Conv2d.forward and getattr(cls, "_conv_forward", None) is nn.Conv2d._conv_forward


def geometry(call: Call) -> tuple[ConvSpec | None, str | None]:
    """Return the geometry of a two-dimensional convolution, or the reason why there is none."""
    weight: Tensor = call.arguments["weight"]
    if "transpose" in call.function or call.arguments.get("transposed"):
        return None, "transposed convolutions are not factorised"
    if weight.ndim != 4:
        return None, f"{weight.ndim - 2}-D convolutions are not factorised"
    if not weight.is_floating_point():
        return None, f"kernels of {weight.dtype} are not factorised"
    spec, module = call.spec, call.module
    if isinstance(module, nn.Conv2d) and is_plain(module):
        # Seen from outside, a padding mode other than zeros is a call to F.pad.
        padding = resolve_padding(module.padding, spec.kernel_size, spec.dilation)
        spec = replace(spec, padding=padding, padding_mode=module.padding_mode)
    return spec, None


def layer_input(call: Call, spec: ConvSpec) -> Tensor:
    """Return the layer's input, without the padding that modes other than zeros add before the call."""
    inputs: Tensor = call.arguments["input"]
    if spec.padding_mode == "zeros":
        return inputs
    (top, bottom), (left, right) = spec.padding
    return inputs[..., top : inputs.shape[-2] - bottom, left : inputs.shape[-1] - right]


@dataclass
class Frame:
    """The forward of one module while it runs, and the convolutions that it has called so far."""

    module: nn.Module
    path: str
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 0
    others: Counter[str] = field(default_factory=Counter)  # calls of `OtherOperator`s by name


class ConvolutionInterceptor(TorchFunctionMode):
    """Intercepts each convolution that the forward of a module of `model` calls, while it is `watching`.

    `on_call` is given the call before it is made; what it returns takes the output's place.
    """

    def __init__(self, model: nn.Module, on_call: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self._model = model
        self._on_call = on_call
        self.frames: list[Frame] = []
        self.depth = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call on, and report convolutions."""
        name = convolution_name(func)
        if name is None or not self.frames or self.depth:
            return func(*args, **(kwargs or {}))
        arguments = bind_arguments(name, args, kwargs or {})

        def run(**changes: Any) -> Tensor:
            self.depth += 1
            try:
                output: Tensor = (
                    func(**{**arguments, **changes}) if changes else func(*args, **(kwargs or {}))
                )
                return output
            finally:
                self.depth -= 1

        frame = self.frames[-1]
        place = frame.path, frame.calls
        frame.calls += 1
        return self._on_call(Call(frame.module, place, name, arguments, run))

    @contextmanager
    def watching(self, on_return: Callable[[Frame, Any], None] | None = None) -> Iterator[None]:
        """Follow which module runs; report to `on_return` each forward that ends, and its output.

        Hooks are removed on leaving.
        """

        def enter(path: str, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.frames.append(Frame(module, path, inputs, kwargs))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            frame = self.frames.pop()
            if on_return is not None:
                on_return(frame, output)

        with ExitStack() as stack:
            for path, module in named_modules(self._model):
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; its convolutions are counted by the dispatcher
                entering = nn.Module.register_forward_pre_hook(module, partial(enter, path), with_kwargs=True)
                # Always: a forward may catch what a submodule raises.
                leaving = nn.Module.register_forward_hook(module, leave, prepend=True, always_call=True)
                stack.callback(entering.remove)
                stack.callback(leaving.remove)
            stack.enter_context(self)
            yield


def substitute(model: nn.Module, kernels: Mapping[Place, Kernel]) -> ConvolutionInterceptor:
    """Return an interceptor that runs `model` with other kernels: `with it.watching(): model(x)`."""
    return ConvolutionInterceptor(model, lambda call: call.run_with(kernels.get(call.place)))


@dataclass
class OtherOperator:
    """A call of an operator that convolves, or may be part of that, but is not torch's own convolution."""

    module: nn.Module  # whose forward calls it
    path: str
    function: str  # "deform_conv2d", "unfold", …
    name: str  # of this call among those of the forward: `unfold_0`
    obstacle: str  # why it cannot be replaced
    convolves: bool  # for certain
    params: int  # among its arguments
    calls: int = 0
    macs: int = 0  # of all calls, as `measure.cost` counts them

    @property
    def is_module(self) -> bool:
        """Whether its module is a layer made for it: `torchvision.ops.DeformConv2d` or `nn.Unfold`, say."""
        library = type(self.module).__module__.partition(".")[0]
        return library in ("torch", "torchvision") and not self.module._modules


class HiddenConvolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Finds the convolutions that the interceptor does not see, but the dispatcher.

    Attributes:
        count: torch's own, run by TorchScript or C++: how many, by path of the module.
        others: other operators, by path of the module and name of the call.
    """

    def __init__(self, interceptor: ConvolutionInterceptor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._interceptor = interceptor
        self._has_spectrum = False  # a signal has been transformed
        self.count: dict[str, tuple[nn.Module, int]] = {}
        self.others: dict[tuple[str, str], OtherOperator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every operation on, and note convolutions that the interceptor has not reported."""
        interceptor, kwargs = self._interceptor, kwargs or {}
        if interceptor.depth or not interceptor.frames:
            return func(*args, **kwargs)
        frame = interceptor.frames[-1]
        if func in _DISPATCHED:
            module, count = self.count.get(frame.path, (frame.module, 0))
            self.count[frame.path] = module, count + 1
            return self._run(func, args, kwargs)
        arguments = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        function, obstacle, convolves = self._described(func, arguments)
        if not function:
            return func(*args, **kwargs)
        output = self._run(func, args, kwargs)
        if func in _VIEWS and output.numel() <= arguments["self"].numel():  # its patches do not overlap
            return output
        name = f"{function}_{frame.others[function]}"
        frame.others[function] += 1
        held = [value for value in arguments.values() if isinstance(value, nn.Parameter)]
        other = self.others.setdefault(
            (frame.path, name),
            OtherOperator(
                frame.module,
                frame.path,
                function,
                _free_name(frame.module, name),
                obstacle,
                convolves,
                sum(parameter.numel() for parameter in held),
            ),
        )
        other.calls += 1
        if function == DEFORMABLE:
            other.macs += _macs(arguments["weight"], output)
        return output

    def _described(self, func: Any, arguments: Mapping[str, Any]) -> tuple[str, str, bool]:
        """Return name, obstacle, and whether it certainly convolves, of an operator; empty for any other."""
        namespace, _, function = str(func.overloadpacket).rpartition(".")
        if function == DEFORMABLE:
            reason = (
                "a deformable convolution reads its input at computed positions, as no separable form does"
            )
            return function, reason, True
        if _CONVOLUTION.match(function):
            reason = f"it is a call of {namespace}::{function}; only torch's own convolutions are replaced"
            return function, reason, True
        if function == "_fft_r2c" or (function == "_fft_c2c" and arguments["forward"]):
            self._has_spectrum = True
            return "", "", False
        if not namespace.startswith(_OWN) and any(_is_kernel(value) for value in arguments.values()):
            reason = f"it is a call of {namespace}::{function} with a kernel, which sepconvert does not know"
            return function, reason, False
        part = _PARTS.get(f"{namespace}.{function}")
        if part is None or (part[0] == "fft" and not self._has_spectrum):
            return "", "", False
        return *part, False

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, which passes the function mode again, and is no other call by the module."""
        self._interceptor.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self._interceptor.depth -= 1
