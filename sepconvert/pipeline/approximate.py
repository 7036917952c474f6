"""Modes approx and auto: survey the layers, search for a plan, fine-tune it, and describe each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from sepconvert.base.distributed import once
from sepconvert.base.options import Budget, Selection
from sepconvert.base.progress import Progress
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.importance import fisher_information
from sepconvert.calibration.record import PATCHES, record
from sepconvert.calibration.split import Calibration
from sepconvert.calibration.stream import too_large
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import Spectrum, kernel_spectrum
from sepconvert.factorize.structures import BY_NAME, FORMS
from sepconvert.measure.latency import Speedup
from sepconvert.measure.verification import compare_with, reference
from sepconvert.network.copies import duplicate, private_copy
from sepconvert.network.merge import linear_pairs
from sepconvert.network.obstacles import Obstacles
from sepconvert.network.tensors import Inputs, placed
from sepconvert.network.trace import ConvSite, trace
from sepconvert.pipeline.delivery import Finetuning as DeliveryFinetuning
from sepconvert.pipeline.delivery import delivered
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.merging import merge_pairs
from sepconvert.pipeline.original import Original
from sepconvert.planning.allocate import Choice
from sepconvert.planning.carry_out import Fitted, Step, carry_out, explain, restored
from sepconvert.planning.conversion import Conversion, LayerApproximation, LayerReport, Merge
from sepconvert.planning.fitting import replacement
from sepconvert.planning.forms import (
    candidate_forms,
    counted_prices,
    depthwise_obstacle,
    exact_forms,
    macs_of,
    measured_prices,
    params_of,
)
from sepconvert.planning.plan import LayerPlan, kept
from sepconvert.planning.search import Point, Search
from sepconvert.planning.survey import LayerSurvey, survey
from sepconvert.planning.timing import FORM_RUNS, Clock


def convert_approximately(original: Original, job: Job) -> Conversion:
    """Replace convolutions by factors, depthwise and pointwise ones or all kinds, under a budget."""
    model, inputs, sites = original.model, original.inputs, original.sites
    start, start_sites, start_cost, merges = model, sites, original.cost, tuple[Merge, ...]()
    if job.mode == "auto":
        start, merges = merge_pairs(
            model, inputs,
            linear_pairs(model, inputs, [site for site in sites if job.selection.admits(site.name)]),
            gate=job.gate, clock=original.clock, seed=job.seed, progress=job.progress,
        )  # fmt: skip
    if start is not model:
        start_sites, start_cost = trace(private_copy(start), inputs), original.count(start)
    parts = original.data
    made = _convert(
        start, inputs, start_sites, original=model, mode=job.mode, gate=job.gate, clock=original.clock,
        include=job.selection.include, exclude=job.selection.exclude, budget=job.budget,
        calibration=parts.calibration,
        finetuning=DeliveryFinetuning(
            job.finetuning.epochs, parts.train, parts.heldout, parts.labelled, job.finetuning.precision,
            job.finetuning.checkpoint, job.finetuning.resume, job.finetuning.on_step,
        ) if job.finetuning and parts.train and parts.heldout else None,
        accuracy=None if original.predictions is None else original.delta,
        total_macs=original.cost.macs, total_params=original.cost.params,
        saved_macs=original.cost.macs - start_cost.macs,
        saved_params=original.cost.params - start_cost.params,
        runs=job.timing.runs, seed=job.seed, progress=job.progress,
    )  # fmt: skip
    return made.with_merges(sites, merges) if job.mode == "auto" else made


def _convert(
    model: nn.Module,
    inputs: Inputs,
    sites: tuple[ConvSite, ...],
    *,
    original: nn.Module,
    mode: str,
    gate: str,
    clock: Clock,
    include: Sequence[str],
    exclude: Sequence[str],
    budget: Budget,
    calibration: Calibration | None,
    finetuning: DeliveryFinetuning | None,
    accuracy: Callable[[nn.Module], Any] | None,
    total_macs: int,
    total_params: int,
    saved_macs: int,
    saved_params: int,
    runs: int,
    seed: int,
    progress: Progress,
) -> Conversion:
    """Replace convolutions by factors, depthwise and pointwise ones or all kinds, under a budget.

    See `pipeline.convert`.

    `original` is `model` before pairs were merged, which saved MACs and parameters of the totals. `accuracy`
    compares a model with it on the evaluation data.
    """
    reasons = _obstacles(model, inputs, sites, mode, include, exclude)
    layers = [site for site in sites if site.name not in reasons]
    if calibration is not None:
        share = {number: placed(batch, model) for number, batch in calibration.share.items()}
        images = sum(map(len, calibration.fit))
        reasons |= too_large(model, share, layers, images=images, memory=calibration.memory)
        layers = [site for site in layers if site.name not in reasons]
    heldout = (
        Heldout(model, calibration.heldout, calibration.labels)
        if calibration and calibration.heldout
        else None
    )
    unit = "params" if budget.target_params else "macs"
    exact = {site.name: exact_forms(site) for site in layers} if mode == "auto" else {}
    prices = {
        site.name: counted_prices(site, candidate_forms(site, budget.rank, exact.get(site.name)), gate, unit)
        for site in layers
    }
    if gate == "latency":
        times, slow = once(lambda: measured_prices(layers, prices, exact, clock, progress))
        reasons |= slow
        if budget.share is None:
            unit, prices = "milliseconds", times
        else:
            prices = {name: prices[name].of(each.forms) for name, each in times.items()}
    if calibration is not None:
        calibration = replace(
            calibration,
            answers=record(model, share, layers, images=images, seed=seed),
            importance=fisher_information(model, share, layers, seed=seed),
        )
    surveyed = survey(model, layers, calibration, heldout, prices, progress)

    def timed(models: Sequence[nn.Module]) -> tuple[float, list[Speedup]]:
        return once(lambda: clock.plans(original, models, inputs, runs or FORM_RUNS, progress))

    earlier: list[Fitted] = []

    def carried_out(choice: Choice) -> Fitted:
        found = carry_out(model, layers, choice, surveyed, calibration, heldout, progress, tuple(earlier))
        earlier.append(found)
        return found

    by_time = unit == "milliseconds"
    total: float = total_params if unit == "params" else total_macs
    saved: float = saved_params if unit == "params" else saved_macs
    if by_time:
        total, merged = timed([] if model is original else [model])
        saved = sum(total * (1 - 1 / each.median) for each in merged)
    search = Search(
        surveyed,
        total_macs,
        total,
        carry_out=carried_out,
        sketched=lambda choice: restored(
            model, layers, {name: surveyed[name].offer(each).fitted for name, each in choice.items()}
        ),
        restored=lambda fitted, name: restored(model, layers, fitted.layers, name),
        divergence=None if heldout is None else lambda each: heldout.measure(each).divergence,
        accuracy=accuracy,
        speedups=(lambda models: timed(models)[1]) if runs or by_time else None,
        timed=by_time,
        progress=progress,
        saved_macs=saved_macs,
        saved=saved,
    )
    point, converted, steps, training = delivered(model, search, budget, finetuning, heldout, accuracy, seed)
    fitted = search.carried_out(point)
    steps = (*explain(model, layers, fitted, surveyed, heldout), *steps)
    expected = reference(original, inputs, (), {}, seed)
    plans = tuple(_layer_plan(site, reasons, surveyed, fitted) for site in sites)
    replacements = {
        site.name: replacement(site, fitted.layers[site.name])
        for site in layers
        if site.name in fitted.layers
    }
    return Conversion(
        model=duplicate(converted),  # with memory of its own
        layers=plans,
        replacements=replacements,
        reports=tuple(
            LayerReport(
                plan,
                site,
                approximation=_layer_report(surveyed, fitted, site.name),
                spectrum=_spectrum(plan, site, mode),
            )
            for plan, site in zip(plans, sites, strict=True)
        ),
        expected=(expected, reference(converted, inputs, (), {}, seed)),
        torch_check=replace(compare_with(expected, converted), tolerance=None),
        approximation=_document(calibration, budget, unit, search, point, steps, training, accuracy),
    )


def _obstacles(
    model: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    mode: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, str]:
    """Why layers are kept, whatever the budget."""
    obstacles = Obstacles(model, inputs, sites)
    reasons = {}
    for site in sites:
        if not Selection(include, exclude).admits(site.name):
            reason: str | None = "not selected"
        else:
            reason = site.obstacle
            if reason is None and site.params == 0 and (mode == "approx" or not exact_forms(site)):
                reason = "its filters are fixed: exact forms alone may take their place"
            if reason is None and mode == "approx":
                reason = depthwise_obstacle(site, named=bool(include))
            reason = reason or obstacles.of(site)
        if reason is not None:
            reasons[site.name] = reason
    return reasons


def _layer_plan(
    site: ConvSite, reasons: Mapping[str, str], surveyed: Mapping[str, LayerSurvey], fitted: Fitted
) -> LayerPlan:
    if site.name in reasons:
        return kept(site, reasons[site.name])
    found = fitted.layers.get(site.name)
    if found is None or site.conv is None:
        return kept(
            site,
            "kept by the budget"
            if site.name in surveyed
            else "no form passes the gate (--gate none converts it)",
        )
    form = found.scheme, found.rank
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=f"rank {found.rank} of {FORMS[found.scheme].full_rank(site.conv.spec)}",
        spec=site.conv.spec,
        scheme=found.scheme,
        rank=found.rank,
        border=Border(),
        bias=True,
        macs=(site.macs, macs_of(site, form)),
        params=(site.params, params_of(site, form)),
        tolerance=None,
    )


def _layer_report(
    surveyed: Mapping[str, LayerSurvey], fitted: Fitted, name: str
) -> LayerApproximation | None:
    if name not in fitted.layers:
        return None
    found, survey_of = fitted.layers[name], surveyed[name]
    return LayerApproximation(
        weight_error=found.weight_error,
        output_error=found.output_error,
        output_error_of_weight_fit=fitted.by_weights[name],
        output_error_alone=survey_of.offer(fitted.choice[name]).fitted.output_error,
        sensitivity=survey_of.sensitivity,
        sweeps=len(found.objective),
    )


def _spectrum(plan: LayerPlan, site: ConvSite, mode: str) -> Spectrum | None:
    """In the form that a layer was replaced by, or that a mode would think of first."""
    if site.conv is None:
        return None
    scheme = plan.scheme
    if scheme is None:
        schemes = (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE) if mode == "approx" else tuple(BY_NAME)
        scheme = next((name for name in schemes if BY_NAME[name].applies(site.conv.spec)), None)
    return None if scheme is None else kernel_spectrum(site.conv.spec, site.conv.weight, scheme, plan.rank)


def _document(
    calibration: Calibration | None,
    budget: Budget,
    unit: str,
    search: Search,
    point: Point,
    steps: Sequence[Step],
    training: Mapping[str, Any] | None,
    accuracy: Callable[[nn.Module], Any] | None,
) -> dict[str, Any]:
    def count(batches: Sequence[Tensor]) -> int:
        return sum(map(len, batches))

    return {
        "metric": "weights" if calibration is None else "data",
        "calibration": None
        if calibration is None
        else {
            "origin": calibration.origin,
            "images": count(calibration.fit),
            "heldout": count(calibration.heldout),
            "patches_per_unknown": PATCHES,
        },
        "budget": asdict(budget),
        "unit": unit,
        "curve": search.to_json(point),
        "plans_measured_on_data": sum(each.accuracy is not None for each in search.points)
        if accuracy is not None
        else 0,
        "steps": [{"name": step.name, **asdict(step.reached), "kept": step.kept} for step in steps],
        "finetune": training,
    }
