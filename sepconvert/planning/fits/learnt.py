"""What conversions learn of a model and its data, kept on disk for the next one with another budget.

Each entry lies under the hash of all that it depends on. It holds tensors and plain values alone, so that a
file from elsewhere cannot run code.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepconvert.base.documents import replacing
from sepconvert.calibration.heldout import Divergence
from sepconvert.factorize.approximate.problem import Approximation
from sepconvert.network.tensors import sha256_of
from sepconvert.planning.allocate import Candidate
from sepconvert.planning.fits.survey import LayerSurvey, Offer

LAYOUT = 1
"""Version of what is kept and of the fits; entries of another one are not used."""


MOST_BYTES = 2 * 2**30
"""Size of the folder; beyond it, what was used longest ago is removed."""


_LARGEST = MOST_BYTES // 4  # entry


_DIGEST = hashlib.sha256().digest_size


class Learnt:
    """Entries of one kind of conversion: of one model, one set of images and one way to fit.

    Args:
        folder: where they are kept; None keeps nothing.
        depends: all that they depend on, in any nesting of tensors, plain values and dataclasses.
    """

    def __init__(self, folder: Path | None = None, depends: Any = None) -> None:
        self._folder = folder
        self._depends = hashed((depends, LAYOUT, version("sepconvert"), torch.__version__))

    def recall(self, what: Any) -> Any | None:
        """Return what was kept under the same name; None if there is nothing, or the file is damaged."""
        if self._folder is None:
            return None
        path = self._path(what)
        with contextlib.suppress(Exception):  # torch's errors for damaged files are of many kinds
            content = path.read_bytes()
            if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
                found = restored(torch.load(io.BytesIO(content[_DIGEST:]), weights_only=True))
                os.utime(path)
                return found
        return None

    def keep(self, what: Any, value: Any) -> None:
        """Keep what is nested of tensors, plain values, tuples, mappings and the dataclasses of the fits.

        Where the folder cannot be written, the next run computes again.
        """
        if self._folder is None:
            return
        written = io.BytesIO()
        torch.save(plain(value), written)
        content = written.getvalue()
        if len(content) > _LARGEST:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(what)) as unfinished:
                unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            self._tidy()

    def _path(self, what: Any) -> Path:
        assert self._folder is not None  # noqa: S101  (callers have looked)
        return self._folder / f"{hashed((self._depends, what))[:32]}.learnt"

    def _tidy(self) -> None:
        """Remove what was used longest ago, while there is too much."""
        assert self._folder is not None  # noqa: S101
        known = [(each.stat().st_mtime, each.stat().st_size, each) for each in self._folder.glob("*.learnt")]
        size = sum(bytes_ for _, bytes_, _ in known)
        for _, bytes_, path in sorted(known):
            if size <= MOST_BYTES:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


def hashed(value: Any) -> str:
    """Return the SHA-256 of nested tensors, plain values, sequences, mappings and dataclasses."""
    digest = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, Tensor):
            digest.update(f"tensor {each.dtype} {tuple(each.shape)} {sha256_of([each])};".encode())
        elif isinstance(each, Mapping):
            digest.update(f"mapping {len(each)};".encode())
            for name, part in each.items():
                add(name)
                add(part)
        elif is_dataclass(each) and not isinstance(each, type):
            digest.update(f"{type(each).__name__};".encode())
            add({part.name: getattr(each, part.name) for part in fields(each)})
        elif isinstance(each, list | tuple):
            digest.update(f"sequence {len(each)};".encode())
            for part in each:
                add(part)
        elif isinstance(each, set | frozenset):
            add(sorted(map(repr, each)))
        else:
            digest.update(f"{type(each).__name__} {each!r};".encode())

    add(value)
    return digest.hexdigest()


_CLASSES: dict[str, type] = {
    each.__name__: each for each in (Approximation, Candidate, Divergence, LayerSurvey, Offer)
}


def plain(value: Any) -> Any:
    """Return nested dataclasses and mappings as lists, which a file can hold; see `restored`."""
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, [plain(getattr(value, each.name)) for each in fields(value)]]
    if isinstance(value, Mapping):
        return ["mapping", [[plain(name), plain(each)] for name, each in value.items()]]
    if isinstance(value, frozenset):
        return ["frozenset", [plain(each) for each in value]]
    if isinstance(value, tuple | list):
        return ["tuple", [plain(each) for each in value]]
    return value.item() if isinstance(value, np.generic) else value


def restored(value: Any) -> Any:
    """Return what `plain` was given, with tuples in the place of lists."""
    if not isinstance(value, list):
        return value
    kind, parts = value
    if kind == "mapping":
        return {restored(name): restored(each) for name, each in parts}
    found = [restored(each) for each in parts]
    if kind in _CLASSES:
        return _CLASSES[kind](*found)
    return frozenset(found) if kind == "frozenset" else tuple(found)
