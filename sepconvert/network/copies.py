"""Copies of models, for experiments or to keep, and the mode that they run in."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from sepconvert.base.errors import SepconvertError, quoted
from sepconvert.base.modules import deep_copy, modules, unshadowed
from sepconvert.network.tensors import InputBatch

M = TypeVar("M", bound=nn.Module)


def checked(model: nn.Module) -> nn.Module:
    """Return the model, `unwrapped`.

    Raises:
        SepconvertError: it is no module, or has parameters without a shape, without data, or complex ones.
    """
    if not isinstance(model, nn.Module):
        raise SepconvertError(
            f"model: expected a torch.nn.Module, got {quoted(model)}; pass the trained model itself"
        )
    model = unwrapped(model)
    for name, tensor in chain(unshadowed(model).named_parameters(), unshadowed(model).named_buffers()):
        if is_lazy(tensor):
            raise SepconvertError(f"{name} has no shape yet; run the model on all of its parts once")
        if tensor.is_meta:
            raise SepconvertError(f"{name} has no data (it is on the meta device); load its weights first")
        if tensor.is_complex():
            raise SepconvertError(
                f"{name} is complex, and models are verified in real numbers; give it two real parts"
            )
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of `torch.compile` and of data parallelism, or the model itself."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    # Of torch.compile, whose class is costly to import.
    return dict(module._modules.items()).get("_orig_mod")


def duplicate(model: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy, whatever the model holds; `memo` is deepcopy's: copies made beforehand, by id.

    Weights computed by the old `torch.nn.utils.weight_norm` hooks and activations that a module keeps
    are no leaves of the autograd graph, and deepcopy refuses those: they are copied detached. Wrappers of
    `torch.compile` and of data parallelism are left out: they refer to the original model.
    """
    memo = {} if memo is None else memo
    for module in modules(model):
        for value in pytree.tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in reversed(modules(model)):  # one may be wrapped in another
        if (wrapped := _wrapped(module)) is not None:
            memo[id(module)] = deep_copy(wrapped, memo)
    return deep_copy(model, memo)


def shared_parameters(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `duplicate` that holds the parameters as new objects on the old memory."""
    return {
        id(parameter): nn.Parameter(
            parameter.clone() if parameter.is_inference() else parameter.detach(), parameter.requires_grad
        )
        for parameter in unshadowed(model).parameters()
        if type(parameter) is nn.Parameter
    }


def private_copy(model: M, dtype: torch.dtype | None = None) -> M:
    """Return a copy in eval mode, which a forward pass may change, in another `dtype` if one is given.

    Its parameters are new objects on the old memory, since large models are copied many times here and
    no forward pass in eval mode writes to parameters; changing their dtype leaves the original alone.
    """
    copied = duplicate(model, shared_parameters(model))
    for module in modules(copied):  # not .eval(): modules from torch.export refuse it
        module.training = False
    return copied if dtype is None else _in_dtype(copied, dtype)


def _in_dtype(model: M, dtype: torch.dtype) -> M:
    """Return `model.to(dtype)`, in place, with the tensors that modules hold as plain attributes cast too."""
    for module in modules(model):
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(module, name, value.to(dtype))
    unshadowed(model).to(dtype)
    return model


def quick_copy(model: M, samples: InputBatch, dtype: torch.dtype | None = None) -> M:
    """Return a `private_copy` with channels last in memory, in which convolutions run fastest.

    Where the copy does not run on the samples in that layout, it has the original one: a model may look at a
    tensor through `view`, which takes one layout alone.
    """
    copied = private_copy(model, dtype)
    try:
        unshadowed(copied).to(memory_format=torch.channels_last)  # which tensors of rank 5 refuse
        with torch.no_grad():
            samples[:1].on(copied).run(copied)
    except Exception:  # another cause will show when the other copy is run
        return private_copy(model, dtype)
    return copied


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode for a while, then give every module its own training flag back.

    Models loaded by `torch.export` refuse `eval()` and `train()`: they compute in the mode that they were
    exported in, whatever their flags say.
    """
    flags = [(module, module.training) for module in modules(model)]
    _set_mode(model, training=False)
    try:
        yield
    finally:
        # Through train() first: some classes override it, to merge weights for eval and unmerge them.
        _set_mode(model, training=flags[0][1])
        for module, flag in flags:
            module.training = flag


def _set_mode(model: nn.Module, *, training: bool) -> None:
    try:
        unshadowed(model).train(training)
    except NotImplementedError:
        for module in modules(model):
            module.training = training
