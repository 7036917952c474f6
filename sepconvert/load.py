"""Model files to models, without running what the file says.

A pickle is a program, and so is a torch.export archive: both are read here by interpreters that know a
short list of harmless names. Everything else is refused by name, with the option that admits it.
"""

import argparse
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import operator
import os
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.export.pt2_archive import PT2ArchiveReader
from torch.nn import functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sepconvert.errors import SepconvertError, shortened
from sepconvert.pickles import check_length, check_pickle, pickle_of_archive
from sepconvert.trace import unwrapped

__all__ = ["LoadedModel", "load_model", "parse_input_shape", "resolve_callable"]

MAX_INPUT_ELEMENTS = 2**26  # 256 MiB of float32 for one sample: beyond it, a shape is a slip of the pen
_MAX_EXAMPLE = 2**22  # elements of an input of which a file, and not its user, tells the shape


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    `model` is on the CPU, in the mode (train or eval) in which it was saved or built. `example_inputs` have a
    batch dimension: those stored in a .pt2 archive, or zeros of the input size that a timm model names.
    `stored_dtype` is that of a checkpoint's weights where the model of the factory has another.
    """

    model: nn.Module
    path: Path
    sha256: str
    example_inputs: tuple[Tensor, ...] | None
    stored_dtype: torch.dtype | None = None


def load_model(
    path: str | os.PathLike[str],
    *,
    factory: str | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
) -> LoadedModel:
    """Read a model file; its content, not its extension, decides the format.

    Formats: a module or a state_dict saved by `torch.save` (zip or legacy), `.safetensors`, a `.pt2` archive
    of `torch.export.save`. `factory` (see `resolve_callable`) builds the model that takes the weights of the
    file, and is needed where the file holds a state_dict; of several, plain weights go before averaged (EMA)
    ones. `allow` admits further classes to the pickle, by their full name. `trust` runs the file as the
    program that it is, unrestricted.

    Raises `SepconvertError` for every file that is no model, is damaged, or asks for more than is allowed.
    """
    path = Path(path)
    build = _builder(factory) if factory else None
    kind = _format(path)
    examples: tuple[Tensor, ...] | None = None
    content: object
    try:
        if kind == "pt2":
            content, examples = _load_pt2(path, trust)
        elif kind == "safetensors":
            content = load_file(path)
        else:
            content = _load_pickle(path, allow, trust, legacy=kind == "legacy torch.save")
        found = _unwrap(content, path)
        if isinstance(found, nn.Module):
            _check_state(found)
        weights = found.state_dict() if isinstance(found, nn.Module) else found
        _check_tensors(found, weights, path)
    except SepconvertError:
        raise
    except Exception as error:  # a damaged or hostile file can make the readers raise anything
        advice = (
            "install what it needs, or run from the directory that holds it"
            if isinstance(error, ImportError)  # of a file that is trusted
            else "it is damaged, or of another version of torch: save it again"
        )
        raise SepconvertError(
            f"{path}: cannot be read as a {kind} file ({_one_line(error)}); {advice}"
        ) from error
    if any(isinstance(value, Tensor) and value.is_meta for value in weights.values()):
        raise SepconvertError(f"{path}: has weights without data (on the meta device); save a trained model")
    cast_from = None
    if build is not None:
        model = build()
        stored, own = _float_dtypes(weights), _float_dtypes(model.state_dict())
        cast_from = stored.pop() if len(stored) == len(own) == 1 and stored != own else None
        _load_weights(model, weights, path)
    elif isinstance(found, nn.Module):
        model = found
    else:
        raise SepconvertError(
            f"{path}: holds a state_dict ({len(found)} entries), which does not say how to build the model; "
            "pass --factory pkg.mod:callable or --factory file.py:callable that returns it"
        )
    model = model.cpu()
    return LoadedModel(model, path, _sha256(path), examples or _timm_example(model), cast_from)


def parse_input_shape(text: str) -> tuple[int, ...]:
    """`"3x224x224"` as `(3, 224, 224)`: the shape of one sample, without the batch dimension."""
    sizes = text.strip().lower().replace("×", "x").split("x")
    if not all(re.fullmatch(r"[0-9]{1,9}", size.strip()) for size in sizes):
        raise SepconvertError(f"input shape {text!r}: expected sizes joined by x, such as 3x224x224")
    shape = tuple(int(size) for size in sizes)
    if not _is_sensible(shape):
        raise SepconvertError(
            f"input shape {text!r}: sizes must be at least 1, their product at most {MAX_INPUT_ELEMENTS}; "
            "give the shape of one sample, such as 3x224x224"
        )
    return shape


def resolve_callable(spec: str, option: str) -> Callable[..., object]:
    """The callable that `spec` names, as `pkg.mod:callable` or `file.py:callable`.

    The working directory is importable, as it is for `python -m`; so is the directory of `file.py`. Errors
    begin with `option`, the command line option that `spec` came from.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SepconvertError(f"{option} {spec}: expected pkg.mod:callable or file.py:callable")
    found = _look_up(source, name, f"{option} {spec}")
    if not callable(found):
        raise SepconvertError(f"{option} {spec}: {name} is a {type(found).__name__}; expected a callable")
    return found


