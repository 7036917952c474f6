"""Errors of activation functions in ONNX Runtime, and how far they move the outputs of a model.

A runtime approximates exp, erf, tanh and sigmoid by polynomials and rational functions. Their error is a few
roundings *of the function's range*, also where the function is saturated and PyTorch's own rounding is far
smaller. So every activation of a model is moved by what its operator may err by, in float64, and what follows
in the network carries the errors on.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Scale = Callable[[Tensor, Tensor], Tensor]
"""Returns what errors are relative to, from the input and the output of an activation; it broadcasts."""


@dataclass(frozen=True)
class OperatorError:
    """Largest error of an activation in ONNX Runtime: so many roundings (ε of the dtype) of `scale`.

    No error leads out of the function's range, beyond which a square root that follows, say, has no value.
    """

    roundings: float
    scale: Scale
    least: float = -math.inf
    most: float = math.inf


def _range(x: Tensor, y: Tensor) -> Tensor:
    """Return the scale of functions with values in [-1, 1]."""
    return torch.ones_like(y)


def _gated(x: Tensor, y: Tensor) -> Tensor:
    """Return the scale of x g(x), where g has values in [-1, 1]."""
    return x.abs()


def _value(x: Tensor, y: Tensor) -> Tensor:
    return y.abs()


def _beside_one(x: Tensor, y: Tensor) -> Tensor:
    """Return the scale of functions that add or subtract 1 on the way."""
    return y.abs() + 1


def _largest_input(x: Tensor, y: Tensor) -> Tensor:
    """Return the scale of functions that weight a part of their input."""
    return x.abs().amax()


# Measured by benchmarks/activations.py, see docs/concepts.md, and rounded up to a power of two.
OPERATOR_ERRORS: Mapping[str, OperatorError] = {
    "sigmoid": OperatorError(4, _range, 0.0, 1.0),
    "tanh": OperatorError(4, _range, -1.0, 1.0),
    "erf": OperatorError(4, _range, -1.0, 1.0),
    "sin": OperatorError(4, _range, -1.0, 1.0),
    "cos": OperatorError(4, _range, -1.0, 1.0),
    "hardsigmoid": OperatorError(4, _range, 0.0, 1.0),
    "_softmax": OperatorError(4, _range, 0.0, 1.0),
    "_safe_softmax": OperatorError(4, _range, 0.0, 1.0),
    "silu": OperatorError(4, _gated),
    "gelu": OperatorError(4, _gated),
    "mish": OperatorError(4, _gated),
    "hardswish": OperatorError(4, _gated),
    "exp": OperatorError(4, _value),
    "exp2": OperatorError(4, _value),
    "expm1": OperatorError(4, _beside_one),
    "elu": OperatorError(4, _beside_one),
    "celu": OperatorError(4, _beside_one),
    "softplus": OperatorError(4, _beside_one),
    "log_sigmoid_forward": OperatorError(4, _beside_one),
    "_log_softmax": OperatorError(4, _beside_one),
    "glu": OperatorError(4, _largest_input),
    "_scaled_dot_product_flash_attention_for_cpu": OperatorError(4, _largest_input),
}
"""By the name of torch's operator; an activation of other operators is as exact as those are."""


_EXACT = frozenset({"relu", "hardtanh", "relu6", "clamp", "clamp_min", "clamp_max", "threshold"})


_VISIBLE = 2.0**-8  # share of the spread of values that rounding must not exceed


def hides(values: Tensor, rounding: float) -> bool:
    """Return whether all differences among some values might be rounding, as where a sigmoid is saturated."""
    spread = float(values.max() - values.min()) if values.numel() else 1.0
    return not rounding < _VISIBLE * spread


class ActivationErrors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Moves the outputs of activations by what ONNX Runtime may err by, while it is entered.

    Args:
        eps: ε of the dtype that the runtime computes in.
        signs: "random", or "equal" where errors of the same sign add up in a sum; "none" moves nothing.
    """

    def __init__(self, eps: float, signs: Literal["none", "random", "equal"], seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._eps, self._signs = eps, signs
        self._generator = torch.Generator().manual_seed(seed)
        self.count = 0  # of the activations that were computed and may err
        self.flat: set[int] = set()  # of those and exact ones, in their order, the ones that are saturated
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every operation on, and move the outputs of activations."""
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        known = OPERATOR_ERRORS.get(name)
        if known is None and name not in _EXACT:
            return func(*args, **(kwargs or {}))
        x: Tensor = args[2] if "attention" in name else args[0]
        x = x.clone()  # the operation may write to it
        output = func(*args, **(kwargs or {}))
        y: Tensor = output if isinstance(output, Tensor) else output[0]
        self._calls += 1
        if y.is_floating_point():
            error = self._eps * (y.abs() if known is None else known.roundings * known.scale(x, y))
            if y.numel() > 1 and hides(y, float(error.max())):
                self.flat.add(self._calls)
            if known is not None and self._signs != "none":
                y.add_(error * self._sign(y)).clamp_(known.least, known.most)
        self.count += known is not None
        return output

    def _sign(self, y: Tensor) -> Tensor | float:
        if self._signs == "equal":
            return 1.0
        drawn = torch.randint(0, 2, y.shape, generator=self._generator)
        return drawn.to(y) * 2 - 1
