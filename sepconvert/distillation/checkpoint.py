"""Checkpoints of fine-tuning: safetensors files, written completely or not at all and checked when read.

The tensors are the weights, their moving average, the best weights and the optimizer's state. The rest is
JSON in the file's metadata. A safetensors file has no checksums, so the JSON holds one of each tensor and one
of itself.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sepconvert.base.documents import is_intact, replacing, sealed
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.distillation.results import Epoch
from sepconvert.network.tensors import sha256_of

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 2
"""Version of the format of checkpoints."""


_METADATA = "sepconvert.checkpoint"


@dataclass(frozen=True)
class State:
    """State of a run, apart from its tensors.

    `fingerprint` identifies the run: models, data and options. `loss_sum` is the sum of the losses of the
    current epoch's steps, `seconds` the time spent so far and `scaler` the state of the gradient scaler, if
    there is one.
    """

    fingerprint: dict[str, str]
    step: int
    loss_sum: float
    seconds: float
    history: tuple[Epoch, ...]
    scaler: dict[str, Any] | None

    def check_run(self, checkpoint: Path, fingerprint: Mapping[str, str]) -> None:
        """Raise `SepconvertError` if the state, read from `checkpoint`, is that of another run."""
        for part, value in fingerprint.items():
            if (stored := self.fingerprint.get(part)) != value:
                raise SepconvertError(
                    f"{checkpoint}: expected a checkpoint of this run, got one with other {part}"
                    f" ({stored}, not {value}); repeat that run, or pass another path"
                )


Checkpoint = tuple[State, dict[str, Tensor]]
"""State of a run, and its tensors by dotted names."""


def write_checkpoint(path: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint completely or not at all: the process may be killed at any time.

    Raises:
        SepconvertError: the file cannot be written.
    """
    # Copies, since safetensors stores no tensors that share memory.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    document = sealed({"format": FORMAT, "state": asdict(state), "tensors": _checksums(copies)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            save_file(copies, unfinished, {_METADATA: json.dumps(document)})
    except (OSError, SafetensorError) as error:
        raise SepconvertError(
            f"{path}: expected a place to write to, got: {first_line(error)}; pass another `checkpoint`"
        ) from error


def read_checkpoint(path: Path, resume: bool, accelerator: "Accelerator") -> Checkpoint | None:
    """Return what `write_checkpoint` wrote; None if there is no file. The main process reads it for all.

    Raises:
        SepconvertError: the file is damaged, foreign or of another format, or it exists without `resume`.
    """
    from accelerate.utils import broadcast_object_list  # which takes long; training alone needs it

    content: list[Checkpoint | None] = [None]
    if accelerator.is_main_process and path.exists():
        if not resume:
            raise SepconvertError(
                f"{path}: expected no file, got the checkpoint of an earlier run; pass `resume`, or remove it"
            )
        content = [_read(path)]
    broadcast_object_list(content)
    return content[0]


def _read(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()[_METADATA])
            # Cloned, so that the file is not mapped into memory any longer.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        version = document["format"]
        if version == FORMAT:
            if not is_intact(document) or _checksums(tensors) != document["tensors"]:
                raise ValueError("its content does not match its checksum")
            return msgspec.convert(document["state"], State), tensors
    except Exception as error:  # safetensors, json and msgspec raise many kinds of errors for a damaged file
        raise SepconvertError(
            f"{path}: expected a checkpoint, got a damaged or foreign file ({first_line(error)});"
            " remove it to start anew"
        ) from error
    raise SepconvertError(
        f"{path}: expected a checkpoint of format {FORMAT}, got {version}; resume with the version of"
        " sepconvert that wrote it, or remove it to start anew"
    )


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {
        name: [str(tensor.dtype), list(tensor.shape), digest_of([tensor])] for name, tensor in tensors.items()
    }


def digest_of(tensors: Iterable[object]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of tensors; other values are skipped."""
    return sha256_of(tensors)[:16]