# Formats ------------------------------------------------------------------------------------------

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def _format(path: Path) -> str:
    """`"torch.save"`, `"legacy torch.save"`, `"pt2"` or `"safetensors"`."""
    expected = "expected a model saved by torch.save, a .safetensors or a .pt2 file"
    if path.is_dir():
        raise SepconvertError(f"{path}: is a directory; {expected}")
    if path.exists() and not path.is_file():
        raise SepconvertError(f"{path}: is no regular file; {expected}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise SepconvertError(f"{path}: there is no such file; {expected}") from None
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path, expected)
    if head.startswith(_LEGACY_MAGIC):
        return "legacy torch.save"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    if not head:
        got = "is empty: its download or copy was cut short"
    elif head.startswith(b"version https://git-lfs"):
        got = "is a Git LFS pointer, not the model: run git lfs pull"
    elif head.startswith(b"\x80"):
        got = "is a pickle that torch.save did not write"
    elif path.suffix == ".onnx":
        got = "is an ONNX model, not a PyTorch one"
    elif head.isascii():
        got = f"is a text file that begins {head[:20].decode()!r}"
    else:
        got = f"is no model file, or damaged (it begins with the bytes {head[:8].hex(' ')})"
    raise SepconvertError(f"{path}: {got}; {expected}")


def _zip_format(path: Path, expected: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            inflated = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # not only BadZipFile: a damaged directory also fails to decode
        raise SepconvertError(
            f"{path}: a truncated or damaged archive ({_one_line(error)}); copy it again"
        ) from error
    # torch compresses nothing: what inflates was made to fill the memory of whoever reads it.
    if inflated > 2 * path.stat().st_size + 2**26:
        raise SepconvertError(
            f"{path}: inflates from {path.stat().st_size / 1e6:,.1f} to {inflated / 1e6:,.0f} MB, and torch "
            f"writes no compressed archives; {expected}"
        )
    inner = {name.partition("/")[2] for name in members}
    if "constants.pkl" in inner:
        raise SepconvertError(
            f"{path}: a TorchScript archive, whose layers cannot be replaced; {expected}: save the module "
            "that was scripted with torch.save(model, 'model.pt'), or its state_dict to use with --factory"
        )
    if "archive_format" in inner:
        return "pt2"
    if "data.pkl" in inner:
        return "torch.save"
    if "serialized_exported_program.json" in members:
        raise SepconvertError(
            f"{path}: written by torch.export of torch < 2.8; export it again with a newer torch"
        )
    raise SepconvertError(f"{path}: a zip file that is no model (it holds {_some(members)}); {expected}")


# Pickles ------------------------------------------------------------------------------------------

# Where modules live whose constructors build layers and do nothing else. All of timm would be too much:
# timm.task.DistillationTeacher is an nn.Module too, and its constructor downloads what it is told to.
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
    """Stands in for `numpy.dtype`, whose own unpickling hands the state in the file to C code unchecked."""

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
    "sepconvert.load._module_class": _module_class,
    **{f"{f.__module__}.{f.__name__}": f for f in _ACTIVATIONS},
}


