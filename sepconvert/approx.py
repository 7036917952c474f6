"""Approximate conversion: survey → search → fine-tune, and what the report says of each layer."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.allocate import Choice
from sepconvert.approximation import (
    Calibration,
    Fitted,
    Heldout,
    LayerSurvey,
    Prices,
    Step,
    all_forms,
    carry_out,
    depthwise_forms,
    depthwise_obstacle,
    explain,
    macs_of,
    params_of,
    replacement,
    restored,
    survey,
)
from sepconvert.attempts import MOST, Attempt, next_drop
from sepconvert.calibrate import PATCHES, record, too_large
from sepconvert.conversion import Conversion
from sepconvert.data import UNLABELLED, Batch, dimensions, split
from sepconvert.distillation import Precision, finetune
from sepconvert.distillation import Step as TrainingStep
from sepconvert.distributed import once
from sepconvert.errors import SepconvertError
from sepconvert.factorize.approximate import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import Spectrum, analyse, may_separate, spectrum
from sepconvert.factorize.structures import BY_NAME, FORMS, Form
from sepconvert.importance import fisher_information
from sepconvert.measure.accuracy import AccuracyDelta, whole
from sepconvert.measure.latency import Speedup
from sepconvert.plan import LayerPlan, kept, selected
from sepconvert.progress import Progress
from sepconvert.report.document import LayerApproximation, LayerReport
from sepconvert.rewrite import Obstacles
from sepconvert.search import Budget, Point, Search
from sepconvert.timing import FORM_RUNS, Clock
from sepconvert.trace import ConvSite, Inputs, duplicate, placed, tensors_in
from sepconvert.verify import compare_with, reference

MOST_AT_ONCE = 64
"""Images to fit to that pass together."""

_MOST_HELD_OUT = 256

# Ratio between costs of ranks that are worth telling apart: fits are what the survey spends its time on, and
# those of layers of more than a million weights above all.
_COST_STEP, _COARSE_COST_STEP, _MANY_WEIGHTS = 1.15, 1.3, 10**6

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


@dataclass(frozen=True)
class Parts:
    """The data by purpose: no image serves two."""

    scored: Iterable[Batch] | None
    calibration: Calibration | None
    train: DataLoader[Batch] | None
    heldout: DataLoader[Batch] | None
    labelled: bool


def split_data(
    data: Iterable[Batch] | None,
    calib: DataLoader[Batch] | None,
    train: DataLoader[Batch] | None,
    images: int,
    epochs: int,
    seed: int,
    at_once: int = MOST_AT_ONCE,
    memory: float | None = None,
) -> Parts:
    """Images to fit to, to judge by, to train on and to score; see `pipeline.convert`.

    `at_once` is how many of the images to fit to make a batch.

    Raises:
        SepconvertError: there are too few, or none to train on.
    """
    scored, source, origin = data, calib, "--calib"
    if source is None:
        source, origin = train, "--train"
    if epochs and source is None:
        raise SepconvertError("--finetune: needs images to train on; pass --calib or --train")
    if source is None and isinstance(data, DataLoader):
        source, scored = split(data, [min(images, _size(data) // 2)], seed)
        origin = "split off --data, and not scored"
    if source is None:
        return Parts(scored, None, None, None, False)
    images = min(images, _size(source))
    if not images:
        raise SepconvertError(f"calibration: no image is left to fit to ({origin}); pass more images")
    judges = min(images // 4, _MOST_HELD_OUT)
    heldout, fit, _ = split(source, [judges, images - judges], seed)
    batches, judged = ([*_batches(loader, at_once)] for loader in (fit, heldout))
    # Training is judged by images that it does not see, with labels if those that it sees have some.
    if train is None:
        train = source
    if train is not source:
        judges = min(_size(train) // 4, _MOST_HELD_OUT)
    if epochs and not judges:
        raise SepconvertError(
            f"--finetune: needs images to judge by too, got {_size(train)} in all; pass more"
        )
    heldout, train = split(train, [judges], seed)
    _, *labels = next(iter(train))
    labelled = bool(labels) and bool((labels[0] >= 0).any())
    calibration = Calibration(
        tuple(x for x, _ in batches),
        tuple(x for x, _ in judged),
        origin,
        labels=tuple(y for _, y in judged),
        memory=memory,
    )
    return Parts(scored, calibration, train, heldout, labelled)


def check_shapes(parts: Parts, inputs: Inputs) -> None:
    """Raise `SepconvertError` if no image to fit to or to train on has the shape of the model's input."""
    expected = [value.shape[1:] for value in tensors_in(inputs)]
    if len(expected) > 1 and (parts.calibration or parts.train):
        raise SepconvertError(
            f"calibration: the model takes {len(expected)} tensors, and can be shown one; give it as a "
            "module that takes one tensor and makes the others of it, or leave calibration and data out"
        )
    found = {
        "to fit to": {x.shape[1:] for x in parts.calibration.fit} if parts.calibration else set(),
        "to train on": {next(iter(parts.train))[0].shape[1:]} if parts.train else set(),
    }
    for purpose, shapes in found.items():
        if shapes and expected and not shapes & set(expected):
            raise SepconvertError(
                f"calibration: images {purpose} are {' or '.join(sorted(map(dimensions, shapes)))}, the model"
                f" is run on {dimensions(expected[0])} (C×H×W); pass --resize, another --input-shape or other"
                " images"
            )


