"""Replace the convolutions of a trained CNN by separable ones, exactly where the kernel allows it,
and by depthwise and pointwise ones, fitted to the data, where it does not.

The public names are resolved on first use, so that `sepconvert --help` answers without loading torch.

No module or package directly below this one may bear the name of a public function (`convert`, `inspect`,
`profile`, `compare`, `apply`, `finetune`): importing the submodule would replace the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "ConversionResult": "pipeline.convert",
    "DemandNotMetError": "base.errors",
    "FactorizedConv2d": "network.layers",
    "Profile": "measure.profiling",
    "FinetuneResult": "distillation.results",
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
    from sepconvert.distillation.results import FinetuneResult as FinetuneResult
    from sepconvert.distillation.training import finetune as finetune
    from sepconvert.measure.comparison import compare as compare
    from sepconvert.measure.profiling import Profile as Profile
    from sepconvert.measure.profiling import profile as profile
    from sepconvert.network.layers import FactorizedConv2d as FactorizedConv2d
    from sepconvert.pipeline.convert import ConversionResult as ConversionResult
    from sepconvert.pipeline.convert import convert as convert
    from sepconvert.pipeline.convert import inspect as inspect
    from sepconvert.pipeline.replay import apply as apply


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sepconvert' has no attribute {name!r}")
    return getattr(import_module(f"sepconvert.{_PUBLIC[name]}"), name)
