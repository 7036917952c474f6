"""Reasons and notes as values: a code or a level for programs, and a text for people."""

from dataclasses import dataclass
from enum import Enum


class ReasonCode(str, Enum):
    """Reasons to convert, merge or keep a layer."""

    SEPARATES = "separates"  # exactly, at the rank that the text names
    FITTED = "fitted"  # approximately, at the rank that the text names
    MERGED = "merged"  # into another convolution, or has taken in another
    NOT_SELECTED = "not-selected"  # by `include` and `exclude`
    OBSTACLE = "obstacle"  # the layer, or the model around it, does not allow it
    UNFOLLOWED = "unfollowed"  # an operator that may be part of a convolution, or of something else
    FULL_RANK = "full-rank"  # no exact structure holds
    COSTS_MORE = "costs-more"  # its structures do not pass the gate
    TOO_LARGE = "too-large"  # its statistics exceed the memory limit
    IN_FLOAT = "in-float"  # int8 would harm it
    BUDGET = "budget"  # the plan spends the budget elsewhere
    UNTIMED = "untimed"  # in plans of 0.1.0: no time was left to measure its forms


@dataclass(frozen=True)
class Reason:
    """The reason for a decision on a layer, or on a pair of layers."""

    code: ReasonCode
    text: str

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class NoteLevel(str, Enum):
    """Importance of a note."""

    INFO = "info"
    WARNING = "warning"  # a reader who ignores it may misjudge the result


@dataclass(frozen=True)
class Note:
    """A sentence about a result. The text of a warning begins in lower case, as it follows "Warning: "."""

    level: NoteLevel
    text: str

    def __str__(self) -> str:
        """Return the text, marked if it is a warning."""
        return f"Warning: {self.text}" if self.level is NoteLevel.WARNING else self.text


def info(text: str) -> Note:
    """Return a note that only informs."""
    return Note(NoteLevel.INFO, text)


def warning(text: str) -> Note:
    """Return a note that is shown even if no other output is wanted."""
    return Note(NoteLevel.WARNING, text)
