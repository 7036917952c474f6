"""`--data` and `--calib` to a loader of (x, y) batches, in a fixed order.

Images stay uint8 in memory or on disk and become float32 one by one: `(x / 255 - mean) / std`.
"""

import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.files.callables import resolve_callable

__all__ = [
    "Batch",
    "Preprocess",
    "check_against_model",
    "dimensions",
    "has_labels",
    "load_data",
    "sample_shape",
    "split",
]


Batch = tuple[Tensor, Tensor]


# Of Pillow's, which tells them by their content: it runs Ghostscript on others.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


_MAX_PIXELS = 2**26  # of an image: 8192 × 8192


IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


UNLABELLED = -1  # no class, so that a loss or an accuracy of unlabelled data fails instead of misleading


@dataclass(frozen=True)
class Preprocess:
    """What happens to uint8 images before the model sees them.

    `mean` and `std` are per channel, of `x / 255`. `resize` is a side or (height, width) in pixels, bilinear
    and antialiased; it does not keep the aspect ratio. Raises `SepconvertError` for values out of range.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges; the number of channels is known only once there are data."""
        if not all(map(math.isfinite, (*(self.mean or ()), *(self.std or ())))) or min(self.std or (1,)) <= 0:
            raise SepconvertError(
                f"--mean {self.mean} --std {self.std}: expected finite numbers, std above 0"
            )
        if max(map(abs, self.mean or (0,))) > 10 or max(self.std or (0,)) > 10:
            raise SepconvertError(
                f"--mean {self.mean} --std {self.std}: expected those of x / 255, about 0 to 1; divide by 255"
            )
        if self.size is not None and not all(0 < side <= 16384 for side in self.size):
            raise SepconvertError(f"--resize {self.resize}: expected 1 to 16384 pixels, as 224 or 224x320")

    @property
    def size(self) -> tuple[int, int] | None:
        """`resize` as (height, width)."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __call__(self, image: Tensor) -> Tensor:
        """A uint8 image C × H × W as the float32 that the model takes."""
        if self.size is not None and self.size != tuple(image.shape[1:]):
            # One after the other: of large images all channels would take much memory as floats.
            x = torch.cat([_resized(channel.float(), self.size) for channel in image])
        else:
            x = image.float()
        x = x / 255
        if self.mean is not None:
            x = x - torch.tensor(self.mean)[:, None, None]
        if self.std is not None:
            x = x / torch.tensor(self.std)[:, None, None]
        return x


def _resized(channel: Tensor, size: tuple[int, int]) -> Tensor:
    """H × W to 1 × `size`."""
    return F.interpolate(channel[None, None], size, mode="bilinear", antialias=True)[0]


def load_data(
    spec: str,
    preprocess: Preprocess | None = None,
    *,
    batch_size: int = 256,
    labelled: bool = True,
    option: str = "--data",
) -> DataLoader[Batch]:
    """Batches `(x, y)`, unshuffled: x float32 N × C × H × W, y int64 N.

    `spec` is a `.npz` file (`x` uint8 N × H × W × C or float N × C × H × W, `y` integer N), a folder of class
    folders with images (classes are numbered in the order of their names), or `pkg.mod:callable` or
    `file.py:callable` that returns a DataLoader, used as it is. Float data and loaders are preprocessed
    already: they refuse a `preprocess`. With `labelled=False`, `y` and class folders are ignored and every
    label is -1. `option` is what errors call the option that `spec` came from.

    Raises `SepconvertError` for data of any other form, and, when a batch is read, for a broken image.
    """
    if not spec:
        raise SepconvertError(f"{option}: is empty; expected an .npz file, a folder or pkg.mod:callable")
    preprocess = preprocess or Preprocess()
    path = Path(spec)
    if path.is_dir():
        return DataLoader(_read_folder(path, preprocess, labelled), batch_size)
    if path.is_file() or path.suffix == ".npz":
        return DataLoader(_read_npz(path, preprocess, labelled), batch_size)
    if ":" in spec:
        return _call(spec, preprocess, option)
    raise SepconvertError(
        f"{option} {spec}: there is no such file or folder; expected an .npz file, a folder of class folders "
        "with images, or pkg.mod:callable that returns a DataLoader"
    )


def has_labels(spec: str) -> bool:
    """Are there labels: a `y` in an .npz file, class folders in a folder? A callable's loader has them."""
    if Path(spec).is_dir():
        return any(child.is_dir() for child in Path(spec).iterdir())
    try:
        with np.load(spec, allow_pickle=False) as archive:
            return "y" in archive
    except Exception:  # no archive, or a damaged one, of which `load_data` says so
        return True


