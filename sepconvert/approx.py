"""Approximate conversion: survey → search → fine-tune, and what the report says of each layer."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.approximation import (
    Calibration,
    Fitted,
    Form,
    Heldout,
    LayerSurvey,
    Step,
    all_forms,
    carry_out,
    depthwise_forms,
    depthwise_obstacle,
    macs_of,
    obstacle,
    replacement,
    survey,
)
from sepconvert.calibrate import POSITIONS
from sepconvert.conversion import Conversion
from sepconvert.data import Batch, split
from sepconvert.distillation import Precision, finetune
from sepconvert.distillation import Step as TrainingStep
from sepconvert.distributed import once
from sepconvert.errors import SepconvertError
from sepconvert.factorize.border import Border
from sepconvert.factorize.structures import BY_NAME
from sepconvert.measure.accuracy import AccuracyDelta
from sepconvert.measure.latency import Speedup
from sepconvert.plan import LayerPlan, kept, selected
from sepconvert.progress import Progress
from sepconvert.report.document import LayerApproximation, LayerReport
from sepconvert.rewrite import graph_obstacle
from sepconvert.search import Budget, Point, Search
from sepconvert.spec import chain_macs, chain_params
from sepconvert.timing import FormClock, time_models
from sepconvert.trace import ConvSite, Inputs, private_copy
from sepconvert.verify import compare_with, reference

_BATCH = 64


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
) -> Parts:
    """Images to fit to, to judge by, to train on and to score; see `pipeline.convert`.

    Raises:
        SepconvertError: there are too few, or none to train on.
    """
    if images < 1 or epochs < 0:
        raise SepconvertError(f"--calib-images {images} --finetune {epochs}: expected 1 and 0 or more")
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
    heldout, fit, _ = split(source, [images // 4, images - images // 4], seed)
    if train is None or source is train:
        train = split(source, [images // 4], seed)[1]  # all but those held out
    if epochs and images < 4:
        raise SepconvertError(f"--finetune: needs images to judge by too, got {images}; pass more")
    batches = [tuple(_images(loader)) for loader in (fit, heldout)]
    _, *labels = next(iter(train))
    labelled = bool(labels) and bool((labels[0] >= 0).any())
    return Parts(scored, Calibration(batches[0], batches[1], origin), train, heldout, labelled)


def _size(loader: DataLoader[Batch]) -> int:
    return len(loader.dataset) if isinstance(loader.dataset, Sized) else 0


def _images(loader: DataLoader[Batch]) -> Iterator[Tensor]:
    """In batches of few: a pass is suspended with each of them."""
    images = [x for x, *_ in loader]
    if not all(x.isfinite().all() for x in images):
        raise SepconvertError("calibration: the images hold NaN or Inf; check the data")
    if images and all(_flat(x) for x in images):
        raise SepconvertError(
            "calibration: every image is of one colour, which says nothing of the data that the model meets; "
            "check the path and the preprocessing"
        )
    for _, alike in itertools.groupby(images, lambda x: x.shape[1:]):
        joined = torch.cat(list(alike))
        yield from (joined[i : i + _BATCH] for i in range(0, len(joined), _BATCH))


def _flat(x: Tensor) -> bool:
    return x.shape[2:].numel() > 1 and bool((x.amin((-2, -1)) == x.amax((-2, -1))).all())


def convert_approximately(
    model: nn.Module,
    inputs: Inputs,
    sites: tuple[ConvSite, ...],
    *,
    mode: str,
    gate: str,
    cache: Path | None,
    measure_seconds: float,
    include: Sequence[str],
    exclude: Sequence[str],
    budget: Budget,
    calibration: Calibration | None,
    finetuning: Finetuning | None,
    accuracy: Callable[[nn.Module], AccuracyDelta] | None,
    total_macs: int,
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> Conversion:
    """Replace convolutions by factors, depthwise and pointwise ones or all kinds, under a budget.

    See `pipeline.convert`.

    `accuracy` compares a model with the original on the evaluation data, `total_macs` are the original's.
    """
    reasons = _obstacles(model, sites, mode, include, exclude)
    layers = [site for site in sites if site.name not in reasons]
    heldout = Heldout(model, calibration.heldout) if calibration and calibration.heldout else None

    def forms(site: ConvSite) -> list[Form]:
        assert site.conv is not None  # noqa: S101  (the others have an obstacle)
        spec = site.conv.spec
        found = all_forms(spec) if mode == "auto" else depthwise_forms(spec, budget.rank)
        if budget.rank is not None:
            cheapest = min((macs_of(site, form) for form in found), default=0)
            found = [form for form in found if macs_of(site, form) == cheapest]
        return [form for form in found if gate == "none" or macs_of(site, form) < site.macs]

    surveyed = survey(model, layers, calibration, heldout, forms, seed, progress)
    if gate == "latency":
        clock = FormClock(max(runs, 1), threads, seed, cache, measure_seconds)
        surveyed, slow = once(lambda: price(surveyed, layers, clock, progress))
        reasons |= slow

    def speedup(converted: nn.Module) -> Speedup:
        return once(lambda: time_models(model, converted, inputs, runs, threads, seed, progress)[2])

    search = Search(
        surveyed,
        total_macs,
        lambda choice: carry_out(model, layers, choice, surveyed, calibration, heldout, seed, progress),
        accuracy,
        speedup if runs else None,
        progress,
    )
    # What fine-tuning will win back is demanded of its result.
    fixed = budget.rank or budget.target_macs or budget.min_speedup
    point = search.run(replace(budget, max_drop=None) if finetuning and fixed else budget)
    fitted = point.fitted
    assert fitted is not None  # noqa: S101  (`run` carried it out)
    converted, steps, training = fitted.model, fitted.steps, None
    if finetuning is not None and fitted.choice:
        converted, steps, training = _finetune(model, fitted, finetuning, heldout, seed)
    expected = reference(model, inputs, sites, {}, seed)
    plans = tuple(_layer_plan(site, reasons, surveyed, fitted) for site in sites)
    replacements = {
        site.name: replacement(site, fitted.layers[site.name])
        for site in layers
        if site.name in fitted.layers
    }
    return Conversion(
        model=converted,
        layers=plans,
        replacements=replacements,
        reports=tuple(
            LayerReport(plan, site, approximation=_layer_report(surveyed.get(site.name), fitted, site.name))
            for plan, site in zip(plans, sites, strict=True)
        ),
        expected=(expected, reference(converted, inputs, (), {}, seed)),
        torch_check=replace(compare_with(expected, converted), tolerance=None),
        approximation=_document(calibration, budget, search, point, steps, training, accuracy),
    )


def _obstacles(
    model: nn.Module, sites: Sequence[ConvSite], mode: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, str]:
    """Why layers are kept, whatever the budget."""
    in_graph = functools.cache(functools.partial(graph_obstacle, private_copy(model), sites))
    reasons = {}
    for site in sites:
        if not selected(site.name, include, exclude):
            reason: str | None = "not selected"
        else:
            reason = obstacle(site)
            if reason is None and mode == "approx":
                reason = depthwise_obstacle(site, named=bool(include))
            reason = reason or in_graph(site.owner)
        if reason is not None:
            reasons[site.name] = reason
    return reasons


def _finetune(
    model: nn.Module,
    fitted: Fitted,
    finetuning: Finetuning,
    heldout: Heldout | None,
    seed: int,
) -> tuple[nn.Module, tuple[Step, ...], dict[str, Any]]:
    trained = finetune(
        fitted.model,
        model,
        finetuning.data,
        finetuning.heldout,
        epochs=finetuning.epochs,
        labelled=finetuning.labelled,
        precision=finetuning.precision,
        checkpoint=finetuning.checkpoint,
        resume=finetuning.resume,
        seed=seed,
        progress=finetuning.on_step,
    )
    steps = fitted.steps
    if heldout is not None:
        steps = (*steps, Step("fine-tune", heldout.measure(trained.model), kept=True))
    return trained.model, steps, trained.to_dict()


def price(
    surveyed: Mapping[str, LayerSurvey], sites: Sequence[ConvSite], clock: FormClock, progress: Progress
) -> tuple[dict[str, LayerSurvey], dict[str, str]]:
    """The survey with times for costs, and why layers are no longer in it; the largest come first."""
    priced, reasons = {}, {}
    largest = sorted((site for site in sites if site.name in surveyed), key=lambda site: -site.macs)
    for site in progress(largest, "timing forms"):
        each = surveyed[site.name]
        times = clock.time(site, [(found.scheme, found.rank) for found in each.offered])
        if times is None:
            reasons[site.name] = "was not timed within --measure-seconds"
            continue
        kept = [i for i, faster in enumerate(times.faster) if faster]
        if not kept:
            reasons[site.name] = (
                f"no form is measured to be faster in ONNX Runtime (best {times.best_ratio:.2f}×)"
            )
            continue
        priced[site.name] = replace(
            each,
            offered=tuple(each.offered[i] for i in kept),
            macs=tuple(each.macs[i] for i in kept),
            separate_errors=tuple(each.separate_errors[i] for i in kept),
            milliseconds=tuple(times.milliseconds[i] for i in kept),
            dense_milliseconds=times.dense_milliseconds,
        )
    return {name: priced[name] for name in surveyed if name in priced}, reasons


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
    chain = BY_NAME[found.scheme].split(site.conv.spec, found.rank)
    macs = sum(chain_macs(chain, size) for size in site.sizes)
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=f"rank {found.rank} of {BY_NAME[found.scheme].full_rank(site.conv.spec)}",
        spec=site.conv.spec,
        scheme=found.scheme,
        rank=found.rank,
        border=Border(),
        bias=True,
        macs=(site.macs, macs),
        params=(site.params, chain_params(chain) + (not site.conv.spec.bias) * site.conv.spec.out_channels),
        tolerance=None,
    )


def _layer_report(surveyed: LayerSurvey | None, fitted: Fitted, name: str) -> LayerApproximation | None:
    found, candidate = fitted.layers.get(name), fitted.choice.get(name)
    if surveyed is None or found is None or candidate is None:
        return None
    index = surveyed.index(found.scheme, found.rank)
    return LayerApproximation(
        weight_error=found.weight_error,
        output_error=found.output_error,
        output_error_of_weight_fit=surveyed.separate_errors[index],
        output_error_alone=surveyed.offered[index].output_error,
        sensitivity=surveyed.sensitivity,
        sweeps=len(found.objective),
    )


def _document(
    calibration: Calibration | None,
    budget: Budget,
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
            "positions": POSITIONS,
        },
        "budget": asdict(budget),
        "curve": search.to_json(point),
        "plans_measured_on_data": sum(each.accuracy is not None for each in search.points)
        if accuracy is not None
        else 0,
        "steps": [{"name": step.name, **asdict(step.reached), "kept": step.kept} for step in steps],
        "finetune": training,
    }