def _load_pickle(path: Path, allow: Sequence[str], trust: bool, *, legacy: bool) -> object:
    with path.open("rb") as file:
        if trust:
            _make_importable(Path.cwd())  # as for --allow
            return torch.load(file, map_location="cpu", weights_only=False)
        if legacy:
            readable, names, pickles = _legacy_file(file, path)
        else:
            pickles = [pickle_of_archive(file, str(path))]
            file.seek(0)
            readable, names = file, set(get_unsafe_globals_in_checkpoint(file))
        admitted = {name: _admit(name, allow) for name in sorted(names)}
        refused = [name for name, found in admitted.items() if found is None]
        if refused:
            raise _refusal(refused, path)
        for pickled in pickles:
            check_pickle(pickled, str(path))
        readable.seek(0)
        # Pairs, since a class that has moved since is known to the file by its old name only.
        known: list[Any] = [(found, name) for name, found in admitted.items() if found is not None]
        with safe_globals(known), _no_constructors():
            return torch.load(readable, map_location="cpu", weights_only=True)


@contextmanager
def _no_constructors() -> Iterator[None]:
    """Pickles restore modules without their constructors, which would allocate what a file tells them to."""
    construct = nn.Module.__init__

    def refuse(module: nn.Module, *_: object, **__: object) -> None:
        raise ValueError(f"it calls the constructor of {type(module).__name__}, as no saved model does")

    nn.Module.__init__ = refuse  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = construct  # type: ignore[method-assign]


def _admit(name: str, allow: Sequence[str]) -> Callable[..., object] | None:
    """The object that a pickle may use under `name`, or None. Imports only what is trusted or allowed."""
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
            f"--allow {name}: expected a class of the model's own code, as pkg.Class; "
            "save the state_dict and pass --factory, or pass --trust if you made the file yourself"
        )
    found = _look_up(module, attribute, f"--allow {name}")
    if not isinstance(found, type):
        raise SepconvertError(
            f"--allow {name}: a {type(found).__name__}, and only classes are admitted; "
            "save the state_dict and pass --factory, or pass --trust if you made the file yourself"
        )
    return found


