"""Division of the images by purpose: to fit to, to judge plans by, to fine-tune on, to score.

Nothing is judged by images that it was fitted to, and no calibration image is scored. Where the user passes
the same images for both, they are found by their hashes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.distributed import processes, rank
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Calibration
from sepconvert.files.data import UNLABELLED, Batch, class_labels, dimensions, paired, split
from sepconvert.measure.metrics.evaluation import whole
from sepconvert.network.tensors import InputBatch, tensors_in

MOST_AT_ONCE = 64
"""Most calibration images in one batch."""


_MOST_HELD_OUT = 256


_MOST_SEEN_TWICE = 0.5  # share of the images of a set; data sets with some duplicates stay far below


OWN_PART = "split off `data`, and not scored"
"""Origin of calibration images that the user did not pass as such."""


@dataclass(frozen=True)
class CalibrationSet:
    """Images to fit to, in batches, and held-out images to judge by; none of them is scored."""

    fit: tuple[InputBatch, ...]
    heldout: tuple[InputBatch, ...]
    labels: tuple[Tensor, ...]  # of the held-out images, -1 for those without one
    origin: str  # which of the user's data they come from
    memory: float | None = None  # bytes that the process may use; None for half of the free memory

    @property
    def images(self) -> int:
        """Number of images to fit to."""
        return sum(map(len, self.fit))

    def share(self, model: nn.Module) -> dict[int, InputBatch]:
        """Return this process's batches to fit to, by number, on the device and in the dtype of `model`.

        Raises:
            SepconvertError: there are fewer batches than processes.
        """
        if len(self.fit) < processes():
            raise SepconvertError(
                f"calibration: {len(self.fit)} batches for {processes()} processes; pass more images"
            )
        numbers = range(rank(), len(self.fit), processes())
        return {number: self.fit[number].on(model) for number in numbers}


@dataclass(frozen=True)
class TrainingSet:
    """Images to fine-tune on, and others to choose weights by."""

    train: DataLoader[Batch]
    judge: DataLoader[Batch]
    labelled: bool  # whether there are class numbers in the first batch to train on
    origin: str  # which of the user's data they come from

    @property
    def images(self) -> int:
        """Number of images, those to choose weights by among them."""
        return size_of(self.train) + size_of(self.judge)


@dataclass(frozen=True)
class DataSplit:
    """The data by purpose; None for a purpose without data."""

    scored: Iterable[Batch] | None
    calibration: CalibrationSet | None = None
    training: TrainingSet | None = None


@dataclass(frozen=True)
class Division:
    """Settings of how the data of a conversion are divided.

    `batched` makes the inputs of some samples from what a loader yields as x.
    """

    options: Calibration  # how many images to fit to and to judge by, and in how much memory
    epochs: int  # of fine-tuning; 0 for none
    seed: int
    batched: Callable[[Any], InputBatch]
    at_once: int = MOST_AT_ONCE  # images to fit to in a batch


@dataclass(frozen=True)
class _Source:
    """Data of which images to fit to and to judge by are taken, and the data that are still to be scored."""

    loader: DataLoader[Batch]
    origin: str
    scored: Iterable[Batch] | None


def split_data(
    data: Iterable[Batch] | None,
    calib: DataLoader[Batch] | None,
    train: DataLoader[Batch] | None,
    division: Division,
) -> DataSplit:
    """Divide the data of an approximate conversion by purpose.

    Args:
        data: labelled batches to score; a part is split off to fit to if there are no other images.
        calib: images to fit to and to judge by; by default those of `train`, or a part of `data`. Batches
            need no labels, and may have any form that `paired` takes.
        train: images to fine-tune on; by default those that may be fitted to. Likewise.
        division: how they are divided.

    Raises:
        SepconvertError: there are too few images, or none to train on.
    """
    options, epochs, seed = division.options, division.epochs, division.seed
    if epochs and calib is None and train is None:
        raise SepconvertError("`finetune`: needs images to train on; pass `calib` or `train`")
    same = train is calib
    calib = None if calib is None else paired(calib, "calib")
    if train is not None:
        train = calib if same else paired(train, "train")
    source = _source(data, calib, train, options.images, seed)
    if source is None:
        return DataSplit(data)
    images = min(options.images, size_of(source.loader))
    calibration = _calibration_set(source, images, division)
    if train is None or train is source.loader:
        train, heldout, origin = source.loader, heldout_of(images), source.origin
    else:
        heldout, origin = heldout_of(size_of(train)), "`train`"
    if epochs and not heldout:
        raise SepconvertError(
            f"`finetune`: needs images to judge by too, got {size_of(train)} in all; pass more"
        )
    return DataSplit(source.scored, calibration, _training_set(train, heldout, origin, division))


def heldout_of(images: int) -> int:
    """Return how many of some images are held out to judge by."""
    return min(images // 4, _MOST_HELD_OUT)


def _source(
    data: Iterable[Batch] | None,
    calib: DataLoader[Batch] | None,
    train: DataLoader[Batch] | None,
    images: int,
    seed: int,
) -> _Source | None:
    if calib is not None:
        return _Source(calib, "`calib`", data)
    if train is not None:
        return _Source(train, "`train`", data)
    if isinstance(data, DataLoader):
        part, rest = split(data, [min(images, size_of(data) // 2)], seed)
        return _Source(paired(part, "data"), OWN_PART, rest)
    return None


def _calibration_set(source: _Source, images: int, division: Division) -> CalibrationSet:
    if not images:
        raise SepconvertError(f"calibration: no image is left to fit to ({source.origin}); pass more images")
    judges = heldout_of(images)
    heldout, fit, _ = split(source.loader, [judges, images - judges], division.seed)
    batches, judged = ([*_batches(loader, division)] for loader in (fit, heldout))
    return CalibrationSet(
        fit=tuple(x for x, _ in batches),
        heldout=tuple(x for x, _ in judged),
        labels=tuple(y for _, y in judged),
        origin=source.origin,
        memory=division.options.memory,
    )


def _training_set(loader: DataLoader[Batch], heldout: int, origin: str, division: Division) -> TrainingSet:
    # The same seed as for calibration: of the same source the same images are held out.
    judge, train = split(loader, [heldout], division.seed)
    x, y = next(iter(train))
    labelled = bool((class_labels(y, len(division.batched(x))) != UNLABELLED).any())
    return TrainingSet(train, judge, labelled, origin)


@dataclass(frozen=True)
class Overlap:
    """The scored images that are fitted to or trained on as well.

    `images` is the number of images to fit to or to train on, of which `compared` were compared with the
    scored ones; `scored` is the number of scored images that are among those.
    """

    images: int
    compared: int
    scored: int


@dataclass(frozen=True)
class SeenTwice:
    """The scored images that are also calibration images, or training images if there is training."""

    calib: Overlap
    train: Overlap | None


def image_hashes(samples: InputBatch) -> list[bytes]:
    """Return a hash of each sample of a batch: the same for the same values, in whatever dtype."""
    size = len(samples)
    digests = [hashlib.sha256() for _ in range(size)]
    for values in tensors_in(samples.inputs):
        if values.ndim > samples.axis and values.shape[samples.axis] == size:
            parts = values.detach().movedim(samples.axis, 0).to("cpu", torch.float32).numpy()
            for digest, each in zip(digests, parts, strict=True):
                digest.update(each.tobytes())
    return [digest.digest() for digest in digests]


def find_seen_twice(parts: DataSplit, scored: Sequence[bytes], division: Division) -> SeenTwice | None:
    """Find the scored images that are fitted to or trained on as well; None without calibration images.

    Images that are trained on are all read once for this, which takes less than an epoch of training.

    Args:
        parts: the images by purpose.
        scored: hashes of the scored ones.
        division: how they were divided.

    Raises:
        SepconvertError: most images are, as the user passed the same data for both.
    """
    calibration, training = parts.calibration, parts.training
    if calibration is None:
        return None
    found = [each for x in (*calibration.fit, *calibration.heldout) for each in image_hashes(x)]
    calib = _overlap(found, len(found), scored, calibration.origin)
    if not division.epochs or training is None:
        return SeenTwice(calib, None)
    loaders = training.train, training.judge
    found = [each for part in loaders for x, _ in whole(part) for each in image_hashes(division.batched(x))]
    return SeenTwice(calib, _overlap(found, training.images, scored, training.origin))


def _overlap(compared: Sequence[bytes], images: int, scored: Sequence[bytes], origin: str) -> Overlap:
    """Compare images with the scored ones; images that occur often, such as black frames, refuse no data."""
    ours, theirs = set(compared), set(scored)
    both = ours & theirs
    share = len(both) / len(ours)
    most = share > _MOST_SEEN_TWICE or share * images > _MOST_SEEN_TWICE * len(theirs)
    if most and origin != OWN_PART:
        instead = "other images"
        if origin != "`train`":
            instead += ", or, without fine-tuning, `data` alone, of which a part is then fitted to"
        raise SepconvertError(
            f"{origin}: {len(both):,} of {len(ours):,} images that were compared are in `data`, too, and the "
            f"accuracy on what was fitted to says nothing; pass {instead}"
        )
    return Overlap(images, len(compared), sum(each in both for each in scored))


def check_shapes(parts: DataSplit, example: InputBatch, division: Division, *, dense: bool = False) -> None:
    """Raise `SepconvertError` if the images to fit to or to train on are not such as the model is run on.

    Images of several sizes, or any of a `dense` task, need only have its channels.
    """
    if parts.calibration is None or parts.training is None:
        return
    found = {
        "to fit to": {x.shapes for x in parts.calibration.fit},
        "to train on": {division.batched(next(iter(parts.training.train))[0]).shapes},
    }
    for purpose, shapes in found.items():
        alike = _leading(example.shapes) in map(_leading, shapes)
        if example.shapes in shapes or (alike and (dense or len(shapes) > 1)):
            continue
        raise SepconvertError(
            f"calibration: images {purpose} are {' or '.join(sorted(map(_written, shapes)))}, the model"
            f" is run on {_written(example.shapes)} (C×H×W); pass images of that shape (`resize`), or "
            "inputs of another (`input_shape`)"
        )


def _leading(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes without the last two dimensions of those that have three: sizes of images."""
    return tuple(shape[:-2] if len(shape) > 2 else shape for shape in shapes)


