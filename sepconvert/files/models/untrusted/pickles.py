"""Models pickled by torch.save: which classes a file may use, and how the user admits others.

A pickle is a program. torch's restricted unpickler (`weights_only=True`) calls only what a list names: here
layers of torch, torchvision and timm, a few harmless functions, and classes that the user allows.
"""

import argparse
import functools
import importlib.util
import io
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.utils import _pytree as pytree

from sepconvert.base.errors import SepconvertError, some_of
from sepconvert.base.limits import check_cost, check_length
from sepconvert.base.modules import modules
from sepconvert.files.callables import look_up, make_importable

# Packages of modules whose constructors build layers and do nothing else. All of timm would be too much:
# timm.task.DistillationTeacher is an nn.Module too, and its constructor downloads the model that it is given.
_TRUSTED_PACKAGES = (
    "torch.nn.modules.",
    "torch.nn.parallel.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchvision.transforms.",
    "timm.models.",
    "timm.layers.",
)

_ACTIVATIONS = (
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.hardsigmoid,
    F.sigmoid,
)


class _NumpyDtype:
    """Stand-in for `numpy.dtype`, whose own unpickling hands the state in the file to C code unchecked."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: Sequence[object]) -> None:
        self.code = f"{state[1]}{self.code}"  # the byte order


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> object:
    return np.frombuffer(data, np.dtype(dtype.code))[0].item()


def _module_class(kind: str, cls: type, source_file: str, source: str) -> type:
    return cls


# functools.partial calls only what the same pickle could already call itself.
_HARMLESS: dict[str, Callable[..., object]] = {
    "argparse.Namespace": argparse.Namespace,
    "functools.partial": functools.partial,
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    f"{__name__}._module_class": _module_class,
    **{f"{f.__module__}.{f.__name__}": f for f in _ACTIVATIONS},
}


def load_pickle(path: Path, allow: Sequence[str], trust: bool, *, legacy: bool) -> object:
    """Return what torch.save wrote to a file, with tensors on the CPU.

    Args:
        path: the file.
        allow: full names of further classes that the pickle may use, which are imported.
        trust: whether to run the file without restrictions.
        legacy: whether the file has the format of torch < 1.6, which is no zip archive.

    Raises:
        SepconvertError: the pickle names something that is not allowed, or costs too much (see `check_cost`).
        Exception: anything that torch raises for a damaged file.
    """
    with path.open("rb") as file:
        if trust:
            make_importable(Path.cwd())  # as for `allow`
            return torch.load(file, map_location="cpu", weights_only=False)
        if legacy:
            content, names = _read_legacy(file, path)
        else:
            check_length(torch._C.PyTorchFileReader(file).get_record("data.pkl"), str(path))
            file.seek(0)
            content, names = None, set(get_unsafe_globals_in_checkpoint(file))
    admitted = {name: _admit(name, allow) for name in sorted(names)}
    refused = [name for name, found in admitted.items() if found is None]
    if refused:
        raise _refusal(refused, path)
    # Pairs, because a file may know a class by a name from which it has moved since.
    known: list[Any] = [(found, name) for name, found in admitted.items() if found is not None]

    def read() -> object:
        # Each process opens the file itself: a fork would share the position in one that is open.
        source = path.open("rb") if content is None else io.BytesIO(content)
        with source, safe_globals(known), _no_constructors():
            return torch.load(source, map_location="cpu", weights_only=True)

    check_cost(lambda: _walk(read()), path.stat().st_size, str(path))
    return read()


def _walk(content: object) -> None:
    """Walk through everything in a file, attributes of modules too, as a copy of a model does later."""
    for value in pytree.tree_leaves(content):
        for module in modules(value) if isinstance(value, nn.Module) else ():
            pytree.tree_leaves(vars(module))


@contextmanager
def _no_constructors() -> Iterator[None]:
    """Make the constructor of every module raise `ValueError` within the block.

    torch.save's pickles restore modules without calling their constructors; a hostile one could have a layer
    of any size built. `nn.Module.__init__` is patched for the whole process: the block is not
    thread-safe, and another thread that builds a module meanwhile meets the error.
    """
    construct = nn.Module.__init__

    def refuse(module: nn.Module, *_: object, **__: object) -> None:
        raise ValueError(f"it calls the constructor of {type(module).__name__}, as no saved model does")

    nn.Module.__init__ = refuse  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = construct  # type: ignore[method-assign]


def _admit(name: str, allow: Sequence[str]) -> Callable[..., object] | None:
    """Return the object that a pickle may use under `name`, or None; import only trusted or allowed ones."""
    if name in allow:
        return _allowed_class(name)
    if name in _HARMLESS:
        return _HARMLESS[name]
    if not name.startswith(_TRUSTED_PACKAGES) or "__" in name or not _is_installed(name):
        return None
    module, _, attribute = name.rpartition(".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old names warn that they have moved
            found = vars(importlib.import_module(module)).get(attribute)
    except Exception:  # optional parts of these libraries fail to import in many ways
        return None
    # What a module merely imports (torch.fx, os) is not its own: the class must live in a trusted package.
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(_TRUSTED_PACKAGES):
        return None
    if issubclass(found, fx.GraphModule | torch.jit.ScriptModule):
        return None
    return found if issubclass(found, nn.Module | Enum) else None


def _allowed_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if not module or module == "__main__" or _is_standard_library(name):
        raise SepconvertError(
            f"`allow` {name}: expected a class of the model's own code, as pkg.Class; "
            "save the state_dict and pass `factory`, or pass `trust` if you made the file yourself"
        )
    found = look_up(module, attribute, f"`allow` {name}")
    if not isinstance(found, type):
        raise SepconvertError(
            f"`allow` {name}: a {type(found).__name__}, and only classes are admitted; "
            "save the state_dict and pass `factory`, or pass `trust` if you made the file yourself"
        )
    return found


def _refusal(names: list[str], path: Path) -> SepconvertError:
    way_out = "or save model.state_dict() where it was made, and pass `factory` file.py:callable"
    if any(name.startswith("__main__.") for name in names):
        return SepconvertError(
            f"{path}: needs {some_of(names)}, and the script that saved it, __main__, cannot be imported; "
            "save model.state_dict() there, and pass `factory` file.py:callable"
        )
    if any(name.startswith(("torch.ao.", "torch.nn.quantized.", "torchao.")) for name in names):
        return SepconvertError(
            f"{path}: is quantised ({some_of(names)}), and factors need kernels in floating point; convert "
            "the model before it is quantised, and quantise the result"
        )
    if "torch.nn.parameter.UninitializedParameter" in names:
        return SepconvertError(
            f"{path}: has layers without a shape yet (lazy modules); run the model once, and save it anew"
        )
    dangerous = [name for name in names if _is_standard_library(name)]
    if dangerous:
        return SepconvertError(
            f"{path}: refused, its pickle calls {some_of(dangerous)}, which could run anything and which "
            f"`allow` never admits; pass `trust` only if you made the file yourself, {way_out}"
        )
    absent = sorted({name.partition(".")[0] for name in names if name.startswith(_TRUSTED_PACKAGES)})
    absent = [package for package in absent if not _is_installed(package)]
    if absent:
        return SepconvertError(f"{path}: needs {' and '.join(absent)}, which is not installed; install it")
    allowing = " ".join(f"`allow` {name}" for name in names)
    return SepconvertError(
        f"{path}: refused, it needs classes that are not allowed; if you know them, pass {allowing}, "
        f"{way_out} (functions are never admitted)"
    )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _is_standard_library(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _read_legacy(file: BinaryIO, path: Path) -> tuple[bytes | None, set[str]]:
    """Check a file of torch < 1.6: five pickles, then data.

    Returns:
        The content in a form that torch's restricted unpickler reads, None if the file has it already; and
        the names in the pickles that this unpickler refuses.
    """
    pickles = []
    for _ in range(5):
        start = file.tell()
        check_length(file, str(path))
        length = file.tell() - start
        file.seek(start)
        pickles.append(file.read(length))
    # The model is the fourth, after the magic number, the version and the machine.
    stored, pickles[3] = pickles[3], _without_module_ids(pickles[3])
    content = b"".join([*pickles, file.read()]) if pickles[3] != stored else None
    return content, set().union(*map(_unsafe_globals, pickles))


def _unsafe_globals(pickled: bytes) -> set[str]:
    as_checkpoint = io.BytesIO()
    with zipfile.ZipFile(as_checkpoint, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    as_checkpoint.seek(0)
    return set(get_unsafe_globals_in_checkpoint(as_checkpoint))


def _without_module_ids(pickled: bytes) -> bytes:
    """Return the pickle with calls of `_module_class` in place of ("module", class, file, source) ids.

    Legacy files wrap every module class in such an id, and torch's restricted unpickler knows only those of
    storages. It reads the result with the same list of names: a mistake here can fail, but cannot run code.
    """
    operations = list(pickletools.genops(pickled))
    marks: list[int] = []
    memo: dict[object, object] = {}
    edits: list[tuple[int, int, bytes]] = []
    opened = 0
    for index, (opcode, argument, position) in enumerate(operations):
        if opcode.name == "MARK":
            marks.append(index)
        elif pickletools.markobject in opcode.stack_before:
            opened = marks.pop()
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = operations[index - 1][1]
        elif opcode.name == "BINPERSID":
            first, value, _ = operations[opened + 1]
            if (memo.get(value) if "GET" in first.name else value) == "module":
                mark = operations[opened][2] or 0
                edits += [
                    (mark, mark, f"c{__name__}\n_module_class\n".encode()),
                    (position or 0, (position or 0) + 1, b"R"),
                ]
    result, done = bytearray(), 0
    for start, end, replacement in sorted(edits):
        result += pickled[done:start] + replacement
        done = end
    return bytes(result + pickled[done:])
