"""Result directories that appear whole or not at all."""

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sepconvert.base.errors import SepconvertError

RUN_FILE = "run.toml"
"""Name of the file of options that the command line writes beside the files of a conversion."""


FILES = (
    "original.onnx", "converted.onnx", "converted.pt2", "plan.json",
    "converted.safetensors", "report.json", "report.html", RUN_FILE,
)  # fmt: skip
"""Names of the files that a conversion writes."""


INT8_FILES = "original-int8.onnx", "converted-int8.onnx"
"""Names of those that are added where models are deployed in int8."""


class TemporaryFolder:
    """A folder that is removed with this object, or when the program ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="sepconvert-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@contextlib.contextmanager
def result_directory(
    out: Path, *, force: bool, inputs: Sequence[Path] = (), resumed: bool = False
) -> Iterator[Path]:
    """Yield an empty directory, which becomes `out` when the block ends well and is removed otherwise.

    It lies in the nearest parent of `out` that exists, so that moving it is one step of the file system.

    Args:
        out: the directory to make.
        force: whether to replace an existing directory of `FILES`. A directory that holds anything else, or
            one of the `inputs`, and the working directory are never replaced.
        inputs: files that the run reads.
        resumed: whether nothing else writes to `out`, so that what a killed run left beside it is removed.

    Raises:
        SepconvertError: `out` exists and may not be replaced, or cannot be written.
    """
    target = _checked(out, force, inputs)
    workplace = _made_beside(out, target, resumed)
    try:
        folder = workplace / "new"
        folder.mkdir()  # unlike mkdtemp's, its permissions are those that the user's umask leaves
        yield folder
        for file in folder.rglob("*"):  # safetensors makes its file readable for the owner only
            if file.is_file():
                file.chmod(folder.stat().st_mode & 0o666)
        with _uninterrupted():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _check_replaceable(out, target, force, inputs)  # it may have appeared meanwhile
                _move(folder, target, workplace / "old")
            except OSError as error:
                raise _not_writable(out, error) from error
    finally:
        with _uninterrupted():
            _remove([workplace])


def check_result_directory(out: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise the `SepconvertError` that `result_directory` would raise; nothing is left behind."""
    target = _checked(out, force, inputs)
    with _uninterrupted():
        _remove([_made_beside(out, target)])


def _checked(out: Path, force: bool, inputs: Sequence[Path]) -> Path:
    """Return the absolute path of a directory that may be made or replaced."""
    try:
        target = out.resolve()
        _check_replaceable(out, target, force, inputs)
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links
        raise _not_writable(out, error) from error
    return target


def _made_beside(out: Path, target: Path, resumed: bool = False) -> Path:
    """Make and return a folder in the nearest parent of the target that exists."""
    try:
        existing = next(parent for parent in target.parents if parent.exists())
        prefix = f".sepconvert-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}-"
        if resumed:
            _remove(path for path in existing.iterdir() if path.name.startswith(prefix))
        return Path(tempfile.mkdtemp(prefix=prefix, dir=existing))
    except OSError as error:
        raise _not_writable(out, error) from error


def _remove(folders: Iterable[Path]) -> None:
    """Delete folders with their content, as far as possible."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _check_replaceable(out: Path, target: Path, force: bool, inputs: Sequence[Path]) -> None:
    """Raise `SepconvertError` if the directory exists and may not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SepconvertError(f"{out}: is a file, expected a directory or nothing; pass another `out`")
    if not force:
        raise SepconvertError(f"{out}: exists already; pass `force` to replace it, or another `out`")
    if target.is_mount():
        raise SepconvertError(f"{out}: is a mount point and cannot be replaced; pass `out` {out / 'results'}")
    for needed in (Path.cwd(), *inputs):
        if needed.resolve().is_relative_to(target):
            raise SepconvertError(
                f"{out}: holds {needed}, which replacing it would delete; pass another `out`"
            )
    others = [
        path
        for path in target.rglob("*")
        if path.name not in (*FILES, *INT8_FILES) and (path.is_symlink() or not path.is_dir())
    ]
    data = _external_data(target / FILES[0]) if others else set()
    if stranger := next((path for path in others if path not in data), None):
        raise SepconvertError(
            f"{out}: holds {stranger.relative_to(target)}, which is no result of a conversion and which "
            "replacing it would delete; move it away or pass another `out`"
        )


def _external_data(path: Path) -> set[Path]:
    """Return the files beside an ONNX file that hold its data; none if there is no such file."""
    if not path.is_file():
        return set()
    import onnx  # which takes long, and is not needed for the help, nor to refuse most directories

    from sepconvert.files.onnx.graph.protobuf import external_files

    with contextlib.suppress(Exception):  # it may be anything
        model = onnx.load(str(path), load_external_data=False)
        return {path.parent / location for location in external_files(model)}
    return set()


def _move(folder: Path, target: Path, aside: Path) -> None:
    """Rename a folder to `target`, whose content moves `aside`; restore it if that fails."""
    if not target.exists():
        folder.rename(target)
        return
    # A directory that is not empty cannot be replaced in one step: the old one moves aside first.
    target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _not_writable(out: Path, error: Exception) -> SepconvertError:
    """Return the error to raise when the file system refuses a step."""
    cause = getattr(error, "strerror", None) or error
    return SepconvertError(f"{out}: cannot be written: {cause}; pass another `out`")


def _ignore_signal(number: int, frame: object) -> None:
    """Do nothing on a signal; after SIG_IGN, Python would complain of a signal that came just before."""


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and termination within the block, which must not be left half done."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(number, _ignore_signal) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
