"""How far a plan may go that is fine-tuned: learnt from what was won back of others."""

from collections.abc import Sequence
from dataclasses import dataclass

MOST = 3
"""Plans to fine-tune at most: each costs as much as the one before."""

# Five epochs brought 11.1 points to 4.0 and 2.5 to 1.1 on a ResNet-9, 6.8 to 2.3 on a ResNet-20.
_WON_BACK = 3.0
_AIM = 0.9  # of the drop that is allowed: what is won back is guessed at
_FURTHER = 2.0  # than a plan was seen to come back from: what is won back of more is not known


@dataclass(frozen=True)
class Attempt:
    """Drops of accuracy of one plan before and after fine-tuning, in percentage points."""

    before: float
    after: float


def next_drop(attempts: Sequence[Attempt], most: float) -> float | None:
    """The drop before fine-tuning to look for next, for one of at most `most` afterwards; percentage points.

    Between a plan that came back far enough and one that did not, drops afterwards are taken to be linear in
    those before; short of either, proportional. None after `MOST`, or if no plan is worth an attempt: what
    is left of the budget is too little, or a plan that keeps within it by itself goes as far.
    """
    if not attempts:
        return _WON_BACK * most
    aim = _AIM * most
    beyond = [each for each in attempts if each.after > most]
    within = [each for each in attempts if each.after <= most]
    low = max(within, key=lambda each: each.before, default=Attempt(0.0, 0.0))
    if len(attempts) == MOST or low.after >= aim:
        return None
    if beyond:
        high = min(beyond, key=lambda each: each.before)
        share = (aim - low.after) / (high.after - low.after)
        found = low.before + share * (high.before - low.before)
    else:
        gain = aim / low.after if low.after > 0 else _FURTHER
        found = low.before * min(gain, _FURTHER)
    return found if found > max(low.before, most) else None
