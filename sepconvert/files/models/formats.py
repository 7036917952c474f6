"""What models are read from: recognised by name, path and first bytes, before anything is read.

Nothing here imports torch or numpy, so that a mistyped path is reported at once.
"""

import zipfile
from glob import escape
from pathlib import Path
from typing import Literal

from sepconvert.base.errors import SepconvertError, one_line, some_of
from sepconvert.files.models.names import PATTERNS, check_library, name_of

ModelFormat = Literal["torch.save", "legacy torch.save", "pt2", "safetensors", "onnx", "origin", "named"]
"""Format of a model file.

"named" is no file, but a name that a library builds the model by; "origin" is no file of torch: it says what
the weights of a `factory` came from."""

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
        path: the file, or a name that a library builds the model by; if the model is `built`, maybe the name
            of what its weights came from.
        built: whether a `factory` builds the model, which may then have its weights already.

    Raises:
        SepconvertError: there is no such file, or it is no model, or the library is not installed.
    """
    if (name := name_of(path)) is not None:
        check_library(name)
        if built:
            raise SepconvertError(
                f"{path}: is built by {name.library}, and `factory` builds a model as well; leave `factory` "
                "out, or pass the file that holds the weights"
            )
        return "named"
    try:
        return _format_of_torch(path)
    except SepconvertError as error:
        if not built and path.suffix == ".onnx" and path.is_file():
            return "onnx"
        if built and _is_origin(path):
            return "origin"
        if path.suffix == ".py" or ".py:" in path.name:  # which people give where the model is wanted
            factory = path if ":" in path.name else f"{path}:FUNCTION"
            raise SepconvertError(
                f"{path}: is code, no model; pass `factory` {factory} to build the model by it, and the file "
                "of its weights as the model, or a name of your own if it has them already"
            ) from error
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
        raise SepconvertError(f"{path}: there is no such file; {_EXPECTED}, or a name: {PATTERNS}") from None
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
