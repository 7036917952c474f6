"""Callables named on the command line as `pkg.mod:callable` or `file.py:callable`."""

import importlib.util
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sepconvert.base.errors import SepconvertError, one_line


def resolve_callable(spec: str, option: str) -> Callable[..., object]:
    """The callable that `spec` names, as `pkg.mod:callable` or `file.py:callable`.

    The working directory is importable, as it is for `python -m`; so is the directory of `file.py`. Errors
    begin with `option`, the command line option that `spec` came from.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SepconvertError(f"{option} {spec}: expected pkg.mod:callable or file.py:callable")
    found = look_up(source, name, f"{option} {spec}")
    if not callable(found):
        raise SepconvertError(f"{option} {spec}: {name} is a {type(found).__name__}; expected a callable")
    return found


def look_up(source: str, name: str, label: str) -> object:
    """The attribute `name` of a module or a Python file; errors begin with `label`."""
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise SepconvertError(f"{label}: there is no file {source}")
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
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
