"""The errors that a user sees: one line that says what happened, what was expected, and what to do next."""

import math
import numbers
from collections.abc import Iterable
from typing import Any


class SepconvertError(Exception):
    """Bad usage or bad input. The command line prints the message and exits with `exit_code`."""

    exit_code = 2


class DemandNotMetError(SepconvertError):
    """A demanded budget or the verification of the result was not met.

    `details` are what to look at then, several lines, or nothing.
    """

    exit_code = 3

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class ExportError(SepconvertError):
    """Torch's exporters cannot translate a model; the model itself is as good as it was."""


MAX_SEED = 2**63 - 1  # of torch and of numpy alike


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise `SepconvertError` unless `value` is None, or a finite number from `low` to `high`."""
    kind: type[Any] = numbers.Integral if whole else numbers.Real
    if value is None or (isinstance(value, kind) and low <= value <= high and math.isfinite(value)):
        return
    bounds = f" from {low:,}" * (low > -math.inf) + f" to {high:,}" * (high < math.inf)
    raise SepconvertError(f"{name}: expected a {'whole ' * whole}number{bounds}, got {quoted(value)}")


_MOST_QUOTED, _MOST_OF_A_VALUE = 400, 80


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, to quote in a message of ours that is one line long."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shortened(line, _MOST_QUOTED)


def quoted(value: object) -> str:
    """A value that was not expected, or the beginning of it."""
    return shortened(" ".join(repr(value).split()))


def shortened(text: str, most: int = _MOST_OF_A_VALUE) -> str:
    """A text, or the beginning of it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(error: BaseException) -> str:
    # torch.load puts its cause after advice to switch the restrictions off
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    first, _, rest = text.partition("\n")
    if first.endswith(":"):
        first += f" {rest.strip().partition(chr(10))[0].strip()}"
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def some_of(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shortened, names[:limit])) + rest
