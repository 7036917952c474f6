"""Numbers as text, written the same way in tables, sentences and pages."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
"""The report as JSON, or an object within it; see `sepconvert.report.schema`."""


_TERMINAL_WIDTH = 80  # columns


def fold(sentence: str) -> str:
    """Return a sentence on lines of 80 columns, the second and later ones indented by two."""
    return textwrap.fill(
        sentence, _TERMINAL_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def count_text(count: int | None) -> str:
    """Return a count with thousands separators, or a dash for None."""
    return "-" if count is None else f"{count:,}"


def ratio_text(ratio: float | None) -> str:
    """Return a ratio as `2.00×`, or nothing for None."""
    return "" if ratio is None else f"{ratio:.2f}×"


def percent_text(share: float | None, digits: int = 2) -> str:
    """Return a fraction in [0, 1] as a percentage without its sign, or a dash for None."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def estimate_text(value: float, ci95: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Return an estimate, its unit and its 95 % interval, such as `1.50× [1.40, 1.60]`."""
    low, high = ci95
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def range_text(ends: Sequence[float]) -> str:
    """Return a range of values, such as `-2.1 to 2.6`."""
    low, high = ends
    return f"{low:.3g} to {high:.3g}"


def speedup_text(speedup: Document) -> str:
    """Return a `latency_speedup` object with its interval, marked if noise can explain it."""
    noise = "" if speedup["significant"] else " ~ within noise"
    return estimate_text(speedup["median"], speedup["ci95"], "×") + noise


def as_fast_text(speedup: Document) -> str:
    """Return a `latency_speedup` object in words, without its interval, marked if noise can explain it."""
    return f"{ratio_text(speedup['median'])} as fast" + ("" if speedup["significant"] else " (within noise)")


def drop_text(drop: Document) -> str:
    """Return an `accuracy_drop_pp` object in percentage points, with its interval."""
    return estimate_text(drop["value"], drop["ci95"], " pp")
