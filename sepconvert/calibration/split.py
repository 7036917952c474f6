"""Division of the images by purpose: to fit, to judge plans by, to train on, to score.

No image serves two purposes: what a decision was fitted to or chosen by is never scored.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sepconvert.base.distributed import processes, rank
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.record import Answers
from sepconvert.files.data import UNLABELLED, Batch, dimensions, split
from sepconvert.measure.metrics import whole
from sepconvert.network.tensors import Inputs, tensors_in


@dataclass(frozen=True)
class Calibration:
    """Images to fit to and images to judge by; none of them is scored."""

    fit: tuple[Tensor, ...]
    heldout: tuple[Tensor, ...]
    origin: str
    answers: Answers | None = None  # of the original; see `calibrate.record`
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # of layers' outputs; see `importance`
    labels: tuple[Tensor, ...] = ()  # of those held out, -1 where there is none
    memory: float | None = None  # bytes that the process may have; None for half of what is free

    @property
    def share(self) -> dict[int, Tensor]:
        """This process's batches to fit to, by number."""
        if len(self.fit) < processes():
            raise SepconvertError(
                f"calibration: {len(self.fit)} batches for {processes()} processes; pass more images"
            )
        return {n: batch for n, batch in enumerate(self.fit) if n % processes() == rank()}


MOST_AT_ONCE = 64
"""Images to fit to that pass together."""


_MOST_HELD_OUT = 256


@dataclass(frozen=True)
class Parts:
    """The data by purpose: no image serves two."""

    scored: Iterable[Batch] | None
    calibration: Calibration | None
    train: DataLoader[Batch] | None
    heldout: DataLoader[Batch] | None
    labelled: bool


def split_data(
    data: Iterable[Batch] | None,
    calib: DataLoader[Batch] | None,
    train: DataLoader[Batch] | None,
    images: int,
    epochs: int,
    seed: int,
    at_once: int = MOST_AT_ONCE,
    memory: float | None = None,
) -> Parts:
    """Images to fit to, to judge by, to train on and to score; see `pipeline.convert`.

    `at_once` is how many of the images to fit to make a batch.

    Raises:
        SepconvertError: there are too few, or none to train on.
    """
    scored, source, origin = data, calib, "--calib"
    if source is None:
        source, origin = train, "--train"
    if epochs and source is None:
        raise SepconvertError("--finetune: needs images to train on; pass --calib or --train")
    if source is None and isinstance(data, DataLoader):
        source, scored = split(data, [min(images, _size(data) // 2)], seed)
        origin = "split off --data, and not scored"
    if source is None:
        return Parts(scored, None, None, None, False)
    images = min(images, _size(source))
    if not images:
        raise SepconvertError(f"calibration: no image is left to fit to ({origin}); pass more images")
    judges = min(images // 4, _MOST_HELD_OUT)
    heldout, fit, _ = split(source, [judges, images - judges], seed)
    batches, judged = ([*_batches(loader, at_once)] for loader in (fit, heldout))
    # Training is judged by images that it does not see, with labels if those that it sees have some.
    if train is None:
        train = source
    if train is not source:
        judges = min(_size(train) // 4, _MOST_HELD_OUT)
    if epochs and not judges:
        raise SepconvertError(
            f"--finetune: needs images to judge by too, got {_size(train)} in all; pass more"
        )
    heldout, train = split(train, [judges], seed)
    _, *labels = next(iter(train))
    labelled = bool(labels) and bool((labels[0] >= 0).any())
    calibration = Calibration(
        tuple(x for x, _ in batches),
        tuple(x for x, _ in judged),
        origin,
        labels=tuple(y for _, y in judged),
        memory=memory,
    )
    return Parts(scored, calibration, train, heldout, labelled)


def check_shapes(parts: Parts, inputs: Inputs) -> None:
    """Raise `SepconvertError` if no image to fit to or to train on has the shape of the model's input."""
    expected = [value.shape[1:] for value in tensors_in(inputs)]
    if len(expected) > 1 and (parts.calibration or parts.train):
        raise SepconvertError(
            f"calibration: the model takes {len(expected)} tensors, and can be shown one; give it as a "
            "module that takes one tensor and makes the others of it, or leave calibration and data out"
        )
    found = {
        "to fit to": {x.shape[1:] for x in parts.calibration.fit} if parts.calibration else set(),
        "to train on": {next(iter(parts.train))[0].shape[1:]} if parts.train else set(),
    }
    for purpose, shapes in found.items():
        if shapes and expected and not shapes & set(expected):
            raise SepconvertError(
                f"calibration: images {purpose} are {' or '.join(sorted(map(dimensions, shapes)))}, the model"
                f" is run on {dimensions(expected[0])} (C×H×W); pass --resize, another --input-shape or other"
                " images"
            )


def _size(loader: DataLoader[Batch]) -> int:
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else 0


def _batches(loader: DataLoader[Batch], at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, -1 where there is none, in batches of few: a pass is suspended with each of them."""
    found = [(x, _labels(x, *rest)) for x, *rest in whole(loader)]
    if not all(x.isfinite().all() for x, _ in found):
        raise SepconvertError("calibration: the images hold NaN or Inf; check the data")
    if found and all(_flat(x) for x, _ in found):
        raise SepconvertError(
            "calibration: every image is of one colour, which says nothing of the data that the model meets; "
            "check the path and the preprocessing"
        )
    for _, alike in itertools.groupby(found, lambda pair: pair[0].shape[1:]):
        images, labels = map(torch.cat, zip(*alike, strict=True))
        yield from zip(torch.split(images, at_once), torch.split(labels, at_once), strict=True)


def _labels(x: Tensor, *rest: Any) -> Tensor:
    """What comes with a batch of images, if that is a class for each."""
    for y in rest[:1]:
        if isinstance(y, Tensor) and y.shape == (len(x),) and not y.is_floating_point():
            return y.long()
    return torch.full((len(x),), UNLABELLED)


def _flat(x: Tensor) -> bool:
    return x.shape[2:].numel() > 1 and bool((x.amin((-2, -1)) == x.amax((-2, -1))).all())
