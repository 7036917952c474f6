"""The conversion from model to result: find, convert, write, verify, measure, report."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.determinism import reproducible
from sepconvert.base.distributed import rank as rank_of_process
from sepconvert.base.errors import DemandNotMetError, SepconvertError
from sepconvert.base.options import Budget, Calibration, Finetuning, Gate, Selection, Timing
from sepconvert.base.progress import Progress, silent
from sepconvert.distillation.results import Precision, Step
from sepconvert.files.data import Batch
from sepconvert.files.onnx.facts import onnx_sizes
from sepconvert.measure.cost import Cost
from sepconvert.measure.latency import Latency
from sepconvert.measure.metrics import Predictions, changes
from sepconvert.measure.metrics import compare as compare_predictions
from sepconvert.measure.profiling import Profile, as_inputs
from sepconvert.network.copies import checked
from sepconvert.network.tensors import Inputs, model_dtype, tensors_in
from sepconvert.pipeline.approximate import convert_approximately
from sepconvert.pipeline.delivered import (
    check_onnx,
    checked_place,
    executed_layers,
    result_folder,
    write_models,
)
from sepconvert.pipeline.exact import analyse_model, convert_exactly, plan_model
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import examine, select_sites
from sepconvert.pipeline.replay import demand_verified
from sepconvert.planning.conversion import LayerReport, Verification
from sepconvert.planning.plan import ConversionPlan
from sepconvert.planning.timing import time_files, time_layers
from sepconvert.report.document import Report, report_document
from sepconvert.report.exhibits import Exhibits, images_at, kernel_pairs
from sepconvert.report.files import write_documents

MODES = ("exact", "approx", "auto")


_SHOWN = 24  # predictions that changed


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion returns.

    `model` is a converted copy, `plan` and `report` are plain JSON-able dictionaries (see
    `sepconvert.plan.SCHEMA` and `sepconvert.report.document.SCHEMA`), `exhibits` what the HTML report shows
    besides.
    """

    model: nn.Module
    plan: dict[str, Any]
    report: dict[str, Any]
    exhibits: Exhibits = field(default_factory=Exhibits)


