"""Display of the progress of long work."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

LoopProgress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps what a long measurement iterates over and shows how far it is, as `tqdm` does."""


T = TypeVar("T")


class Progress(Protocol):
    """Wraps a loop whose progress may be shown."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items."""
        ...


def silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    """Show nothing."""
    return items
