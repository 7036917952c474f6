"""Names of models that a library builds, such as `timm:resnet50` or `torchvision:resnet18?weights=DEFAULT`.

Nothing here imports the libraries, nor torch: a mistyped name is told at once, as far as it can be.
"""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from sepconvert.base.errors import SepconvertError

Scheme = Literal["timm", "torchvision", "hf-hub"]
"""What stands before the colon: a library, or the hub of which timm loads the models."""

PATTERNS = "timm:NAME, torchvision:NAME or hf-hub:OWNER/NAME"
"""Forms of a name, for messages."""

WEIGHTS = "weights=DEFAULT"
"""The argument that asks for a library's trained weights."""

_LIBRARIES: Mapping[Scheme, str] = {"timm": "timm", "torchvision": "torchvision", "hf-hub": "timm"}

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_NAMES: Mapping[Scheme, re.Pattern[str]] = {
    "timm": re.compile(_WORD),
    "torchvision": re.compile(_WORD),
    "hf-hub": re.compile(rf"{_WORD}/{_WORD}(@[A-Za-z0-9_./\-]+)?"),  # with a revision
}
_EXAMPLES: Mapping[Scheme, str] = {
    "timm": "timm:resnet50",
    "torchvision": "torchvision:resnet18",
    "hf-hub": "hf-hub:timm/resnet18.a1_in1k",
}

# Arguments of timm by which it reads files that are named in them, pickles as programs among them.
_OF_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True)
class ModelName:
    """A model as a library names it.

    Attributes:
        text: the whole name, as it was given.
        scheme: what stands before the colon.
        name: what the library calls the model; on the hub, OWNER/NAME.
        weights: name of its weights, `DEFAULT` for those that the library takes; None for random ones.
        arguments: further keyword arguments of the library's function.
    """

    text: str
    scheme: Scheme
    name: str
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """Name of the package that builds the model."""
        return _LIBRARIES[self.scheme]

    @property
    def stem(self) -> str:
        """Name without owner and revision, for files."""
        return self.name.partition("@")[0].rpartition("/")[2]

    @property
    def with_weights(self) -> str:
        """Name of the same model with the weights that its library takes."""
        base, _, query = self.text.partition("?")
        others = [part for part in query.split("&") if part.partition("=")[0] in self.arguments]
        return f"{base}?{'&'.join([WEIGHTS, *others])}"


def name_of(path: Path) -> ModelName | None:
    """Return the model that a path names; None if it is a file's, as that of every file that exists.

    After the name may stand arguments: `?KEY=VALUE`, more of them behind `&`. A value is JSON or a literal of
    Python, or else text.

    Raises:
        SepconvertError: it names a scheme, and is malformed.
    """
    text = path.as_posix()
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in _LIBRARIES or path.exists():
        return None
    found: Scheme = next(each for each in get_args(Scheme) if each == scheme)
    name, _, query = rest.partition("?")
    if not _NAMES[found].fullmatch(name):
        got = f"names {name!r}" if name else "names no model"
        raise SepconvertError(f"{text}: {got}; expected a name such as {_EXAMPLES[found]}")
    arguments = _arguments(text, query) if "?" in rest else {}
    weights = _weights(text, found, arguments)
    if refused := [each for each in _OF_FILES if each in arguments]:
        raise SepconvertError(
            f"{text}: {refused[0]} names a file, which is not read so; pass the file itself, with `factory` "
            f"timm.models:{name.partition('.')[0]}"
        )
    return ModelName(text, found, name, weights, arguments)


def stem_of(path: Path) -> str:
    """Return the name of a model without the extension of its file, or without what its library reads."""
    try:
        name = name_of(path)
    except SepconvertError:  # a file of such a name that is there no longer
        name = None
    return path.stem if name is None else name.stem


def check_library(name: ModelName) -> None:
    """Raise `SepconvertError` unless the library that builds a model is installed."""
    if find_spec(name.library) is None:
        raise SepconvertError(
            f"{name.text}: is built by {name.library}, which is not installed; pip install {name.library}"
        )


def _arguments(text: str, query: str) -> dict[str, Any]:
    """Return the arguments behind the question mark."""
    found: dict[str, Any] = {}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise SepconvertError(
                f"{text}: expected KEY=VALUE after the ?, and between &, got {part!r}; e.g. ?{WEIGHTS} or "
                "?num_classes=10"
            )
        if key in found:
            raise SepconvertError(f"{text}: gives {key} twice; leave one out")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """Return a value that is written as JSON or as a literal of Python; other text stands for itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


def _weights(text: str, scheme: Scheme, arguments: dict[str, Any]) -> str | None:
    """Take the arguments that ask for weights, in place, and return the name of these."""
    given = [key for key in ("weights", "pretrained") if key in arguments]
    if len(given) == 2:
        raise SepconvertError(f"{text}: weights and pretrained say the same; leave pretrained out")
    if not given:
        # A repository is named for the weights that are in it; architectures are built from nothing.
        return "DEFAULT" if scheme == "hf-hub" else None
    value = arguments.pop(given[0])
    if given == ["pretrained"]:
        if value not in (True, False):
            raise SepconvertError(f"{text}: expected pretrained=1 or pretrained=0, got {value!r}")
        return "DEFAULT" if value else None
    if value is not None and not (isinstance(value, str) and value):
        raise SepconvertError(f"{text}: expected {WEIGHTS}, or the name of other weights, got {value!r}")
    if scheme != "torchvision" and value not in (None, "DEFAULT"):
        raise SepconvertError(
            f"{text}: expected {WEIGHTS}; other weights of timm are a part of the name, as in "
            f"timm:resnet50.a1_in1k?{WEIGHTS}"
        )
    return value
