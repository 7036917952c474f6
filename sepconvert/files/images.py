"""Images of a folder, and what happens to them before a model sees them.

Images stay uint8 in memory or on disk and become float32 one at a time: `(x / 255 - mean) / std`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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

_GREY, _NUMBERED = {"1", "L", "LA"}, {"1", "L", "P"}  # Pillow's modes

_MAX_PIXELS = 2**26  # of an image: 8192 × 8192


TargetKind = Literal["classes", "pictures", "any"]
"""What a metric takes as targets: class numbers (of samples or pixels), pictures, or anything."""


class StoredSamples(Dataset[Batch]):
    """Samples and their targets, read when they are indexed.

    Attributes:
        size: number of samples.
        read: returns the sample of an index, float32 C × H × W.
        target: returns the target of an index: a class number, a mask, a picture, numbers or a text.
        varying: whether samples differ in size, so that each is a batch of its own.
    """

    def __init__(
        self, size: int, read: Callable[[int], Tensor], target: Callable[[int], Any], *, varying: bool = False
    ) -> None:
        self.size, self.read, self.target, self.varying = size, read, target, varying

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        return self.read(index), self.target(index)


Layout = Literal["nchw", "nhwc"]
"""Order of the dimensions of images: samples, channels, height and width."""


def layout_of(shape: Sequence[int | None]) -> Layout:
    """Return the layout that the shape of a batch of images speaks for; None is an open size."""
    channels = (1, 3, 4)
    is_last = len(shape) == 4 and shape[3] in channels and shape[1] not in channels
    return "nhwc" if is_last else "nchw"


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of uint8 images.

    Targets have a part in `resize` alone: masks are resized to the nearest pixel, pictures as images are.
    Neither `mean` nor `std` is applied to them.

    Args:
        mean: of each channel of `x / 255`; None subtracts nothing.
        std: of each channel of `x / 255`; None divides by nothing.
        resize: a side, or (height, width), in pixels, by bilinear interpolation with antialiasing. The aspect
            ratio is not kept. None leaves images as they are.
        layout: "nhwc" gives images as H × W × C, "nchw" as C × H × W. It applies to uint8 images alone.

    Raises:
        SepconvertError: a value is out of range.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    layout: Layout = field(default="nchw", compare=False)

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
        """Return a uint8 image C × H × W as the float32 image that the model takes, in its layout."""
        x = self.picture(image)
        if self.mean is not None:
            x = x - torch.tensor(self.mean)[:, None, None]
        if self.std is not None:
            x = x / torch.tensor(self.std)[:, None, None]
        return x if self.layout == "nchw" else x.permute(1, 2, 0).contiguous()

    def picture(self, image: Tensor) -> Tensor:
        """Return a uint8 target C × H × W as float32 from 0 to 1."""
        if self.size is not None and self.size != tuple(image.shape[1:]):
            # One channel after the other: all channels of a large image would take much memory as floats.
            return torch.cat([_resized(channel.float(), self.size) for channel in image]) / 255
        return image.float() / 255

    def mask(self, classes: Tensor) -> Tensor:
        """Return class numbers H × W of any integer dtype as int64."""
        if self.size is None or self.size == tuple(classes.shape):
            return classes.long()
        nearest = F.interpolate(classes.double()[None, None], self.size, mode="nearest-exact")
        return nearest[0, 0].long()


def _resized(channel: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a channel, H × W, to 1 × `size`."""
    return F.interpolate(channel[None, None], size, mode="bilinear", antialias=True)[0]


def read_folder(path: Path, preprocess: Preprocess, labelled: bool, *, dense: bool = False) -> StoredSamples:
    """Return the images of a folder, sorted by path, decoded and preprocessed when they are indexed.

    Args:
        path: a folder of class folders, numbered in the order of their names; or, with `labelled=False`, a
            folder that holds images at any depth.
        preprocess: applied to each image. Images have 1 channel if all of them are grey, else 3.
        labelled: whether class folders are labels; otherwise every label is `UNLABELLED`.
        dense: whether images may differ in size.

    Raises:
        SepconvertError: there are no images, or they differ in size without a `resize`, are too large, have
            more than 8 bits or are broken. Decoding a broken one raises the error when it is indexed.
    """
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not labelled:
        folders = [path]
    elif not folders:
        raise SepconvertError(
            f"{path}: holds no folders; expected one folder with images for each class, or pass the masks or "
            "pictures that are wanted for the images as `targets`"
        )
    groups = [_image_files(folder) for folder in folders]
    for folder, group in zip(folders, groups, strict=True):
        if not group:
            raise _no_images(folder)
    files = [file for group in groups for file in group]
    labels = torch.tensor(
        [number if labelled else UNLABELLED for number, group in enumerate(groups) for _ in group]
    )
    return _stored(files, path, preprocess, labels.__getitem__, dense=dense)


