"""What a mode makes of a model, before it is exported and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sepconvert.factorize.border import Border
from sepconvert.merge import Merge
from sepconvert.plan import MERGED, LayerPlan
from sepconvert.report.document import LayerReport
from sepconvert.rewrite import Replacement
from sepconvert.trace import ConvSite
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
    merges: tuple[tuple[str, str], ...] = ()  # of convolutions of the original, the second into the first

    def with_merges(self, sites: Sequence[ConvSite], merges: Sequence[Merge]) -> "Conversion":
        """The conversion of a merged model as that of the original, whose convolutions are `sites`."""
        merged = {each.second: each.first for each in merges if each.decision == "merged"}
        found = {each.plan.name: each for each in self.reports}
        reports = tuple(
            LayerReport(_merged_into(merged[site.name], site), site)
            if site.name in merged
            else _takes_in(
                [second for second, first in merged.items() if first == site.name], found[site.name], site
            )
            for site in sites
        )
        return replace(
            self,
            layers=tuple(report.plan for report in reports),
            reports=reports,
            # Factors of a dense form are not those of the layer that was there.
            replacements={k: v for k, v in self.replacements.items() if k not in merged.values()},
            approximation={**(self.approximation or {}), "merges": [each.to_json() for each in merges]},
            merges=tuple((first, second) for second, first in merged.items()),
        )


def _merged_into(first: str, site: ConvSite) -> LayerPlan:
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=f"merged into {first}",
        spec=None if site.conv is None else site.conv.spec,
        scheme=MERGED,
        rank=None,
        border=Border(),
        bias=False,
        macs=(site.macs, 0),
        params=(site.params, 0),
        tolerance=None,
    )


def _takes_in(seconds: Sequence[str], report: LayerReport, site: ConvSite) -> LayerReport:
    """What became of a dense form is what became of the first convolution of its pair."""
    if not seconds:
        return report
    plan = report.plan
    scheme = plan.scheme if plan.decision == "converted" else MERGED
    plan = replace(
        plan,
        decision="converted",
        reason=f"takes in {', '.join(seconds)}; {plan.reason}",
        scheme=scheme,
        macs=(site.macs, plan.macs[1]),
        params=(site.params, plan.params[1]),
    )
    return replace(report, plan=plan, site=site)
