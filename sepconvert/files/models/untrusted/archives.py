"""Models in `.pt2` archives of torch.export, checked before torch reads them.

torch.export.load runs code that the archive names in many places: pickles, operators looked up in the
attributes of torch, sympy expressions that are evaluated, names that go into generated Python. Every string
of the program must therefore have the form that torch.export writes for its field, which no code has:

    field                            what torch does with the text                  allowed form
    target, as_operator              looks it up in modules, and calls the result   _OPERATOR
    expr_str (of a symbolic size)    evaluates it as Python, by sympy               _EXPRESSION of _SYMPY_WORD
    in_spec, out_spec                imports the classes that it names              tuples, lists and dicts
    path_name                        opens it as a member of the archive            _PAYLOAD
    fqn, parameter_name, ...         walks attributes of the module                 _DOTTED
    as_string, guards_code, ...      nothing that runs code (guards stay off)       any
    all others                       writes it into the source of a function        _WORD
"""

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
from sepconvert.base.limits import check_cost

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

_FREE_TEXT = {"as_string", "as_strings", "metadata", "torch_version", "guards_code"}

_DOTTED_NAMES = {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "class_fqn", "verifiers"}

_PAYLOAD = re.compile(r"(weight|tensor)_[0-9]+")


def load_archive(path: Path, trust: bool) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """Read an archive that torch.export.save wrote.

    Args:
        path: the archive.
        trust: whether to leave out the checks, and read pickles without restrictions.

    Returns:
        The module, and the example inputs that the archive holds; None unless they are positional tensors.

    Raises:
        SepconvertError: a part of the archive could run code, or costs too much to read (see `check_cost`);
            or torch is older than 2.9.
        Exception: anything that torch raises for a damaged archive.
    """
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
            _check_archive(file, path)
            file.seek(0)
            with _restricted_torch_load():
                program = load_pt2(file).exported_programs["model"]
    examples = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        if args and not kwargs and all(type(value) is Tensor for value in args):
            examples = tuple(args)
    # Guards are Python source in the file, which check_guards=True would compile.
    return program.module(check_guards=False), examples


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Raise `SepconvertError` unless the archive holds one program, in which nothing runs code."""
    from torch.export.pt2_archive import PT2ArchiveReader  # torch 2.7 has no such module

    archive = PT2ArchiveReader(file)
    members = archive.get_file_names()
    if any(name.startswith("data/aotinductor/") for name in members):
        raise SepconvertError(f"{path}: holds compiled code (AOTInductor); write it with torch.export.save")
    if [name for name in members if name.startswith("models/")] != ["models/model.json"]:
        raise SepconvertError(f"{path}: expected one program, called model; write it with torch.export.save")
    configs = {
        name: json.loads(archive.read_bytes(name))
        for kind in ("weights", "constants")
        if (name := f"data/{kind}/model_{kind}_config.json") in members
    }
    for name, content in {
        "models/model.json": json.loads(archive.read_bytes("models/model.json")),
        **configs,
    }.items():
        for key, text in _strings(content):
            if key == "type" and text != "cpu":
                raise SepconvertError(f"{path}: was exported on the device {text!r}; export it on the CPU")
            if not _is_plain(key, text):
                raise SepconvertError(
                    f"{path}: refused, {key} {text[:60]!r} in {name} could run code and is not what "
                    "torch.export writes; save the module with torch.save, or pass `trust` if you made it"
                )
    pickles = {name for name in members if name.endswith(".pt")}
    for name, content in configs.items():
        folder = name.rpartition("/")[0]
        pickles |= {
            f"{folder}/{entry['path_name']}" for entry in content["config"].values() if entry["use_pickle"]
        }
    contents = [archive.read_bytes(name) for name in sorted(pickles)]

    def read() -> None:
        for pickled in contents:
            torch.load(io.BytesIO(pickled), weights_only=True)

    check_cost(read, sum(map(len, contents)), str(path))


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in the JSON of an exported program, after the name of the field that holds it."""
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
    """Return whether a text has the form that torch.export writes in the field `key` (table above)."""
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
    """Return whether a pytree consists of tuples, lists and dicts with plain keys.

    Any other type may make pytree import what the file names.
    """
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
    """Make every `torch.load` within the block a restricted one (`weights_only=True`).

    torch.export reads with `weights_only=False` in places, which only environment variables overrule. These
    are process-wide: the block is not thread-safe, and `torch.load` is restricted in other threads as well.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
