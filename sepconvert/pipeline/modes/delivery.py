"""Delivery of a plan: tuned, if the job says so, as far as earlier attempts show that it may go."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sepconvert.base.errors import DemandNotMetError
from sepconvert.base.options.values import Budget
from sepconvert.calibration.heldout import Divergence
from sepconvert.distillation.fake_quantization import (
    with_fake_quantization,
    without_fake_quantization,
)
from sepconvert.distillation.results import FinetuneResult
from sepconvert.network.tensors import InputBatch
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.modes.reconstruction import Extent, extent_within, reconstruct
from sepconvert.pipeline.original import Original
from sepconvert.planning.allocate import in_float
from sepconvert.planning.search.curve import Point
from sepconvert.planning.search.search import Search
from sepconvert.planning.workshop import Step, StepKind, Workshop

_REFINEMENTS = 5  # of the search: fitting a plan takes a fraction of the time of tuning it


FINETUNINGS = 3
"""Most plans that are fine-tuned."""


_RECONSTRUCTIONS = 2  # most plans that are reconstructed, in the time for all of them


_AIM = 0.9  # share of the allowed drop that later attempts aim at: their forecast is uncertain


_FURTHER = 2.0  # largest step beyond a drop that was won back: how much is won back further away is unknown


@dataclass(frozen=True)
class Attempt:
    """Drops of one plan before and after it was tuned, in the unit of the metric."""

    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Tuned:
    """A plan whose factors were tuned."""

    point: Point
    result: FinetuneResult
    steps: tuple[Step, ...]  # one, if there are held-out images
    attempt: Attempt | None = None  # None where no drop was allowed beforehand


@dataclass(frozen=True)
class Tuning:
    """A way to tune the factors of plans.

    Attributes:
        tune: called with a plan, and with the number of plans that were tuned before it.
        most: largest number of plans that are tuned: each costs as much as the one before.
        won_back: ratio of the drop that the first attempt looks for, before tuning, to the allowed one.
    """

    tune: Callable[[Point, int], Tuned]
    most: int
    won_back: float


@dataclass(frozen=True, eq=False)
class Delivery:
    """The plan that is delivered, with its model, and all plans that were tuned on the way to it."""

    point: Point
    model: nn.Module
    tuned: Tuned | None = None  # if the model is a tuned one
    tried: tuple[Tuned, ...] = ()
    shortfall: str | None = None  # why the plan is only the nearest to the demands

    @property
    def steps(self) -> tuple[Step, ...]:
        """Steps that tuning adds to those of the plan."""
        return () if self.tuned is None else self.tuned.steps

    def tuning_json(self) -> dict[str, Any] | None:
        """Return the report's `approximation.finetune` or `reconstruction`; None if nothing was tuned."""
        if not self.tried:
            return None
        shown = self.tuned or self.tried[-1]
        attempts = [
            {
                "drop_before_pp": each.attempt.before,
                "drop_pp": each.attempt.after,
                "delivered": each is self.tuned,
            }
            for each in self.tried
            if each.attempt is not None
        ]
        return {**shown.result.to_dict(), "attempts": attempts}


def deliver(original: Original, job: Job, search: Search, workshop: Workshop) -> Delivery:
    """Return the plan that meets the budget, tuned if the job says so.

    If a drop of accuracy is allowed and nothing else is demanded, several plans are tuned, each as far from
    the original as the earlier ones suggest. The last of those within the budget goes furthest. If there is
    none, or a plan that needs no tuning goes further, that is delivered.

    Raises:
        DemandNotMetError: no plan meets the budget, and the nearest is not wanted instead.
    """
    try:
        return _within_budget(original, job, search, workshop)
    except DemandNotMetError as error:
        if not job.nearest or job.budget.confidence is not None:  # no plan is nearly proven
            raise
        return replace(_untuned(search, search.nearest(job.budget)), shortfall=str(error))


def _within_budget(original: Original, job: Job, search: Search, workshop: Workshop) -> Delivery:
    """Return the plan that meets the budget, tuned if the job says so."""
    budget, tuning = job.budget, _tuning(original, job, search, workshop)
    if tuning is None:
        return _untuned(search, search.run(budget))
    if budget.max_drop is None or original.scores is None or _fixes_plan(job):
        # The drop is known only after tuning, so that no plan is chosen by it.
        point = search.run(replace(budget, max_drop=None))
        if not point.plan.choice:
            return _untuned(search, point)
        tuned = tuning.tune(point, 0)
        return Delivery(point, tuned.result.model, tuned, (tuned,))
    tried = _attempts(original, budget, search, tuning, budget.max_drop)
    within = [each for each in tried if each.attempt and each.attempt.after <= budget.max_drop]
    last = within[-1] if within else None
    # One that lost more than is allowed before it was tuned goes further than any that is not tuned.
    if last is None or last.attempt is None or last.attempt.before <= budget.max_drop:
        untuned = search.run(budget)
        if last is None or untuned.plan.cost < last.point.plan.cost:
            return replace(_untuned(search, untuned), tried=tried)
    return Delivery(last.point, last.result.model, last, tried)


def _untuned(search: Search, point: Point) -> Delivery:
    return Delivery(point, search.measurements.fitted(point).model)


def _tuning(original: Original, job: Job, search: Search, workshop: Workshop) -> Tuning | None:
    """Return how the factors of plans are tuned; None if they stay as they are fitted."""
    if original.data.training is None:
        return None
    if job.finetuning:
        # Five epochs brought 11.1 points to 4.0 and 2.5 to 1.1 on a ResNet-9, 6.8 to 2.3 on a ResNet-20.
        tune = partial(_fine_tuned, original, job, search, workshop)
        return Tuning(tune, FINETUNINGS, won_back=3.0)
    if job.calibration.reconstruct:
        tune = partial(_reconstructed, original, job, search, workshop)
        return Tuning(tune, _RECONSTRUCTIONS, won_back=1.5)
    return None


