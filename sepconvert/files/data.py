"""Data for evaluation, calibration and training: loaders of (x, y) batches in a fixed order."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset

from sepconvert.base.errors import SepconvertError, one_line, quoted
from sepconvert.files.arrays import holds_pixels, read_npz
from sepconvert.files.callables import resolve_callable
from sepconvert.files.images import (
    UNLABELLED,
    Batch,
    Preprocess,
    StoredSamples,
    TargetKind,
    dimensions,
    read_folder,
    read_pairs,
)
from sepconvert.files.sources import check_data
from sepconvert.network.tensors import InputBatch, tensors_in

__all__ = [
    "UNLABELLED",
    "Batch",
    "Preprocess",
    "TargetKind",
    "changed",
    "check_shape",
    "class_labels",
    "dimensions",
    "has_labels",
    "has_pixels",
    "is_own",
    "load_data",
    "paired",
    "sample_shapes",
    "split",
    "varies",
]

# Usual keys of batches that are mappings.
_IMAGES = ("image", "images", "img", "pixel_values", "x", "input", "inputs")
_LABELS = ("label", "labels", "y", "target", "targets", "mask", "masks")


def load_data(
    spec: str,
    preprocess: Preprocess | None = None,
    *,
    batch_size: int = 256,
    labelled: bool = True,
    parameter: str = "data",
    targets: str | None = None,
    kind: TargetKind | None = None,
) -> DataLoader[Batch]:
    """Return an unshuffled loader of batches `(x, y)`; of files, x is float32 N × C × H × W.

    Images of a folder that differ in size, as they may with `targets` or a `kind`, come in batches of one.

    Args:
        spec: an `.npz` file (`x` uint8 N × H × W × C or float N × C × H × W, and `y`, see `read_npz`), a
            folder of class folders with images (classes are numbered in the order of their names), a folder
            of images with `targets`, or `pkg.mod:callable` or `file.py:callable` that returns a DataLoader,
            which is used as it is: x is a tensor, or a tuple or mapping of tensors, y is anything.
        preprocess: of uint8 images. Float data and loaders, which are preprocessed already, refuse it.
        batch_size: samples in a batch, unless a callable returns the loader.
        labelled: whether targets are needed; otherwise `y` and class folders are ignored, and labels are -1.
            A loader is then one of `paired` batches, which keep the targets that there are.
        parameter: name of the parameter that `spec` was passed as, for error messages.
        targets: a folder of masks or pictures, named as the images of the folder `spec` (see `read_pairs`).
        kind: what the metric takes as targets; None for the class numbers of a classifier.

    Raises:
        SepconvertError: the data have another form. A broken image raises it when its batch is read.
    """
    check_data(spec, parameter, targets)
    preprocess = preprocess or Preprocess()
    path = Path(spec)
    if targets is not None:
        return _batched(read_pairs(path, Path(targets), preprocess, kind), batch_size)
    if path.is_dir():
        return _batched(read_folder(path, preprocess, labelled, dense=kind is not None), batch_size)
    if path.is_file():
        return _batched(read_npz(path, preprocess, labelled, kind), batch_size)
    return _call(spec, preprocess, parameter, labelled)


def _batched(samples: StoredSamples, batch_size: int) -> DataLoader[Batch]:
    return DataLoader(samples, 1 if samples.varying else batch_size)


def has_labels(spec: str) -> bool:
    """Return whether files have targets: `y` in an .npz file, or class folders.

    It is False of a callable, whose loader need not have any.
    """
    if Path(spec).is_dir():
        return any(child.is_dir() for child in Path(spec).iterdir())
    if not Path(spec).is_file():
        return False
    try:
        with np.load(spec, allow_pickle=False) as archive:
            return "y" in archive
    except Exception:  # no archive, or a damaged one, which `load_data` reports
        return True


def has_pixels(spec: str) -> bool:
    """Return whether images are uint8, which are preprocessed: those of a folder, or x in an .npz file.

    It is False of a callable, whose loader has preprocessed them.
    """
    return Path(spec).is_dir() or holds_pixels(Path(spec))


def paired(loader: DataLoader[Any], parameter: str) -> DataLoader[Batch]:
    """Return a loader of the same images in batches (x, y), for uses that need no labels.

    Its batches may be x alone, tuples or lists that begin with x, or mappings with images under a usual key
    or with one floating-point tensor; x is a tensor, or a tuple, list or mapping of tensors. y is what stands
    behind x, or under a usual key, and None where there is nothing. A batch of another form raises
    `SepconvertError`, which names the `parameter`, when it is made.
    """
    return changed(loader, partial(_pair, parameter=parameter))


def changed(loader: DataLoader[Any], change: Callable[[Any], Batch]) -> DataLoader[Batch]:
    """Return a loader of the same batches, each of them changed."""
    other = copy.copy(loader)
    vars(other)["_iterator"] = None  # persistent workers would go on with the old `collate_fn`
    other.collate_fn = partial(_changed, loader.collate_fn, change)
    return other


def class_labels(y: object, samples: int) -> Tensor:
    """Return the targets of so many samples as int64 class numbers; `UNLABELLED` where they are no such."""
    if isinstance(y, Tensor) and y.shape == (samples,) and not (y.is_floating_point() or y.is_complex()):
        return y.long()
    return torch.full((samples,), UNLABELLED)


def _changed(collate: Callable[[Any], Any], change: Callable[[Any], Batch], samples: Any) -> Batch:
    return change(collate(samples))


def _pair(batch: object, parameter: str) -> Batch:
    """Return the inputs of a batch, and what stands behind them."""
    x: object = batch
    y: object = None
    if isinstance(batch, Mapping):
        x = _inputs_of(batch)
        y = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, tuple | list):
        x, y = (*batch, None, None)[:2]
    tensors = tensors_in(x)
    if not tensors or any(each.ndim < 2 for each in tensors[:1]):
        raise SepconvertError(
            f"`{parameter}`: its batches are {_kind(batch)}; expected a tensor N×C×H×W, a tuple that begins "
            f"with one, or a dict with one under a key such as {_IMAGES[0]}"
        )
    return x, y


def _inputs_of(batch: Mapping[Any, Any]) -> object:
    """Return the images of a batch that is a mapping; of several tensors, a mapping without the targets."""
    usual = next((batch[key] for key in _IMAGES if isinstance(batch.get(key), Tensor)), None)
    if usual is not None:
        return usual
    inputs = {key: value for key, value in batch.items() if key not in _LABELS}
    floating = [each for each in inputs.values() if isinstance(each, Tensor) and each.is_floating_point()]
    return floating[0] if len(floating) == 1 else inputs


def is_own(loader: object) -> TypeGuard[DataLoader[Batch]]:
    """Return whether `load_data` read the samples itself, so that they may be batched anew."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, StoredSamples)