def is_own(loader: object) -> TypeGuard[DataLoader[Batch]]:
    """Whether `load_data` read the samples itself: they may be batched anew."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, _Samples)


def sample_shape(loader: DataLoader[Batch]) -> tuple[int, ...]:
    """The shape of one sample, without the batch dimension: (C, H, W) for images."""
    if isinstance(loader.dataset, _Samples):
        return tuple(loader.dataset[0][0].shape)
    return tuple(next(iter(loader))[0].shape[1:])


def check_against_model(
    loader: DataLoader[Batch], input_shape: Sequence[int] | None, num_classes: int | None
) -> None:
    """Raise `SepconvertError` unless samples have `input_shape` and labels are below `num_classes`.

    `input_shape` is that of one sample, (C, H, W); None skips either check. All labels of data that
    `load_data` read itself are checked, and the first batch of a loader that came from a callable.
    """
    shape = sample_shape(loader)
    if input_shape is not None and shape != tuple(input_shape):
        raise SepconvertError(
            f"data: samples are {dimensions(shape)}, the model takes {dimensions(input_shape)} (C×H×W); "
            "pass --resize, another --input-shape or other data"
        )
    labels = loader.dataset.labels if isinstance(loader.dataset, _Samples) else next(iter(loader))[1]
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise SepconvertError(
            f"data: holds the label {int(labels.max())}, the model has {num_classes} outputs, labels 0 to "
            f"{num_classes - 1}; use the data that this model was trained for"
        )


def split(loader: DataLoader[Batch], counts: Sequence[int], seed: int) -> list[DataLoader[Batch]]:
    """Disjoint random parts of so many samples, and the rest as the last; each in the loader's order.

    Raises `SepconvertError` if the data cannot be indexed or are too few.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise SepconvertError(
            "data: expected a map-style dataset, of which parts can be taken, got an IterableDataset; "
            "wrap it in one that has __getitem__ and __len__"
        )
    size = len(dataset)  # type: ignore[arg-type]  # map-style datasets have one
    if sum(counts) > size:
        raise SepconvertError(
            f"data: expected at least {sum(counts)} samples, got {size}; pass more or ask for fewer"
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


class _Samples(Dataset[Batch]):
    """Samples that are read when asked for. `labels` is int64 N."""

    def __init__(self, read: Callable[[int], Tensor], labels: Tensor) -> None:
        self.read = read
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.read(index), self.labels[index]


# .npz ----------------------------------------------------------------------------------------------


def _read_npz(path: Path, preprocess: Preprocess, labelled: bool) -> _Samples:
    wanted = ("x", "y") if labelled else ("x",)
    expected = (
        "expected an .npz file with x (uint8 N×H×W×C or float N×C×H×W)" + " and y (integer N)" * labelled
    )
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SepconvertError(f"{path}: holds a single array; {expected}")
            if missing := [name for name in wanted if name not in archive]:
                held = ", ".join(archive) or "no array"
                raise SepconvertError(f"{path}: lacks {' and '.join(missing)}, holds {held}; {expected}")
            for name in wanted:
                _check_size(archive.zip, name, path)
            arrays = [archive[name] for name in wanted]
    except SepconvertError:
        raise
    except FileNotFoundError:
        raise SepconvertError(f"{path}: there is no such file; {expected}") from None
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise in many ways
        cause = str(error).partition("\n")[0][:100] or type(error).__name__
        if isinstance(error, ValueError) and "pickle" in cause:  # numpy takes whatever else it meets for one
            cause = "it is no archive of numeric arrays"
        raise SepconvertError(f"{path}: cannot be read ({cause}); {expected}") from error
    x = arrays[0]
    if not all(isinstance(each, np.ndarray) for each in arrays):
        raise SepconvertError(f"{path}: holds members that are no arrays; {expected}")
    if x.ndim != 4 or 0 in x.shape or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise SepconvertError(f"{path}: x is {x.dtype} of shape {x.shape}; {expected}")
    labels = _labels(arrays[1], path) if labelled else torch.full((len(x),), UNLABELLED)
    if len(labels) != len(x):
        raise SepconvertError(
            f"{path}: x holds {len(x)} samples and y {len(labels)} labels; expected as many"
        )
    images = _images if x.dtype == np.uint8 else _floats
    return _Samples(images(x, preprocess, path), labels)


def _check_size(archive: zipfile.ZipFile | None, name: str, path: Path) -> None:
    """Raise `SepconvertError` if an array is not as large as it says, or does not fit in memory."""
    assert archive is not None  # noqa: S101  (it is, once it is closed)
    info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    with archive.open(info) as member:
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            np.lib.format.read_magic(member), np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
        expected = member.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and expected != info.file_size:
        raise SepconvertError(
            f"{path}: {name} is {dtype} of shape {shape}, which takes {expected:,} bytes, and holds "
            f"{info.file_size:,}; it is damaged: save it again"
        )
    free = psutil.virtual_memory().available
    if info.file_size > free or (info.file_size > 2**28 and info.file_size > 250 * info.compress_size):
        memory, file, left = (size / 1e9 for size in (info.file_size, info.compress_size, free))
        raise SepconvertError(
            f"{path}: {name} takes {memory:,.1f} GB of memory ({file:,.3f} GB in the file), of {left:,.1f} "
            "that are free; pass a folder of images or a loader, which are read in parts"
        )


def _labels(y: npt.NDArray[np.generic], path: Path) -> Tensor:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise SepconvertError(
            f"{path}: y is {y.dtype} of shape {y.shape}; expected integer class numbers of shape (N,)"
        )
    if y.size and (int(y.min()) < 0 or int(y.max()) >= 2**31):
        raise SepconvertError(
            f"{path}: y ranges from {y.min()} to {y.max()}; expected classes from 0 upwards"
        )
    return torch.from_numpy(y.astype(np.int64))


def _images(x: npt.NDArray[np.uint8], preprocess: Preprocess, path: Path) -> Callable[[int], Tensor]:
    if x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise SepconvertError(
            f"{path}: x is uint8 of shape {x.shape}, which looks like N×C×H×W; expected N×H×W×C: "
            "save x.transpose(0, 2, 3, 1)"
        )
    _check_channels(preprocess, x.shape[3], path)
    images = torch.from_numpy(x).permute(0, 3, 1, 2)
    return lambda index: preprocess(images[index])


def _floats(x: npt.NDArray[np.floating], preprocess: Preprocess, path: Path) -> Callable[[int], Tensor]:
    if preprocess != Preprocess():
        raise SepconvertError(
            f"{path}: x is float and used as it is; --mean, --std and --resize are for uint8: leave them out"
        )
    if x.shape[3] == 3 and x.shape[1] > 4:
        raise SepconvertError(
            f"{path}: x is float of shape {x.shape}, which looks like N×H×W×C; expected N×C×H×W: "
            "save x.transpose(0, 3, 1, 2)"
        )
    with np.errstate(over="ignore"):  # what overflows becomes inf, which is refused below
        samples = torch.from_numpy(x.astype(np.float32))
    # In parts: the masks of all would be as large again.
    if not all(part.isfinite().all() for part in torch.split(samples, 256)):
        raise SepconvertError(f"{path}: x holds NaN or infinite values; expected finite numbers")
    return samples.__getitem__


# Folders -------------------------------------------------------------------------------------------


def _read_folder(path: Path, preprocess: Preprocess, labelled: bool) -> _Samples:
    classes = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if labelled and not classes:
        raise SepconvertError(f"{path}: holds no folders; expected one folder with images for each class")
    groups = [_image_files(folder) for folder in classes] if labelled else [_image_files(path)]
    for folder, group in zip(classes if labelled else [path], groups, strict=True):
        if not group:
            raise SepconvertError(
                f"{folder}: holds no images ({' '.join(IMAGE_EXTENSIONS)}); add some or remove it"
            )
    files = [file for group in groups for file in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    grey = True
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        with _open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise SepconvertError(
                    f"{file}: is {dimensions((image.height, image.width))}, expected at most "
                    f"{_MAX_PIXELS:,} pixels; scale it down"
                )
            sizes.setdefault((image.height, image.width), file)
            if image.mode.startswith(("I", "F")):
                raise SepconvertError(f"{file}: has more than 8 bits a channel; convert it to 8 bits")
            grey = grey and image.mode in ("1", "L", "LA")
    if len(sizes) > 1 and preprocess.size is None:
        (size, file), (other, odd) = list(sizes.items())[:2]
        raise SepconvertError(
            f"{path}: {file} is {dimensions(size)}, {odd} is {dimensions(other)} (H×W); pass --resize"
        )
    _check_channels(preprocess, 1 if grey else 3, path)

    def read(index: int) -> Tensor:
        with _open(files[index]) as image:
            try:
                pixels = np.array(image.convert("L" if grey else "RGB"))
            except Exception as error:  # what Pillow's decoders raise depends on the format
                raise SepconvertError(
                    f"{files[index]}: a broken image ({error}); replace or remove it"
                ) from error
        return preprocess(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))

    return _Samples(read, torch.tensor(numbers if labelled else [UNLABELLED] * len(files)))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".") and file.is_file()
    )


