"""Modes approx and auto: merge pairs, survey the layers, search for a plan, deliver and describe it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from sepconvert.base.distributed import once, processes
from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.base.options.values import Mode
from sepconvert.base.progress import Phase, begin
from sepconvert.calibration.evidence import Evidence, collect_evidence
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.record import PATCHES
from sepconvert.calibration.split import CalibrationSet, SeenTwice
from sepconvert.calibration.stream import too_large
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import Spectrum, kernel_spectrum
from sepconvert.factorize.structures import BY_NAME, FORMS
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.measure.divergence import outputs
from sepconvert.measure.latency import LEAST_RUNS
from sepconvert.measure.verification.outputs import compare_with, reference
from sepconvert.network.copies import duplicate, quick_copy
from sepconvert.network.obstacles import Obstacles
from sepconvert.network.tensors import state_tensors
from sepconvert.network.trace import ConvSite, TracedModel
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.modes.delivery import Delivery, deliver
from sepconvert.pipeline.modes.merging import Start, merge_original
from sepconvert.pipeline.original import Original
from sepconvert.planning.allocate import in_float
from sepconvert.planning.conversion import Conversion, LayerApproximation, LayerReport
from sepconvert.planning.fits.fitting import replacement
from sepconvert.planning.fits.learnt import Learnt
from sepconvert.planning.fits.survey import LayerSurvey, survey, with_float_options
from sepconvert.planning.forms import (
    Prices,
    Unit,
    candidate_forms,
    counted_prices,
    depthwise_obstacle,
    exact_forms,
    macs_of,
    measured_prices,
    params_of,
)
from sepconvert.planning.plan import LayerPlan, kept, obstacle_reason
from sepconvert.planning.search.curve import Totals
from sepconvert.planning.search.search import Search
from sepconvert.planning.workshop import Fitted, Stopwatch, Workshop


def convert_approximately(original: Original, job: Job) -> Conversion:
    """Replace convolutions by factors, depthwise and pointwise ones or all kinds, under a budget.

    Args:
        original: the model and all that is known of it.
        job: its budget has the default filled in already (see `Budget.or_default`).

    Raises:
        DemandNotMetError: no plan meets the budget.
        SepconvertError: the model cannot run on the images, or they do not suffice.
    """
    auto = job.mode == "auto"
    begin(Phase.TIMES if job.gate == "latency" else Phase.SURVEY)
    start = merge_original(original, job) if auto else Start(original.traced, original.cost)
    findings = _survey(original, start, job)
    workshop = _workshop(original, start, job, findings)
    search = Search(findings.surveyed, workshop, _totals(original, start, workshop, findings.unit))
    begin(Phase.SEARCH)
    delivery = deliver(original, job, search, workshop)
    conversion = _described(original, start, job, findings, search, workshop, delivery)
    return conversion.with_merges(original.sites, start.merges) if auto else conversion


@dataclass(frozen=True)
class _Findings:
    """The survey of a model's layers, and what it was made with."""

    layers: tuple[ConvSite, ...]  # that may be replaced
    reasons: Mapping[str, Reason]  # for which others are kept, whatever the budget
    evidence: Evidence | None
    heldout: Heldout | None
    unit: Unit  # of costs
    surveyed: Mapping[str, LayerSurvey]
    learnt: Learnt  # by earlier conversions of the same model


def _survey(original: Original, start: Start, job: Job) -> _Findings:
    """Find the layers that may be replaced, and fit all forms of each that pass the gate."""
    model, calibration = start.model, original.data.calibration
    reasons = obstacles_to(start.traced, job)
    layers = [site for site in start.sites if site.name not in reasons]
    heldout: Heldout | None = None
    if calibration is not None:
        share = calibration.share(model)
        large = too_large(model, share, layers, images=calibration.images, memory=calibration.memory)
        reasons |= {name: Reason(ReasonCode.TOO_LARGE, text) for name, text in large.items()}
        layers = [site for site in layers if site.name not in reasons]
        if calibration.heldout:
            heldout = Heldout(model, calibration.heldout, calibration.labels, original.yardstick)
    unit, prices, slow = _prices(original, layers, job)
    reasons |= slow
    begin(Phase.SURVEY)
    evidence: Evidence | None = None
    if calibration is not None:
        yardstick = original.yardstick if heldout is None else heldout.yardstick
        evidence = collect_evidence(model, layers, calibration, seed=job.seed, yardstick=yardstick)
    levels = None if original.form is None else original.form.number.levels
    learnt, name = _learnt(original, start, heldout, job), ("survey", prices, levels)
    known: dict[str, LayerSurvey] | None = learnt.recall(name)
    surveyed = known or survey(model, layers, evidence, heldout, prices, job.progress, levels)
    if known is None:
        learnt.keep(name, surveyed)
    if original.form is not None and heldout is not None and unit == "milliseconds":
        costs = once(lambda: _float_costs(original, original.form, model, layers, surveyed))
        surveyed = with_float_options(model, surveyed, heldout, original.form, costs, job.progress)
    return _Findings(tuple(layers), reasons, evidence, heldout, unit, surveyed, learnt)


