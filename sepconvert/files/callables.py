"""Callables of the user's code, named as `pkg.mod:callable` or `file.py:callable`."""

import importlib.util
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sepconvert.base.errors import SepconvertError, one_line


def resolve_callable(spec: str, parameter: str) -> Callable[..., object]:
    """Import the callable that `spec` names, as `pkg.mod:callable` or `file.py:callable`.

    The working directory is importable, as it is for `python -m`; so is the directory of `file.py`.

    Raises:
        SepconvertError: the import fails, or yields no callable. The message begins with `parameter`, the
            name of the parameter that `spec` was passed as.
    """
    source, name = check_callable(spec, parameter)
    label = f"`{parameter}` {spec}"
    found = look_up(source, name, label)
    if not callable(found):
        raise SepconvertError(f"{label}: {name} is a {type(found).__name__}; expected a callable")
    return found


def check_callable(spec: str, parameter: str) -> tuple[str, str]:
    """Return the module or the Python file that `spec` names, and the name in it; nothing is imported.

    Raises:
        SepconvertError: `spec` has another form, or there is no such file. The message begins with
            `parameter`.
    """
    label = f"`{parameter}` {spec}"
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SepconvertError(f"{label}: expected pkg.mod:callable or file.py:callable")
    _is_file(source, label)
    return source, name


def look_up(source: str, name: str, label: str) -> object:
    """Import a module or a Python file and return its attribute `name` (dotted, if it is nested).

    Raises:
        SepconvertError: it cannot be imported or has no such attribute. The message begins with `label`.
    """
    is_file = _is_file(source, label)
    try:
        module = _import_file(Path(source)) if is_file else _import_from_cwd(source)
    except (Exception, SystemExit) as error:  # user code, which may also end in sys.exit when imported
        raise SepconvertError(
            f"{label}: importing {source} failed ({one_line(error)}); "
            "install what it needs, or run from the directory that holds it"
        ) from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        raise SepconvertError(f"{label}: {source} defines no {name!r}; check the name") from None


def _is_file(source: str, label: str) -> bool:
    """Return whether a source is a Python file, not a module; raise `SepconvertError` if it is missing."""
    if not source.endswith(".py"):
        return False
    if not Path(source).is_file():
        raise SepconvertError(f"{label}: there is no file {source}")
    return True


def _import_from_cwd(name: str) -> ModuleType:
    make_importable(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    make_importable(path.parent)
    # A file called torch.py must not take the place of torch.
    name = path.stem if known is None else f"_sepconvert_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make_importable(directory: Path) -> None:
    """Put a directory at the beginning of `sys.path`, unless it is there already."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
