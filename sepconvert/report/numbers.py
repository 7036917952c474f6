"""Numbers as text, alike in tables and sentences."""

import textwrap
from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]


_WIDTH = 80  # columns of a terminal


def bytes_text(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def folded(sentence: str) -> str:
    """On lines of a terminal, the second and later ones indented."""
    return textwrap.fill(
        sentence, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def times_text(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def interval_text(values: Document, digits: int) -> str:
    low, high = values["ci95"]
    return f"{values['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def points_text(drop: Document) -> str:
    low, high = drop["ci95"]
    return f"{drop['value']:.2f} [{low:.2f}, {high:.2f}]"


def speedup_text(speedup: Document) -> str:
    note = "" if speedup["significant"] else " ~ within noise"
    return f"{interval_text(speedup, 2)}×{note}"


def percent_text(profile: Document, key: str) -> str:
    return f"{100 * profile['accuracy'][key]:.2f}"


def drop_text(delta: Document) -> str:
    drop = delta["accuracy_drop_pp"]
    low, high = drop["ci95"]
    return f"drop {drop['value']:.2f} pp [{low:.2f}, {high:.2f}]"
