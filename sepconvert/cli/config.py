"""Options in files: those that `--config` reads, and run.toml, which repeats a conversion."""

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import tomli_w
from click.core import ParameterSource

from sepconvert import __version__
from sepconvert.base.documents import check_file, read_file
from sepconvert.base.errors import SepconvertError, first_line, shortened
from sepconvert.base.options.declared import options_of
from sepconvert.base.options.exporting import Export
from sepconvert.files.results import RUN_FILE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Options of the command line alone: --debug is looked for before the command line is read.
_NOT_IN_FILES = ("config", "debug", "help")

# Consents to what was there at the time, which a repetition must not give again by itself.
_FOR_ONE_RUN = ("force", "resume")

# How the result is printed, which is not part of it.
_OF_THE_TERMINAL = ("style", "brief", "as_json")

_READ = "sepconvert.config"
"""Key of the file that was read, in the memory of click's context."""

# Options whose text is made of numbers, which a file may also give as one number or as an array: what joins
# them on the command line.
_JOINED_BY = {"batches": ",", "input_shape": "x", "mean": ",", "output": ",", "resize": "x", "std": ","}

# Options that hold names, which are joined by commas there.
_NAMES = tuple(each.name for each in options_of(Export) if each.metadata.get("joined"))

_HEAD = f"""\
# Options of a conversion by sepconvert {__version__}; those that are not named had their defaults. To repeat
# it, call `sepconvert --config` with this file in the same working directory, which paths are relative to.
"""


def read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the options in a TOML file the defaults of those that the command line does not give.

    A callback of an eager option: the others are read afterwards.

    Raises:
        SepconvertError: the file cannot be read, is no TOML, or names an option that there is not, or a value
            that the option does not take.
    """
    if path is None or context.resilient_parsing:  # a shell asks what could come next
        return
    options, defaults = _options(context.command), dict[str, Any]()
    for key, value in _parsed(path).items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name is None:
            raise SepconvertError(f"{path}: {key}: {_unknown(key, context.command, options)}")
        if option.name in defaults:
            raise SepconvertError(f"{path}: {key}: is given twice, with - and with _; keep one of them")
        defaults[option.name] = given = _as_typed(option, value, f"{path}: {key}")
        try:
            option.process_value(context, given)
        except click.BadParameter as error:
            raise SepconvertError(f"{path}: {key}: {error.message.rstrip('.')}; correct the file") from error
        except SepconvertError as error:
            raise SepconvertError(f"{path}: {error}") from error
    context.default_map = defaults
    context.meta[_READ] = path


def repeats(folder: Path) -> bool:
    """Return whether the options of this command come from the run.toml of a result in this folder."""
    context = click.get_current_context(silent=True)
    path: Path | None = None if context is None else context.meta.get(_READ)
    return path is not None and path.resolve() == (folder / RUN_FILE).resolve()


def run_file(context: click.Context) -> str:
    """Return the options that a command was given, by the command line or a file, as text for `--config`.

    Paths stay as they were given. Those that are no Unicode text, which TOML needs, are told in a comment.
    """
    lines = [_HEAD]
    for key, option in _options(context.command).items():
        name = option.name or key
        if (
            name in (*_FOR_ONE_RUN, *_OF_THE_TERMINAL)
            or context.get_parameter_source(name) is ParameterSource.DEFAULT
        ):
            continue
        line = tomli_w.dumps({key: _written(option, context.params[name])})
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            line = f"# {key}: is no Unicode text, which TOML needs; give it on the command line\n"
        lines.append(line)
    return "".join(lines)


def _options(command: click.Command) -> dict[str, click.Parameter]:
    """Return the options and single arguments of a command that a file may give, by their keys."""
    found: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if parameter.name is None or parameter.name in _NOT_IN_FILES:
            continue
        if isinstance(parameter, click.Option):
            flag = next(flag for flag in parameter.opts if flag.startswith("--"))
            found[flag.removeprefix("--")] = parameter
        elif parameter.nargs == 1:
            found[parameter.name] = parameter
    return found


def _parsed(path: Path) -> dict[str, Any]:
    check_file(path)
    try:
        document: dict[str, Any] = tomllib.loads(read_file(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SepconvertError(
            f"{path}: is no TOML file: byte {error.start} is not UTF-8; pass a text file, "
            "such as the run.toml of a conversion"
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SepconvertError(
            f"{path}: is no TOML file: {first_line(error)}; write lines such as: max-drop = 1.0"
        ) from error
    return document


def _unknown(key: str, command: click.Command, options: Mapping[str, click.Parameter]) -> str:
    """Return what is wrong with a key that no option has."""
    closest = difflib.get_close_matches(key.replace("_", "-"), options, n=1)
    advice = f"did you mean {closest[0]}?" if closest else "remove it; --help lists those there are"
    return f"is no option of sepconvert {command.name} that files can set; {advice}"


def _as_typed(option: click.Parameter, value: Any, where: str) -> Any:
    """Return a value of TOML as the command line would give it; `where` begins the message of an error."""
    if option.name in _JOINED_BY:
        value = _joined(value, _JOINED_BY[option.name])
    if option.name in _NAMES and isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    if value is True and isinstance(option, click.Option) and isinstance(option.flag_value, str):
        value = option.flag_value  # what the flag means without a value
    expected, example = _expected(option)
    kinds = (int, float) if isinstance(example, float) else type(example)
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(example, bool)
    if isinstance(value, list):
        fits = fits and all(isinstance(each, str) for each in value)
    if not fits:
        key = where.rpartition(": ")[2]
        raise SepconvertError(
            f"{where}: expected {expected}, got {_shown(value)}; write it as: {key} = {_shown(example)}"
        )
    return value


def _expected(option: click.Parameter) -> tuple[str, Any]:
    """Return what TOML has to hold for an option, in words and as an example."""
    if isinstance(option, click.Option) and option.is_flag:
        return "true or false", True
    if isinstance(option, click.Option) and option.multiple:
        return "an array of texts", ["…", "…"]
    if isinstance(option.type, click.types.IntParamType):
        return "a whole number", 8
    return ("a number", 0.5) if isinstance(option.type, click.types.FloatParamType) else ("a text", "…")


def _joined(value: Any, by: str) -> Any:
    """Return a number, or an array of them, as the text of the command line; anything else as it is."""
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in numbers):
        return value
    return by.join(map(str, numbers))


def _shown(value: Any) -> str:
    """Return a value as TOML has it, cut to a reasonable length; JSON writes it alike."""
    if isinstance(value, dict):
        return "a table"
    return shortened(json.dumps(value, ensure_ascii=False, default=str))


def _written(option: click.Parameter, value: Any) -> Any:
    """Return the value of an option as TOML holds it, such that `_as_typed` undoes this."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        if isinstance(option, click.Option) and option.multiple:
            return [f"{key}={each}" for key, each in value.items()]
        return json.dumps(value)
    return list(value) if isinstance(value, tuple) else value
