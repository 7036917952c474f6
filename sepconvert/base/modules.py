"""Modules of a model, whatever its classes call their own attributes.

A class may use the name of a method of `nn.Module` for a value of its own (`self.modules = []`), and it may
define `__eq__`, `__bool__` or `__getattr__`. Torch runs such a model, and nothing here relies on these names.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from sepconvert.base.errors import SepconvertError, first_line

M = TypeVar("M", bound=nn.Module)


_METHODS = frozenset(
    name for name, value in vars(nn.Module).items() if inspect.isfunction(value) and name[0] != "_"
)


# Methods that tell what a module consists of. A class of the user's that defines one means something else.
_STRUCTURE = frozenset(
    name
    for name in _METHODS
    if name.removeprefix("named_") in ("modules", "children", "parameters", "buffers")
    or name in ("get_submodule", "set_submodule", "get_parameter", "get_buffer")
)


# Defined by a class, these change what torch finds in sets, tests for truth, or is told that a module has.
_SPECIAL = ("__eq__", "__hash__", "__bool__", "__len__", "__getattr__")


# What a facade shares with its module: the very dictionaries, in which tensors are exchanged.
_SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set",
    "_state_dict_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def named_modules(model: nn.Module, *, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, as `nn.Module.named_modules` does.

    Args:
        model: any module.
        duplicates: whether to yield a module that is shared once for each of its paths.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen and not duplicates:
            continue
        seen.add(id(module))
        yield path, module
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module._modules.items()]
        waiting.extend((name, child) for name, child in reversed(children) if child is not None)


def modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, itself first."""
    return [module for _, module in named_modules(model)]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path.

    Raises:
        KeyError: there is none.
    """
    found = model
    for name in path.split(".") if path else ():
        child = found._modules[name]
        if child is None:
            raise KeyError(path)
        found = child
    return found


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path, which is not the model's own."""
    parent, _, name = path.rpartition(".")
    submodule(model, parent)._modules[name] = module


def has(module: nn.Module, name: str) -> bool:
    """Return whether a module holds an attribute; a `__getattr__` of its own may answer for any name."""
    return name in nn.Module.__dir__(module)  # type: ignore[no-untyped-call]  # torch's own


def deep_copy(model: M, memo: dict[int, Any]) -> M:
    """Return what `copy.deepcopy` returns, whatever a `__getattr__` of a module answers.

    It asks each module for `__deepcopy__`, and calls the answer.

    Raises:
        SepconvertError: a module, or what it holds, cannot be copied.
    """
    answering = [
        module
        for module in modules(model)
        if id(module) not in memo and not hasattr(type(module), "__deepcopy__")
        if getattr(module, "__deepcopy__", None) is not None
    ]
    memo.update((id(module), type(module).__new__(type(module))) for module in answering)
    try:
        for module in answering:
            vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's `__deepcopy__` raises
        raise SepconvertError(
            f"the model cannot be copied: {type(error).__name__}: {first_line(error)}; it is converted in a "
            "copy, so let copy.deepcopy(model) work"
        ) from error


def unshadowed(model: nn.Module) -> nn.Module:
    """Return the model, or a facade on which the methods of `nn.Module` work, for libraries and for us.

    The facade has the same paths, the same parameters and buffers, also after they are exchanged, and
    calls the model. Modules that shadow nothing and contain none that do are part of it themselves.
    """
    found: dict[int, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if id(module) not in found:
            found[id(module)] = module  # for a module that contains itself
            children = {
                name: None if child is None else plain(child) for name, child in module._modules.items()
            }
            if _shadows(module) or any(
                child is not module._modules[name] for name, child in children.items()
            ):
                found[id(module)] = _Facade(module, children)
        return found[id(module)]

    return model if isinstance(model, torch.jit.ScriptModule) else plain(model)


@contextmanager
def hashable(model: nn.Module) -> Iterator[None]:
    """Let torch look up modules in dictionaries within the block, whose classes define `__eq__` alone.

    Those classes are changed for the whole process: the block is not thread-safe.
    """
    classes: set[Any] = {type(module) for module in modules(model) if type(module).__hash__ is None}
    for cls in classes:
        cls.__hash__ = object.__hash__
    try:
        yield
    finally:
        for cls in classes:
            cls.__hash__ = None


class _Facade(nn.Module):
    """Facade for a module that shadows names of `nn.Module`."""

    def __init__(self, module: nn.Module, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        vars(self).update({name: vars(module)[name] for name in _SHARED})
        vars(self).update(_module=module, training=module.training)
        self._modules.update(children)

    def train(self, mode: bool = True) -> "_Facade":
        """Set the mode of the module too."""
        vars(self)["_module"].training = mode
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return unshadowed(deep_copy(vars(self)["_module"], memo))

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the module."""
        return vars(self)["_module"](*args, **kwargs)


def _shadows(module: nn.Module) -> bool:
    """Return whether a module, or its class, uses names of `nn.Module` in another way."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    own = vars(module).keys() & _METHODS
    # What torch.export loads refuses to change its mode by functions of its own.
    refusals = {name for name in own & {"train", "eval"} if callable(vars(module)[name])}
    cls: Any = type(module)  # mypy takes no class for hashable
    return bool(own - refusals - {"forward"}) or _class_shadows(cls)


@functools.cache
def _class_shadows(cls: Any) -> bool:
    if any(not _is_torch(_definition(cls, name)[0]) for name in (*_STRUCTURE, *_SPECIAL)):
        return True
    return any(not inspect.isroutine(_definition(cls, name)[1]) for name in _METHODS)


def _definition(cls: type, name: str) -> tuple[type, object]:
    """Return the class that defines an attribute, and its definition; `object` if none does."""
    return next(((base, vars(base)[name]) for base in cls.__mro__ if name in vars(base)), (object, None))


def _is_torch(cls: type) -> bool:
    return cls is object or cls.__module__.partition(".")[0] == "torch"
