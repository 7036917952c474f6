"""Errors that a user sees: one line that says what happened, what was expected, and what to do next.

Messages name parameters of the Python API between backticks, such as `max_drop`. The command line shows them
as its own flags, such as --max-drop (see `sepconvert.cli.options.in_flags`).
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SepconvertError(Exception):
    """Bad usage or bad input. The command line prints the message and exits with `exit_code`."""

    exit_code = 2


class DemandNotMetError(SepconvertError):
    """No plan meets a demanded budget, or the converted model turned out not to meet it.

    `curve` holds the plans that were found, as in the report's `approximation.curve`; it is empty where the
    demand failed after a plan was chosen. `within_reach` holds demands, by name, that a plan meets.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        curve: Iterable[dict[str, Any]] = (),
        within_reach: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(message)
        self.curve, self.within_reach = tuple(curve), dict(within_reach or {})


class VerificationError(SepconvertError):
    """The converted model, or an exported file, does not compute what it has to compute."""

    exit_code = 3


class ExportError(SepconvertError):
    """Torch's exporters cannot translate a model; the converted model itself is unaffected."""


MAX_SEED = 2**63 - 1  # of torch and of numpy alike


ABOVE_ZERO = 1e-9  # the least of numbers that must be above 0


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise `SepconvertError` unless `value` is None, or a finite number from `low` to `high`."""
    kind: type[Any] = numbers.Integral if whole else numbers.Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if value is None or (is_number and low <= value <= high and math.isfinite(value)):
        return
    expected = f"a {'whole ' * whole}number{range_text(low, high)}"
    raise SepconvertError(f"`{name}`: expected {expected}, got {quoted(value)}")


def range_text(low: float, high: float) -> str:
    """Return a range in words that follow "a number", such as " from 1 to 100"."""
    if low == ABOVE_ZERO:
        return " above 0" + f", at most {high:,}" * (high < math.inf)
    return f" from {low:,}" * (low > -math.inf) + f" to {high:,}" * (high < math.inf)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `SepconvertError` unless `value` is one of `choices`."""
    if value not in choices:
        raise SepconvertError(f"`{name}`: expected one of {', '.join(choices)}, got {quoted(value)}")


_MOST_QUOTED, _MOST_OF_A_VALUE = 400, 80


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's message, to be quoted in a message of one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shortened(line, _MOST_QUOTED)


def quoted(value: object) -> str:
    """Return the `repr` of an unexpected value on one line, cut to a reasonable length."""
    return shortened(" ".join(repr(value).split()))


def shortened(text: str, most: int = _MOST_OF_A_VALUE) -> str:
    """Return a text, cut to at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def some_of(names: Iterable[str], limit: int = 4) -> str:
    """Return the first `limit` names, joined by commas, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shortened, names[:limit])) + rest


def one_line(error: BaseException) -> str:
    """Return the type and the cause of a foreign error on one line."""
    # torch.load puts its cause after advice to switch the restrictions off
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    first, _, rest = text.partition("\n")
    if first.endswith(":"):
        first += f" {rest.strip().partition(chr(10))[0].strip()}"
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