def _refusal(names: list[str], path: Path) -> SepconvertError:
    way_out = "or save model.state_dict() where it was made, and pass --factory file.py:callable"
    if any(name.startswith("__main__.") for name in names):
        return SepconvertError(
            f"{path}: needs {_some(names)}, and the script that saved it, __main__, cannot be imported; "
            "save model.state_dict() there, and pass --factory file.py:callable"
        )
    if any(name.startswith(("torch.ao.", "torch.nn.quantized.", "torchao.")) for name in names):
        return SepconvertError(
            f"{path}: is quantised ({_some(names)}), and factors need kernels in floating point; convert the "
            "model before it is quantised, and quantise the result"
        )
    if "torch.nn.parameter.UninitializedParameter" in names:
        return SepconvertError(
            f"{path}: has layers without a shape yet (lazy modules); run the model once, and save it anew"
        )
    dangerous = [name for name in names if _is_standard_library(name)]
    if dangerous:
        return SepconvertError(
            f"{path}: refused, its pickle calls {_some(dangerous)}, which could run anything and no --allow "
            f"admits; pass --trust only if you made the file yourself, {way_out}"
        )
    absent = sorted({name.partition(".")[0] for name in names if name.startswith(_TRUSTED_PACKAGES)})
    absent = [package for package in absent if not _is_installed(package)]
    if absent:
        return SepconvertError(f"{path}: needs {' and '.join(absent)}, which is not installed; install it")
    options = " ".join(f"--allow {name}" for name in names)
    return SepconvertError(
        f"{path}: refused, it needs classes that are not allowed; if you know them, pass {options}, "
        f"{way_out} (functions are admitted by no option)"
    )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _is_standard_library(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _legacy_file(file: BinaryIO, path: Path) -> tuple[BinaryIO, set[str], list[bytes]]:
    """A file of torch < 1.6 (five pickles, then data), made readable, and names that torch refuses."""
    pickles = []
    for _ in range(5):
        start = file.tell()
        check_length(file, str(path))
        length = file.tell() - start
        file.seek(start)
        pickles.append(file.read(length))
    # The model is the fourth, after the magic number, the version and the machine.
    rewritten = _without_module_ids(pickles[3])
    if rewritten != pickles[3]:
        pickles[3] = rewritten
        file = io.BytesIO(b"".join([*pickles, file.read()]))
    return file, set().union(*map(_unsafe_globals, pickles)), pickles


def _unsafe_globals(pickled: bytes) -> set[str]:
    as_checkpoint = io.BytesIO()
    with zipfile.ZipFile(as_checkpoint, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    as_checkpoint.seek(0)
    return set(get_unsafe_globals_in_checkpoint(as_checkpoint))


def _without_module_ids(pickled: bytes) -> bytes:
    """The same pickle with calls of `_module_class` in place of ("module", class, file, source) ids.

    Legacy files wrap every module class in such an id; torch's restricted unpickler knows those of storages
    alone. It still reads the result, with the same list of names: a mistake here can fail but run nothing.
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
                    (mark, mark, b"csepconvert.load\n_module_class\n"),
                    (position or 0, (position or 0) + 1, b"R"),
                ]
    result, done = bytearray(), 0
    for start, end, replacement in sorted(edits):
        result += pickled[done:start] + replacement
        done = end
    return bytes(result + pickled[done:])


# torch.export archives ----------------------------------------------------------------------------

# torch.export.load runs code that the archive names in many places: pickles, operators looked up in the
# attributes of torch, sympy expressions that are evaluated, names that go into generated Python. So every
# string of the program must look like what it is for: what torch.export writes does, and code does not.
_WORD = re.compile(r"\w*", re.ASCII)
_DOTTED = re.compile(r"(?!(?:.*\.)?__)[\w.]*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|torchvision)\.(?!from_file\b|save\b|__)\w+(\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt)|math\.trunc"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|getitem)",
    re.ASCII,
)
_EXPRESSION = re.compile(r"[\w\s.,()'=+*/-]*", re.ASCII)
_SYMPY_WORD = re.compile(
    r"[a-z]+[0-9]+|Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Mod|Not|And|Or|[Tt]rue|[Ff]alse|floor"
    r"|ceiling|Equality|Unequality|(Strict)?(Less|Greater)Than|Identity|FloorDiv|ModularIndexing|Where|PythonMod"
    r"|CleanDiv|CeilDiv|CeilToInt|FloorToInt|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|TruncToFloat"
    r"|TruncToInt|RoundToInt|ToFloat|positive|nonnegative|negative|nonzero|integer|real|precision",
    re.ASCII,
)
_FREE_TEXT = {"as_string", "as_strings", "metadata", "torch_version", "guards_code"}  # never evaluated here
_DOTTED_NAMES = {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "class_fqn", "verifiers"}
_PAYLOAD = re.compile(r"(weight|tensor)_[0-9]+")


def _load_pt2(path: Path, trust: bool) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    # torch.export.load would, after an error, fall back on an older format that was not checked.
    from torch.export.pt2_archive._package import load_pt2

    with path.open("rb") as file:
        if trust:
            program = load_pt2(file).exported_programs["model"]
        else:
            _check_pt2(file, path)
            file.seek(0)
            with _restricted_torch_load():
                program = load_pt2(file).exported_programs["model"]
    examples = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        if args and not kwargs and all(type(x) is Tensor for x in args):
            examples = tuple(args)
    # Guards are Python source in the file, which check_guards=True would compile.
    return program.module(check_guards=False), examples


def _check_pt2(file: BinaryIO, path: Path) -> None:
    archive = PT2ArchiveReader(file)
    members = archive.get_file_names()
    if any(name.startswith("data/aotinductor/") for name in members):
        raise SepconvertError(f"{path}: holds compiled code (AOTInductor); write it with torch.export.save")
    if [name for name in members if name.startswith("models/")] != ["models/model.json"]:
        raise SepconvertError(f"{path}: expected one program, called model; write it with torch.export.save")
    for name in members:
        if name.endswith(".pt"):
            pickled = pickle_of_archive(io.BytesIO(archive.read_bytes(name)), str(path))
            check_pickle(pickled, str(path))
    configs = {f"data/{kind}/model_{kind}_config.json" for kind in ("weights", "constants")}
    for name in ["models/model.json", *configs.intersection(members)]:
        for key, text in _strings(json.loads(archive.read_bytes(name))):
            if key == "type" and text != "cpu":
                raise SepconvertError(f"{path}: was exported on the device {text!r}; export it on the CPU")
            if not _is_plain(key, text):
                raise SepconvertError(
                    f"{path}: refused, {key} {text[:60]!r} in {name} could run code and is not what "
                    "torch.export writes; save the module with torch.save, or pass --trust if you made it"
                )


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in the JSON of an exported program, with the name of the field that holds it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield ("fqn" if key == "config" else "name", name)
            yield from _strings(item, name if key not in _FREE_TEXT else key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _is_plain(key: str, text: str) -> bool:
    if key in _FREE_TEXT:
        return True
    if key in ("target", "as_operator"):
        return _OPERATOR.fullmatch(text) is not None
    if key == "expr_str":
        words = re.findall(r"[^\W\d]\w*", text)
        return _EXPRESSION.fullmatch(text) is not None and all(map(_SYMPY_WORD.fullmatch, words))
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(json.loads(text)[1])
    if key == "path_name":
        return _PAYLOAD.fullmatch(text) is not None
    return (_DOTTED if key in _DOTTED_NAMES else _WORD).fullmatch(text) is not None


def _is_plain_tree(spec: dict[str, object]) -> bool:
    """Tuples, lists and dicts with plain keys: any other type may make pytree import what the file names."""
    context = spec["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    children = spec["children_spec"]
    return (
        spec["type"] in (None, "builtins.tuple", "builtins.list", "builtins.dict")
        and (keys is None or (isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)))
        and isinstance(children, list)
        and all(_is_plain_tree(child) for child in children)
    )


@contextmanager
def _restricted_torch_load() -> Iterator[None]:
    """torch.export reads with weights_only=False in places; this switch of torch.load overrules that."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


# State dicts --------------------------------------------------------------------------------------

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
)


def _unwrap(content: object, path: Path) -> nn.Module | Mapping[str, Tensor]:
    for _ in range(8):  # a hostile wrapper may hold itself
        if isinstance(content, nn.DataParallel | nn.parallel.DistributedDataParallel):
            content = content.module
        if isinstance(content, nn.Module):
            return content
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping | nn.Module)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise SepconvertError(f"{path}: holds a {type(content).__name__}; expected a module or a state_dict")
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise SepconvertError(
            f"{path}: holds no weights, only {_some(map(str, content)) or 'an empty dict'}; "
            "expected a module or a state_dict"
        )
    return {str(key): value for key, value in content.items()}


