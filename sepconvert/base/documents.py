"""Small documents (plans, profiles, caches) read and written, with a checksum that reveals damage on disk."""

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sepconvert.base.errors import SepconvertError, first_line, shortened

CHECKSUM = "checksum"
"""Key of a document's checksum."""

MOST_BYTES = 2**23
"""Bytes of the largest document that is read; a plan takes some hundred for each layer."""

T = TypeVar("T")


@contextlib.contextmanager
def writing(path: Path, parameter: str = "out") -> Iterator[None]:
    """Turn every exception of a library that writes `path` within the block into a `SepconvertError`.

    The message gives the file's name alone: a result directory has a temporary path until it is complete.
    `parameter` is the one that names the place.
    """
    try:
        yield
    except SepconvertError:
        raise
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise SepconvertError(
            f"{path.name}: cannot be written: {reason}; pass another `{parameter}`"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write beside `path`, which takes the place of `path` at the end of the block.

    An exception leaves `path` as it was. Other processes may read it, and replace it, at any time.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where the file could not be written either
            unfinished.unlink(missing_ok=True)


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        SepconvertError: the file is larger, or is no regular file (a pipe, a device).
        OSError: it cannot be read.
    """
    _check_size(path, most)
    return path.read_bytes()


def check_file(path: Path) -> None:
    """Raise the `SepconvertError` of a file that cannot be read, whatever its size; nothing is read."""
    try:
        _check_size(path, math.inf)
        path.open("rb").close()
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error


def _check_size(path: Path, most: float) -> None:
    size = path.stat().st_size
    if path.is_file() and size <= most:
        return
    problem = f"has {size:,} bytes, expected at most {most:,}" if path.is_file() else "is no regular file"
    raise SepconvertError(f"{path}: cannot be read: it {problem}; check the path")


def decode(text: bytes | str, kind: type[T], where: str, advice: str = "make it anew") -> T:
    """Return a JSON document as a value of type `kind`, its types and constraints checked.

    Unknown keys are ignored; numbers that are not finite are refused. `where` says what the document should
    be, with its path, and `advice` what to do next.

    Raises:
        SepconvertError: the document is malformed, or does not have this form; the message names the place.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        # Without backticks, which would make parameters of keys.
        reason = first_line(error).replace("`", "'")
        raise SepconvertError(f"{where} ({reason}); {advice}") from error


def structured(document: Any, kind: type[T], where: str) -> T:
    """Return a parsed JSON document as a value of type `kind`; see `decode`.

    `where` begins the message of an error, as the path of the file.

    Raises:
        SepconvertError: a field is missing or of another type.
    """
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        # Without backticks, which would make parameters of keys.
        problem, _, path = first_line(error).replace("`", "").partition(" - at $")
        key = shortened(path.lstrip(".")) or "the document"
        raise SepconvertError(f"{where}: {key}: {problem[:1].lower()}{problem[1:]}; make it anew") from error


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with its checksum: the SHA-256 of everything else in it, as JSON with sorted keys."""
    return {**document, CHECKSUM: _checksum(document)}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Return whether a document has the checksum that it gives."""
    return document.get(CHECKSUM) == _checksum(document)


def _checksum(document: Mapping[str, Any]) -> str:
    """Return the checksum of a document, whether or not it is sealed."""
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
