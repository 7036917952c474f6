"""The operations `convert` and `inspect`: the stages of a conversion, in order."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from sepconvert.base.determinism import reproducible
from sepconvert.base.distributed import rank as rank_of_process
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Gate,
    Int8,
    Mode,
    Origin,
    Selection,
    Task,
    Timing,
)
from sepconvert.base.progress import (
    Phase,
    Progress,
    Stage,
    begin,
    expect,
    progress_of,
    stage,
    stage_clock,
    stages_so_far,
)
from sepconvert.files.data import Batch
from sepconvert.files.onnx.graph.network import OnnxNetwork, open_network
from sepconvert.files.results import TemporaryFolder
from sepconvert.network.tensors import Inputs, model_dtype, state_tensors, tensors_in
from sepconvert.pipeline.job import Check, Job
from sepconvert.pipeline.modes.approximate import convert_approximately
from sepconvert.pipeline.modes.exact import analyse_model, convert_exactly, plan_model
from sepconvert.pipeline.original import Original, Subject, examine, given_model, trace_selected
from sepconvert.pipeline.results import ConversionResult, Inspection, Plan
from sepconvert.pipeline.stages import Measured, Written, checked_place, measure, result_folder, verify, write
from sepconvert.planning.conversion import Conversion, LayerReport, Verification
from sepconvert.planning.plan import ConversionPlan
from sepconvert.report.document import Report, report_document
from sepconvert.report.files import write_documents
from sepconvert.report.pictures.exhibits import Exhibits, kernel_pairs
from sepconvert.report.pictures.samples import changed_samples, image_of, samples_at

_RUNS = 30  # of each layer under the gate "latency" of `inspect`


@reproducible()
def inspect(
    model: Subject,
    example_inputs: Tensor | Inputs | None = None,
    *,
    gate: Gate = "macs",
    tol: float | None = None,
    selection: Selection = Selection(),
    progress: bool | Progress = False,
) -> Inspection:
    """Report which convolutions separate, how exactly, and why not; nothing is converted.

    Arguments are those of `convert`. The result prints as a verdict and a table; its `to_json()` holds, for
    every structure of every layer, its rank, the best relative error at a rank that would pay, and the
    singular values around the cut.

    Example:
        A Laplacian is no product of a column and a row, and the best of these is off by a tenth:

        >>> import torch, sepconvert
        >>> laplacian = torch.nn.Conv2d(1, 1, 3, bias=False)
        >>> laplacian.weight.data = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
        >>> found = sepconvert.inspect(torch.nn.Sequential(laplacian), torch.rand(1, 1, 16, 16))
        >>> layer, = found.to_json()["layers"]
        >>> [(each["scheme"], each["rank"], each["full_rank"]) for each in layer["structures"]]
        [('zero-border', 9, 9), ('channelwise-spatial-vh', 2, 3), ('channelwise-spatial-hv', 2, 3)]
        >>> round(layer["structures"][1]["best_relative_error"], 3)
        0.101
    """
    model, inputs = given_model(model, example_inputs)
    job = Job(
        gate=gate, tol=tol, selection=selection, timing=Timing(runs=_RUNS), progress=progress_of(progress)
    )
    traced = trace_selected(model, inputs, selection)
    analyses = analyse_model(traced.sites, tol, selection, job.progress)
    layers, factorizations = plan_model(traced, analyses, job)
    certificates = {name: each.certificate for name, each in factorizations.items()}
    return Inspection(
        tuple(
            LayerReport(layer, site, analyses.get(site.name), certificates.get(site.name))
            for layer, site in zip(layers, traced.sites, strict=True)
        )
    )


@reproducible()
@stage_clock()
def convert(
    model: Subject,
    example_inputs: Tensor | Inputs | None = None,
    mode: Mode = "exact",
    *,
    data: Iterable[Batch] | None = None,
    calib: DataLoader[Batch] | None = None,
    metric: str | Callable[..., Any] | Task | None = None,
    max_drop: float | None = None,
    confidence: float | None = None,
    min_speedup: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    rank: int | None = None,
    nearest: bool = False,
    gate: Gate | None = None,
    tol: float | None = None,
    selection: Selection = Selection(),
    timing: Timing = Timing(),
    calibration: Calibration = Calibration(),
    int8: bool | str | Int8 = False,
    finetune: int | Finetuning = 0,
    dynamic_batch: bool = True,
    export: Export = Export(),
    check: Check = "onnx",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    origin: Origin = Origin(),
    progress: bool | Progress = False,
) -> ConversionResult:
    """Replace convolutions by separable ones: exactly, with proof, or approximately, within a budget.

    Args:
        model: any module, or an ONNX file (a path, or a `ModelProto`); it is left as it is.
        example_inputs: N × C × H × W tensor, a tuple of positional arguments, or a mapping of arguments by
            name. The models are run, verified and timed on them; MACs are counted for one sample. An ONNX
            file that says how large its inputs are needs none.
        mode: "exact" keeps the function. "approx" fits depthwise and pointwise factors to the data; "auto"
            chooses for each layer among all structures, under the budget.
        data: batches (x, y) of inputs and labels or other targets, on which the metric is reported; read once
            for each model. x is a tensor, a tuple of positional arguments, or a mapping of arguments by name.
        calib: images that factors are fitted to, in approx and auto mode, and that int8 ranges are measured
            on: batches of x alone, tuples that begin with x, or dicts. Without it a part of `data` is split
            off and not scored; without either, factors are fitted to the weights alone.
        metric: what drops are measured in: a name such as "miou" or "psnr", a function `(outputs, targets) →
            N scores`, a `torchmetrics.Metric`, or a `Task`, which says more. By default top-1 accuracy, of
            classifiers.
        max_drop: largest drop of the metric on `data`, in its unit; 1 percentage point if nothing else is
            demanded.
        confidence: probability with which the drop on unseen images of the same kind is at most `max_drop`;
            by default, the drop that is measured on `data` is.
        min_speedup: smallest ratio of measured latencies, original over converted.
        target_macs: largest MACs, as a share of the original's.
        target_params: largest number of parameters, as a share of the original's.
        rank: channel multiplier M of all layers, instead of a search.
        nearest: deliver the plan that comes nearest to the demands, where none meets them; an allowed drop is
            kept.
        gate: "macs" converts layers that get fewer MACs, "latency" those that are measured to be faster in
            ONNX Runtime, "none" all that have a structure, or can be approximated. By default "latency" in
            auto mode, else "macs".
        tol: relative error of a kernel that counts as exact, in exact mode; by default what rounding to the
            dtype in which the kernel is stored explains.
        selection: names of the layers that may be replaced.
        timing: how often, and by which runtime, models and layers are timed.
        calibration: how many images are fitted to, and in how much memory.
        int8: whether the models are deployed in static int8: True, "auto" (if the original is measured to be
            faster in it than in floating point), or all its settings. Plans are then made for that form,
            timed against the original in that form, and judged by the drop from the original in floating
            point.
        finetune: epochs of distillation afterwards, or all its settings.
        dynamic_batch: export with a dynamic batch dimension where the model allows it, which is called
            `batch` in ONNX files.
        export: names of inputs and outputs of ONNX files, which are by default those of the forward's
            arguments and `output`, and their opset.
        check: "onnx" exports both models, verifies them in ONNX Runtime and times them; "torch" verifies in
            torch alone, which takes a fraction of the time.
        out: empty directory, made if needed, for all files that the command line writes. By default files are
            temporary.
        seed: of random inputs, data splits, training and the order of runs.
        origin: where the model came from, for the report.
        progress: True shows bars, in a terminal or a notebook; a function `(items, description) → items`
            wraps the loops in another way.

    With several processes (`accelerate launch`), the main one exports, measures and reports; in the others
    the report is empty.

    Raises:
        SepconvertError: bad arguments, or a model that cannot be run or exported.
        VerificationError: the converted model does not compute what it has to; the message names the layer.
        DemandNotMetError: no plan meets the budget; `curve` shows the nearest.

    Example:
        A binomial filter is a column times a row:

        >>> import torch, sepconvert
        >>> blur = torch.nn.Conv2d(1, 1, 3, bias=False)
        >>> blur.weight.data = torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16
        >>> result = sepconvert.convert(torch.nn.Sequential(blur), torch.rand(1, 1, 16, 16), check="torch")
        >>> layer, = result.report["layers"]
        >>> layer["decision"], layer["reason"], layer["certificate"]["bitwise"]
        ('converted', 'rank 1 of 3', True)
        >>> [tuple(each.kernel_size) for each in result.model[0].convolutions]
        [(3, 1), (1, 3)]
    """
    if isinstance(model, str | os.PathLike):
        path, model = os.fspath(model), open_network(model)
        if origin == Origin():
            origin = Origin(path, hashlib.sha256(model.graph.content).hexdigest())
    job = Job.of(
        metric=metric, mode=mode, nearest=nearest, gate=gate, tol=tol, seed=seed, check=check, out=out,
        budget=Budget(rank, target_macs, target_params, min_speedup, max_drop, confidence),
        selection=selection, timing=timing, calibration=calibration, int8=int8, finetune=finetune,
        dynamic_batch=dynamic_batch, export=export, origin=origin, progress=progress_of(progress),
    )  # fmt: skip
    expect(_phases(job))
    begin(Phase.CHECKS)
    main = rank_of_process() == 0
    place = checked_place(job.out) if main and job.out is not None else None
    original = examine(model, example_inputs, data, calib, job)
    job = job.deployed_in_int8(original.form is not None).with_default_budget(
        unit=None if original.evaluation is None else original.evaluation.metric.unit
    )
    convert_model = convert_exactly if job.mode == "exact" else convert_approximately
    made = convert_model(original, job)
    original.evaluate(made.model)  # all processes take part
    plan = _plan(original, made, job)
    if not main:
        return ConversionResult(made.model, Plan(plan.to_json(), state_tensors(made.model)), {})
    files = TemporaryFolder() if place is None else place
    with result_folder(files.path if isinstance(files, TemporaryFolder) else files) as folder:
        begin(Phase.FILES)
        written = write(original, made, plan, folder, job)
        verification = verify(original, made, written, job)
        begin(Phase.MEASUREMENT)
        measured = measure(original, made, written, verification, job)
        result = _result(original, made, written, verification, measured, job)
        if place is not None:
            write_documents(result.report, result.plan, place, result.exhibits)
    return result if job.check == "torch" else replace(result, files=files)


def _phases(job: Job) -> list[Phase]:
    """Return the phases of a conversion, in their order."""
    if job.mode == "exact":
        fitted = [Phase.ANALYSIS]
    else:
        fitted = [*([Phase.TIMES] if job.gate == "latency" else []), Phase.SURVEY, Phase.SEARCH]
    return [Phase.CHECKS, *fitted, Phase.FILES, Phase.MEASUREMENT]


def _plan(original: Original, made: Conversion, job: Job) -> ConversionPlan:
    """Return the decisions of a conversion, to be replayed."""
    return ConversionPlan(
        mode=job.mode,
        gate=job.gate,
        tol=job.tol,
        seed=job.seed,
        model_sha256=job.origin.sha256,
        weights_sha256=None,
        input_shapes=tuple(tuple(value.shape) for value in tensors_in(original.inputs)),
        layers=made.layers,
        merges=made.merges,
    )


@stage(Stage.REPORT)
def _result(
    original: Original,
    made: Conversion,
    written: Written,
    verification: Verification,
    measured: Measured,
    job: Job,
) -> ConversionResult:
    """Return what was made, written, verified and measured as one result."""
    exhibits = _exhibits(original, made, measured, job)  # first, as it takes time, which the report tells
    report = Report(
        name=_name(original, job.origin),
        created=datetime.now(timezone.utc),
        input_shapes=tuple(tuple(value.shape) for value in tensors_in(original.inputs)),
        mode=job.mode,
        source=job.origin.to_json(),
        command=job.origin.command,
        runtime=job.timing.runtime,
        seed=job.seed,
        dtype=str(model_dtype(original.model)).removeprefix("torch."),
        original=measured.original,
        converted=measured.converted,
        speedup=measured.speedup,
        accuracy=measured.accuracy,
        changed=measured.changed,
        layers=measured.layers,
        verification=verification,
        export=written.export,
        execution=measured.execution,
        int8_gain=original.int8_gain,
        forms=None if measured.forms is None else measured.forms.to_json(),
        approximation=made.approximation,
        data=None if original.facts is None else original.facts.to_json(),
        files=job.origin.data,
        stages=stages_so_far(),
    )
    return ConversionResult(
        made.model,
        Plan(written.plan.to_json(), state_tensors(made.model)),
        report_document(report),
        measured.original,
        measured.converted,
        measured.speedup,
        measured.accuracy,
        measured.layers,
        verification,
        exhibits,
    )


def _name(original: Original, origin: Origin) -> str:
    """Return the name of a model: that of its file, or of its class."""
    if origin.path is not None:
        return Path(origin.path).name
    return "ONNX model" if isinstance(original.model, OnnxNetwork) else type(original.model).__name__


def _exhibits(original: Original, made: Conversion, measured: Measured, job: Job) -> Exhibits:
    """Return what the HTML page shows in addition to the report.

    The samples of a classifier are those whose predictions changed. Others are run again, unless the outputs
    are proven to be the same.
    """
    kernels = kernel_pairs(measured.layers, made.model)
    scores, data, after = original.scores, original.data.scored, original.evaluate(made.model)
    if scores is None or data is None or after is None:
        return Exhibits(kernels)
    if measured.changed is not None:
        indices = [each.index for each in measured.changed.shown]
        found = samples_at(data, indices, partial(scores.scoring.batched, original.model))
        images = {index: image_of(x) for index, (x, _) in found.items()}
        return Exhibits(kernels, {index: image for index, image in images.items() if image is not None})
    if job.mode == "exact":
        return Exhibits(kernels)
    models = original.model, made.model
    return Exhibits(kernels, changed=changed_samples(models, data, scores.scoring, (scores.original, after)))
