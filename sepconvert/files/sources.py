"""What models and data are read from: recognised by path and first bytes, before anything is read.

Nothing here imports torch or numpy, so that a mistyped path is told at once.
"""

import math
import re
import zipfile
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Literal

from sepconvert.base.errors import SepconvertError, one_line, some_of
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.callables import check_callable

ModelFormat = Literal["torch.save", "legacy torch.save", "pt2", "safetensors", "onnx", "origin"]
"""Format of a model file; "origin" is no file of torch: it says what the weights of a `factory` came from."""

_EXPECTED = "expected a model saved by torch.save, a .safetensors, a .pt2 or a .onnx file"

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."

# Files that a factory may have read the weights from; torch writes no such ones.
_FOREIGN = (".onnx", ".tflite", ".pb", ".index", ".h5", ".hdf5", ".keras", ".npz", ".msgpack")

# A word that ends in one of these is a file's name, which must not be mistyped.
_EXTENSIONS = (
    *_FOREIGN, ".pt", ".pth", ".pt2", ".th", ".t7", ".ckpt", ".tar", ".zip", ".bin", ".pkl", ".pickle",
    ".safetensors", ".model", ".weights", ".params", ".npy", ".json",
)  # fmt: skip


def model_format(path: Path, *, built: bool) -> ModelFormat:
    """Return the format of a model file; its content decides, not its extension.

    Args:
        path: the file; if the model is `built`, maybe a name.
        built: whether a `factory` builds the model, which may then have its weights already.

    Raises:
        SepconvertError: there is no such file, or it is no model.
    """
    try:
        return _format_of_torch(path)
    except SepconvertError:
        if not built and path.suffix == ".onnx" and path.is_file():
            return "onnx"
        if built and _is_origin(path):
            return "origin"
        raise


def _format_of_torch(path: Path) -> ModelFormat:
    """Return the format of a file of torch or safetensors; raise `SepconvertError` if it is none."""
    if path.is_dir():
        raise SepconvertError(f"{path}: is a directory; {_EXPECTED}")
    if path.exists() and not path.is_file():
        raise SepconvertError(f"{path}: is no regular file; {_EXPECTED}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise SepconvertError(f"{path}: there is no such file; {_EXPECTED}") from None
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from error
    if head.startswith(b"PK\x03\x04"):
        return _format_of_archive(path)
    if head.startswith(_LEGACY_MAGIC):
        return "legacy torch.save"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    if not head:
        got = "is empty: its download or copy was cut short"
    elif head.startswith(b"version https://git-lfs"):
        got = "is a Git LFS pointer, not the model: run git lfs pull"
    elif head.startswith(b"\x80"):
        got = "is a pickle that torch.save did not write"
    elif head.isascii():
        got = f"is a text file that begins {head[:20].decode()!r}"
    else:
        got = f"is no model file, or damaged (it begins with the bytes {head[:8].hex(' ')})"
    raise SepconvertError(f"{path}: {got}; {_EXPECTED}")


def _format_of_archive(path: Path) -> ModelFormat:
    """Return the format of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            inflated = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # not only BadZipFile: a damaged directory also fails to decode
        raise SepconvertError(
            f"{path}: a truncated or damaged archive ({one_line(error)}); copy it again"
        ) from error
    # torch compresses nothing: an archive that inflates was made to fill the reader's memory.
    if inflated > 2 * path.stat().st_size + 2**26:
        raise SepconvertError(
            f"{path}: inflates from {path.stat().st_size / 1e6:,.1f} to {inflated / 1e6:,.0f} MB, and torch "
            f"writes no compressed archives; {_EXPECTED}"
        )
    inner = {name.partition("/")[2] for name in members}
    if "constants.pkl" in inner:
        raise SepconvertError(
            f"{path}: a TorchScript archive, whose layers cannot be replaced; {_EXPECTED}: save the module "
            "that was scripted with torch.save(model, 'model.pt'), or its state_dict to use with `factory`"
        )
    if "archive_format" in inner:
        return "pt2"
    if "data.pkl" in inner:
        return "torch.save"
    if "serialized_exported_program.json" in members:
        raise SepconvertError(
            f"{path}: written by torch.export of torch < 2.8; export it again with a newer torch"
        )
    raise SepconvertError(f"{path}: a zip file that is no model (it holds {some_of(members)}); {_EXPECTED}")


def _is_origin(path: Path) -> bool:
    """Return whether a path that is no file of torch can say what the weights of `factory` came from.

    Raises:
        SepconvertError: it looks like the name of a file without its extension.
    """
    if path.exists():
        return path.is_file() and path.suffix in _FOREIGN
    if path.name != str(path) or path.suffix in _EXTENSIONS:
        return False
    files = [each.name for each in path.parent.glob(f"{escape(path.name)}.*") if each.suffix in _EXTENSIONS]
    if files:
        raise SepconvertError(
            f"{path}: there is no such file, but {some_of(sorted(files))}; pass that, or, if the model of "
            "`factory` has its weights already, a name that no file begins with"
        )
    return True


def check_data(spec: str, parameter: str, targets: str | None = None) -> None:
    """Raise `SepconvertError` unless the data are there that a parameter names, and their targets.

    Args:
        spec: a file, a folder, or `pkg.mod:callable` or `file.py:callable`, which is not imported.
        parameter: name of the parameter that `spec` was passed as, for error messages.
        targets: a folder of masks or pictures, for images in the folder `spec`.
    """
    if not spec:
        raise SepconvertError(f"`{parameter}`: is empty; expected an .npz file, a folder or pkg.mod:callable")
    path = Path(spec)
    if not (path.is_dir() or path.is_file()):
        if ":" not in spec or path.suffix == ".npz":
            raise SepconvertError(
                f"`{parameter}` {spec}: there is no such file or folder; expected an .npz file, a folder of "
                "class folders with images, or pkg.mod:callable that returns a DataLoader"
            )
        check_callable(spec, parameter)
    if targets is None:
        return
    if not path.is_dir():
        raise SepconvertError(
            f"`targets` {targets}: is for images in a folder, and `{parameter}` is {spec}, which holds its "
            "own targets (y); leave `targets` out, or pass the folder of the images"
        )
    if not Path(targets).is_dir():
        raise SepconvertError(
            f"`targets` {targets}: there is no such folder; pass the one that holds a mask or a picture for "
            "each image, of the same name"
        )


def parse_input_shape(text: str) -> tuple[int, ...]:
    """Parse the shape of one sample, without the batch dimension: `"3x224x224"` becomes `(3, 224, 224)`.

    Raises:
        SepconvertError: the text is no such shape, or the sample has too many elements.
    """
    sizes = text.strip().lower().replace("×", "x").split("x")
    if not all(re.fullmatch(r"[0-9]{1,9}", size.strip()) for size in sizes):
        raise SepconvertError(f"`input_shape` {text!r}: expected sizes joined by x, such as 3x224x224")
    shape = tuple(int(size) for size in sizes)
    if not is_sensible(shape):
        raise SepconvertError(
            f"`input_shape` {text!r}: sizes must be at least 1, their product at most {MAX_INPUT_ELEMENTS}; "
            "give the shape of one sample, such as 3x224x224"
        )
    return shape


def is_sensible(shape: Sequence[object], most: int = MAX_INPUT_ELEMENTS) -> bool:
    """Return whether a shape consists of whole numbers from 1, of at most `most` elements together."""
    sizes = [size for size in shape if isinstance(size, int) and size >= 1]
    return len(sizes) == len(shape) and math.prod(sizes) <= most
