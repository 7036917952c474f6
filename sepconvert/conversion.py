"""What a mode makes of a model, before it is exported and measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sepconvert.plan import LayerPlan
from sepconvert.report.document import LayerReport
from sepconvert.rewrite import Replacement
from sepconvert.verify import Comparison, LayerCheck, Reference


@dataclass(frozen=True)
class Conversion:
    """A converted model, and how it is known to be what it should be."""

    model: nn.Module
    layers: tuple[LayerPlan, ...]  # one for each site
    replacements: Mapping[str, Replacement]
    reports: tuple[LayerReport, ...]
    expected: tuple[
        Reference, Reference | None
    ]  # of the original; of the converted where it is another function
    torch_check: Comparison
    checks: Mapping[str, LayerCheck] = field(default_factory=dict)
    approximation: Mapping[str, Any] | None = None  # for the report