def _check_state(model: nn.Module) -> None:
    """Raise `ValueError` where a module's own dictionaries are others than its constructor makes."""
    usual = {name: value for name, value in vars(nn.Module()).items() if isinstance(value, dict)}
    for module in model.modules():
        if _makes_layers(vars(module).get("forward", id)):
            raise ValueError(f"the forward of a {type(module).__name__} is not what torch makes")
        for name, value in usual.items():
            held = vars(module).get(name, value)
            called = name in ("_forward_hooks", "_forward_pre_hooks")
            if not isinstance(held, type(value)) or (called and any(map(_makes_layers, held.values()))):
                raise ValueError(f"{name} of a {type(module).__name__} is not what torch makes")


def _makes_layers(called: object) -> bool:
    """Is it a class, or a call of one, of any size that a file may name, or nothing to call at all?"""
    return isinstance(called, type | functools.partial) or not callable(called)


def _check_tensors(found: object, weights: Mapping[str, object], path: Path) -> None:
    """Refuse sparse tensors, and views that repeat a few stored numbers until they fill the memory."""
    own = [*found.parameters(), *found.buffers()] if isinstance(found, nn.Module) else []
    tensors = [each for each in (*weights.values(), *own) if isinstance(each, Tensor)]
    if any(each.layout is not torch.strided and not each.is_mkldnn for each in tensors):
        raise SepconvertError(f"{path}: has sparse weights; save them dense (tensor.to_dense())")
    claims: dict[int, int] = {}  # by storage: slices of one take no more than it does
    for each in tensors:
        if each.layout is torch.strided and not each.is_meta:
            storage = each.untyped_storage().data_ptr()
            claims[storage] = max(claims.get(storage, 0), each.numel() * each.element_size())
    claimed, size = sum(claims.values()), path.stat().st_size
    if claimed > 2 * size + 2**28:
        raise SepconvertError(
            f"{path}: its weights take {claimed / 1e6:,.0f} MB, and the file {size / 1e6:,.1f}: they "
            "repeat what is stored; save them whole (tensor.contiguous())"
        )