def read_pairs(images: Path, targets: Path, preprocess: Preprocess, kind: TargetKind | None) -> StoredSamples:
    """Return the images of a folder with targets from another, which has an image of the same name for each.

    Names are compared without their extensions, and with the folders within `images` and `targets`.
    Targets are class numbers H × W, int64, if they are palette images, of which the numbers in the palette
    count, or grey ones; pictures, float32 C × H × W from 0 to 1, if they are in colour or `kind` asks for
    pictures. `mean` and `std` are not applied to targets.

    Args:
        images: the folder of images, at any depth; they may differ in size.
        targets: the folder of targets.
        preprocess: applied to each image; of each target, its `resize` alone.
        kind: what the metric takes; None for anything.

    Raises:
        SepconvertError: an image has no target, or several, a target has no image, or a file is no use.
    """
    found, wanted = _by_name(images), _by_name(targets)
    if lacking := next((name for name in found if name not in wanted), None):
        raise SepconvertError(
            f"{targets}: holds no target for {found[lacking]}; add {lacking}.png, or take that image away"
        )
    if extra := next((name for name in wanted if name not in found), None):
        raise SepconvertError(
            f"{wanted[extra]}: there is no image of that name in {images}; add it, or take the target away"
        )
    files = [wanted[name] for name in found]
    read = _reader_of_targets(files, targets, preprocess, kind)
    return _stored(list(found.values()), images, preprocess, read, dense=True)


def _by_name(folder: Path) -> dict[str, Path]:
    """Return the images in a folder, sorted by path, by their paths without the extension."""
    found: dict[str, Path] = {}
    for file in _image_files(folder):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise SepconvertError(
                f"{file}: has the name of {found[name]}, and images and targets are matched by name; rename "
                "or remove one of them"
            )
        found[name] = file
    if not found:
        raise _no_images(folder)
    return found


def _no_images(folder: Path) -> SepconvertError:
    return SepconvertError(f"{folder}: holds no images ({' '.join(IMAGE_EXTENSIONS)}); add some or remove it")


def _stored(
    files: Sequence[Path],
    folder: Path,
    preprocess: Preprocess,
    target: Callable[[int], Any],
    *,
    dense: bool,
) -> StoredSamples:
    """Return the images of some files with their targets; `dense` ones may differ in size."""
    modes, sizes = _headers(files)
    varying = len(sizes) > 1 and preprocess.size is None
    if varying and not dense:
        (size, file), (other, odd) = list(sizes.items())[:2]
        raise SepconvertError(
            f"{folder}: {file} is {dimensions(size)}, {odd} is {dimensions(other)} (H×W); pass `resize`"
        )
    mode = "L" if modes <= _GREY else "RGB"
    check_channels(preprocess, len(mode), folder)
    return StoredSamples(
        len(files), lambda index: preprocess(_decoded(files[index], mode)), target, varying=varying
    )


def _reader_of_targets(
    files: Sequence[Path], folder: Path, preprocess: Preprocess, kind: TargetKind | None
) -> Callable[[int], Tensor]:
    """Return a function that reads the target of an index; raise `SepconvertError` if they are no use."""
    modes, _ = _headers(files)
    flat = kind != "pictures" and modes <= _NUMBERED
    if flat:
        if lossy := next((file for file in files if _format(file) == "JPEG"), None):
            raise SepconvertError(
                f"{lossy}: is a JPEG, whose compression changes class numbers; save masks as PNG"
            )
        return lambda index: preprocess.mask(_decoded(files[index], None)[0])
    if kind == "classes" or (kind != "pictures" and modes & _NUMBERED):
        odd, mode = next((file, _mode(file)) for file in files if _mode(file) not in _NUMBERED)
        raise SepconvertError(
            f"{odd}: is a picture ({mode}), expected class numbers; save the targets in {folder} as palette "
            "or grey PNG of 8 bits, whose values are class numbers, or pass another `metric`"
        )
    mode = "L" if modes <= _GREY else "RGB"
    return lambda index: preprocess.picture(_decoded(files[index], mode))


def _decoded(file: Path, mode: str | None) -> Tensor:
    """Return the pixels of an image in Pillow's `mode`, or in its own: uint8 C × H × W."""
    with _open(file) as image:
        try:
            pixels = np.array(image if mode is None else image.convert(mode))
        except Exception as error:  # what Pillow's decoders raise depends on the format
            raise SepconvertError(f"{file}: a broken image ({error}); replace or remove it") from error
    return torch.from_numpy(np.atleast_3d(pixels).astype(np.uint8, copy=False)).permute(2, 0, 1)


def _headers(files: Sequence[Path]) -> tuple[set[str], dict[tuple[int, int], Path]]:
    """Return Pillow's modes of images, and a file of each size; raise `SepconvertError` if one is no use."""
    modes: set[str] = set()
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
            modes.add(image.mode)
    return modes, sizes


def _mode(file: Path) -> str:
    with _open(file) as image:
        return str(image.mode)


def _format(file: Path) -> str:
    with _open(file) as image:
        return str(image.format)


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
