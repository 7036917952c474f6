"""The conversion, stage by stage: trace → analyse → plan → rewrite → verify → export → measure → report."""

import contextlib
import functools
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from sepconvert.environment import available_cores
from sepconvert.errors import DemandNotMetError, SepconvertError, first_line
from sepconvert.export import (
    ExportNote,
    cast,
    model_dtype,
    onnx_bytes,
    onnx_feed,
    runtime_dtype,
    save_archive,
    save_onnx,
    writing,
)
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import ZERO_BORDER, Analysis, Factorization, analyse, split
from sepconvert.layers import FactorizedConv2d
from sepconvert.measure.accuracy import Predictions, evaluate
from sepconvert.measure.accuracy import compare as compare_predictions
from sepconvert.measure.cost import count
from sepconvert.measure.latency import Latency, Speedup, measure_pair, session
from sepconvert.plan import GATES, ConversionPlan, LayerPlan, plan_layer, selected
from sepconvert.profiling import Profile, as_inputs, batch_size
from sepconvert.report.document import LayerReport, Report, Verification, report_document
from sepconvert.rewrite import Replacement, graph_obstacle, rewrite
from sepconvert.trace import ConvSite, Inputs, private_copy, trace
from sepconvert.verify import (
    Comparison,
    LayerCheck,
    Outputs,
    Reference,
    check_layer,
    compare_runs,
    compare_with,
    reference,
)

T = TypeVar("T")


class Progress(Protocol):
    """Wraps a loop whose progress may be shown."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]:
        """Yield the items."""
        ...


def _silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    return items


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion returns.

    `model` is a converted copy, `plan` and `report` are plain JSON-able dictionaries (see
    `sepconvert.plan.SCHEMA` and `sepconvert.report.document.SCHEMA`).
    """

    model: nn.Module
    plan: dict[str, Any]
    report: dict[str, Any]


@dataclass(frozen=True)
class Analysed:
    """A model's convolutions, and what is known of each kernel."""

    sites: tuple[ConvSite, ...]
    analyses: dict[str, Analysis]


