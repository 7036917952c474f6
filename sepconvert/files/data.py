"""Data for evaluation, calibration and training: loaders of (x, y) batches in a fixed order."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset

from sepconvert.base.errors import SepconvertError
from sepconvert.files.arrays import read_npz
from sepconvert.files.callables import resolve_callable
from sepconvert.files.images import UNLABELLED, Batch, Preprocess, StoredSamples, dimensions, read_folder
from sepconvert.network.tensors import tensors_in

__all__ = [
    "UNLABELLED",
    "Batch",
    "Preprocess",
    "check_against_model",
    "class_labels",
    "dimensions",
    "has_labels",
    "is_own",
    "load_data",
    "paired",
    "sample_shape",
    "split",
]

# Usual keys of batches that are mappings.
_IMAGES = ("image", "images", "img", "pixel_values", "x", "input", "inputs")
_LABELS = ("label", "labels", "y", "target", "targets")


def load_data(
    spec: str,
    preprocess: Preprocess | None = None,
    *,
    batch_size: int = 256,
    labelled: bool = True,
    parameter: str = "data",
) -> DataLoader[Batch]:
    """Return an unshuffled loader of batches `(x, y)`: x float32 N × C × H × W, y int64 N.

    Args:
        spec: an `.npz` file (`x` uint8 N × H × W × C or float N × C × H × W, `y` integer N), a folder of
            class folders with images (classes are numbered in the order of their names), or
            `pkg.mod:callable` or `file.py:callable` that returns a DataLoader, which is used as it is.
        preprocess: of uint8 images. Float data and loaders, which are preprocessed already, refuse it.
        batch_size: samples in a batch, unless a callable returns the loader.
        labelled: whether labels are needed; otherwise `y` and class folders are ignored, and labels are -1.
            A loader is then one of `paired` batches, which keep the labels that there are.
        parameter: name of the parameter that `spec` was passed as, for error messages.

    Raises:
        SepconvertError: the data have another form. A broken image raises it when its batch is read.
    """
    if not spec:
        raise SepconvertError(f"`{parameter}`: is empty; expected an .npz file, a folder or pkg.mod:callable")
    preprocess = preprocess or Preprocess()
    path = Path(spec)
    if path.is_dir():
        return DataLoader(read_folder(path, preprocess, labelled), batch_size)
    if path.is_file() or path.suffix == ".npz":
        return DataLoader(read_npz(path, preprocess, labelled), batch_size)
    if ":" in spec:
        return _call(spec, preprocess, parameter, labelled)
    raise SepconvertError(
        f"`{parameter}` {spec}: there is no such file or folder; expected an .npz file, a folder of class "
        "folders with images, or pkg.mod:callable that returns a DataLoader"
    )


def has_labels(spec: str) -> bool:
    """Return whether files have labels: integers `y` in an .npz file, or class folders.

    It is False of a callable, whose loader need not have any.
    """
    if Path(spec).is_dir():
        return any(child.is_dir() for child in Path(spec).iterdir())
    if not Path(spec).is_file():
        return False
    try:
        with np.load(spec, allow_pickle=False) as archive:
            return "y" in archive and archive["y"].ndim == 1 and archive["y"].dtype.kind in "iu"
    except Exception:  # no archive, or a damaged one, which `load_data` reports
        return True


def paired(loader: DataLoader[Any], parameter: str) -> DataLoader[Batch]:
    """Return a loader of the same images in batches (x, y), for uses that need no labels.

    Its batches may be x alone, tuples or lists that begin with x, or mappings with images under a usual key
    or with one floating-point tensor; x is a tensor, or a tuple, list or mapping of tensors. y is what stands
    behind x, or under a usual key, and None where there is nothing. A batch of another form raises
    `SepconvertError`, which names the `parameter`, when it is made.
    """
    pairs = copy.copy(loader)
    vars(pairs)["_iterator"] = None  # persistent workers would go on with the old `collate_fn`
    pairs.collate_fn = partial(_collated_pair, loader.collate_fn, parameter)
    return pairs


def class_labels(y: object, samples: int) -> Tensor:
    """Return the targets of so many samples as int64 class numbers; `UNLABELLED` where they are no such."""
    if isinstance(y, Tensor) and y.shape == (samples,) and not (y.is_floating_point() or y.is_complex()):
        return y.long()
    return torch.full((samples,), UNLABELLED)


def _collated_pair(collate: Callable[[Any], Any], parameter: str, samples: Any) -> Batch:
    return _pair(collate(samples), parameter)


def _pair(batch: object, parameter: str) -> Batch:
    """Return the images of a batch, and what stands behind them."""
    x: object = batch
    y: object = None
    if isinstance(batch, Mapping):
        floating = [each for each in batch.values() if isinstance(each, Tensor) and each.is_floating_point()]
        found = [batch[key] for key in _IMAGES if isinstance(batch.get(key), Tensor)]
        others = {key: value for key, value in batch.items() if key not in _LABELS}
        several = sum(isinstance(each, Tensor) for each in others.values()) > 1
        x = (
            others
            if several and not found
            else next(iter(found), floating[0] if len(floating) == 1 else None)
        )
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


def is_own(loader: object) -> TypeGuard[DataLoader[Batch]]:
    """Return whether `load_data` read the samples itself, so that they may be batched anew."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, StoredSamples)


