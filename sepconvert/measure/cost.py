"""Multiply-accumulates and parameters of a model, counted on a trace of what it really computes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepconvert.errors import SepconvertError, first_line
from sepconvert.measure.accuracy import evaluation_mode, tensor_leaves
from sepconvert.trace import fresh

with warnings.catch_warnings():
    # fvcore scripts one of its losses on import, which recent torch calls deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, get_shape

_ROOT = "model"


@dataclass(frozen=True)
class Cost:
    """What a model costs, as fvcore counts it.

    `macs`: multiply-accumulates for *one sample*, one fused multiply-add being 1. `params`: elements of all
    parameters, shared ones once. `macs_by_module`: the same MACs by module name, each module with all that
    it contains, "" being the model; a module called twice counts twice. `uncounted_ops`: operators that
    fvcore has no rule for, hence counted 0 (additions, pooling, activations), with their numbers of calls.
    """

    macs: int
    params: int
    macs_by_module: dict[str, int]
    uncounted_ops: dict[str, int]

    @property
    def flops(self) -> int:
        """2 × `macs`: a multiplication and an addition each."""
        return 2 * self.macs


def count(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """Count `model(*inputs)` in eval mode with fvcore; the model's training flags and hooks stay as they are.

    The first dimension of the first tensor is the batch, and all counts are divided by it. Functional
    calls count towards the module whose `forward` makes them. Modules called by `.forward(...)`, and those
    of a model loaded by `torch.export`, show 0: their MACs appear in their parents. A module under two
    names appears under the first. What does not reach the output is not counted, nor would ONNX keep it.

    Raises `SepconvertError` if the model cannot run on the inputs or be traced.
    """
    first = next((value for value in inputs if isinstance(value, Tensor) and value.ndim), None)
    if first is None or len(first) == 0:
        raise SepconvertError(
            f"cost: expected inputs with a batch of at least 1, got {_shapes(inputs)}; give a batch of 1"
        )
    batch = len(first)
    analysis = FlopCountAnalysis(_TensorsOnly(model), fresh(inputs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::_convolution_mode", _same_padding_conv)
    with evaluation_mode(model), _hooks_kept(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            macs_by_module = analysis.by_module()
        except Exception as error:  # whatever the user's forward, the tracer and fvcore raise
            raise SepconvertError(
                f"cost: expected a model that torch.jit.trace can trace on {_shapes(inputs)}, got"
                f" {type(error).__name__}: {first_line(error)}; check the input shape first"
            ) from error
    return Cost(
        macs=round(macs_by_module[_ROOT] / batch),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs_by_module={
            name.removeprefix(_ROOT).removeprefix("."): round(macs / batch)
            for name, macs in macs_by_module.items()
            if name
        },
        uncounted_ops=dict(analysis.unsupported_ops(_ROOT)),
    )


class _TensorsOnly(nn.Module):
    """The model, with its outputs flattened to tensors: the tracer takes no dataclass or None for output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_ROOT, model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.get_submodule(_ROOT)(*inputs)
        tensors = tuple(tensor_leaves(output))
        if not tensors:  # nothing would reach the output, and everything be counted 0
            raise TypeError(f"the model returns {type(output).__name__}, in which no tensor is found")
        return tensors


def _same_padding_conv(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of a convolution with `padding="same"` or `"valid"`, an operator that fvcore lacks."""
    return int(conv_flop_count(*(get_shape(value) for value in (inputs[0], inputs[1], outputs[0]))))


@contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that fvcore leaves behind when tracing fails; the model could not be pickled then."""
    tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, kept in zip(tables, before, strict=True):
            for key in set(table) - kept:
                del table[key]


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    shapes = [str(tuple(each.shape)) for each in inputs if isinstance(each, Tensor)]
    return ", ".join(shapes) or ("no tensor" if inputs else "no inputs")