def _learnt(original: Original, start: Start, heldout: Heldout | None, job: Job) -> Learnt:
    """Return what earlier conversions have learnt of the same model, on the same images.

    What the original returns for some images belongs to what all depends on: a forward may be another one
    though the weights are the same.
    """
    calibration = original.data.calibration
    if job.learnt is None or processes() > 1:  # each process has a share of the images
        return Learnt()
    returned = None
    if heldout is not None:
        returned = heldout.expected
    elif calibration is not None:
        first = calibration.fit[0].on(start.model)
        with torch.no_grad():
            returned = [outputs(quick_copy(start.model, first), first)]
    depends = (
        state_tensors(start.model),
        [
            (each.name, each.conv and (each.conv.spec, each.conv.weight, each.conv.bias))
            for each in start.sites
        ],
        calibration and [batch.inputs for batch in (*calibration.fit, *calibration.heldout)],
        calibration and calibration.labels,
        original.yardstick if heldout is None else heldout.yardstick,
        returned,
        original.form and (job.int8, original.form.number),
        job.seed,
        torch.get_num_threads(),
    )
    return Learnt(job.learnt, depends)


def _float_costs(
    original: Original,
    form: Int8Form | None,
    model: nn.Module,
    layers: Sequence[ConvSite],
    surveyed: Mapping[str, LayerSurvey],
) -> dict[str, float]:
    """Return the milliseconds of layers in floating point among others in int8, as far as there is time."""
    known = form.keepable(model, surveyed) if form is not None else ()
    costs = {site.name: original.clock.in_float(site) for site in layers if site.name in known}
    return {name: cost for name, cost in costs.items() if cost is not None}


def _prices(
    original: Original, layers: Sequence[ConvSite], job: Job
) -> tuple[Unit, Mapping[str, Prices], Mapping[str, Reason]]:
    """Return the unit of costs, the prices of each layer's forms, and why other layers have none."""
    unit: Unit = "params" if job.budget.target_params else "macs"
    exact = {site.name: exact_forms(site) for site in layers} if job.mode == "auto" else {}
    forms = {site.name: candidate_forms(site, job.budget.rank, exact.get(site.name)) for site in layers}
    counted = {
        site.name: counted_prices(site, forms[site.name], exact.get(site.name, ()), job.gate, unit)
        for site in layers
    }
    if job.gate != "latency":
        return unit, counted, {}
    timed, slow = once(lambda: measured_prices(layers, counted, original.clock, job.progress))
    if job.budget.share is None:
        return "milliseconds", timed, slow
    shares = {name: counted[name].of(each.forms) for name, each in timed.items()}
    return unit, {name: replace(shares[name], modelled=timed[name].modelled) for name in shares}, slow


def obstacles_to(traced: TracedModel, job: Job) -> dict[str, Reason]:
    """Return why layers are kept, whatever the budget."""
    obstacles, approx = Obstacles(traced), job.mode == "approx"
    reasons = {}
    for site in traced.sites:
        if not job.selection.admits(*site.names):
            reasons[site.name] = Reason(ReasonCode.NOT_SELECTED, "not selected")
            continue
        why = site.obstacle
        if why is None and site.params == 0 and (approx or not exact_forms(site)):
            why = "its filters are fixed: exact forms alone may take their place"
        if why is None and approx:
            why = depthwise_obstacle(site, named=bool(job.selection.include))
        why = why or obstacles.of(site)
        if why is not None:
            reasons[site.name] = obstacle_reason(site, why)
    return reasons


def _workshop(original: Original, start: Start, job: Job, findings: _Findings) -> Workshop:
    runs = job.timing.runs
    stopwatch = Stopwatch(original.clock, original.drafts, runs or LEAST_RUNS, job.progress)
    timed = job.runs or findings.unit == "milliseconds" or job.budget.min_speedup is not None
    return Workshop(
        start.traced,
        findings.layers,
        findings.surveyed,
        findings.evidence,
        findings.heldout,
        job.progress,
        original.scores,
        stopwatch if timed else None,
        original.form,
        findings.learnt,
    )


def _totals(original: Original, start: Start, workshop: Workshop, unit: Unit) -> Totals:
    """Return the cost of the original, and what the pairs that were merged save of it."""
    macs, saved_macs = original.cost.macs, original.cost.macs - start.cost.macs
    floor = sum(step.reached.divergence for step in workshop.deployed(original.model))
    if unit == "milliseconds" and workshop.stopwatch is not None:
        merged = [] if start.model is original.model else [start.model]
        milliseconds, speedups = workshop.stopwatch.time(merged)
        saved = sum(milliseconds * (1 - 1 / each.median) for each in speedups)
        return Totals(macs, milliseconds, unit, saved_macs, saved, floor)
    if unit == "params":
        saved_params = original.cost.params - start.cost.params
        return Totals(macs, original.cost.params, unit, saved_macs, saved_params, floor)
    return Totals(macs, macs, unit, saved_macs, saved_macs, floor)


