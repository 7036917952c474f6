"""Reasons and notes as values: a code that programs read, and a text that people read."""

from dataclasses import dataclass
from enum import Enum


class ReasonCode(str, Enum):
    """Why a layer is converted, merged or kept."""

    SEPARATES = "separates"  # exactly, at the rank that the text names
    FITTED = "fitted"  # approximately, at the rank that the text names
    MERGED = "merged"  # into another convolution, or has taken in another
    NOT_SELECTED = "not-selected"  # by `include` and `exclude`
    OBSTACLE = "obstacle"  # the layer, or the model around it, does not allow it
    FULL_RANK = "full-rank"  # no exact structure holds
    COSTS_MORE = "costs-more"  # its structures do not pass the gate
    UNTIMED = "untimed"  # no time was left to measure its forms
    TOO_LARGE = "too-large"  # its statistics exceed the memory limit
    BUDGET = "budget"  # the plan spends the budget elsewhere


@dataclass(frozen=True)
class Reason:
    """Why a layer, or a pair of layers, is treated as it is."""

    code: ReasonCode
    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text


class NoteLevel(str, Enum):
    """How urgently a note concerns the reader."""

    INFO = "info"
    WARNING = "warning"  # the result may not be what the reader takes it for


@dataclass(frozen=True)
class Note:
    """A sentence about a result."""

    level: NoteLevel
    text: str

    def __str__(self) -> str:
        """The text, marked if it is a warning."""
        return f"Warning: {self.text}" if self.level is NoteLevel.WARNING else self.text


def info(text: str) -> Note:
    """Return a note that only informs."""
    return Note(NoteLevel.INFO, text)


def warning(text: str) -> Note:
    """Return a note that even a reader who wants no output must see."""
    return Note(NoteLevel.WARNING, text)