def _open(file: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise SepconvertError(f"{file}: too large an image ({first_line(error)}); scale it down") from error
    except Exception as error:  # what Pillow's parsers raise depends on the format
        raise SepconvertError(f"{file}: a broken image; replace or remove it") from error


# Callables -----------------------------------------------------------------------------------------


def _call(spec: str, preprocess: Preprocess, option: str) -> DataLoader[Batch]:
    label = f"{option} {spec}"
    function = resolve_callable(spec, option)
    if preprocess != Preprocess():
        raise SepconvertError(
            f"{label}: its batches are used as they are; leave out --mean, --std and --resize"
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
    if isinstance(loader.sampler, RandomSampler):
        raise SepconvertError(
            f"{label}: its loader shuffles, so two models would see different batches; pass shuffle=False"
        )
    if batch is None:
        raise SepconvertError(f"{label}: its loader is empty; expected batches (x, y)")
    if not (
        isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)
    ):
        raise SepconvertError(f"{label}: its batches are {_kind(batch)}; expected two tensors (x, y)")
    x, y = batch
    if x.dtype != torch.float32 or x.ndim < 2:
        raise SepconvertError(f"{label}: its x is {_kind(x)}; expected float32 N×C×H×W")
    if y.dtype != torch.int64 or y.shape != x.shape[:1] or int(y.min()) < 0:
        raise SepconvertError(
            f"{label}: its y is {_kind(y)}; expected int64 class numbers of shape ({len(x)},)"
        )
    return loader


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}s of {', '.join(type(item).__name__ for item in value)}"
    return f"of type {type(value).__name__}"


def _check_channels(preprocess: Preprocess, channels: int, path: Path) -> None:
    for option, values in (("--mean", preprocess.mean), ("--std", preprocess.std)):
        if values is not None and len(values) != channels:
            raise SepconvertError(
                f"{path}: {option} has {len(values)} values, the images {channels} channels; give one each"
            )


def dimensions(shape: Sequence[int]) -> str:
    """As people write it: 3×224×224."""
    return "×".join(map(str, shape))
