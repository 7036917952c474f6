"""Display of the progress of long work."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wrapper of a loop that shows its progress."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items."""
        ...


def silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    """Return the items; show nothing."""
    return items
