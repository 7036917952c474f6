"""Interception of convolution calls during a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Frame:
    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 0


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
    """ "conv2d" for `torch.conv2d`, `F.conv2d` and `aten.conv2d.*` alike; None for what is no convolution."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
        name = str(packet).removeprefix("aten.")
        return name if str(packet) == f"aten.{name}" and name in _FUNCTIONS.values() else None
    try:
        return _FUNCTIONS.get(function)  # type: ignore[call-overload,no-any-return]
    except TypeError:  # unhashable, so none of ours
        return None


def bind_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a convolution call by parameter name, absent ones left out."""
    return dict(zip(_PARAMETERS[name.rstrip("123d")], args, strict=False)) | dict(kwargs)


class ConvolutionInterceptor(TorchFunctionMode):
    """Sees each convolution that `model` calls, with the module whose forward calls it.

    `on_call` gets the module, the position among the convolutions of that forward, the function's
    name, its arguments by name, and the call itself, which takes other arguments by name; what it
    returns takes the output's place.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[nn.Module, int, str, dict[str, Any], Callable[..., Tensor]], Tensor],
    ) -> None:
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

        def call(**changes: Any) -> Tensor:
            self.depth += 1
            try:
                output: Tensor = (
                    func(**{**arguments, **changes}) if changes else func(*args, **(kwargs or {}))
                )
                return output
            finally:
                self.depth -= 1

        frame = self.frames[-1]
        index, frame.calls = frame.calls, frame.calls + 1
        return self._on_call(frame.module, index, name, arguments, call)

    @contextmanager
    def watching(self, on_return: Callable[[Frame, Any], None] | None = None) -> Iterator[None]:
        """Follow which module runs. Hooks are removed on leaving."""

        def enter(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.frames.append(Frame(module, inputs, kwargs))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            frame = self.frames.pop()
            if on_return is not None:
                on_return(frame, output)

        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; its convolutions are counted by the dispatcher
                entering = module.register_forward_pre_hook(enter, with_kwargs=True)
                # Always: a forward may catch what a submodule raises.
                leaving = module.register_forward_hook(leave, prepend=True, always_call=True)
                stack.callback(entering.remove)
                stack.callback(leaving.remove)
            stack.enter_context(self)
            yield


class HiddenConvolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the convolutions that reach the dispatcher from nowhere that Python sees (TorchScript, C++)."""

    def __init__(self, interceptor: ConvolutionInterceptor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._interceptor = interceptor
        self.count: dict[nn.Module, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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
