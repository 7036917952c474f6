"""Tensors in nested inputs and outputs: finding, copying, casting and placing them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepconvert.base.modules import unshadowed

Inputs = tuple[Any, ...]
"""Positional arguments of a forward: tensors, containers of tensors, and other values."""


V = TypeVar("V")


def tensors_in(inputs: Any) -> list[Tensor]:
    """Return the tensors of nested lists, tuples and dictionaries, in the order of torch's pytree."""
    return [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]


def floating(change: Callable[[Tensor], Tensor], inputs: V) -> V:
    """Return the same nested inputs with `change` applied to each floating-point tensor."""
    changed: V = pytree.tree_map_only(
        Tensor, lambda value: change(value) if value.is_floating_point() else value, inputs
    )
    return changed


def fresh(inputs: V) -> V:
    """Return the same nested inputs with tensors copied: a forward pass may write to its arguments."""
    copied: V = pytree.tree_map_only(Tensor, torch.clone, inputs)
    return copied


def sha256_of(values: Iterable[object]) -> str:
    """Return the SHA-256 of the bytes of tensors, in hexadecimal; other values are skipped."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):  # a module's extra state may be anything
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return the inputs with their floating-point tensors in another dtype."""
    return floating(lambda value: value.to(dtype), inputs)


def random_like(inputs: Inputs, more: int) -> Inputs:
    """Return random values in the place of the inputs, with so many `more` samples."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Tensor) -> Tensor:
        shape = (value.shape[0] + more, *value.shape[1:]) if value.ndim else value.shape
        return torch.rand(shape, generator=generator).to(value)

    return floating(other, inputs)


def placed(x: Tensor, model: nn.Module) -> Tensor:
    """Return `x` on the model's device, and in its dtype if `x` is floating-point (see `model_dtype`)."""
    like = _first_floating(model)
    if like is None:
        return x
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter or buffer; float32 if there is none."""
    like = _first_floating(model)
    return torch.float32 if like is None else like.dtype


def _first_floating(model: nn.Module) -> Tensor | None:
    tensors = chain(unshadowed(model).parameters(), unshadowed(model).buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def tensor_leaves(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a model's output, depth first: of tuples, lists, mappings and dataclasses."""
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


def largest(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value in some tensors; 0 if all of them are empty."""
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