def _builder(spec: str) -> Callable[[], nn.Module]:
    function = resolve_callable(spec, "--factory")

    def build() -> nn.Module:
        try:
            model = function()
        except (Exception, SystemExit) as error:
            raise SepconvertError(
                f"--factory {spec}: calling it without arguments failed ({_one_line(error)}); "
                "give a callable that returns the model"
            ) from error
        if not isinstance(model, nn.Module):
            raise SepconvertError(
                f"--factory {spec}: returned a {type(model).__name__}; expected an nn.Module"
            )
        return unwrapped(model)

    return build


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    weights = {_plain_key(key, expected): value for key, value in weights.items()}
    if "n_averaged" not in expected:  # of torch.optim.swa_utils.AveragedModel
        weights.pop("n_averaged", None)
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
        for key, value in weights.items()
        if isinstance(value, Tensor)
        and isinstance(expected.get(key), Tensor)
        and value.shape != expected[key].shape
    ]
    problems = []
    try:
        outcome = model.load_state_dict(weights, strict=False)
        problems += [f"lacks {_some(outcome.missing_keys)}"] if outcome.missing_keys else []
        problems += [f"also holds {_some(outcome.unexpected_keys)}"] if outcome.unexpected_keys else []
    except Exception as error:  # size mismatches, and whatever load hooks of user code raise
        problems += [f"has shapes that differ: {_some(shapes)}" if shapes else _one_line(error)]
    if problems:
        raise SepconvertError(
            f"{path}: does not fit the model of --factory: it {' and '.join(problems)}; "
            "pass the --factory that builds the model which was trained"
        )


def _float_dtypes(weights: Mapping[str, object]) -> set[torch.dtype]:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _plain_key(key: str, expected: Mapping[str, object]) -> str:
    """The key without what torch.compile and DataParallel put into it."""
    key = key if key in expected else key.replace("_orig_mod.", "")
    while key not in expected and key.startswith("module."):
        key = key.removeprefix("module.")
    return key


# Small helpers ------------------------------------------------------------------------------------


def _timm_example(model: nn.Module) -> tuple[Tensor, ...] | None:
    configs = (getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg"))
    config: dict[str, Any] = next((each for each in configs if isinstance(each, dict) and each), {})
    size = config.get("input_size")
    if not isinstance(size, tuple | list) or len(size) != 3 or not _is_sensible(size, _MAX_EXAMPLE):
        return None
    # The configuration keeps its 3 channels when a model is created with in_chans=1.
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels % size[0]:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return (torch.zeros(1, *size, dtype=dtype),)


def _is_sensible(shape: Sequence[object], most: int = MAX_INPUT_ELEMENTS) -> bool:
    sizes = [size for size in shape if isinstance(size, int) and size >= 1]
    return len(sizes) == len(shape) and math.prod(sizes) <= most


def _look_up(source: str, name: str, label: str) -> object:
    """The attribute `name` of a module or a Python file; errors begin with `label`."""
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise SepconvertError(f"{label}: there is no file {source}")
    try:
        module = _import_file(Path(source)) if is_file else _import_from_cwd(source)
    except (Exception, SystemExit) as error:  # user code, which may also end in sys.exit when imported
        raise SepconvertError(
            f"{label}: importing {source} failed ({_one_line(error)}); "
            "install what it needs, or run from the directory that holds it"
        ) from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        raise SepconvertError(f"{label}: {source} defines no {name!r}; check the name") from None


def _import_from_cwd(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    _make_importable(path.parent)
    # A file called torch.py must not take the place of torch.
    name = path.stem if known is None else f"_sepconvert_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    # torch.load puts its cause after advice to switch the restrictions off
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    first, _, rest = text.partition("\n")
    if first.endswith(":"):
        first += f" {rest.strip().partition(chr(10))[0].strip()}"
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shortened, names[:limit])) + rest