def _described(
    original: Original,
    start: Start,
    job: Job,
    findings: _Findings,
    search: Search,
    workshop: Workshop,
    delivery: Delivery,
) -> Conversion:
    """Return the conversion of the merged model, with a report on each of its layers."""
    fitted = search.measurements.fitted(delivery.point)
    steps = (*workshop.explain(fitted), *delivery.steps)
    expected = reference(original.model, original.inputs, (), {}, job.seed)
    model = duplicate(delivery.model)  # with memory of its own
    if original.scores is not None:
        original.scores.share(delivery.model, model)
    if original.form is not None:
        original.form.share(delivery.model, model)
    plans = tuple(_layer_plan(site, findings, fitted, search.idle) for site in start.sites)
    return Conversion(
        model=model,
        layers=plans,
        replacements={
            site.name: replacement(site, fitted.layers[site.name])
            for site in findings.layers
            if site.name in fitted.layers
        },
        reports=tuple(
            LayerReport(
                plan,
                site,
                approximation=_layer_approximation(findings.surveyed, fitted, site.name),
                spectrum=_spectrum(plan, site, job.mode),
            )
            for plan, site in zip(plans, start.sites, strict=True)
        ),
        expected=(expected, reference(delivery.model, original.inputs, (), {}, job.seed)),
        torch_check=replace(compare_with(expected, delivery.model), tolerance=None),
        approximation={
            **_calibration_json(original.data.calibration, original.seen_twice),
            "divergence": [] if original.yardstick is None else original.yardstick.names,
            "no_gradients": original.no_gradients,
            "budget": asdict(job.budget),
            "unit": findings.unit,
            "curve": search.to_json(delivery.point),
            "plans_measured_on_data": search.plans_measured_on_data,
            "modelled": [name for name, layer in findings.surveyed.items() if layer.modelled],
            "choice": search.choice(delivery.point, delivery.model, job.budget),
            "steps": [step.to_json() for step in steps],
            "finetune": delivery.tuning_json() if job.finetuning else None,
            **({"reconstruction": delivery.tuning_json()} if job.calibration.reconstruct else {}),
            **({} if delivery.shortfall is None else {"shortfall": delivery.shortfall}),
        },
    )


def _layer_plan(site: ConvSite, findings: _Findings, fitted: Fitted, idle: Collection[str]) -> LayerPlan:
    found = fitted.layers.get(site.name)
    if found is None and site.name in findings.reasons:
        return kept(site, findings.reasons[site.name])
    if found is None or site.conv is None:
        if site.name in in_float(fitted.choice):
            text = "stays in floating point, as int8 harms it"
            return kept(site, Reason(ReasonCode.IN_FLOAT, text))
        if site.name in findings.surveyed:
            if site.name in idle:
                text = "saves no time in the whole model, as measured"
                return kept(site, Reason(ReasonCode.COSTS_MORE, text))
            return kept(site, Reason(ReasonCode.BUDGET, "kept by the budget"))
        return kept(site, Reason(ReasonCode.COSTS_MORE, "no form passes the gate (gate none converts it)"))
    form = found.scheme, found.rank
    rank = f"rank {found.rank} of {FORMS[found.scheme].full_rank(site.conv.spec)}"
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=Reason(ReasonCode.FITTED, rank),
        spec=site.conv.spec,
        scheme=found.scheme,
        rank=found.rank,
        border=Border(),
        bias=True,
        macs=(site.macs, macs_of(site, form)),
        params=(site.params, params_of(site, form)),
        tolerance=None,
    )


def _layer_approximation(
    surveyed: Mapping[str, LayerSurvey], fitted: Fitted, name: str
) -> LayerApproximation | None:
    if name not in fitted.layers:
        return None
    found, layer = fitted.layers[name], surveyed[name]
    return LayerApproximation(
        weight_error=found.weight_error,
        output_error=found.output_error,
        output_error_of_weight_fit=fitted.by_weights[name],
        output_error_alone=layer.offer(fitted.choice[name]).fitted.output_error,
        sensitivity=layer.sensitivity,
        sweeps=len(found.objective),
    )


def _spectrum(plan: LayerPlan, site: ConvSite, mode: Mode) -> Spectrum | None:
    """Return a layer's spectrum in the form that it was given, or in the first that its mode considers."""
    if site.conv is None:
        return None
    scheme = plan.scheme
    if scheme is None:
        schemes = (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE) if mode == "approx" else tuple(BY_NAME)
        scheme = next((name for name in schemes if BY_NAME[name].applies(site.conv.spec)), None)
    return None if scheme is None else kernel_spectrum(site.conv.spec, site.conv.weight, scheme, plan.rank)


def _calibration_json(calibration: CalibrationSet | None, seen_twice: SeenTwice | None) -> dict[str, Any]:
    """Return the entries `metric` and `calibration` of the report's `approximation`."""
    if calibration is None:
        return {"metric": "weights", "calibration": None}
    return {
        "metric": "data",
        "calibration": {
            "origin": calibration.origin,
            "images": calibration.images,
            "heldout": sum(map(len, calibration.heldout)),
            "patches_per_unknown": PATCHES,
            "seen_twice": None if seen_twice is None else asdict(seen_twice),
        },
    }
