"""The conversion, stage by stage: trace → analyse → plan → rewrite → verify → export → measure → report."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from sepconvert.environment import available_cores
from sepconvert.errors import DemandNotMetError, SepconvertError
from sepconvert.export import (
    ExportNote,
    cast,
    model_dtype,
    onnx_bytes,
    runtime_dtype,
    save_archive,
    save_onnx,
    writing,
)
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact import ZERO_BORDER, Analysis, Certificate, Factorization, analyse
from sepconvert.layers import FactorizedConv2d
from sepconvert.measure.accuracy import AccuracyDelta, Predictions, evaluate
from sepconvert.measure.accuracy import compare as compare_predictions
from sepconvert.measure.cost import count
from sepconvert.measure.latency import Latency, Speedup, measure_pair, session
from sepconvert.plan import GATES, ConversionPlan, LayerPlan, plan_layer, selected
from sepconvert.profiling import Profile, as_inputs, batch_size, feeds
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
    random_like,
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
    layers = [
        LayerReport(plan_layer(site, analysed.analyses.get(site.name), partial(graph_obstacle, private, site), "macs",
                               tol, lambda _: None)[0], site, analysed.analyses.get(site.name))
        for site in analysed.sites
    ]  # fmt: skip
    return {"layers": [layer.to_json() for layer in layers]}


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
        data: labelled batches (x, y), on which accuracy is reported.
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
    layers, factorizations = _plan(private, analysed, gate, tol, runs, threads, seed, progress)
    del private  # large models come in many copies
    replacements = {name: _replacement(f, analysed.sites, name) for name, f in factorizations.items()}
    converted = rewrite(model, analysed.sites, replacements)
    certificates = {name: factorization.certificate for name, factorization in factorizations.items()}
    checks, expected, torch_check = verify_model(model, converted, inputs, analysed.sites, certificates, seed, progress)
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
        latencies = _latencies(model, paths, inputs, runs, threads, seed, progress) if onnx_check and runs else None
        sizes = [path.stat().st_size for path in paths]
        before, after, accuracy = _profiles(model, converted, inputs, data, latencies, sizes, progress)
        layer_speed = {
            name: _layer_latencies(site, factorizations[name], runs, threads, seed)
            for site in analysed.sites
            if (name := site.name) in factorizations and latencies is not None
        }
        report = Report(
            mode=mode, source=source, threads=threads, seed=seed, dtype=str(model_dtype(model)).removeprefix("torch."),
            original=before, converted=after, speedup=latencies[2] if latencies else None, accuracy=accuracy,
            layers=tuple(
                LayerReport(
                    layer, site, analysed.analyses.get(site.name), certificates.get(site.name), checks.get(site.name),
                    layer_speed.get(site.name),
                )
                for layer, site in zip(layers, analysed.sites, strict=True)
            ),
            verification=verification, export=note,
        )  # fmt: skip
    return ConversionResult(converted, plan.to_json(), report_document(report))


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
    eligible = [site for site in sites if site.obstacle is None and selected(site.name, include, exclude)]
    analyses = {
        site.name: analyse(site.spec, site.weight, site.sizes, tol)
        for site in progress(eligible, "analysing kernels")
        if site.spec is not None and site.weight is not None
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
    for site in progress(analysed.sites, "planning"):
        layer, factorization = plan_layer(
            site,
            analysed.analyses.get(site.name),
            partial(graph_obstacle, model, site),
            gate,
            tol,
            partial(_not_faster, site, runs, threads, seed),
        )
        layers.append(layer)
        if factorization is not None:
            factorizations[site.name] = factorization
    return layers, factorizations


def _replacement(factorization: Factorization, sites: Sequence[ConvSite], name: str) -> Replacement:
    bias = next(site.bias for site in sites if site.name == name)
    return Replacement(factorization.scheme, factorization.rank, factorization.border, factorization.weights, bias)


def verify_model(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    certificates: dict[str, Certificate],
    seed: int,
    progress: Progress = _silent,
) -> tuple[dict[str, LayerCheck], Reference, Comparison]:
    """Every replaced layer on the input it had, and the whole model in float64 on given and random inputs."""
    checks: dict[str, LayerCheck] = {}
    for site in progress([site for site in sites if site.name in certificates], "verifying layers"):
        layer = converted.get_submodule(site.name)
        assert isinstance(layer, FactorizedConv2d)  # noqa: S101  (`rewrite` put it there)
        checks[site.name] = check_layer(site, layer, certificates[site.name])
    tolerances = {name: certificate.channel_tolerance for name, certificate in certificates.items()}
    expected = reference(model, [inputs, random_like(inputs, seed)], sites, tolerances, seed)
    return checks, expected, compare_with(expected, converted)


def write_models(
    model: nn.Module, converted: nn.Module, inputs: Inputs, folder: Path, dynamic_batch: bool, progress: Progress
) -> ExportNote:
    """`original.onnx`, `converted.onnx`, `converted.pt2` and `converted.safetensors`."""
    jobs = {
        "original.onnx": lambda path: save_onnx(model, inputs, path, dynamic_batch=dynamic_batch),
        "converted.onnx": lambda path: save_onnx(converted, inputs, path, dynamic_batch=dynamic_batch),
        "converted.pt2": lambda path: save_archive(converted, inputs, path, dynamic_batch=dynamic_batch),
    }
    notes = {name: jobs[name](folder / name) for name in progress(jobs, "exporting")}
    weights = folder / "converted.safetensors"
    with writing(weights):
        save_model(converted, str(weights))
    return notes["converted.onnx"]


def check_onnx(
    model: nn.Module, expected: Reference, paths: tuple[Path, Path], threads: int
) -> tuple[Comparison | None, str | None]:
    """Both ONNX files in the runtime on the inputs of `expected`; None and the reason if it cannot run them."""
    dtype = runtime_dtype(model)
    try:
        original, converted = (_run_onnx(path, expected.inputs, dtype, threads) for path in paths)
    except SepconvertError as error:
        return None, str(error)
    return compare_runs(expected, original, converted, str(dtype).removeprefix("torch.")), None


def _run_onnx(path: Path, inputs: Sequence[Inputs], dtype: torch.dtype, threads: int) -> list[Outputs]:
    runner = session(path, threads)
    results = []
    for value in inputs:
        try:
            arrays = runner.run(None, feeds(path, cast(value, dtype), threads))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise SepconvertError(f"{path.name}: ONNX Runtime cannot run it: {error}") from error
        tensors = (torch.from_numpy(array) for array in arrays)
        results.append([tensor.double() for tensor in tensors if tensor.is_floating_point()])
    return results


def _demand(verification: Verification) -> None:
    if verification.holds:
        return
    culprit = verification.worst_layer
    raise DemandNotMetError(
        f"verification failed: {verification.failure}; the layer that moved most is {culprit or 'none of the converted'}; "
        f"leave it out with --exclude{f' {culprit}' if culprit else ''}, or report this as a defect"
    )


def _latencies(
    model: nn.Module, paths: tuple[Path, Path], inputs: Inputs, runs: int, threads: int, seed: int, progress: Progress
) -> tuple[Latency, Latency, Speedup]:
    feed = feeds(paths[0], cast(inputs, runtime_dtype(model)), threads)
    return measure_pair(
        *paths, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed,
        progress=lambda items: progress(items, "timing"),
    )  # fmt: skip


def _profiles(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    data: Iterable[tuple[Tensor, Tensor]] | None,
    latencies: tuple[Latency, Latency, Speedup] | None,
    sizes: Sequence[int],
    progress: Progress,
) -> tuple[Profile, Profile, AccuracyDelta | None]:
    profiles: list[Profile] = []
    predictions: list[Predictions] = []
    for index, (name, each) in enumerate((("original", model), ("converted", converted))):
        private = private_copy(each)
        cost = count(private, inputs)
        if data is not None:
            wrap = partial(_described, progress, f"accuracy, {name}")
            predictions.append(evaluate(private, data, wrap))
        latency = None if latencies is None else (latencies[0], latencies[1])[index]
        accuracy = predictions[index].accuracy() if predictions else None
        profiles.append(Profile(cost.params, cost.macs, sizes[index], latency, accuracy, cost.uncounted_ops))
    delta = compare_predictions(*predictions) if predictions else None
    return profiles[0], profiles[1], delta


def _described(progress: Progress, description: str, items: Iterable[Any]) -> Iterable[Any]:
    return progress(items, description)


def _layer_latencies(
    site: ConvSite, factorization: Factorization, runs: int, threads: int, seed: int
) -> tuple[Latency, Latency, Speedup]:
    """The dense layer and its factors, each alone in the runtime, on the input it has in the model."""
    assert site.spec is not None and site.weight is not None and site.inputs is not None  # noqa: S101
    dense = FactorizedConv2d(site.spec, ZERO_BORDER, 0, Border())
    dense.set_factors([site.weight], site.bias)
    factored = FactorizedConv2d(site.spec, factorization.scheme, factorization.rank, factorization.border)
    factored.set_factors(factorization.weights, site.bias)
    inputs = cast((site.inputs,), torch.float32)
    models = [onnx_bytes(module.float().eval(), inputs) for module in (dense, factored)]
    feed = feeds(models[0], inputs, threads)
    return measure_pair(*models, feed, runs=runs, threads=threads, batch=batch_size(inputs), seed=seed)


def _not_faster(site: ConvSite, runs: int, threads: int, seed: int, factorization: Factorization) -> str | None:
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