def _attempts(
    original: Original, budget: Budget, search: Search, tuning: Tuning, most: float
) -> tuple[Tuned, ...]:
    """Tune one plan after the other, as far from the original as `next_drop` says."""
    tried: list[Tuned] = []
    while (drop := next_drop([each.attempt for each in tried if each.attempt], most, tuning)) is not None:
        point = search.run(replace(budget, max_drop=drop), _REFINEMENTS)
        if not point.plan.choice or any(point is each.point for each in tried):
            break
        tuned = tuning.tune(point, len(tried))
        models = search.measurements.fitted(point).model, tuned.result.model
        tried.append(replace(tuned, attempt=Attempt(*(_drop(original, model) for model in models))))
    return tuple(tried)


def _drop(original: Original, model: nn.Module) -> float:
    delta = original.delta(model)
    return math.nan if delta is None else delta.drop


def _fixes_plan(job: Job) -> bool:
    """Return whether the budget demands anything besides accuracy."""
    demands = (job.budget.rank, job.budget.share, job.budget.min_speedup)
    return any(demand is not None for demand in demands)


def checkpoints(first: Path) -> tuple[Path, ...]:
    """Return the checkpoint files of all attempts at fine-tuning, given that of the first."""
    return first, *(first.with_name(f"{first.name}.{number}") for number in range(2, FINETUNINGS + 1))


def _fine_tuned(
    original: Original, job: Job, search: Search, workshop: Workshop, point: Point, attempt: int
) -> Tuned:
    from sepconvert.distillation.training import finetune  # with accelerate, which takes long to import

    options, data = job.finetuning, original.data.training
    if data is None:
        raise ValueError("fine-tuning needs images to train on, and others to choose weights by")
    student = plain = search.measurements.fitted(point).model
    if original.form is not None:
        example = InputBatch(original.inputs, original.task.batch_dim or 0)
        kept = in_float(point.plan.choice)
        student = with_fake_quantization(plain, original.form.number.levels, example, kept)
    result = finetune(
        student,
        workshop.traced.model,
        data.train,
        data.judge,
        epochs=options.epochs,
        labelled=data.labelled and original.yardstick is not None and original.yardstick.is_classifier,
        task=original.task,
        precision=options.precision,
        checkpoint=None if options.checkpoint is None else checkpoints(options.checkpoint)[attempt],
        resume=options.resume,
        seed=job.seed,
        progress=options.on_step,
    )
    if original.form is not None:
        result = replace(result, model=without_fake_quantization(result.model, plain))
        original.form.keep(result.model, kept)
    step = partial(Step, StepKind.FINETUNE, "fine-tune", kept=True)
    return _tuned(workshop, point, result, step)


def _reconstructed(
    original: Original, job: Job, search: Search, workshop: Workshop, point: Point, attempt: int
) -> Tuned:
    data, calibration = original.data.training, original.data.calibration
    if data is None or calibration is None:
        raise ValueError("reconstruction needs images to tune on, and others to choose weights by")
    model, teacher = search.measurements.fitted(point).model, workshop.traced.model
    seconds = job.calibration.reconstruct
    if job.budget.max_drop is not None and not _fixes_plan(job):
        seconds /= _RECONSTRUCTIONS  # the time is for all attempts
    # By a measurement of time, so that what it said once is kept.
    name = "extent", seconds, point.plan.forms
    known = workshop.learnt.recall(name)
    extent = extent_within(seconds, model, teacher, calibration.fit) if known is None else Extent(*known)
    workshop.learnt.keep(name, tuple(extent))
    result = reconstruct(model, teacher, data, extent, original.task, job.seed)
    step = partial(Step, StepKind.RECONSTRUCTION, "reconstruct", kept=True)
    return _tuned(workshop, point, result, step)


def _tuned(
    workshop: Workshop, point: Point, result: FinetuneResult, step: Callable[[Divergence], Step]
) -> Tuned:
    if workshop.heldout is None:
        return Tuned(point, result, ())
    reached = workshop.heldout.measure(result.model)
    return Tuned(point, result, (step(reached), *workshop.deployed(result.model)))


def next_drop(attempts: Sequence[Attempt], most: float, tuning: Tuning) -> float | None:
    """Return the drop before tuning to look for next, for one of at most `most` afterwards.

    All drops are in the unit of the metric. Between a plan that came back within `most` and one that did not,
    the drop afterwards is taken to be linear in the drop before; with plans on one side only, proportional to
    it.

    Returns:
        None after as many attempts as are made, or if no plan is worth another one: too little of the budget
        is left, or a plan that keeps within it without tuning goes as far.
    """
    if not attempts:
        return tuning.won_back * most
    aim = _AIM * most
    beyond = [each for each in attempts if each.after > most]
    within = [each for each in attempts if each.after <= most]
    low = max(within, key=lambda each: each.before, default=Attempt(0.0, 0.0))
    if len(attempts) == tuning.most or low.after >= aim:
        return None
    if beyond:
        high = min(beyond, key=lambda each: each.before)
        share = (aim - low.after) / (high.after - low.after)
        found = low.before + share * (high.before - low.before)
    else:
        gain = aim / low.after if low.after > 0 else _FURTHER
        found = low.before * min(gain, _FURTHER)
    return found if found > max(low.before, most) else None
