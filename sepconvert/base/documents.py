"""Reading and writing of small JSON documents, with a checksum that reveals damage on disk."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sepconvert.base.errors import SepconvertError, first_line, shortened

T = TypeVar("T")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise when they cannot write `path` into one line.

    It tells the name alone: a result directory has another until it is whole.
    """
    try:
        yield
    except SepconvertError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SepconvertError(f"{path.name}: cannot be written: {reason}; pass another --out") from error
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        reason = first_line(error)
        raise SepconvertError(f"{path.name}: cannot be written: {reason}; pass another --out") from error


CHECKSUM = "checksum"


MOST_BYTES = 2**23  # of a document: a plan takes some hundred for each layer


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        SepconvertError: it is larger, or no regular file (but a pipe, say, or a device).
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if path.is_file() and size <= most:
        return path.read_bytes()
    what = f"has {size:,} bytes, expected at most {most:,}" if path.is_file() else "is no regular file"
    raise SepconvertError(f"{path}: cannot be read: it {what}; check the path")


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with a checksum: the SHA-256 of all its other content, as JSON with sorted keys."""
    return {**document, CHECKSUM: _checksum(document)}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Return whether the checksum of a document is that of its content."""
    return document.get(CHECKSUM) == _checksum(document)


def decode(content: bytes | str, kind: type[T], where: str) -> T:
    """Return the value of type `kind` that a JSON document holds.

    Args:
        content: the JSON text.
        kind: usually a dataclass; annotations of its fields may hold bounds, as `msgspec.Meta`.
        where: begins the message of an error, as the path of the file.

    Raises:
        SepconvertError: it is no JSON, or a field is missing or of another type.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SepconvertError(
            f"{where}: expected JSON that sepconvert wrote, got none: {first_line(error)}"
        ) from error
    return structured(document, kind, where)


def structured(document: Any, kind: type[T], where: str) -> T:
    """Return the value of type `kind` that a parsed JSON document holds; see `decode`.

    Raises:
        SepconvertError: a field is missing or of another type.
    """
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        # Backticks are for parameters of our own (see `sepconvert.base.errors`).
        problem, _, path = first_line(error).replace("`", "").partition(" - at $")
        field = shortened(path.lstrip(".")) or "the document"
        raise SepconvertError(
            f"{where}: {field}: {problem[:1].lower()}{problem[1:]}; make it anew"
        ) from error


def _checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