@reproducible()
def inspect(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    gate: Gate = "macs",
    tol: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Which convolutions separate, how exactly, and why not: `{"layers": […]}`, nothing converted.

    Arguments as those of `convert`. Each layer holds, for every structure, its rank, the best relative
    error at a rank that would pay, and the singular values around the cut.

    Example:
        A Laplacian is no product of a column and a row, and the best of these is off by a tenth:

        >>> import torch, sepconvert
        >>> laplacian = torch.nn.Conv2d(1, 1, 3, bias=False)
        >>> laplacian.weight.data = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
        >>> layer, = sepconvert.inspect(torch.nn.Sequential(laplacian), torch.rand(1, 1, 16, 16))["layers"]
        >>> [(each["scheme"], each["rank"], each["full_rank"]) for each in layer["structures"]]
        [('zero-border', 9, 9), ('channelwise-spatial-vh', 2, 3), ('channelwise-spatial-hv', 2, 3)]
        >>> round(layer["structures"][1]["best_relative_error"], 3)
        0.101
    """
    model, inputs = checked(model), as_inputs(example_inputs)
    job = Job(
        gate=gate, tol=tol, selection=Selection(include, exclude), timing=Timing(runs=30), progress=progress
    )
    sites = select_sites(model, inputs, job.selection)
    analyses = analyse_model(sites, tol, job.selection, progress)
    layers, factorizations = plan_model(model, inputs, sites, analyses, job)
    reports = [
        LayerReport(
            layer,
            site,
            analyses.get(site.name),
            factorizations[site.name].certificate if site.name in factorizations else None,
        )
        for layer, site in zip(layers, sites, strict=True)
    ]
    return {"layers": [report.to_json() for report in reports]}


@reproducible()
def convert(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    mode: str = "exact",
    *,
    gate: str | None = None,
    tol: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Iterable[Batch] | None = None,
    calib: DataLoader[Batch] | None = None,
    calib_images: int = 1536,
    memory: float | None = None,
    rank: int | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    min_speedup: float | None = None,
    max_drop: float | None = None,
    finetune: int = 0,
    train: DataLoader[Batch] | None = None,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    measure_seconds: float = 300.0,
    cache: Path | None = None,
    dynamic_batch: bool = True,
    runs: int = 50,
    threads: int | None = None,
    graph_optimization: str = "all",
    provider: str = "cpu",
    seed: int = 0,
    source: dict[str, Any] | None = None,
    command: str | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> ConversionResult:
    """Replace convolutions by separable ones: exactly, with proof, or approximately, within a budget.

    Args:
        model: any module; it is left as it is.
        example_inputs: N × C × H × W tensor, or a tuple of positional arguments. They are run, verified on
            and timed; MACs are counted for one sample.
        mode: "exact"; or in the metric of the data, "approx": depthwise and pointwise factors, or "auto":
            for each layer the best of all structures under the budget.
        gate: "macs" converts what has fewer MACs, "latency" what is measured to be faster in ONNX
            Runtime, "none" all that has a structure, or all that can be approximated. By default "latency"
            in auto mode, else "macs".
        tol: exact mode: relative error of a kernel that counts as exact; by default what rounding to the
            dtype in which it is stored explains.
        include, exclude: globs of layer names.
        data: labelled batches (x, y), on which accuracy is reported; read once for each model.
        calib: approximate mode: images to fit to. Without it a part of `data` is split off, and not scored;
            without either, the metric of the weights is used.
        calib_images: how many of them; a quarter, or 256, are held out from the fit to judge plans by, with
            their labels if there are any.
        memory: bytes that the process may have while it calibrates; by default, half of what is free besides.
            Time depends on it, results do not.
        rank: the channel multiplier M of all layers, instead of a search.
        target_macs: most MACs, as a share of the original's.
        target_params: most parameters, likewise.
        min_speedup: least measured latency ratio.
        max_drop: largest drop of top-1 accuracy on `data`, in percentage points; 1 if nothing else is
            demanded.
        finetune: epochs of distillation afterwards, on `train`, or on what `calib` holds.
        train: batches (x, y) with a map-style dataset; labels other than -1 are used. A quarter, or 256, are
            held out to choose weights by.
        precision: mixed precision of fine-tuning; by default that of `accelerate launch`.
        checkpoint: file that fine-tuning is kept in while it runs.
        resume: go on from `checkpoint`, if it exists.
        on_step: called after each step of fine-tuning.
        measure_seconds: for timing layers under the gate "latency", of all but exact mode.
        cache: folder in which such times are kept for the next run; None to keep none.
        dynamic_batch: export with a dynamic batch dimension where the model allows it.
        runs: timed runs of each model; 0 to measure no latency.
        threads: of ONNX Runtime; all cores if None.
        graph_optimization: of ONNX Runtime: "all" as is its default, "extended", "basic" or "none".
        provider: of execution, one that the installed ONNX Runtime has: "cpu", "cuda", "openvino", …
        seed: of random inputs, of splits and positions, of training, and of the order of runs.
        source: `{"path": …, "sha256": …}` of the model file, for the report.
        command: that asked for the conversion, likewise.
        out: directory to leave all files in that the command line writes; it must be empty, or is made. By
            default files are temporary.
        progress: shows the progress of loops.

    Of several processes (`accelerate launch`), the main one exports, measures and reports; in the others the
    report is empty.

    Raises:
        SepconvertError: bad arguments, or a model that cannot be run or exported.
        DemandNotMetError: an exactly converted model is not the original (the message names the layer), or
            no plan meets the budget (`details` show the nearest).

    Example:
        A binomial filter is a column times a row:

        >>> import torch, sepconvert
        >>> blur = torch.nn.Conv2d(1, 1, 3, bias=False)
        >>> blur.weight.data = torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16
        >>> result = sepconvert.convert(torch.nn.Sequential(blur), torch.rand(1, 1, 16, 16), runs=0)
        >>> layer, = result.report["layers"]
        >>> layer["decision"], layer["reason"], layer["certificate"]["bitwise"]
        ('converted', 'rank 1 of 3', True)
        >>> [tuple(each.kernel_size) for each in result.model[0].convolutions]
        [(3, 1), (1, 3)]
    """
    for name, given in (("calib", calib), ("train", train)):
        if given is not None and not isinstance(given, DataLoader):
            raise SepconvertError(
                f"`{name}`: expected a torch.utils.data.DataLoader, got {type(given).__name__}; make one, e.g. "
                "DataLoader(dataset, batch_size=64)"
            )
    job = Job.of(
        mode=mode, gate=gate, tol=tol, seed=seed, dynamic_batch=dynamic_batch,
        budget=Budget(rank, target_macs, target_params, min_speedup, max_drop),
        selection=Selection(include, exclude),
        timing=Timing(threads, graph_optimization, provider, runs, measure_seconds, cache),
        calibration=Calibration(calib_images, memory),
        finetune=Finetuning(finetune, train, precision, checkpoint, resume, on_step),
        out=out, progress=progress,
    )  # fmt: skip
    gate, runtime = job.gate, job.timing.runtime
    place = checked_place(out) if rank_of_process() == 0 else None
    original = examine(model, example_inputs, data, calib, job)
    model, inputs, sites = original.model, original.inputs, original.sites
    data, predictions, original_cost = original.data.scored, original.predictions, original.cost
    if mode == "exact":
        conversion = convert_exactly(original, job)
    else:
        by_time = gate == "latency" and job.budget.share is None
        budget = job.budget.or_default(labelled=predictions is not None, timed=runs > 0 or by_time)
        job = replace(job, budget=budget)
        conversion = convert_approximately(original, job)
    max_drop, counted = job.budget.max_drop, original.count
    converted = conversion.model
    converted_predictions = original.predict(converted)
    plan = ConversionPlan(
        mode=job.mode, gate=gate, tol=tol, seed=seed,
        model_sha256=None if source is None else source["sha256"],
        weights_sha256=None,
        input_shapes=tuple(tuple(value.shape) for value in tensors_in(inputs)),
        layers=conversion.layers,
        merges=conversion.merges,
    )  # fmt: skip
    if rank_of_process() != 0:
        return ConversionResult(converted, plan.to_json(), {})
    with result_folder(place) as folder:
        note = write_models(model, converted, inputs, folder, dynamic_batch, progress)
        weights = hashlib.sha256((folder / "converted.safetensors").read_bytes()).hexdigest()
        plan = replace(plan, weights_sha256=weights)
        paths = folder / "original.onnx", folder / "converted.onnx"
        onnx_reason = next((note.missing[each.name] for each in paths if each.name in note.missing), None)
        onnx_check = None
        if onnx_reason is None:
            onnx_check, onnx_reason = check_onnx(model, conversion.expected, paths, runtime)
        verification = Verification(conversion.torch_check, onnx_check, onnx_reason, conversion.checks)
        demand_verified(verification)
        timing = (
            time_files(model, paths, inputs, runs, runtime, seed, progress) if onnx_check and runs else None
        )
        if gate == "latency" and timing and timing[2].significant and timing[2].median < 1:
            raise DemandNotMetError(
                f"--gate latency: the converted model is measured {timing[2].median:.2f}× as fast as the "
                "original, though each replaced layer is faster alone; change the budget or pass --gate macs"
            )
        if min_speedup is not None and timing and timing[2].ci95.hi < min_speedup:
            raise DemandNotMetError(
                f"--min-speedup {min_speedup:g}: the converted model is measured {timing[2].median:.2f}× as "
                f"fast [{timing[2].ci95.lo:.2f}, {timing[2].ci95.hi:.2f}], though its plan was timed as fast "
                "enough; measure on an idle machine with more --runs, or relax the demand"
            )
        delta = (
            compare_predictions(predictions, converted_predictions)
            if predictions and converted_predictions
            else None
        )
        if delta is not None and max_drop is not None and delta.drop_pp > max_drop:
            raise DemandNotMetError(
                f"--max-drop {max_drop:g}: the fine-tuned model loses {delta.drop_pp:.2f} pp; "
                "fine-tune for longer or relax a demand"
            )
        layer_timings = (
            time_layers(sites, conversion.replacements, runs, runtime, seed, progress) if timing else {}
        )
        layers = tuple(
            replace(each, latency=layer_timings.get(each.site.name)) for each in conversion.reports
        )
        execution = None
        if timing:
            layers, execution = executed_layers(layers, model, paths, inputs, runs, runtime)
        changed = (
            changes(predictions, converted_predictions, _SHOWN)
            if predictions and converted_predictions
            else None
        )
        report = Report(
            mode=mode,
            source=source,
            command=command,
            runtime=runtime,
            seed=seed,
            dtype=str(model_dtype(model)).removeprefix("torch."),
            original=_profile(original_cost, predictions, timing and timing[0], paths[0]),
            converted=_profile(counted(converted), converted_predictions, timing and timing[1], paths[1]),
            speedup=timing[2] if timing else None,
            accuracy=delta,
            changed=changed,
            layers=layers,
            verification=verification,
            export=note,
            execution=execution,
            approximation=conversion.approximation,
        )
        shown = () if changed is None else (each.index for each in changed.shown)
        result = ConversionResult(
            converted,
            plan.to_json(),
            report_document(report),
            Exhibits(kernel_pairs(layers, converted), {} if data is None else images_at(data, shown)),
        )
        if place is not None:
            write_documents(result.report, result.plan, place, result.exhibits)
    return result


def _profile(cost: Cost, predictions: Predictions | None, latency: Latency | None, path: Path) -> Profile:
    size, weights = onnx_sizes(path) if path.exists() else (None, None)
    accuracy = None if predictions is None else predictions.accuracy()
    return Profile(cost.params, cost.macs, size, weights, latency, accuracy, cost.uncounted_ops)
