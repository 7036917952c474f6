"""Options of the command line, made from the values that they fill.

An option that Python has too is a field of a value in `sepconvert.base.options.values`, or of the job in
`sepconvert.pipeline.job`; its flag, type, help and default come from there. Options of files and of the
terminal are defined here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click

from sepconvert.base.errors import range_text
from sepconvert.base.options.declared import check_option, options_of
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Int8,
    Selection,
    Task,
    Timing,
)
from sepconvert.cli.config import read_config
from sepconvert.pipeline.job import Job

_WIDTH = '{"width": 12}'  # an example of keyword arguments

Command = Callable[..., Any]
Options = Mapping[str, Any]
V = TypeVar("V")


def numbers(
    kind: type[int] | type[float], example: str
) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that reads numbers joined by commas; whole ones must be above 0."""
    what = "whole numbers from 1" if kind is int else "numbers"

    def read(
        context: click.Context, parameter: click.Parameter, text: str | None
    ) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or (kind is int and min(found) < 1):
            raise click.BadParameter(f"expected {what}, joined by commas, e.g. {example}, got {text!r}")
        return found

    return read


def size(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> int | tuple[int, int] | None:
    """Read a size in pixels: N, or HxW."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected N or HxW in pixels, e.g. 224, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def pairs(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, str] | None:
    """Read options of the form KEY=VALUE; None where there are none."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"expected KEY=VALUE, e.g. device_id=1, got {text!r}")
        found[name] = value
    return found or None


def names(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read names joined by commas; None where there are none."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def keywords(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """Read keyword arguments: a JSON object."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"expected JSON, e.g. '{_WIDTH}', got {text!r} ({error})") from error
    if not isinstance(found, dict):
        raise click.BadParameter(f"expected a JSON object of arguments, e.g. '{_WIDTH}', got {text!r}")
    return found


def in_flags(text: str) -> str:
    """Return a text in which parameters between backticks, such as `max_drop`, are flags: --max-drop."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda found: _flag(_RENAMED.get(found[1], found[1])), text)


def value_of(kind: type[V], options: Options, **others: Any) -> V:
    """Return a value of which the options hold the fields; `others` are the fields that no flag fills."""
    given = {
        each.name: _in_its_unit(each, options[_name(each)])
        for each in options_of(kind)
        if each.name not in others and _name(each) in options
    }
    return kind(**given, **others)


def _in_its_unit(option: Field[Any], given: Any) -> Any:
    """Return what a flag is given as the field counts it."""
    return given if given is None or "unit" not in option.metadata else given * option.metadata["unit"]


def _name(option: Field[Any]) -> str:
    """Return the name of an option among the command line's."""
    name: str = option.metadata.get("flag", option.name)
    return name.replace("-", "_")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _made_from(option: Field[Any]) -> Command:
    """Return click's option for a field; a number out of its range is refused before any file is read."""

    def check(context: click.Context, parameter: click.Parameter, given: Any) -> Any:
        check_option(option, _in_its_unit(option, given))
        return given

    name, about = _name(option), option.metadata
    low, high = about.get("low"), about.get("high", math.inf)
    allowed = "" if low is None or "unit" in about else f" [a number{range_text(low, high)}]"
    shown = f" [default: {about['shown_default']}]" if "shown_default" in about else ""
    settings: dict[str, Any] = {
        "help": in_flags(about["help"]).rstrip(".") + f"{allowed}{shown}.",
        "metavar": about.get("metavar"),
    }
    if isinstance(option.default, bool):
        declaration = f"{_flag(name)}/--no-{name.replace('_', '-')}" if option.default else _flag(name)
        return click.option(
            declaration, default=option.default, is_flag=True, show_default=option.default, **settings
        )
    if isinstance(option.default, tuple):
        return click.option(_flag(name), multiple=True, **settings)
    kinds = get_args(option.type)  # of `Path | None`, for example
    if about.get("joined"):
        return click.option(_flag(name), callback=names, **settings)
    if any(get_origin(kind) is Mapping for kind in kinds):
        return click.option(_flag(name), multiple=True, callback=pairs, **settings)
    if "flag_value" in about:
        settings |= {"is_flag": False, "flag_value": about["flag_value"]}
    if "choices" in about:
        settings["type"] = click.Choice(about["choices"])
    elif "low" in about:
        settings |= {"type": int if about.get("whole") else float, "callback": check}
    elif Path in kinds:
        settings["type"] = click.Path(path_type=Path)
    return click.option(
        _flag(name), default=option.default, show_default=option.default is not None, **settings
    )


def _options(*decorators: Command) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _of(kind: Any, *names: str) -> list[Command]:
    """Return the options of a value, or those of these names."""
    return [_made_from(each) for each in options_of(kind) if not names or each.name in names]


_RENAMED = {
    each.name: _name(each)
    for kind in (Budget, Calibration, Export, Finetuning, Int8, Selection, Task, Timing, Job)
    for each in options_of(kind)
}

model_argument = click.argument("model", type=click.Path(path_type=Path))
loading_options = _options(
    click.option("--input-shape", metavar="CxHxW", help="Shape of one sample, e.g. 3x224x224."),
    click.option(
        "--factory",
        metavar="PKG.MOD:CALLABLE",
        help="Callable that builds the model of a state_dict checkpoint; also file.py:callable. If the "
        "model has its weights already, MODEL is the name of what they came from.",
    ),
    click.option(
        "--factory-args",
        callback=keywords,
        metavar="JSON",
        help=f"Keyword arguments that --factory is called with, e.g. '{_WIDTH}'.",
    ),
    click.option(
        "--ignore-extra-keys",
        multiple=True,
        metavar="GLOB",
        help="Leave out such keys of a checkpoint if the model of --factory does not have them. Repeatable.",
    ),
    click.option(
        "--allow", multiple=True, metavar="CLASS", help="Admit this class in a pickled model. Repeatable."
    ),
    click.option(
        "--trust",
        is_flag=True,
        help="Load an arbitrary pickle or archive: this executes code in the file. The last resort.",
    ),
)
data_options = _options(
    click.option(
        "--data", metavar="PATH", help="Labelled data: .npz, a folder of class folders, or pkg.mod:callable."
    ),
    click.option(
        "--targets",
        metavar="PATH",
        help="Folder of the masks or pictures that are wanted for the images in the folder --data, with the "
        "same names.",
    ),
    click.option(
        "--mean",
        callback=numbers(float, "0.485,0.456,0.406"),
        metavar="R,G,B",
        help="Mean of x/255 per channel, for uint8 images.",
    ),
    click.option(
        "--std",
        callback=numbers(float, "0.229,0.224,0.225"),
        metavar="R,G,B",
        help="Standard deviation of x/255 per channel, for uint8 images.",
    ),
    click.option(
        "--layout",
        type=click.Choice(("nchw", "nhwc")),
        help="Order in which an ONNX file takes images [default: as the shape of its input says].",
    ),
    click.option("--resize", callback=size, metavar="N|HxW", help="Size to which uint8 images are resized."),
)
_OF_TRAINING = ("divergence", "loss")  # of use where something is fitted to outputs
export_options = _options(*_of(Export))
task_options = _options(*(_made_from(each) for each in options_of(Task) if each.name not in _OF_TRAINING))
comparing_options = _options(*_of(Task, *_OF_TRAINING))
mode_options = _options(*_of(Job, "mode", "gate", "nearest"))
selection_options = _options(*_of(Selection), *_of(Job, "tol"))
budget_options = _options(*reversed(_of(Budget)))  # those that are used most come first
calibration_options = _options(
    click.option(
        "--calib",
        metavar="PATH",
        help="Calibration images that factors are fitted to in approx and auto mode, in the forms of --data "
        "[default: a part of --data, which is then not scored].",
    ),
    *_of(Calibration),
)
int8_options = _options(*_of(Int8))
finetuning_options = _options(
    *_of(Finetuning),
    click.option(
        "--train", metavar="PATH", help="Images to fine-tune on; labels are used where there are any."
    ),
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the JSON document on standard output."
)
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks.")
run_options = _options(
    click.option(
        "--batch",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        metavar="N",
        help="Batch size that is run and timed.",
    ),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="DEVICE",
        help="Device that torch runs the model on, e.g. cuda.",
    ),
    *_of(Job, "seed"),
    click.option("--quiet", is_flag=True, help="Print only warnings and errors."),
    click.option("--brief", is_flag=True, help="Print one line: the answer alone."),
    json_option,
    click.option(
        "--verbose",
        "-v",
        is_flag=True,
        help="Print each step with its time, on standard error.",
    ),
    click.option(
        "--log-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write each step with its time, and errors, to this file; an earlier log is replaced.",
    ),
    debug_option,
)
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="TOML file of options, such as the run.toml of a result; the command line prevails.",
)
_OF_SEARCH = ("measure_seconds", "cache")  # of no use where nothing is searched for
timing_options = _options(*(_made_from(each) for each in options_of(Timing) if each.name not in _OF_SEARCH))
search_options = _options(*_of(Timing, *_OF_SEARCH))
trace_option = click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the operators of a run in ONNX Runtime to this JSON file, which ui.perfetto.dev and "
    "chrome://tracing show.",
)
output_options = _options(
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Result directory [default: STEM-sepconvert, after the name of the model or the demo].",
    ),
    click.option("--force", is_flag=True, help="Replace an existing result directory."),
    *_of(Job, "dynamic_batch"),
)
