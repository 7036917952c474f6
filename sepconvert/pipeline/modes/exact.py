"""Mode exact: analyse each kernel, plan, rewrite the model, and verify it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from sepconvert.base.modules import submodule
from sepconvert.base.options.values import Selection
from sepconvert.base.progress import Phase, Progress, Stage, begin, silent, stage
from sepconvert.factorize.exact.analysis import Analysis, Spectrum, analyse
from sepconvert.factorize.exact.factors import Factorization
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.measure.verification.layer import LayerCheck, check_layer
from sepconvert.measure.verification.outputs import OutputCheck, Reference, compare_with, reference
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.obstacles import Obstacles
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.tensors import Inputs
from sepconvert.network.trace import ConvSite, TracedModel
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import Original
from sepconvert.planning.conversion import Conversion, LayerReport
from sepconvert.planning.plan import LayerPlan, plan_layer
from sepconvert.planning.timing.pairs import not_faster


def convert_exactly(original: Original, job: Job) -> Conversion:
    """Replace every selected convolution that has an exact structure and passes the gate.

    The result is verified in PyTorch, and holds the checks, whether they passed or not.
    """
    model, inputs, sites = original.model, original.inputs, original.sites
    begin(Phase.ANALYSIS)
    analyses = analyse_model(sites, job.tol, job.selection, job.progress)
    layers, factorizations = plan_model(original.traced, analyses, job, original.form)
    by_name = {site.name: site for site in sites}
    replacements = {name: replacement(each, by_name[name]) for name, each in factorizations.items()}
    converted = rewrite(original.traced, replacements)
    certificates = {name: each.certificate for name, each in factorizations.items()}
    tolerances = {name: certificate.channel_tolerance for name, certificate in certificates.items()}
    checks, expected, torch_check = verify_model(
        model, converted, inputs, sites, tolerances, job.seed, job.progress
    )
    reports = tuple(
        LayerReport(
            layer,
            site,
            analyses.get(site.name),
            certificates.get(site.name),
            checks.get(site.name),
            spectrum=_spectrum(layer, analyses.get(site.name)),
        )
        for layer, site in zip(layers, sites, strict=True)
    )
    return Conversion(converted, tuple(layers), replacements, reports, (expected, None), torch_check, checks)


def analyse_model(
    sites: Sequence[ConvSite], tol: float | None, selection: Selection, progress: Progress
) -> dict[str, Analysis]:
    """Return the analysis of each kernel that may be replaced, by layer."""
    eligible = [
        site
        for site in sites
        if site.conv is not None and site.obstacle is None and selection.admits(*site.names)
    ]
    with _one_thread_each() as pool:
        pending = [pool.submit(_analysed, site, tol) for site in eligible]
        return {
            site.name: analysis.result()
            for site, analysis in zip(progress(eligible, "analysing kernels"), pending, strict=True)
        }


@torch.no_grad()
def _analysed(site: ConvSite, tol: float | None) -> Analysis:
    dense = site.dense
    return analyse(dense.spec, dense.weight, site.sizes, tol)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yield as many threads as torch has, each of which computes alone.

    Decompositions gain little from a second thread, and lose much where one thread has to wait for another
    on a busy machine. Two eigenvalue problems of size 1536 at once took 0.57 of the time of one after the
    other.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "analysis", partial(torch.set_num_threads, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def plan_model(
    traced: TracedModel, analyses: Mapping[str, Analysis], job: Job, form: Int8Form | None = None
) -> tuple[list[LayerPlan], dict[str, Factorization]]:
    """Decide on every convolution, and factorize those to replace.

    Args:
        traced: the model, left as it is, and all its convolutions.
        analyses: from `analyse_model`.
        job: gate, tolerance, seed, and how layers are timed under the gate "latency".
        form: in which they are timed; None for floating point.

    Returns:
        A decision for each convolution, and the factors by layer.
    """
    layers: list[LayerPlan] = []
    factorizations: dict[str, Factorization] = {}
    obstacles = Obstacles(traced)
    for site in job.progress(traced.sites, "planning"):

        def is_slower(factorization: Factorization, site: ConvSite = site) -> str | None:
            factors, timing = replacement(factorization, site), job.timing
            return not_faster(site, factors, timing.runs, timing.runtime, job.seed, form)

        layer, factorization = plan_layer(
            site, analyses.get(site.name), partial(obstacles.of, site), job.gate, job.tol, is_slower
        )
        layers.append(layer)
        if factorization is not None:
            factorizations[site.name] = factorization
    return layers, factorizations


def _spectrum(layer: LayerPlan, analysis: Analysis | None) -> Spectrum | None:
    """Return a layer's spectrum in the structure that it was given, or in the one that nearly holds."""
    findings = [each for each in analysis.findings if each.spectrum] if analysis else []
    if not findings:
        return None
    if layer.decision == "converted":
        own = [each for each in findings if each.scheme == layer.scheme]
        return Spectrum(own[0].scheme, own[0].spectrum, layer.rank) if own else None
    nearest = min(findings, key=lambda each: each.best_error)
    return Spectrum(nearest.scheme, nearest.spectrum, max(nearest.paying_rank, 1))


def replacement(factorization: Factorization, site: ConvSite) -> Replacement:
    """Return the factors of a layer, and the dense layer's bias."""
    bias = None if site.conv is None else site.conv.bias
    return Replacement(
        factorization.scheme, factorization.rank, factorization.border, factorization.weights, bias
    )


@stage(Stage.VERIFICATION)
def verify_model(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
    progress: Progress = silent,
) -> tuple[dict[str, LayerCheck], Reference, OutputCheck]:
    """Check every replaced layer on the input that it had, and the whole model on given and random inputs.

    Args:
        model: the original.
        converted: its conversion; both are compared in float64.
        inputs: positional arguments of the forward.
        sites: the original's convolutions.
        tolerances: relative error that each replaced kernel may have, by layer.
        seed: of the random inputs.
        progress: shows the progress.

    Returns:
        The check of each replaced layer, the original's outputs, and the comparison with them.
    """
    checks: dict[str, LayerCheck] = {}
    for site in progress([site for site in sites if site.name in tolerances], "verifying layers"):
        layer = submodule(converted, site.name)
        if site.conv is not None and isinstance(layer, FactorizedConv2d):
            checks[site.name] = check_layer(site.conv, layer, tolerances[site.name])
    expected = reference(model, inputs, sites, tolerances, seed)
    return checks, expected, compare_with(expected, converted)
