"""Delivery of a plan: with fine-tuning, as far as earlier attempts show that it may go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from sepconvert.base.options import Budget
from sepconvert.calibration.heldout import Heldout
from sepconvert.distillation.results import Precision
from sepconvert.distillation.results import Step as TrainingStep
from sepconvert.distillation.training import finetune
from sepconvert.files.data import Batch
from sepconvert.measure.metrics import AccuracyDelta
from sepconvert.planning.carry_out import Fitted, Step
from sepconvert.planning.search import Point, Search

_REFINEMENTS = 5  # of the search: a plan is fitted in a fraction of the time that it is fine-tuned


@dataclass(frozen=True)
class Finetuning:
    """What to train on, and for how long."""

    epochs: int
    data: DataLoader[Batch]
    heldout: DataLoader[Batch]
    labelled: bool
    precision: Precision | None = None
    checkpoint: Path | None = None
    resume: bool = False
    on_step: Callable[[TrainingStep], None] | None = None


_Delivered = tuple[Point, nn.Module, tuple[Step, ...], dict[str, Any] | None]


def delivered(
    model: nn.Module,
    search: Search,
    budget: Budget,
    finetuning: Finetuning | None,
    heldout: Heldout | None,
    accuracy: Callable[[nn.Module], AccuracyDelta] | None,
    seed: int,
) -> _Delivered:
    """The plan, its model, what fine-tuning brought, and how it went.

    Where a drop is held to, several plans are fine-tuned, each as far as those before tell that it may go. Of
    those that come back within the budget the last goes furthest; if there is none, a plan is delivered that
    needs no fine-tuning.
    """
    if finetuning is None:
        point = search.run(budget)
        return point, search.carried_out(point).model, (), None
    if budget.max_drop is None or accuracy is None or _fixes_plan(budget):
        # The drop is yet to come, and nothing that a plan is chosen by.
        point = search.run(replace(budget, max_drop=None))
        fitted = search.carried_out(point)
        if not point.choice:
            return point, fitted.model, (), None
        return point, *_finetune(model, fitted, finetuning, heldout, seed, attempt=0)
    attempts, found = list[Attempt](), list[_Delivered]()
    while (drop := next_drop(attempts, budget.max_drop)) is not None:
        point = search.run(replace(budget, max_drop=min(drop, 100.0)), _REFINEMENTS)
        if not point.choice or any(point is tried for tried, *_ in found):
            break
        fitted = search.carried_out(point)
        found.append((point, *_finetune(model, fitted, finetuning, heldout, seed, len(attempts))))
        attempts.append(Attempt(accuracy(fitted.model).drop_pp, accuracy(found[-1][1]).drop_pp))
    within = [each for each, attempt in zip(found, attempts, strict=True) if attempt.after <= budget.max_drop]
    training = found[-1][-1] if found else None
    if within:
        point, converted, step, training = within[-1]
    else:
        point, step = search.run(budget), ()
        converted = search.carried_out(point).model
    if training is not None:
        training["attempts"] = [
            {"drop_before_pp": attempt.before, "drop_pp": attempt.after, "delivered": each in within[-1:]}
            for each, attempt in zip(found, attempts, strict=True)
        ]
    return point, converted, step, training


def _fixes_plan(budget: Budget) -> bool:
    """By more than the accuracy that it leaves."""
    return any(demand is not None for demand in (budget.rank, budget.share, budget.min_speedup))


def checkpoints(first: Path) -> tuple[Path, ...]:
    """Of all attempts at fine-tuning."""
    return first, *(first.with_name(f"{first.name}.{number}") for number in range(2, MOST + 1))


def _finetune(
    model: nn.Module,
    fitted: Fitted,
    finetuning: Finetuning,
    heldout: Heldout | None,
    seed: int,
    attempt: int,
) -> tuple[nn.Module, tuple[Step, ...], dict[str, Any]]:
    trained = finetune(
        fitted.model,
        model,
        finetuning.data,
        finetuning.heldout,
        epochs=finetuning.epochs,
        labelled=finetuning.labelled,
        precision=finetuning.precision,
        checkpoint=finetuning.checkpoint and checkpoints(finetuning.checkpoint)[attempt],
        resume=finetuning.resume,
        seed=seed,
        progress=finetuning.on_step,
    )
    step = () if heldout is None else (Step("fine-tune", heldout.measure(trained.model), True, "finetune"),)
    return trained.model, step, {**trained.to_dict(), "attempts": []}


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
