"""Type of plan.json."""

from dataclasses import dataclass
from typing import Literal

from sepconvert.planning.plan import ConversionPlan
from sepconvert.report.schema.profile import Sha256


@dataclass(frozen=True, kw_only=True)
class PlanDocument(ConversionPlan):
    """The content of plan.json."""

    schema: Literal["sepconvert.plan/1"]
    checksum: Sha256
