"""Display of the progress of long work."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps a loop whose progress may be shown."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items."""
        ...


def silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    """Show nothing."""
    return items
