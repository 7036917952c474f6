"""Arrays of images and targets in .npz files."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from sepconvert.base.errors import SepconvertError
from sepconvert.files.images import UNLABELLED, Preprocess, StoredSamples, TargetKind, check_channels


def read_npz(
    path: Path, preprocess: Preprocess, labelled: bool, kind: TargetKind | None = None
) -> StoredSamples:
    """Return the samples in an .npz file, in its order.

    `y` may hold class numbers N, and, with a `kind`, masks of class numbers N × H × W (integers or bool,
    which become int64; negative numbers may be such as are not scored), pictures N × H × W × C (uint8, which
    become float32 N × C × H × W from 0 to 1; without C if `kind` is pictures), other integers N × …, floats
    N × …, or texts N. `mean` and `std` are not applied to it; `resize` is to masks, by nearest neighbour, and
    to pictures, as to images.

    Args:
        path: an archive of `x`, uint8 N × H × W × C or float N × C × H × W, and `y`.
        preprocess: applied to uint8 images when they are indexed; float samples are used as they are.
        labelled: whether `y` is needed; otherwise it is ignored and every label is `UNLABELLED`.
        kind: what the metric takes; None for the class numbers of a classifier.

    Raises:
        SepconvertError: the file has another form, is damaged, does not fit in memory, or has float samples
            and a `preprocess`.
    """
    wanted = ("x", "y") if labelled else ("x",)
    expected = "expected an .npz file with x (uint8 N×H×W×C or float N×C×H×W)" + labelled * (
        " and y (integer N)" if kind is None else " and y (class numbers, masks, pictures, floats or texts)"
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
        if (
            isinstance(error, ValueError) and "pickle" in cause
        ):  # numpy takes all unknown content for a pickle
            cause = "it is no archive of numeric arrays"
        raise SepconvertError(f"{path}: cannot be read ({cause}); {expected}") from error
    x = arrays[0]
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise SepconvertError(f"{path}: holds members that are no arrays; {expected}")
    if x.ndim > 0 and len(x) == 0:
        raise SepconvertError(f"{path}: x holds no samples (its shape is {x.shape}); save at least one")
    if x.ndim != 4 or 0 in x.shape or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise SepconvertError(f"{path}: x is {x.dtype} of shape {x.shape}; {expected}")
    target: Callable[[int], Any] = torch.full((len(x),), UNLABELLED).__getitem__
    if labelled:
        if arrays[1].shape[:1] != x.shape[:1]:
            raise SepconvertError(
                f"{path}: x holds {len(x)} samples and y, of shape {arrays[1].shape}, "
                f"{len(arrays[1]) if arrays[1].ndim else 1}; expected as many: save a target for each"
            )
        target = _targets(arrays[1], preprocess, path, kind)
    images = _images if x.dtype == np.uint8 else _floats
    return StoredSamples(len(x), images(x, preprocess, path), target)


def holds_pixels(path: Path) -> bool:
    """Return whether x in an .npz file is uint8; its header alone is read. False for what is no such file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as member:
            return _header(member)[1] == np.uint8
    except Exception:  # no archive, or a damaged one, which `read_npz` reports
        return False


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the dtype of an array in an archive."""
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        np.lib.format.read_magic(member), np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(member)
    return shape, dtype


def _check_size(archive: zipfile.ZipFile | None, name: str, path: Path) -> None:
    """Raise `SepconvertError` if an array has not the size that its header says, or exceeds free memory."""
    assert archive is not None  # noqa: S101  (it is None only once it is closed)
    info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    with archive.open(info) as member:
        shape, dtype = _header(member)
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


def _targets(
    y: npt.NDArray[Any], preprocess: Preprocess, path: Path, kind: TargetKind | None
) -> Callable[[int], Any]:
    """Return a function that returns the target of an index, or raise `SepconvertError` if it is no use."""
    if kind is None:
        return _labels(y, path).__getitem__
    what = f"{path}: y is {y.dtype} of shape {y.shape}"
    if y.dtype.kind == "U" and y.ndim == 1:
        texts: list[str] = y.tolist()
        return texts.__getitem__
    if y.dtype.kind not in "biuf" or 0 in y.shape:
        raise SepconvertError(
            f"{what}; expected integers, bool, floats N×… or texts N, one target for each sample of x"
        )
    if y.dtype == np.uint8 and (y.ndim == 4 or (y.ndim == 3 and kind == "pictures")):
        return _pictures(y[..., None] if y.ndim == 3 else y, preprocess, path, kind)
    if preprocess.size is not None and (y.ndim > 3 or (y.ndim == 3 and y.dtype.kind == "f")):
        raise SepconvertError(
            f"{what}, which is used as it is; `resize` is for masks N×H×W of integers and pictures of "
            "uint8 N×H×W×C: leave it out"
        )
    if y.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = torch.from_numpy(y.astype(np.float32))
        if not all(part.isfinite().all() for part in torch.split(values, 256)):
            raise SepconvertError(f"{path}: y holds NaN or infinite values; expected finite numbers")
        return values.__getitem__
    if not -(2**31) <= int(y.min()) <= int(y.max()) < 2**31:
        raise SepconvertError(f"{path}: y ranges from {y.min()} to {y.max()}; expected integers of 32 bits")

    def numbers(index: int) -> Tensor:  # int64 of all masks would take eight times the memory
        found = torch.from_numpy(np.asarray(y[index]).astype(np.int64))
        return preprocess.mask(found) if found.ndim == 2 else found

    return numbers


def _pictures(
    y: npt.NDArray[np.uint8], preprocess: Preprocess, path: Path, kind: TargetKind
) -> Callable[[int], Tensor]:
    """Return a function that returns the picture of an index, from 0 to 1; `y` is uint8 N × H × W × C."""
    if kind == "classes":
        raise SepconvertError(
            f"{path}: y is uint8 of shape {y.shape}, pictures; expected class numbers N or N×H×W: save "
            "these, or pass another `metric`"
        )
    return _channels_first(y, path, "y", preprocess.picture)


def _labels(y: npt.NDArray[np.generic], path: Path) -> Tensor:
    """Return class numbers as int64 N, or raise `SepconvertError` if they are none."""
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise SepconvertError(
            f"{path}: y is {y.dtype} of shape {y.shape}; expected integer class numbers of shape (N,), or a "
            "`metric` that takes such targets, e.g. miou or psnr"
        )
    if y.size and (int(y.min()) < 0 or int(y.max()) >= 2**31):
        raise SepconvertError(
            f"{path}: y ranges from {y.min()} to {y.max()}; expected classes from 0 upwards: number them as "
            "the model's outputs, and leave samples without a class out"
        )
    return torch.from_numpy(y.astype(np.int64))


def _images(x: npt.NDArray[np.uint8], preprocess: Preprocess, path: Path) -> Callable[[int], Tensor]:
    """Return a function that preprocesses the image of an index; `x` is uint8 N × H × W × C."""
    found = _channels_first(x, path, "x", preprocess)
    check_channels(preprocess, x.shape[3], path)
    return found


def _channels_first(
    array: npt.NDArray[np.uint8], path: Path, name: str, change: Callable[[Tensor], Tensor]
) -> Callable[[int], Tensor]:
    """Return a function that changes the image C × H × W of an index; `array` is N × H × W × C."""
    if array.shape[1] in (1, 3) and array.shape[3] > 4:
        raise SepconvertError(
            f"{path}: {name} is uint8 of shape {array.shape}, which looks like N×C×H×W; expected N×H×W×C: "
            f"save {name}.transpose(0, 2, 3, 1)"
        )
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    return lambda index: change(images[index])


def _floats(x: npt.NDArray[np.floating], preprocess: Preprocess, path: Path) -> Callable[[int], Tensor]:
    """Return a function that returns the sample of an index as float32; `x` is float N × C × H × W."""
    if preprocess != Preprocess():
        raise SepconvertError(
            f"{path}: x is float and used as it is; `mean`, `std` and `resize` are for uint8: leave them out"
        )
    if x.shape[3] == 3 and x.shape[1] > 4:
        raise SepconvertError(
            f"{path}: x is float of shape {x.shape}, which looks like N×H×W×C; expected N×C×H×W: "
            "save x.transpose(0, 3, 1, 2)"
        )
    with np.errstate(over="ignore"):  # overflow becomes inf, which is refused below
        samples = torch.from_numpy(x.astype(np.float32))
    # In parts, since a mask of all samples would take as much memory again.
    if not all(part.isfinite().all() for part in torch.split(samples, 256)):
        raise SepconvertError(f"{path}: x holds NaN or infinite values; expected finite numbers")
    return samples.__getitem__