def varies(loader: DataLoader[Batch]) -> bool:
    """Return whether samples differ in size; of a loader that is not our own, the first two batches tell."""
    if isinstance(loader.dataset, StoredSamples):
        return loader.dataset.varying
    shapes = {
        tuple(tuple(each.shape[1:]) for each in tensors_in(batch[0])) for batch in itertools.islice(loader, 2)
    }
    return len(shapes) > 1


def sample_shapes(loader: DataLoader[Batch], axis: int = 0) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the inputs of the first sample, without the batch dimension `axis`."""
    if isinstance(loader.dataset, StoredSamples):
        return (tuple(loader.dataset[0][0].shape),)
    return InputBatch((next(iter(loader))[0],), axis).shapes


def check_shape(shape: Sequence[int], expected: Sequence[int], *, dense: bool) -> None:
    """Check that samples have the shape that a model is run on, (C, H, W).

    Args:
        shape: that of a sample.
        expected: that of an input.
        dense: whether the model takes images of any size, so that their channels alone count.

    Raises:
        SepconvertError: they have another.
    """
    leading = -2 if dense and len(shape) == len(expected) > 2 else None
    if tuple(shape)[:leading] != tuple(expected)[:leading]:
        raise SepconvertError(
            f"`data`: samples are {dimensions(shape)}, the model takes {dimensions(expected)} (C×H×W); "
            "pass `resize`, another `input_shape` or other data"
        )


def split(loader: DataLoader[Batch], counts: Sequence[int], seed: int) -> list[DataLoader[Batch]]:
    """Split data at random into disjoint parts.

    Args:
        loader: the data.
        counts: number of samples of each part but the last, which takes the rest.
        seed: seed of the choice.

    Returns:
        A loader for each part, with the samples in the order of `loader`.

    Raises:
        SepconvertError: the data cannot be indexed, or are too few.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise SepconvertError(
            "`data`: expected a map-style dataset, of which parts can be taken, got an IterableDataset; "
            "wrap it in one that has __getitem__ and __len__"
        )
    size = len(dataset)  # type: ignore[arg-type]  # map-style datasets have one
    if sum(counts) > size:
        raise SepconvertError(
            f"`data`: expected at least {sum(counts)} samples, got {size}; pass more or ask for fewer"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order, [*counts, size - sum(counts)])
    return [
        DataLoader(
            Subset(dataset, sorted(part.tolist())),
            batch_size=loader.batch_size or 1,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
        for part in parts
    ]


def _call(spec: str, preprocess: Preprocess, parameter: str, labelled: bool) -> DataLoader[Batch]:
    """Return the loader that a callable returns, after a check of its first batch."""
    label = f"`{parameter}` {spec}"
    function = resolve_callable(spec, parameter)
    if preprocess != Preprocess():
        raise SepconvertError(
            f"{label}: its batches are used as they are; leave out `mean`, `std` and `resize`"
        )
    try:
        loader = function()
    except Exception as error:
        raise SepconvertError(
            f"{label}: failed ({one_line(error)}); fix it: it is called without arguments, and returns a "
            "DataLoader"
        ) from error
    if not isinstance(loader, DataLoader):
        raise SepconvertError(
            f"{label}: returned {quoted(loader)}, expected a torch.utils.data.DataLoader; return one, e.g. "
            "DataLoader(dataset, batch_size=64)"
        )
    try:
        batch = next(iter(loader), None)
    except Exception as error:
        raise SepconvertError(
            f"{label}: its loader fails on the first batch ({one_line(error)}); fix its dataset or its "
            "collate_fn"
        ) from error
    if batch is None:
        raise SepconvertError(f"{label}: its loader is empty; let it yield at least one batch")
    if not labelled:
        loader, batch = paired(loader, parameter), _pair(batch, parameter)
    elif isinstance(loader.sampler, RandomSampler):
        raise SepconvertError(
            f"{label}: its loader shuffles, so two models would see different batches; pass shuffle=False"
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise SepconvertError(
            f"{label}: its batches are {_kind(batch)}; expected pairs (x, y) of inputs and targets: let the "
            "dataset yield a sample and its label, mask or picture"
        )
    _check_inputs(batch[0], label)
    return loader


def _check_inputs(x: object, label: str) -> None:
    """Raise `SepconvertError` unless these are floating-point inputs of some samples, among others."""
    if isinstance(x, Tensor):
        if x.dtype != torch.float32 or x.ndim < 2:
            raise SepconvertError(
                f"{label}: its x is {_kind(x)}; expected float32 N×C×H×W, e.g. x.float() / 255 of images"
            )
    elif not any(each.is_floating_point() and each.ndim > 1 for each in tensors_in(x)):
        raise SepconvertError(
            f"{label}: its x is {_kind(x)}; expected a tensor float32 N×C×H×W, or a tuple or dict of "
            "tensors, one of them floating-point"
        )


def _kind(value: object) -> str:
    """Describe a batch, or a part of one, that has another form than expected."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}s of {', '.join(type(item).__name__ for item in value)}"
    if isinstance(value, Mapping):
        return f"dicts of {', '.join(map(str, value))}"
    return f"of type {type(value).__name__}"
