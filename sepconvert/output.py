"""Result directories that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sepconvert.errors import SepconvertError


@contextlib.contextmanager
def result_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory to fill; it takes its name when the block ends well, and is removed otherwise.

    It lies beside `target`, so that renaming it is one step of the file system.

    Raises:
        SepconvertError: `target` exists and `force` is not given, or the place is not writable.
    """
    target = target.absolute()
    if target.exists() and not force:
        raise SepconvertError(f"{target}: exists already; pass --force to replace it, or another --out")
    if target.exists() and not target.is_dir():
        raise SepconvertError(f"{target}: is a file, expected a directory or nothing; pass another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SepconvertError(f"{target}: cannot be written: {error.strerror}; pass another --out") from error
    try:
        yield folder
        folder.chmod(0o755)
        _move(folder, target)
    except OSError as error:
        raise SepconvertError(f"{target}: cannot be written: {error.strerror}; pass another --out") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    # A directory that is not empty cannot be replaced in one step: the old one steps aside first.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        folder.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
