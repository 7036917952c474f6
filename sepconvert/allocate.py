"""Which layer gets which rank: a Lagrangian over error and cost.

Every layer offers itself as it is, at no error, and its candidates. The plans that minimise
error + λ·cost for some λ ≥ 0 are the lower convex hull of all plans, and a plan's share in it is each
layer's own hull; going through all steps of these hulls in order of their slope gives every such plan.
(H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
resources", Operations Research 11 (1963).)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to replace a layer."""

    scheme: str
    rank: int
    macs: int  # over all calls of one forward pass of one sample
    error: float  # expected divergence of the model's output if this layer alone is replaced so


Choice = Mapping[str, Candidate]
"""The layers that are replaced, by name."""


def plans(dense_macs: Mapping[str, int], candidates: Mapping[str, Sequence[Candidate]]) -> list[Choice]:
    """All plans on the lower convex hull of error against cost, from nothing replaced to the cheapest.

    Args:
        dense_macs: MACs of each layer as it is.
        candidates: those of each layer, in any order; one that costs more than the layer is never chosen.
    """
    steps = []
    for order, (name, offered) in enumerate(candidates.items()):
        hull = _hull(dense_macs[name], offered)
        before = (dense_macs[name], 0.0)
        for candidate in hull:
            slope = (candidate.error - before[1]) / (before[0] - candidate.macs)
            steps.append((slope, order, name, candidate))
            before = (candidate.macs, candidate.error)
    chosen: dict[str, Candidate] = {}
    found: list[Choice] = [{}]
    # Slopes grow along each layer's hull; ties go by layer, and `sorted` keeps the order within one.
    for _, _, name, candidate in sorted(steps, key=lambda step: step[:2]):
        chosen[name] = candidate
        found.append(dict(chosen))
    return found


def _hull(dense_macs: int, offered: Sequence[Candidate]) -> list[Candidate]:
    """Candidates on the lower convex hull that begins at the dense layer, by falling cost."""
    points: list[Candidate] = []
    for candidate in sorted(offered, key=lambda each: (-each.macs, each.error)):
        if candidate.macs >= dense_macs:
            continue
        # Of two at one cost the first has the lower error; of two at one error the last costs less.
        while points and points[-1].macs > candidate.macs and points[-1].error >= candidate.error:
            points.pop()
        if points and points[-1].macs == candidate.macs:
            continue
        while points and not _turns(
            points[-2] if len(points) > 1 else None, points[-1], candidate, dense_macs
        ):
            points.pop()
        points.append(candidate)
    return points


def _turns(before: Candidate | None, middle: Candidate, after: Candidate, dense_macs: int) -> bool:
    """Does the slope grow at `middle`?"""
    macs, error = (dense_macs, 0.0) if before is None else (before.macs, before.error)
    return (middle.error - error) * (middle.macs - after.macs) < (after.error - middle.error) * (
        macs - middle.macs
    )


def macs_of(total: int, dense_macs: Mapping[str, int], choice: Choice) -> int:
    """MACs of the whole model under a plan, `total` being those of the original."""
    return total - sum(dense_macs[name] - candidate.macs for name, candidate in choice.items())


def spread(found: Sequence[Choice], costs: Sequence[int], count: int) -> list[int]:
    """Indices of `count` plans at about even ratios of cost, the first and the last among them."""
    first, last = costs[0], costs[-1]
    picked = {0, len(found) - 1}
    if not last:  # a model that is nothing but what is replaced, or has no MACs at all
        return sorted(picked)
    for step in range(1, count - 1):
        wanted = first * (last / first) ** (step / (count - 1))
        picked.add(min(range(len(found)), key=lambda index: abs(costs[index] - wanted)))
    return sorted(picked)
