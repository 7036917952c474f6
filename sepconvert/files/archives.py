"""`.pt2` archives of torch.export, checked before torch reads them."""

import inspect
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sepconvert.base.errors import SepconvertError
from sepconvert.files.pickled_program import check_pickle, pickle_of_archive

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


def load_archive(path: Path, trust: bool) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    # Guards are Python source in the file; only torch that has this parameter is known to leave them alone.
    if "check_guards" not in inspect.signature(ExportedProgram.module).parameters:
        raise SepconvertError(
            f"{path}: .pt2 archives need torch 2.9 or newer, got torch {torch.__version__}; upgrade torch, "
            "or save the module with torch.save"
        )
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
    from torch.export.pt2_archive import PT2ArchiveReader  # which torch 2.7 lacks

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
