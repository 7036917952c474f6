"""Replace the convolutions of a trained CNN by separable ones, exactly where the kernel allows it.

The public names are resolved on first use, so that `sepconvert --help` answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "SepconvertError": "errors",
    "DemandNotMetError": "errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604

if TYPE_CHECKING:
    from sepconvert.errors import DemandNotMetError as DemandNotMetError
    from sepconvert.errors import SepconvertError as SepconvertError


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sepconvert' has no attribute {name!r}")
    return getattr(import_module(f"sepconvert.{_PUBLIC[name]}"), name)
