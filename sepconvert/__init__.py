"""Make a trained CNN faster: its convolutions replaced by separable ones, exactly or within a budget.

Public names are resolved on first use, so that `sepconvert --help` answers without importing torch. No module
or package directly in here may bear the name of a public function (convert, inspect, profile, compare, apply,
finetune): importing it would put the module in the function's place.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Calibration": "base.options.values",
    "ConversionResult": "pipeline.results",
    "DemandNotMetError": "base.errors",
    "Export": "base.options.exporting",
    "FactorizedConv2d": "network.layers",
    "Profile": "measure.profiling",
    "FinetuneResult": "distillation.results",
    "Finetuning": "base.options.values",
    "Inspection": "pipeline.results",
    "Int8": "base.options.values",
    "Selection": "base.options.values",
    "Task": "base.options.values",
    "Timing": "base.options.values",
    "VerificationError": "base.errors",
    "SepconvertError": "base.errors",
    "apply": "pipeline.replay",
    "compare": "measure.comparison",
    "convert": "pipeline.convert",
    "finetune": "distillation.training",
    "inspect": "pipeline.convert",
    "profile": "measure.profiling",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from sepconvert.base.errors import DemandNotMetError as DemandNotMetError
    from sepconvert.base.errors import SepconvertError as SepconvertError
    from sepconvert.base.errors import VerificationError as VerificationError
    from sepconvert.base.options.exporting import Export as Export
    from sepconvert.base.options.values import Calibration as Calibration
    from sepconvert.base.options.values import Finetuning as Finetuning
    from sepconvert.base.options.values import Int8 as Int8
    from sepconvert.base.options.values import Selection as Selection
    from sepconvert.base.options.values import Task as Task
    from sepconvert.base.options.values import Timing as Timing
    from sepconvert.distillation.results import FinetuneResult as FinetuneResult
    from sepconvert.distillation.training import finetune as finetune
    from sepconvert.measure.comparison import compare as compare
    from sepconvert.measure.profiling import Profile as Profile
    from sepconvert.measure.profiling import profile as profile
    from sepconvert.network.layers import FactorizedConv2d as FactorizedConv2d
    from sepconvert.pipeline.convert import convert as convert
    from sepconvert.pipeline.convert import inspect as inspect
    from sepconvert.pipeline.replay import apply as apply
    from sepconvert.pipeline.results import ConversionResult as ConversionResult
    from sepconvert.pipeline.results import Inspection as Inspection


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sepconvert' has no attribute {name!r}")
    return getattr(import_module(f"sepconvert.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    """List the public names alone, for completion."""
    return __all__
