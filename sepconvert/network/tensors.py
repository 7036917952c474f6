"""Tensors in nested inputs and outputs: finding, copying, casting and placing them."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import signature
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepconvert.base.errors import SepconvertError
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


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's `state_dict` by name; an extra state may hold anything else."""
    return {
        name: value for name, value in unshadowed(model).state_dict().items() if isinstance(value, Tensor)
    }


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


def placed(inputs: V, model: nn.Module) -> V:
    """Return inputs on the model's device, floating-point tensors in its dtype (see `model_dtype`)."""
    like = _first_floating(model)
    if like is None:
        return inputs
    there: V = pytree.tree_map_only(
        Tensor,
        lambda x: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device),
        inputs,
    )
    return there


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


def ordered_like(example: Any, values: Any) -> Any:
    """Return inputs with the entries of each mapping in the order of an example, as files have them."""
    if isinstance(example, Mapping) and isinstance(values, Mapping):
        return {key: ordered_like(each, values[key]) for key, each in example.items() if key in values}
    if isinstance(example, tuple | list) and isinstance(values, tuple | list):
        return tuple(ordered_like(*each) for each in zip(example, values, strict=False))
    return values


@dataclass(frozen=True, eq=False)
class InputBatch:
    """Inputs for some samples: positional arguments of a forward, with the samples along one dimension.

    The first tensor that has this dimension says how many samples there are. A tensor without it, or of
    another size along it, belongs to all of them.
    """

    inputs: Inputs
    axis: int = 0

    def __len__(self) -> int:
        return next(
            (value.shape[self.axis] for value in tensors_in(self.inputs) if value.ndim > self.axis), 1
        )

    def __getitem__(self, which: slice | Tensor) -> "InputBatch":
        """Return the samples of a slice, or of a mask or of indices: one dimension, N."""
        size, place = len(self), (*(slice(None),) * self.axis, which)

        def part(value: Tensor) -> Tensor:
            return value[place] if self._counts(value, size) else value

        return replace(self, inputs=pytree.tree_map_only(Tensor, part, self.inputs))

    def split(self, size: int) -> Iterator["InputBatch"]:
        """Yield the samples in batches of `size`, the last of which may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors, without the dimension of the samples."""
        size = len(self)
        return tuple(
            (*value.shape[: self.axis], *value.shape[self.axis + 1 :])
            if self._counts(value, size)
            else tuple(value.shape)
            for value in tensors_in(self.inputs)
        )

    @property
    def floating(self) -> list[Tensor]:
        """Floating-point tensors, with the dimension of the samples first where they have it."""
        size = len(self)
        return [
            value.movedim(self.axis, 0) if self._counts(value, size) else value
            for value in tensors_in(self.inputs)
            if value.is_floating_point()
        ]

    def on(self, model: nn.Module) -> "InputBatch":
        """Return the inputs `placed` on a model's device and in its dtype."""
        return replace(self, inputs=placed(self.inputs, model))

    def run(self, model: nn.Module) -> Any:
        """Return what a model returns for a copy of the inputs."""
        return model(*fresh(self.inputs))

    @classmethod
    def joined(cls, batches: Sequence["InputBatch"]) -> "InputBatch":
        """Return several batches of samples of the same shapes as one."""
        first, size = batches[0], len(batches[0])
        leaves, structure = pytree.tree_flatten(first.inputs)
        others = [pytree.tree_leaves(each.inputs) for each in batches]
        whole = [
            torch.cat([each[place] for each in others], first.axis)
            if isinstance(leaf, Tensor) and first._counts(leaf, size)
            else leaf
            for place, leaf in enumerate(leaves)
        ]
        return cls(pytree.tree_unflatten(whole, structure), first.axis)

    def _counts(self, value: Tensor, size: int) -> bool:
        """Return whether a tensor holds a part for each of `size` samples."""
        return value.ndim > self.axis and value.shape[self.axis] == size


