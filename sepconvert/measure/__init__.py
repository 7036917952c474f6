"""What a model costs and how well it does: each number with its unit, its convention and its interval."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps what a long measurement iterates over and shows how far it is, as `tqdm` does."""
