"""Replace the convolutions of a trained CNN by separable ones, exactly where the kernel allows it,
and by depthwise and pointwise ones, fitted to the data, where it does not.

The public names are resolved on first use, so that `sepconvert --help` answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "ConversionResult": "pipeline",
    "DemandNotMetError": "errors",
    "FactorizedConv2d": "layers",
    "Profile": "profiling",
    "FinetuneResult": "distillation",
    "SepconvertError": "errors",
    "apply": "pipeline",
    "compare": "comparison",
    "convert": "pipeline",
    "finetune": "distillation",
    "inspect": "pipeline",
    "profile": "profiling",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from sepconvert.comparison import compare as compare
    from sepconvert.distillation import FinetuneResult as FinetuneResult
    from sepconvert.distillation import finetune as finetune
    from sepconvert.errors import DemandNotMetError as DemandNotMetError
    from sepconvert.errors import SepconvertError as SepconvertError
    from sepconvert.layers import FactorizedConv2d as FactorizedConv2d
    from sepconvert.pipeline import ConversionResult as ConversionResult
    from sepconvert.pipeline import apply as apply
    from sepconvert.pipeline import convert as convert
    from sepconvert.pipeline import inspect as inspect
    from sepconvert.profiling import Profile as Profile
    from sepconvert.profiling import profile as profile


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sepconvert' has no attribute {name!r}")
    return getattr(import_module(f"sepconvert.{_PUBLIC[name]}"), name)
