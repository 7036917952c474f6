"""Images of a folder, and what happens to them before a model sees them.

Images stay uint8 in memory or on disk and become float32 one at a time: `(x / 255 - mean) / std`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sepconvert.base.errors import SepconvertError, first_line

Batch = tuple[Any, Any]
"""Inputs, such as images float32 N × C × H × W, and labels, int64 N, or other targets."""

UNLABELLED = -1
"""Label of unlabelled samples. It is no class: a loss or an accuracy of them fails instead of misleading."""

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

# Pillow recognises formats by content, and would run Ghostscript on others.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

_MAX_PIXELS = 2**26  # of an image: 8192 × 8192


class StoredSamples(Dataset[Batch]):
    """StoredSamples that are read when they are indexed.

    Attributes:
        read: returns the sample of an index, float32 C × H × W.
        labels: int64 N.
    """

    def __init__(self, read: Callable[[int], Tensor], labels: Tensor) -> None:
        self.read = read
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.read(index), self.labels[index]


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of uint8 images.

    Args:
        mean: of each channel of `x / 255`; None subtracts nothing.
        std: of each channel of `x / 255`; None divides by nothing.
        resize: a side, or (height, width), in pixels, by bilinear interpolation with antialiasing. The aspect
            ratio is not kept. None leaves images as they are.

    Raises:
        SepconvertError: a value is out of range.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges; the number of channels is known only once there are data."""
        if not all(map(math.isfinite, (*(self.mean or ()), *(self.std or ())))) or min(self.std or (1,)) <= 0:
            raise SepconvertError(
                f"`mean` {self.mean} `std` {self.std}: expected finite numbers, `std` above 0"
            )
        if max(map(abs, self.mean or (0,))) > 10 or max(self.std or (0,)) > 10:
            raise SepconvertError(
                f"`mean` {self.mean} `std` {self.std}: expected those of x / 255, about 0 to 1; divide by 255"
            )
        if self.size is not None and not all(0 < side <= 16384 for side in self.size):
            raise SepconvertError(f"`resize` {self.resize}: expected 1 to 16384 pixels, as 224 or 224x320")

    @property
    def size(self) -> tuple[int, int] | None:
        """Return `resize` as (height, width)."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __call__(self, image: Tensor) -> Tensor:
        """Return a uint8 image C × H × W as the float32 image that the model takes."""
        if self.size is not None and self.size != tuple(image.shape[1:]):
            # One channel after the other: all channels of a large image would take much memory as floats.
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
    """Resize a channel, H × W, to 1 × `size`."""
    return F.interpolate(channel[None, None], size, mode="bilinear", antialias=True)[0]


def read_folder(path: Path, preprocess: Preprocess, labelled: bool) -> StoredSamples:
    """Return the images of a folder, sorted by path, decoded and preprocessed when they are indexed.

    Args:
        path: a folder of class folders, numbered in the order of their names; or, with `labelled=False`, a
            folder that holds images at any depth.
        preprocess: applied to each image. Images have 1 channel if all of them are grey, else 3.
        labelled: whether class folders are labels; otherwise every label is `UNLABELLED`.

    Raises:
        SepconvertError: there are no images, or they differ in size without a `resize`, are too large, have
            more than 8 bits or are broken. Decoding a broken one raises the error when it is indexed.
    """
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not labelled:
        folders = [path]
    elif not folders:
        raise SepconvertError(f"{path}: holds no folders; expected one folder with images for each class")
    groups = [_image_files(folder) for folder in folders]
    for folder, group in zip(folders, groups, strict=True):
        if not group:
            raise SepconvertError(
                f"{folder}: holds no images ({' '.join(IMAGE_EXTENSIONS)}); add some or remove it"
            )
    files = [file for group in groups for file in group]
    labels = [number if labelled else UNLABELLED for number, group in enumerate(groups) for _ in group]
    grey = _check_images(files, path, preprocess)

    def read(index: int) -> Tensor:
        with _open(files[index]) as image:
            try:
                pixels = np.array(image.convert("L" if grey else "RGB"))
            except Exception as error:  # what Pillow's decoders raise depends on the format
                raise SepconvertError(
                    f"{files[index]}: a broken image ({error}); replace or remove it"
                ) from error
        return preprocess(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))

    return StoredSamples(read, torch.tensor(labels))


def _check_images(files: Sequence[Path], folder: Path, preprocess: Preprocess) -> bool:
    """Return whether all images are grey; raise `SepconvertError` if their headers say that one is no use."""
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
            f"{folder}: {file} is {dimensions(size)}, {odd} is {dimensions(other)} (H×W); pass `resize`"
        )
    check_channels(preprocess, 1 if grey else 3, folder)
    return grey


def _image_files(folder: Path) -> list[Path]:
    """Return the images in a folder, at any depth, sorted by path."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".") and file.is_file()
    )


def _open(file: Path) -> Image.Image:
    """Open an image without decoding it, or raise `SepconvertError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise SepconvertError(f"{file}: too large an image ({first_line(error)}); scale it down") from error
    except Exception as error:  # what Pillow's parsers raise depends on the format
        raise SepconvertError(f"{file}: a broken image; replace or remove it") from error


def check_channels(preprocess: Preprocess, channels: int, path: Path) -> None:
    """Raise `SepconvertError` unless mean and std have a value for each channel of the images in `path`."""
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if values is not None and len(values) != channels:
            raise SepconvertError(
                f"{path}: `{name}` has {len(values)} values, the images {channels} channels; give one each"
            )


def dimensions(shape: Sequence[int]) -> str:
    """Return a shape as people write it: 3×224×224."""
    return "×".join(map(str, shape))
