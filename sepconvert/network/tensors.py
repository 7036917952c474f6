"""Tensors in nested inputs and outputs: finding, copying, casting and placing them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = tuple[Any, ...]


V = TypeVar("V")


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors in there, those in lists, tuples and dictionaries too, in the order of torch's pytree."""
    return [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]


def floating(change: Callable[[Tensor], Tensor], inputs: V) -> V:
    """The same with its floating-point tensors changed."""
    changed: V = pytree.tree_map_only(
        Tensor, lambda value: change(value) if value.is_floating_point() else value, inputs
    )
    return changed


def fresh(inputs: V) -> V:
    """Copies of the tensors in there: a forward pass may write to what it is given."""
    copied: V = pytree.tree_map_only(Tensor, torch.clone, inputs)
    return copied


def placed(x: Tensor, model: nn.Module) -> Tensor:
    """`x` on the device of the model's first floating-point parameter or buffer, and of its dtype."""
    floating = (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())
    like = next(floating, None)
    if like is None:
        return x
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter or buffer; float32 if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating-point tensors among the inputs in another dtype."""
    return floating(lambda value: value.to(dtype), inputs)


def tensor_leaves(output: object) -> Iterator[Tensor]:
    """The tensors in the output of a model, depth first: of tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensor_leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensor_leaves(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensor_leaves(getattr(output, field.name))