def _written(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(map(dimensions, shapes))


def size_of(loader: DataLoader[Batch]) -> int:
    """Return the number of samples that a loader yields; 0 if its dataset does not say."""
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else 0


def _batches(loader: DataLoader[Batch], division: Division) -> Iterator[tuple[InputBatch, Tensor]]:
    """Yield images and their labels, -1 for images without one, in batches of `at_once` of one shape."""
    found = []
    for x, y in whole(loader):
        samples = division.batched(x)
        found.append((samples, class_labels(y, len(samples))))
    if not all(value.isfinite().all() for samples, _ in found for value in samples.floating):
        raise SepconvertError("calibration: the images hold NaN or Inf; check the data")
    pictures = [value for samples, _ in found for value in samples.floating if value[0].ndim > 1]
    if pictures and all(map(_is_flat, pictures)):
        raise SepconvertError(
            "calibration: every image is of one colour, which says nothing of the data that the model meets; "
            "check the path and the preprocessing"
        )
    by_shape: dict[tuple[tuple[int, ...], ...], list[tuple[InputBatch, Tensor]]] = {}
    for pair in found:
        by_shape.setdefault(pair[0].shapes, []).append(pair)
    for alike in by_shape.values():
        batches, labels = zip(*alike, strict=True)
        images = InputBatch.joined(batches)
        yield from zip(
            images.split(division.at_once),
            torch.split(torch.cat(labels), division.at_once),
            strict=True,
        )


def _is_flat(x: Tensor) -> bool:
    return x.shape[2:].numel() > 1 and bool((x.amin((-2, -1)) == x.amax((-2, -1))).all())
