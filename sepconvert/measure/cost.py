"""Multiply-accumulates and parameters of a model, counted on the operators that it runs."""

import collections
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import hashable, modules, unshadowed
from sepconvert.files.onnx.graph.cost import macs_of_graph, measured_shapes, weights_of
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.network.calls import DEFORMABLE
from sepconvert.network.copies import evaluation_mode
from sepconvert.network.tensors import Inputs, fresh, tensor_leaves, tensors_in

with warnings.catch_warnings():
    # fvcore scripts one of its losses on import, which recent torch calls deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, get_shape


Counter = Literal["fvcore", "torch", "onnx"]


@dataclass(frozen=True)
class Cost:
    """Computations and parameters of a model.

    `macs` are multiply-accumulates for *one sample*, one fused multiply-add being 1. `params` are the
    elements of all parameters, shared ones counted once. `uncounted_ops` are operators that the counter has
    no rule for and counts as 0 (additions, pooling, activations), with their numbers of calls. `counter` is
    fvcore, torch's own, or ours, of the operators of an ONNX file.
    """

    macs: int
    params: int
    uncounted_ops: dict[str, int]
    counter: Counter = "fvcore"

    @property
    def flops(self) -> int:
        """Floating-point operations: 2 × `macs`, a multiplication and an addition each."""
        return 2 * self.macs


def count(model: nn.Module, inputs: Inputs, counter: Counter = "fvcore") -> Cost:
    """Count the operators of `model(*inputs)` in eval mode; training flags and hooks are left as they are.

    fvcore counts on a trace: operators that do not reach the output are not counted, nor would ONNX keep
    them. A model that cannot be traced (with a part in TorchScript, inputs in lists, …) is counted by torch's
    `FlopCounterMode` as it runs: convolutions, matrix products and attention alone, while fvcore counts norms
    and interpolation as well. Counts that are compared must come from the same `counter`. The network of an
    ONNX file is counted by the operators of that file.

    The first dimension of the first tensor is the batch, and all counts are divided by it.

    Raises `SepconvertError` if the model cannot run on the inputs.
    """
    if isinstance(model, OnnxNetwork):
        return _of_file(model, inputs)
    batch = next((len(value) for value in tensors_in(inputs) if value.ndim), 0)
    if batch == 0:
        raise SepconvertError(
            f"cost: expected inputs with a batch of at least 1, got {_shapes(inputs)}; give a batch of 1"
        )
    macs = None
    with (
        evaluation_mode(model),
        _hooks_kept(model),
        hashable(model),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if counter == "fvcore":
            # The tracer and fvcore may raise anything; errors of the model itself recur below.
            with suppress(Exception):
                macs, uncounted = _traced(model, fresh(inputs))
        if macs is None:
            counter = "torch"
            try:
                macs, uncounted = _run(model, fresh(inputs))
            except Exception as error:
                raise SepconvertError(
                    f"cost: expected a model that runs on {_shapes(inputs)}, got"
                    f" {type(error).__name__}: {first_line(error)}; check the input shape first"
                ) from error
    params = sum(parameter.numel() for parameter in unshadowed(model).parameters())
    return Cost(round(macs / batch), params, uncounted, counter)


def _of_file(network: OnnxNetwork, inputs: Inputs) -> Cost:
    """Count the operators of a file as it would be written."""
    file = converted_model(network, embedded=True)
    macs, uncounted = macs_of_graph(file.graph, measured_shapes(file, onnx_feed(network, inputs)))
    return Cost(round(macs / network.samples(inputs)), weights_of(file), uncounted, "onnx")


def _traced(model: nn.Module, inputs: Inputs) -> tuple[float, dict[str, int]]:
    analysis = FlopCountAnalysis(unshadowed(_TensorsOnly(model)), inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    for name in ("aten::_convolution_mode", f"torchvision::{DEFORMABLE}"):
        analysis.set_op_handle(name, _convolution)
    return analysis.total(), dict(analysis.unsupported_ops())


def _run(model: nn.Module, inputs: Inputs) -> tuple[float, dict[str, int]]:
    rules = _deformable()
    uncounted = _Uncounted({*flop_registry, *rules})
    with FlopCounterMode(display=False, custom_mapping=rules) as counter, uncounted:
        _TensorsOnly(model)(*inputs)
    return counter.get_total_flops() / 2, dict(uncounted.calls)


def _deformable() -> dict[Any, Any]:
    """Return the rule for deformable convolutions that torch's counter lacks, if torchvision is loaded."""
    operator = getattr(torch.ops.torchvision, DEFORMABLE, None)
    return {} if operator is None else {operator: _deformable_flops}


def _deformable_flops(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    return 2 * int(conv_flop_count(x, weight, out_shape))


class _Uncounted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counter of calls of operators that torch's counter has no rule for; views compute nothing."""

    def __init__(self, counted: Set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._counted = counted
        self.calls = collections.Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket not in self._counted and not func.is_view:
            self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class _TensorsOnly(nn.Module):
    """A model whose outputs are flattened to tensors: the tracer takes no dataclass or None as output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        output = self.model(*inputs)
        tensors = tuple(tensor_leaves(output))
        if not tensors:  # nothing would reach the output, and everything would be counted as 0
            raise TypeError(f"the model returns {type(output).__name__}, in which no tensor is found")
        return tensors


def _convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the MACs of a convolution that fvcore lacks: deformable, or with `padding="same"` or "valid"."""
    return int(conv_flop_count(*(get_shape(value) for value in (inputs[0], inputs[1], outputs[0]))))


@contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that fvcore leaves behind when tracing fails; the model could not be pickled then."""
    tables = [t for m in modules(model) for t in (m._forward_pre_hooks, m._forward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            for key in set(table) - kept:
                del table[key]


def _shapes(inputs: Inputs) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(inputs)]
    return ", ".join(shapes) or ("no tensor" if inputs else "no inputs")
