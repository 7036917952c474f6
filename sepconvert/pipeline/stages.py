"""Stages of a conversion behind the modes: write, verify, measure, hold to the demands."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from sepconvert.base.documents import writing
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import DemandNotMetError, SepconvertError, VerificationError
from sepconvert.base.progress import Stage, stage
from sepconvert.files.onnx.export import ExportNote, runtime_dtype
from sepconvert.files.onnx.facts import onnx_sizes
from sepconvert.files.onnx.graph.running import Feed
from sepconvert.files.onnx.writing import write_models
from sepconvert.measure.cost import Cost
from sepconvert.measure.execution.layers import (
    Gain,
    ModelExecution,
    by_layer,
    layer_executions,
    model_execution,
)
from sepconvert.measure.execution.operators import operator_times
from sepconvert.measure.latency import Deployed, Latency, PairTiming, Speedup, session
from sepconvert.measure.metrics.classes import ChangedPredictions, changes
from sepconvert.measure.metrics.evaluation import Evaluation, MetricDelta
from sepconvert.measure.profiling import Profile, batch_size
from sepconvert.measure.verification.outputs import (
    OutputCheck,
    Outputs,
    Reference,
    compare_export,
    compare_runs,
)
from sepconvert.network.tensors import Inputs, state_tensors
from sepconvert.pipeline.deployment import FourForms, check_int8, measure_forms, write_int8
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import Original
from sepconvert.planning.conversion import Conversion, LayerReport, Verification
from sepconvert.planning.plan import ConversionPlan
from sepconvert.planning.timing.pairs import time_files, time_layers

_SHOWN = 24  # predictions that changed


@dataclass(frozen=True)
class Written:
    """The files that a conversion left on disk, if any.

    `onnx_reason` says why there are no ONNX files, where there are none.
    """

    plan: ConversionPlan  # tied to the weights by their SHA-256
    paths: tuple[Path, Path]  # original.onnx and converted.onnx
    export: ExportNote
    onnx_reason: str | None
    int8: tuple[Path, Path] | None = None  # original-int8.onnx and converted-int8.onnx

    @property
    def deployed(self) -> tuple[Path, Path]:
        """The files of the form that the models are deployed in."""
        return self.int8 or self.paths


@dataclass(frozen=True)
class Measured:
    """Measurements of the original and the converted model; None for those that were not made."""

    original: Profile
    converted: Profile
    speedup: Speedup | None
    accuracy: MetricDelta | None
    changed: ChangedPredictions | None
    layers: tuple[LayerReport, ...]
    execution: ModelExecution | None
    forms: FourForms | None = None  # where the models are deployed in int8


def write(original: Original, made: Conversion, plan: ConversionPlan, folder: Path, job: Job) -> Written:
    """Write the models and the weights of a conversion.

    Under the check "torch" nothing is exported.
    """
    weights = save(
        {
            name: each.clone(memory_format=torch.contiguous_format)
            for name, each in state_tensors(made.model).items()
        }
    )
    plan = replace(plan, weights_sha256=hashlib.sha256(weights).hexdigest())
    paths = folder / "original.onnx", folder / "converted.onnx"
    if job.check == "torch":
        note = ExportNote(False, str(runtime_dtype(made.model)).removeprefix("torch."), None)
        return Written(plan, paths, note, "the conversion was checked in torch alone")
    # Where nothing was replaced, both files are one.
    unchanged = job.mode == "exact" and not made.replacements
    converted = original.model if unchanged else made.model
    note = write_models(original.drafts, converted, folder, job.dynamic_batch, job.progress)
    path = folder / "converted.safetensors"
    with writing(path):
        path.write_bytes(weights)
    int8 = None if original.form is None else write_int8(original, made, original.form, folder)
    reason = next((note.missing[each.name] for each in paths if each.name in note.missing), None)
    return Written(plan, paths, note, reason, int8)


@stage(Stage.VERIFICATION)
def verify(original: Original, made: Conversion, written: Written, job: Job) -> Verification:
    """Compare the converted model with the original in torch, and the files of both in ONNX Runtime.

    Raises:
        VerificationError: a model or a file does not compute what it has to compute.
    """
    reason = written.onnx_reason
    files = OnnxChecks(None, None, reason)
    if reason is None:
        files = check_onnx(original.drafts.feed, made.expected, written.paths, job.timing.runtime)
    verification = Verification(
        made.torch_check, files.converted, files.reason, made.checks, original=files.original
    )
    demand_verified(verification)
    return verification


def demand_verified(verification: Verification) -> None:
    """Raise `VerificationError`, which names the layer that moved most, unless the verification holds."""
    if verification.holds:
        return
    culprit = verification.worst_layer
    raise VerificationError(
        f"verification failed: {verification.failure}; the layer that moved most: {culprit or 'none'}; "
        f"leave it out with `exclude`{f' {culprit}' if culprit else ''}, or report this as a defect"
    )


def measure(
    original: Original, made: Conversion, written: Written, verification: Verification, job: Job
) -> Measured:
    """Time both models and each replaced layer, and compare their predictions."""
    runs, runtime = job.runs if verification.onnx is not None else 0, job.timing.runtime
    timing: PairTiming | None = None
    layers, execution, forms = made.reports, None, None
    if original.form is not None and written.int8 is not None:
        checks = check_int8(original, made, original.form, written.int8)
        paths = [path for pair in zip(written.paths, written.int8, strict=True) for path in pair]
        forms = measure_forms(original, made, paths, checks, job)
        timing = forms.timing
    elif runs:
        timing = time_files(
            written.paths,
            original.drafts.feed(original.inputs),
            batch_size(original.inputs),
            runs,
            runtime,
            job.seed,
            job.progress,
        )
    if timing is not None:
        hold_to_speed(timing, job)
    before, after = original.evaluation, original.evaluate(made.model)
    accuracy = original.delta(made.model)
    hold_to_accuracy(accuracy, job)
    if timing is not None:
        times = time_layers(
            original.sites, made.replacements, runs, runtime, job.seed, job.progress, original.form
        )
        layers = tuple(replace(layer, latency=times.get(layer.site.name)) for layer in layers)
        layers, execution = executed_layers(
            layers,
            written.deployed,
            original.drafts.feed(original.inputs),
            batch_size(original.inputs),
            runs,
            runtime,
        )
    return Measured(
        original=_profile(original.cost, before, timing.original if timing else None, written.deployed[0]),
        converted=_profile(
            original.count(made.model), after, timing.converted if timing else None, written.deployed[1]
        ),
        speedup=timing.speedup if timing else None,
        accuracy=accuracy,
        changed=changes(before.predictions, after.predictions, _SHOWN)
        if before is not None and after is not None and before.predictions and after.predictions
        else None,
        layers=layers,
        execution=execution,
        forms=forms,
    )


def hold_to_speed(timing: PairTiming, job: Job) -> None:
    """Raise `DemandNotMetError` if the files are slower than the gate or the budget demands."""
    speedup, least = timing.speedup, job.budget.min_speedup
    slower = speedup.significant and speedup.median < 1
    if job.int8 and slower:
        raise DemandNotMetError(
            f"`int8`: the converted model is measured {speedup.median:.2f}× as fast as the original in int8; "
            "deploy that, or convert with another budget or `gate` latency"
        )
    if job.gate == "latency" and slower:
        raise DemandNotMetError(
            f"`gate` latency: the converted model is measured {speedup.median:.2f}× as fast as the "
            "original, though each replaced layer is faster alone; change the budget or pass `gate` macs"
        )
    if least is not None and speedup.ci95.hi < least and not job.nearest:
        raise DemandNotMetError(
            f"`min_speedup` {least:g}: the converted model is measured {speedup.median:.2f}× as "
            f"fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}], though its plan was timed as fast "
            "enough; measure on an idle machine with more `runs`, or relax the demand"
        )


def hold_to_accuracy(accuracy: MetricDelta | None, job: Job) -> None:
    """Raise `DemandNotMetError` if the converted model loses more than the budget allows."""
    most = job.budget.max_drop
    if accuracy is not None and most is not None and accuracy.drop > most and not job.nearest:
        raise DemandNotMetError(
            f"`max_drop` {most:g}: the fine-tuned model loses {accuracy.written_drop}; "
            "fine-tune for longer or relax a demand"
        )


def _profile(cost: Cost, scored: Evaluation | None, latency: Latency | None, path: Path) -> Profile:
    size, weights = onnx_sizes(path) if path.exists() else (None, None)
    return Profile(cost.params, cost.macs, size, weights, latency, None, cost.uncounted_ops).with_scores(
        scored
    )


def _gain(speedup: Speedup) -> float:
    """Return the measured speed-up, at least 1 unless the layer is slower beyond noise."""
    return speedup.median if speedup.significant else max(speedup.median, 1.0)


@dataclass(frozen=True)
class OnnxChecks:
    """Checks of both ONNX files, or why they do not run."""

    original: OutputCheck | None
    converted: OutputCheck | None
    reason: str | None


def check_onnx(
    feed: Callable[[Inputs], Feed],
    expected: tuple[Reference, Reference | None],
    paths: tuple[Path, Path],
    runtime: Runtime,
) -> OnnxChecks:
    """Run both ONNX files of a model and of its conversion on the inputs of `expected`, and compare.

    `feed` returns inputs as the files take them.

    The converted file is held against the original's, or, if there is a reference of its own, against that.
    Where the original's file differs from the original by more than the runtime's arithmetic explains, but by
    no more than might still be rounding, the difference is not the conversion's: it is reported, and the
    converted file may differ as much.

    Raises:
        VerificationError: the original's file does not compute what the original computes.
    """
    reference, own = expected
    try:
        original, converted = (
            _run_onnx(path, map(feed, each.inputs), runtime)
            for path, each in zip(paths, (reference, own or reference), strict=True)
        )
    except SepconvertError as error:
        return OnnxChecks(None, None, str(error))
    export = compare_export(reference, original)
    if not compare_export(reference, original, any_rounding=True).holds:
        raise VerificationError(
            f"verification failed: original.onnx is off the PyTorch model by {export.max_abs_diff:.3g}, "
            f"tolerance {export.tolerance:.3g}, which is more than rounding: torch's exporter or ONNX "
            "Runtime computes something else; run the model in ONNX Runtime yourself, and report it to them"
        )
    if own is None:
        return OnnxChecks(export, compare_runs(reference, original, converted), None)
    return OnnxChecks(export, compare_export(own, converted, any_rounding=not export.holds), None)


def _run_onnx(path: Path, feeds: Iterable[Feed], runtime: Runtime) -> list[Outputs]:
    runner = session(Deployed(path, runtime))
    results = []
    for feed in feeds:
        try:
            arrays = runner.run(None, feed)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise SepconvertError(f"{path.name}: ONNX Runtime cannot run it: {error}") from error
        results.append([torch.from_numpy(np.asarray(array)).double() for array in arrays])
    return results


def executed_layers(
    layers: tuple[LayerReport, ...],
    paths: tuple[Path, Path],
    feed: Feed,
    batch: int,
    runs: int,
    runtime: Runtime,
) -> tuple[tuple[LayerReport, ...], ModelExecution]:
    """Return the layers with what the runtime made of each, and the same of the whole model."""
    known = {label: each.site.name for each in layers for label in each.site.labels}
    before, after = (
        list(operator_times(Deployed(path, runtime), feed, runs=runs, known=known)) for path in paths
    )
    functional: dict[str, list[str]] = {}
    for each in sorted(layers, key=lambda each: each.site.place):
        if each.site.index is not None:
            functional.setdefault(each.site.owner, []).append(each.site.name)
    before = by_layer(before, functional)
    gains = {
        each.plan.name: Gain(
            (batch * each.plan.macs[0], batch * each.plan.macs[1]),
            _gain(each.latency.speedup),
            (each.plan.spec, each.plan.macs, each.plan.scheme, each.plan.rank),
        )
        for each in layers
        if each.latency is not None
    }
    found = layer_executions(before, after, gains)
    converted = [each.plan.name for each in layers if each.plan.decision == "converted"]
    return (
        tuple(replace(each, execution=found.get(each.plan.name)) for each in layers),
        model_execution(before, after, converted),
    )


def checked_place(place: Path) -> Path:
    """Return a directory to write to, made if needed.

    Raises:
        SepconvertError: it is not empty, or cannot be written.
    """
    try:
        if place.exists() and any(place.iterdir()):
            raise SepconvertError(f"`out`: {place} is not empty; pass an empty directory or one to be made")
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SepconvertError(
            f"`out`: {place}: {error.strerror}; pass a directory that can be written"
        ) from error
    return place


@contextlib.contextmanager
def result_folder(place: Path) -> Iterator[Path]:
    """Yield the place, emptied again if the block fails."""
    try:
        yield place
    except BaseException:
        for path in place.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        raise
