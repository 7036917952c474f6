"""Checkpoints of fine-tuning: written whole or not at all, and checked when they are read."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from sepconvert.base.errors import SepconvertError, first_line

FORMAT = 1
"""Of checkpoints."""


def write_checkpoint(checkpoint: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    unfinished = checkpoint.with_name(f"{checkpoint.name}.unfinished")
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(checkpoint)
    except (OSError, RuntimeError) as error:  # a RuntimeError is torch's of a full disk
        raise SepconvertError(
            f"{checkpoint}: expected a place to write to, got: {first_line(error)}; pass another checkpoint"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be written either
            unfinished.unlink(missing_ok=True)


def read_checkpoint(checkpoint: Path, resume: bool, accelerator: Accelerator) -> dict[str, Any] | None:
    """What `_write` has written; None if there is nothing. The main process reads it for all."""
    content: list[dict[str, Any] | None] = [None]
    if accelerator.is_main_process and checkpoint.exists():
        if not resume:
            raise SepconvertError(
                f"{checkpoint}: expected no file, got the checkpoint of an earlier run; resume or remove it"
            )
        try:
            with zipfile.ZipFile(checkpoint) as archive:
                if (damaged := archive.testzip()) is not None:  # torch does not look at the checksums
                    raise ValueError(f"{damaged} is not what its checksum says")
            stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
            matches = stored["format"] == FORMAT
        except Exception as error:  # a damaged archive makes zipfile, pickle and torch raise in many ways
            raise SepconvertError(
                f"{checkpoint}: expected a checkpoint, got a damaged or foreign file ({first_line(error)});"
                " remove it to start anew"
            ) from error
        if not matches:
            raise SepconvertError(
                f"{checkpoint}: expected a checkpoint of format {FORMAT}, got {stored['format']}; resume with"
                " the version of sepconvert that wrote it, or remove it to start anew"
            )
        content = [stored]
    broadcast_object_list(content)
    return content[0]


def digest_of(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):  # a module's extra state may be anything
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
