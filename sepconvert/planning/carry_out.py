"""Carrying out a plan: all its layers fitted in the order of execution, and the steps that help kept."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import Progress
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.calibration.heldout import Divergence, Heldout
from sepconvert.calibration.record import Kernel
from sepconvert.calibration.split import Calibration
from sepconvert.factorize.approximate.problem import Approximation, output_error
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.structures import Form
from sepconvert.network.copies import duplicate, quick_copy, shared_parameters
from sepconvert.network.rewrite import rewrite
from sepconvert.network.tensors import placed
from sepconvert.network.trace import ConvSite
from sepconvert.planning.allocate import Choice
from sepconvert.planning.fitting import bias_of, fit_problem, for_each_layer, kernel_of, replacement
from sepconvert.planning.survey import LayerSurvey, form_of


@dataclass(frozen=True)
class Step:
    """What one step of the pipeline brought; `kept` is whether the next builds on it."""

    name: str
    reached: Divergence
    kept: bool
    kind: Literal["weights", "data", "batchnorm", "finetune"]


@dataclass(frozen=True)
class Fitted:
    """A plan carried out."""

    choice: Choice
    model: nn.Module  # on the memory of the original where nothing was replaced
    layers: Mapping[str, Approximation]
    by_weights: Mapping[str, float]  # output errors of the same forms, if fitted to the weights
    batchnorm: bool  # statistics re-estimated, as that brought it nearer to the original
    steps: tuple[Step, ...] = ()  # on the images held out

    @property
    def heldout(self) -> Divergence | None:
        """After the last step that was kept; None without images held out."""
        return next((step.reached for step in reversed(self.steps) if step.kept), None)


def carry_out(
    model: nn.Module,
    sites: Sequence[ConvSite],
    choice: Choice,
    surveyed: Mapping[str, LayerSurvey],
    calibration: Calibration | None,
    heldout: Heldout | None,
    progress: Progress,
    earlier: Sequence[Fitted] = (),
) -> Fitted:
    """Fit the layers chosen in step, rewrite the model, and re-estimate BatchNorms if that helps.

    Layers behind which the same was done in one of the `earlier` plans are as they were fitted there.
    """
    chosen = [site for site in sites if site.name in choice]
    shared = [(_in_common(plan, choice, surveyed), plan.by_weights) for plan in earlier]
    fits, errors = max(shared, key=lambda each: len(each[0]), default=({}, {}))
    by_weights = {name: errors[name] for name in fits}
    known = {site.name: kernel_of(site, fits[site.name]) for site in chosen if site.name in fits}

    def fit(site: ConvSite, moments: Moments) -> Kernel:
        offer = surveyed[site.name].offer(choice[site.name])
        before, problem = offer.fitted, fit_problem(site, moments, calibration)
        simple, _ = surveyed[site.name].fitted_to_weights(site, form_of(offer))
        by_weights[site.name] = output_error(site.dense.spec, site.dense.weight, simple, moments)
        found = problem.fit(before.scheme, before.rank, basis=before.basis)
        # Plans are many: what follows from the factors is not kept.
        fits[site.name] = replace(found, kernel=torch.empty(0), basis=torch.empty(0))
        return found.kernel, bias_of(site, found)

    for_each_layer(model, chosen, calibration, fit, progress, "fitting layers", known)
    if missing := choice.keys() - fits.keys():
        raise SepconvertError(
            f"calibration: the images do not reach {', '.join(sorted(missing))}; leave it out with --exclude"
        )
    converted = restored(model, sites, fits)
    if heldout is None or calibration is None:
        return Fitted(choice, converted, fits, by_weights, False)
    steps = [Step("follow the drift, correct the bias", heldout.measure(converted), kept=True, kind="data")]
    running = quick_copy(converted, calibration.fit[0])
    if not reestimate_batchnorm(running, [placed(batch, running) for batch in calibration.fit]):
        return Fitted(choice, converted, fits, by_weights, False, tuple(steps))
    candidate = duplicate(converted, shared_parameters(converted))
    for buffer, found in zip(candidate.buffers(), running.buffers(), strict=True):
        buffer.copy_(found)
    reached = heldout.measure(candidate)
    before = steps[-1].reached
    # Labels may forbid the step, but not make up for answers that are further from the original's.
    kept = reached.divergence < before.divergence and reached.loss < before.loss
    steps.append(Step("re-estimate BatchNorm", reached, kept, "batchnorm"))
    return Fitted(choice, candidate if kept else converted, fits, by_weights, kept, tuple(steps))


def _in_common(plan: Fitted, choice: Choice, order: Iterable[str]) -> dict[str, Approximation]:
    """Layers of a plan up to the first, in the `order` of execution, that has another form in `choice`."""

    def form(each: Choice, name: str) -> Form | None:
        return (each[name].scheme, each[name].rank) if name in each else None

    alike = itertools.takewhile(lambda name: form(plan.choice, name) == form(choice, name), order)
    return {name: plan.layers[name] for name in alike if name in choice}


def restored(
    model: nn.Module,
    sites: Sequence[ConvSite],
    fits: Mapping[str, Approximation],
    left_out: str | None = None,
) -> nn.Module:
    """The model with layers replaced as they were fitted, but for one; BatchNorms are as they were.

    Its other parameters are on the memory of the model's: plans are many.
    """
    chosen = [site for site in sites if site.name in fits and site.name != left_out]
    layers = {site.name: replacement(site, fits[site.name]) for site in chosen}
    return rewrite(model, sites, layers, old_memory=True)


def explain(
    model: nn.Module,
    sites: Sequence[ConvSite],
    fitted: Fitted,
    surveyed: Mapping[str, LayerSurvey],
    heldout: Heldout | None,
) -> tuple[Step, ...]:
    """The steps of a plan after those that it would have been simpler to take."""
    if heldout is None:
        return fitted.steps
    chosen = [site for site in sites if site.name in fitted.choice]
    by_weights: dict[tuple[str, int], Kernel] = {}
    by_outputs: dict[tuple[str, int], Kernel] = {}
    for site in chosen:
        offer = surveyed[site.name].offer(fitted.choice[site.name])
        by_weights[site.place] = surveyed[site.name].fitted_to_weights(site, form_of(offer))
        by_outputs[site.place] = kernel_of(site, offer.fitted)
    return (
        Step("fit the weights", heldout.measure(model, by_weights), kept=False, kind="weights"),
        Step("fit the outputs", heldout.measure(model, by_outputs), kept=False, kind="data"),
        *fitted.steps,
    )