def _size(loader: DataLoader[Batch]) -> int:
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else 0


def _batches(loader: DataLoader[Batch], at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, -1 where there is none, in batches of few: a pass is suspended with each of them."""
    found = [(x, _labels(x, *rest)) for x, *rest in whole(loader)]
    if not all(x.isfinite().all() for x, _ in found):
        raise SepconvertError("calibration: the images hold NaN or Inf; check the data")
    if found and all(_flat(x) for x, _ in found):
        raise SepconvertError(
            "calibration: every image is of one colour, which says nothing of the data that the model meets; "
            "check the path and the preprocessing"
        )
    for _, alike in itertools.groupby(found, lambda pair: pair[0].shape[1:]):
        images, labels = map(torch.cat, zip(*alike, strict=True))
        yield from zip(torch.split(images, at_once), torch.split(labels, at_once), strict=True)


def _labels(x: Tensor, *rest: Any) -> Tensor:
    """What comes with a batch of images, if that is a class for each."""
    for y in rest[:1]:
        if isinstance(y, Tensor) and y.shape == (len(x),) and not y.is_floating_point():
            return y.long()
    return torch.full((len(x),), UNLABELLED)


def _flat(x: Tensor) -> bool:
    return x.shape[2:].numel() > 1 and bool((x.amin((-2, -1)) == x.amax((-2, -1))).all())


def convert_approximately(
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
    finetuning: Finetuning | None,
    accuracy: Callable[[nn.Module], AccuracyDelta] | None,
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
    exact = {site.name: _exact_forms(site) for site in layers} if mode == "auto" else {}
    prices = {
        site.name: _counted(site, _forms(site, budget.rank, exact.get(site.name)), gate, unit)
        for site in layers
    }
    if gate == "latency":
        times, slow = once(lambda: _measured(layers, prices, exact, clock, progress))
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
    point, converted, steps, training = _delivered(model, search, budget, finetuning, heldout, accuracy, seed)
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


_Delivered = tuple[Point, nn.Module, tuple[Step, ...], dict[str, Any] | None]


def _delivered(
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
        if not selected(site.name, include, exclude):
            reason: str | None = "not selected"
        else:
            reason = site.obstacle
            if reason is None and site.params == 0 and (mode == "approx" or not _exact_forms(site)):
                reason = "its filters are fixed: exact forms alone may take their place"
            if reason is None and mode == "approx":
                reason = depthwise_obstacle(site, named=bool(include))
            reason = reason or obstacles.of(site)
        if reason is not None:
            reasons[site.name] = reason
    return reasons


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
    step = () if heldout is None else (Step("fine-tune", heldout.measure(trained.model), kept=True),)
    return trained.model, step, {**trained.to_dict(), "attempts": []}


def _forms(site: ConvSite, rank: int | None, exact: Sequence[Form] | None) -> Sequence[Form]:
    """What may take a layer's place, whatever it costs: depthwise and pointwise, or all with the `exact`."""
    spec = site.dense.spec
    if exact is None:
        return depthwise_forms(spec, rank)
    # Ranks at which it has a form exactly are as good as any that are on the grid.
    return exact if site.params == 0 else list(dict.fromkeys([*all_forms(spec), *exact]))


def _exact_forms(site: ConvSite) -> list[Form]:
    """Those that a kernel has, whatever the data."""
    spec, weight = site.dense.spec, site.dense.weight
    if not may_separate(spec, weight):
        return []
    held = analyse(spec, weight, site.sizes).holding()
    return [(each.scheme, each.rank) for each in held if each.scheme in FORMS and each.rank]


def _counted(site: ConvSite, forms: Sequence[Form], gate: str, unit: str) -> Prices:
    """Prices in MACs or parameters, of the forms that pass the gate."""
    macs = {form: macs_of(site, form) for form in forms}
    passed = [form for form in forms if gate == "none" or macs[form] < site.macs]
    if unit == "macs":
        return Prices(site.macs, {form: macs[form] for form in passed})
    return Prices(site.params, {form: params_of(site, form) for form in passed})


def _measured(
    sites: Sequence[ConvSite],
    counted: Mapping[str, Prices],
    exact: Mapping[str, Sequence[Form]],
    clock: Clock,
    progress: Progress,
) -> tuple[dict[str, Prices], dict[str, str]]:
    """Prices in milliseconds, and why layers are no longer there.

    Time may be up before all are measured. What has the most MACs for each form to be timed comes first, and
    the forms that a layer has exactly by themselves: they are few, and cost no accuracy.
    """
    prices, reasons = dict[str, Prices](), dict[str, str]()
    queue = []
    for site in sites:
        forms = list(counted[site.name].forms)
        held = [form for form in exact.get(site.name, ()) if form in forms]
        queue += [(site, some) for some in (held, forms) if some]
    queue.sort(key=lambda each: -each[0].macs / len(each[1]))
    for site, forms in progress(queue, "timing forms"):
        times = clock.forms(site, forms)
        if times is None:
            if site.name not in prices:
                reasons[site.name] = "was not timed within --measure-seconds, least MACs for each form last"
            continue
        faster = {form: each.milliseconds for form, each in times.forms.items() if each.faster}
        if not faster:
            reasons[site.name] = (
                f"no form is measured to be faster in ONNX Runtime (best {times.best_ratio:.2f}×)"
            )
            continue
        reasons.pop(site.name, None)
        many = math.prod(site.dense.spec.weight_shape) > _MANY_WEIGHTS
        step = _COARSE_COST_STEP if many else _COST_STEP
        prices[site.name] = Prices(times.dense_milliseconds, _worth_fitting(faster, step))
    return prices, reasons


def _worth_fitting(costs: Mapping[Form, float], step: float) -> dict[Form, float]:
    """Of each scheme ranks of costs that are a `step` apart, and none that a higher rank undercuts.

    A higher rank errs less, whatever the data.
    """
    found: dict[Form, float] = {}
    last: dict[str, float] = {}
    for (scheme, rank), cost in sorted(costs.items(), key=lambda each: -each[0][1]):
        if cost <= last.get(scheme, math.inf) / step:
            last[scheme] = found[scheme, rank] = cost
    return {form: found[form] for form in costs if form in found}


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
    return None if scheme is None else spectrum(site.conv.spec, site.conv.weight, scheme, plan.rank)


def _document(
    calibration: Calibration | None,
    budget: Budget,
    unit: str,
    search: Search,
    point: Point,
    steps: Sequence[Step],
    training: Mapping[str, Any] | None,
    accuracy: Callable[[nn.Module], AccuracyDelta] | None,
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