def inspect(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    gate: str = "macs",
    tol: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Which convolutions separate, how exactly, and why not: `{"layers": […]}`, nothing converted.

    Arguments as those of `convert`. Each layer holds, for every structure, its rank, the best relative
    error at a rank that would pay, and the singular values around the cut.
    """
    private = private_copy(model)
    analysed = _analyse(private, as_inputs(example_inputs), tol, include, exclude, progress)
    layers, factorizations = _plan(private, analysed, gate, tol, 30, available_cores(), 0, progress)
    reports = [
        LayerReport(
            layer,
            site,
            analysed.analyses.get(site.name),
            factorizations[site.name].certificate if site.name in factorizations else None,
        )
        for layer, site in zip(layers, analysed.sites, strict=True)
    ]
    return {"layers": [report.to_json() for report in reports]}


def convert(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    mode: str = "exact",
    *,
    gate: str = "macs",
    tol: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    dynamic_batch: bool = True,
    runs: int = 50,
    threads: int | None = None,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    out: Path | None = None,
    progress: Progress = _silent,
) -> ConversionResult:
    """Replace every convolution that has an exact structure and passes the gate, and prove it.

    Args:
        model: any module; it is left as it is.
        example_inputs: N × C × H × W tensor, or a tuple of positional arguments. They are run, verified on
            and timed; MACs are counted for one sample.
        mode: "exact".
        gate: "macs" converts what has fewer MACs, "latency" what is measured to be faster in ONNX
            Runtime, "none" all that has a structure.
        tol: relative error of a kernel that counts as exact; by default what rounding to the dtype in
            which it is stored explains.
        include, exclude: globs of layer names.
        data: labelled batches (x, y), on which accuracy is reported; read once for each model.
        dynamic_batch: export with a dynamic batch dimension where the model allows it.
        runs: timed runs of each model; 0 to measure no latency.
        threads: of the runtime; all cores if None.
        seed: of random inputs and of the order of runs.
        source: `{"path": …, "sha256": …}` of the model file, for the report.
        out: an existing empty directory to leave all files in; by default they are temporary.
        progress: shows the progress of loops.

    Raises:
        SepconvertError: bad arguments, or a model that cannot be run or exported.
        DemandNotMetError: the converted model is not the original; the message names the layer.
    """
    if mode != "exact":
        raise SepconvertError(f"mode: expected 'exact', got {mode!r}")
    if gate not in GATES:
        raise SepconvertError(f"gate: expected one of {', '.join(GATES)}, got {gate!r}")
    inputs, threads = as_inputs(example_inputs), threads or available_cores()
    private = private_copy(model)
    analysed = _analyse(private, inputs, tol, include, exclude, progress)
    # Before the long work, as this is where data that do not suit the model are found out.
    predictions = None if data is None else _predict("original", private, data, progress)
    layers, factorizations = _plan(private, analysed, gate, tol, runs, threads, seed, progress)
    del private
    replacements = {name: _replacement(f, analysed.sites, name) for name, f in factorizations.items()}
    converted = rewrite(model, analysed.sites, replacements)
    certificates = {name: factorization.certificate for name, factorization in factorizations.items()}
    tolerances = {name: certificate.channel_tolerance for name, certificate in certificates.items()}
    checks, expected, torch_check = verify_model(
        model, converted, inputs, analysed.sites, tolerances, seed, progress
    )
    plan = ConversionPlan(
        mode=mode, gate=gate, tol=tol, seed=seed,
        model_sha256=None if source is None else source["sha256"],
        weights_sha256=None,
        input_shapes=tuple(tuple(value.shape) for value in inputs if isinstance(value, Tensor)),
        layers=tuple(layers),
    )  # fmt: skip
    with _folder(out) as folder:
        note = write_models(model, converted, inputs, folder, dynamic_batch, progress)
        paths = folder / "original.onnx", folder / "converted.onnx"
        onnx_check, onnx_reason = check_onnx(model, expected, paths, threads)
        verification = Verification(torch_check, onnx_check, onnx_reason, checks)
        _demand(verification)
        latencies = (
            _latencies(model, paths, inputs, runs, threads, seed, progress) if onnx_check and runs else None
        )
        sizes = [path.stat().st_size for path in paths]
        converted_predictions = (
            None if data is None else _predict("converted", private_copy(converted), data, progress)
        )
        before = _profile(model, inputs, predictions, latencies and latencies[0], sizes[0])
        after = _profile(converted, inputs, converted_predictions, latencies and latencies[1], sizes[1])
        layer_speed = (
            _time_layers(analysed.sites, factorizations, runs, threads, seed, progress) if latencies else {}
        )
        reports = tuple(
            LayerReport(
                layer,
                site,
                analysed.analyses.get(site.name),
                certificates.get(site.name),
                checks.get(site.name),
                layer_speed.get(site.name),
            )
            for layer, site in zip(layers, analysed.sites, strict=True)
        )
        report = Report(
            mode=mode,
            source=source,
            threads=threads,
            seed=seed,
            dtype=str(model_dtype(model)).removeprefix("torch."),
            original=before,
            converted=after,
            speedup=latencies[2] if latencies else None,
            accuracy=compare_predictions(predictions, converted_predictions)
            if predictions and converted_predictions
            else None,
            layers=reports,
            verification=verification,
            export=note,
        )
    return ConversionResult(converted, plan.to_json(), report_document(report))


def apply_plan(
    model: nn.Module,
    plan: ConversionPlan,
    weights: Path,
    out: Path,
    *,
    model_sha256: str | None,
    dynamic_batch: bool = True,
    progress: Progress = _silent,
) -> dict[str, Any] | None:
    """Replay a plan and its weights on a fresh model, and write the converted one to `out`.

    Returns:
        The comparison of outputs, if `model` comes from the very file that the plan was made of;
        else None: weights are the plan's, and there is nothing to compare with.

    Raises:
        SepconvertError: plan, weights and model do not belong together.
        DemandNotMetError: the outputs differ from the original's.
    """
    inputs = cast(
        tuple(
            torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed))
            for shape in plan.input_shapes
        ),
        model_dtype(model),
    )
    sites = trace(private_copy(model), inputs)
    by_name = {site.name: site for site in sites}
    for layer in plan.converted:
        site = by_name.get(layer.name)
        if site is None or site.conv is None or site.conv.spec != layer.spec:
            found = (
                "none of that name"
                if site is None
                else site.obstacle
                if site.conv is None
                else site.conv.spec
            )
            raise SepconvertError(
                f"plan: expected a convolution {layer.name}, {layer.spec}; the model has {found}"
            )
    replacements = {layer.name: _planned_replacement(layer, by_name[layer.name]) for layer in plan.converted}
    converted = rewrite(model, sites, replacements)
    _load_weights(converted, weights, plan.weights_sha256)
    verified = None
    if plan.model_sha256 is not None and plan.model_sha256 == model_sha256:
        tolerances = {layer.name: layer.tolerance for layer in plan.converted if layer.tolerance is not None}
        checks, _, comparison = verify_model(model, converted, inputs, sites, tolerances, plan.seed, progress)
        _demand(Verification(comparison, None, None, checks))
        verified = asdict(comparison)
    save_onnx(converted, inputs, out / "converted.onnx", dynamic_batch=dynamic_batch)
    save_archive(converted, inputs, out / "converted.pt2", dynamic_batch=dynamic_batch)
    return verified


def _analyse(
    model: nn.Module,
    inputs: Inputs,
    tol: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress,
) -> Analysed:
    if tol is not None and not 0 <= tol < 1:
        raise SepconvertError(f"tol: expected a relative error in [0, 1), got {tol}")
    sites = trace(model, inputs)
    for pattern in (*include, *exclude):
        if not any(selected(site.name, [pattern], ()) for site in sites):
            raise SepconvertError(f"{pattern}: matches none of the {len(sites)} convolutions; see inspect")
    eligible = [site for site in sites if site.obstacle is None and selected(site.name, include, exclude)]
    analyses = {
        site.name: analyse(site.conv.spec, site.conv.weight, site.sizes, tol)
        for site in progress(eligible, "analysing kernels")
        if site.conv is not None
    }
    return Analysed(sites, analyses)


def _plan(
    model: nn.Module,
    analysed: Analysed,
    gate: str,
    tol: float | None,
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> tuple[list[LayerPlan], dict[str, Factorization]]:
    layers: list[LayerPlan] = []
    factorizations: dict[str, Factorization] = {}
    # Tracing a forward is slow, and asked for by each of its convolutions.
    obstacle = functools.cache(partial(graph_obstacle, model, analysed.sites))
    for site in progress(analysed.sites, "planning"):
        layer, factorization = plan_layer(
            site,
            analysed.analyses.get(site.name),
            partial(obstacle, site.owner),
            gate,
            tol,
            partial(_not_faster, site, runs, threads, seed),
        )
        layers.append(layer)
        if factorization is not None:
            factorizations[site.name] = factorization
    return layers, factorizations


def _planned_replacement(layer: LayerPlan, site: ConvSite) -> Replacement:
    """Factors of the planned shapes, to be filled from the plan's weights."""
    assert layer.scheme is not None  # noqa: S101  (`read_plan` checked it)
    assert layer.rank is not None  # noqa: S101
    assert site.conv is not None  # noqa: S101  (`apply_plan` compared it)
    specs = split(site.conv.spec, layer.scheme, layer.rank, layer.border)
    empty = tuple(site.conv.weight.new_zeros(spec.weight_shape) for spec in specs)
    return Replacement(layer.scheme, layer.rank, layer.border, empty, site.conv.bias)


def _load_weights(model: nn.Module, path: Path, sha256: str | None) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SepconvertError(
            f"{path}: cannot be read: {error.strerror}; it belongs beside the plan"
        ) from error
    if found != sha256:
        raise SepconvertError(
            f"{path}: is not the file that the plan was written with; use the files of one conversion"
        )
    try:
        load_model(model, path)
    except Exception as error:  # safetensors' own error, or that of load_state_dict
        raise SepconvertError(
            f"{path}: does not fit the model: {first_line(error)}; use the plan's model"
        ) from error


def _replacement(factorization: Factorization, sites: Sequence[ConvSite], name: str) -> Replacement:
    bias = next(site.conv.bias for site in sites if site.name == name and site.conv is not None)
    return Replacement(
        factorization.scheme, factorization.rank, factorization.border, factorization.weights, bias
    )


def verify_model(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
    progress: Progress = _silent,
) -> tuple[dict[str, LayerCheck], Reference, Comparison]:
    """Every replaced layer on the input it had, and the whole model in float64 on given and random inputs.

    `tolerances` hold the relative error that each replaced kernel may have.
    """
    checks: dict[str, LayerCheck] = {}
    for site in progress([site for site in sites if site.name in tolerances], "verifying layers"):
        layer = converted.get_submodule(site.name)
        if site.conv is not None and isinstance(layer, FactorizedConv2d):
            checks[site.name] = check_layer(site.conv, layer, tolerances[site.name])
    expected = reference(model, inputs, sites, tolerances, seed)
    return checks, expected, compare_with(expected, converted)


def write_models(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    folder: Path,
    dynamic_batch: bool,
    progress: Progress,
) -> ExportNote:
    """`original.onnx`, `converted.onnx`, `converted.pt2` and `converted.safetensors`."""
    notes = [
        save_onnx(each, inputs, folder / f"{name}.onnx", dynamic_batch=dynamic_batch)
        for name, each in progress((("original", model), ("converted", converted)), "exporting")
    ]
    save_archive(converted, inputs, folder / "converted.pt2", dynamic_batch=dynamic_batch)
    weights = folder / "converted.safetensors"
    with writing(weights):
        save_model(converted, str(weights))
    return notes[-1]


def check_onnx(
    model: nn.Module, expected: Reference, paths: tuple[Path, Path], threads: int
) -> tuple[Comparison | None, str | None]:
    """Both ONNX files in the runtime on the inputs of `expected`; or None and why it cannot run them.

    Raises:
        DemandNotMetError: the original's file computes something else than the original.
    """
    dtype = runtime_dtype(model)
    try:
        original, converted = (_run_onnx(path, expected.inputs, dtype, threads) for path in paths)
    except SepconvertError as error:
        return None, str(error)
    export, runs = compare_runs(expected, original, converted, dtype)
    if not export.holds:
        raise DemandNotMetError(
            f"verification failed: original.onnx is off the PyTorch model by {export.max_abs_diff:.3g}, "
            f"tolerance {export.tolerance:.3g}; torch's exporter does not translate this model rightly"
        )
    return runs, None


def _run_onnx(path: Path, inputs: Sequence[Inputs], dtype: torch.dtype, threads: int) -> list[Outputs]:
    runner = session(path, threads)
    results = []
    for value in inputs:
        try:
            arrays = runner.run(None, onnx_feed(cast(value, dtype)))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise SepconvertError(f"{path.name}: ONNX Runtime cannot run it: {error}") from error
        results.append([torch.from_numpy(np.asarray(array)).double() for array in arrays])
    return results


def _demand(verification: Verification) -> None:
    if verification.holds:
        return
    culprit = verification.worst_layer
    raise DemandNotMetError(
        f"verification failed: {verification.failure}; the layer that moved most: {culprit or 'none'}; "
        f"leave it out with --exclude{f' {culprit}' if culprit else ''}, or report this as a defect"
    )


def _latencies(
    model: nn.Module,
    paths: tuple[Path, Path],
    inputs: Inputs,
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> tuple[Latency, Latency, Speedup]:
    feed = onnx_feed(cast(inputs, runtime_dtype(model)))
    return measure_pair(
        *paths, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed,
        progress=lambda items: progress(items, "timing"),
    )  # fmt: skip


def _predict(
    name: str, model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], progress: Progress
) -> Predictions:
    return evaluate(model, data, lambda batches: progress(batches, f"accuracy, {name}"))


def _profile(
    model: nn.Module, inputs: Inputs, predictions: Predictions | None, latency: Latency | None, size: int
) -> Profile:
    cost = count(private_copy(model), inputs)
    accuracy = None if predictions is None else predictions.accuracy()
    return Profile(cost.params, cost.macs, size, latency, accuracy, cost.uncounted_ops)


def _time_layers(
    sites: Sequence[ConvSite],
    factorizations: Mapping[str, Factorization],
    runs: int,
    threads: int,
    seed: int,
    progress: Progress,
) -> dict[str, tuple[Latency, Latency, Speedup]]:
    """Dense layer against factors for each converted one; layers of the same shape share one measurement."""
    measured: dict[Any, tuple[Latency, Latency, Speedup]] = {}
    latencies = {}
    converted = [site for site in sites if site.name in factorizations]
    for site in progress(converted, "timing layers"):
        assert site.conv is not None  # noqa: S101  (only such sites are converted)
        factorization = factorizations[site.name]
        shape = (site.conv.spec, site.conv.inputs.shape, factorization.specs)
        if shape not in measured:
            measured[shape] = _layer_latencies(site, factorization, runs, threads, seed)
        latencies[site.name] = measured[shape]
    return latencies


def _layer_latencies(
    site: ConvSite, factorization: Factorization, runs: int, threads: int, seed: int
) -> tuple[Latency, Latency, Speedup]:
    """The dense layer and its factors, each alone in the runtime, on the input it has in the model."""
    conv = site.conv
    assert conv is not None  # noqa: S101  (only such sites are planned)
    dense = FactorizedConv2d(conv.spec, ZERO_BORDER, 0, Border())
    dense.set_factors([conv.weight], conv.bias)
    factored = FactorizedConv2d(conv.spec, factorization.scheme, factorization.rank, factorization.border)
    factored.set_factors(factorization.weights, conv.bias)
    inputs = cast((conv.inputs,), torch.float32)
    before, after = (onnx_bytes(module.float().eval(), inputs) for module in (dense, factored))
    feed = onnx_feed(inputs)
    return measure_pair(before, after, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed)


def _not_faster(
    site: ConvSite, runs: int, threads: int, seed: int, factorization: Factorization
) -> str | None:
    _, _, speedup = _layer_latencies(site, factorization, max(runs, 1), threads, seed)
    if speedup.significant and speedup.median > 1:
        return None
    return f"is measured {speedup.median:.2f}× as fast [{speedup.ci95.lo:.2f}, {speedup.ci95.hi:.2f}]"


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