class NamedInputs:
    """Mixin of models whose inputs have names, which need not be those of Python's parameters.

    Attributes:
        input_names: names of the inputs, in order.
    """

    input_names: tuple[str, ...]


class StandIn(nn.Module):
    """A module that runs another model in some way, and takes its arguments; a copy of it is itself.

    Attributes:
        stands_for: the model, which is no part of the module.
    """

    stands_for: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", model)

    def __deepcopy__(self, memo: object) -> "StandIn":
        return copy.copy(self)


def by_position(names: Sequence[str], given: Mapping[str, Any]) -> Inputs:
    """Return inputs by name in the order of the names.

    Raises:
        SepconvertError: one of them is missing.
    """
    if missing := [name for name in names if name not in given]:
        raise SepconvertError(
            f"the inputs lack {missing[0]}, which the ONNX file takes, and hold "
            f"{', '.join(map(str, given))}; pass a mapping with {', '.join(names)}, or a tuple in that order"
        )
    return tuple(given[name] for name in names)


def arguments(model: nn.Module, given: Any) -> Inputs:
    """Return what a data set yields for a model as positional arguments of its forward.

    A tuple or list is several arguments if the forward takes as many without a keyword, a mapping is
    arguments by name if it takes these; anything else is one argument.

    Raises:
        SepconvertError: the forward takes one of the named arguments by keyword only.
    """
    if isinstance(model, StandIn):
        return arguments(model.stands_for, given)
    if isinstance(given, Tensor):
        return (given,)
    if isinstance(model, NamedInputs) and isinstance(given, Mapping):
        return by_position(model.input_names, given)
    takes = signature(model.forward)
    if isinstance(given, Mapping):
        try:
            bound = takes.bind(**given)
        except TypeError:
            return (given,)
        bound.apply_defaults()
        if bound.kwargs:
            raise SepconvertError(
                f"data: the forward takes {', '.join(map(str, bound.kwargs))} by keyword only; let it take "
                "them by position, too"
            )
        return bound.args
    if isinstance(given, tuple | list):
        try:
            takes.bind(*given)
        except TypeError:
            return (given,)
        return tuple(given)
    return (given,)


def batch_dimension(model: nn.Module, inputs: Inputs) -> int:
    """Return the dimension of the inputs that counts samples: the first, unless it is seen to be the second.

    Only inputs without a picture N × C × H × W are tried: two samples, side by side in the second dimension,
    must give what each gives alone, and side by side in the first something else.
    """
    tensors = [value for value in tensors_in(inputs) if value.is_floating_point()]
    if not tensors or any(value.ndim not in (2, 3, 5) for value in tensors):
        return 0
    return next((axis for axis in (0, 1) if _are_independent(model, inputs, axis)), 0)


def _are_independent(model: nn.Module, inputs: Inputs, axis: int) -> bool:
    """Return whether samples side by side in a dimension give what each of them gives alone."""
    one = InputBatch(inputs, axis)[:1]
    other = InputBatch(random_like(one.inputs, 0), axis)
    try:
        with torch.no_grad():
            alone = [list(tensor_leaves(each.run(model))) for each in (one, other)]
            together = list(tensor_leaves(InputBatch.joined([one, other]).run(model)))
    except Exception:  # a size that the model does not take
        return False
    return all(_is_joined(*parts) for parts in zip(*alone, together, strict=True))


def _is_joined(one: Tensor, other: Tensor, together: Tensor) -> bool:
    """Return whether a tensor holds two others side by side in some dimension."""
    if one.shape != other.shape or one.ndim != together.ndim:
        return False
    scale = max(largest([one, other]), torch.finfo(torch.float32).tiny)
    return any(
        together.shape == joined.shape and float((together - joined).abs().max()) <= 1e-3 * scale
        for joined in (torch.cat([one, other], axis) for axis in range(one.ndim))
    )
