"""Declaration of options: fields of values, with all that the command line needs to know of them."""

import os
from collections.abc import Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

from sepconvert.base.errors import SepconvertError, check_choice, check_number, quoted


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """Declare a field as an option.

    Args:
        help: one sentence for `--help`.
        default: of the field and of the flag.
        metadata: `low`, `high` and `whole` bound a number; `choices` are the admitted strings; `flag` is the
            name on the command line where it is not the field's, and `flag_value` what it means without a
            value; `joined` names are separated by commas there; `metavar` and `shown_default` are for
            `--help`; `unit` is what one unit of the flag is worth in the field (`--memory` counts gigabytes).
    """
    return field(default=default, metadata={"help": help, **metadata})


def options_of(kind: Any) -> tuple[Field[Any], ...]:
    """Return the fields of a value that are options."""
    return tuple(each for each in fields(kind) if "help" in each.metadata)


def check_options(value: Any) -> None:
    """Raise `SepconvertError` for the first option of a value that is out of its range."""
    for each in options_of(value):
        check_option(each, getattr(value, each.name))


def check_option(option: Field[Any], given: Any) -> None:
    """Raise `SepconvertError` if what is given for an option is out of its range."""
    bounds = option.metadata
    if "low" in bounds:
        if given is None and option.default is not None:
            raise SepconvertError(f"`{option.name}`: expected a number, got None")
        check_number(
            option.name,
            given,
            bounds["low"],
            bounds.get("high", float("inf")),
            whole=bounds.get("whole", False),
        )
    if "choices" in bounds and given is not None:
        check_choice(option.name, given, bounds["choices"])
    if isinstance(option.default, bool) and not isinstance(given, bool):
        raise SepconvertError(f"`{option.name}`: expected True or False, got {quoted(given)}")


def path_of(name: str, value: Any) -> Path | None:
    """Return a path that was given as one or as text.

    Raises:
        SepconvertError: it is neither.
    """
    if value is None or isinstance(value, str | os.PathLike):
        return None if value is None else Path(value)
    raise SepconvertError(f"`{name}`: expected a path, got {quoted(value)}")


def texts_of(name: str, value: Any) -> dict[str, str] | None:
    """Return a mapping of names to texts or numbers as one of names to texts.

    Raises:
        SepconvertError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(each, str | int | float) for key, each in value.items()
    ):
        return {key: str(each) for key, each in value.items()}
    raise SepconvertError(
        f"`{name}`: expected a mapping of names to texts or numbers, such as {{'device_id': 1}}, "
        f"got {quoted(value)}"
    )
