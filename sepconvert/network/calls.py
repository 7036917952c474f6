"""Interception of the convolution calls of a forward pass, and what one such call computes."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
        name = f"{self.function}_{self.place[1]}"
        while hasattr(self.module, name):  # left by an earlier conversion
            name += "_"
        return name

    def macs(self, output: Tensor) -> int:
        """Count multiply-adds as fvcore does: positions of `output` (input if transposed) × weights."""
        weight: Tensor = self.arguments["weight"]
        positions: Tensor = self.arguments["input"] if "transpose" in self.function else output
        dims = weight.ndim - 2
        images = positions.shape[0] if positions.ndim == weight.ndim else 1
        return images * math.prod(positions.shape[-dims:]) * weight.numel()

    def same_kernel(self, other: "Call") -> bool:
        """Tell whether weight and bias of both calls are equal."""
        for name in ("weight", "bias"):
            mine, others = self.arguments.get(name), other.arguments.get(name)
            if mine is not others and (mine is None or others is None or not same_values(mine, others)):
                return False
        return True


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


@dataclass
class Frame:
    """The forward of one module while it runs, and the convolutions that it has called so far."""

    module: nn.Module
    path: str
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 0


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
        paths = {module: path for path, module in self._model.named_modules()}

        def enter(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.frames.append(Frame(module, paths[module], inputs, kwargs))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            frame = self.frames.pop()
            if on_return is not None:
                on_return(frame, output)

        with ExitStack() as stack:
            for module in paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; its convolutions are counted by the dispatcher
                entering = module.register_forward_pre_hook(enter, with_kwargs=True)
                # Always: a forward may catch what a submodule raises.
                leaving = module.register_forward_hook(leave, prepend=True, always_call=True)
                stack.callback(entering.remove)
                stack.callback(leaving.remove)
            stack.enter_context(self)
            yield


def substitute(model: nn.Module, kernels: Mapping[Place, Kernel]) -> ConvolutionInterceptor:
    """Return an interceptor that runs `model` with other kernels: `with it.watching(): model(x)`."""
    return ConvolutionInterceptor(model, lambda call: call.run_with(kernels.get(call.place)))


class HiddenConvolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts, by module, the convolutions that Python does not see (TorchScript, C++), but the dispatcher."""

    def __init__(self, interceptor: ConvolutionInterceptor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._interceptor = interceptor
        self.count: dict[nn.Module, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every operation on, and count convolutions that the interceptor has not reported."""
        interceptor = self._interceptor
        if func not in _DISPATCHED or interceptor.depth or not interceptor.frames:
            return func(*args, **(kwargs or {}))
        module = interceptor.frames[-1].module
        self.count[module] = self.count.get(module, 0) + 1
        # Calling `func` passes the function mode again, which must not take it for a call by the module.
        interceptor.depth += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            interceptor.depth -= 1