def sample_shape(loader: DataLoader[Batch]) -> tuple[int, ...]:
    """Return the shape of one sample, without the batch dimension: (C, H, W) for images."""
    if isinstance(loader.dataset, StoredSamples):
        return tuple(loader.dataset[0][0].shape)
    return tuple(next(iter(loader))[0].shape[1:])


def check_against_model(
    loader: DataLoader[Batch], input_shape: Sequence[int] | None, num_classes: int | None
) -> None:
    """Check that data suit a model.

    All labels are checked if `load_data` read the samples, else those of the loader's first batch.

    Args:
        loader: the data.
        input_shape: shape of one sample that the model takes, (C, H, W); None skips this check.
        num_classes: number of the model's outputs; None skips this check.

    Raises:
        SepconvertError: samples have another shape, or labels are not below `num_classes`.
    """
    shape = sample_shape(loader)
    if input_shape is not None and shape != tuple(input_shape):
        raise SepconvertError(
            f"`data`: samples are {dimensions(shape)}, the model takes {dimensions(input_shape)} (C×H×W); "
            "pass `resize`, another `input_shape` or other data"
        )
    labels = loader.dataset.labels if isinstance(loader.dataset, StoredSamples) else next(iter(loader))[1]
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise SepconvertError(
            f"`data`: holds the label {int(labels.max())}, the model has {num_classes} outputs, labels 0 to "
            f"{num_classes - 1}; use the data that this model was trained for"
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
        batch = next(iter(loader), None) if isinstance(loader, DataLoader) else None
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise SepconvertError(
            f"{label}: failed ({cause}); expected a callable that returns a DataLoader"
        ) from error
    if not isinstance(loader, DataLoader):
        raise SepconvertError(f"{label}: returned a {type(loader).__name__}; expected a DataLoader")
    if batch is None:
        raise SepconvertError(f"{label}: its loader is empty; expected batches of images")
    if not labelled:
        loader, batch = paired(loader, parameter), _pair(batch, parameter)
    elif isinstance(loader.sampler, RandomSampler):
        raise SepconvertError(
            f"{label}: its loader shuffles, so two models would see different batches; pass shuffle=False"
        )
    if not (
        isinstance(batch, tuple | list)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        raise SepconvertError(f"{label}: its batches are {_kind(batch)}; expected two tensors (x, y)")
    x, y = batch
    if x.dtype != torch.float32 or x.ndim < 2:
        raise SepconvertError(f"{label}: its x is {_kind(x)}; expected float32 N×C×H×W")
    if labelled and (y.dtype != torch.int64 or y.shape != x.shape[:1] or int(y.min()) < 0):
        raise SepconvertError(
            f"{label}: its y is {_kind(y)}; expected int64 class numbers of shape ({len(x)},)"
        )
    return loader


def _kind(value: object) -> str:
    """Describe a batch, or a part of one, that has another form than expected."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}s of {', '.join(type(item).__name__ for item in value)}"
    if isinstance(value, Mapping):
        return f"dicts of {', '.join(map(str, value))}"
    return f"of type {type(value).__name__}"
