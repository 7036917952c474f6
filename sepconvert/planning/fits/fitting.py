"""Fits of single layers to moments of the calibration images, or to their weights."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from sepconvert.base.progress import Progress, Stage, stage
from sepconvert.calibration.evidence import Evidence
from sepconvert.calibration.stream import calibrate
from sepconvert.factorize.approximate.problem import Approximation, Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.border import Border
from sepconvert.factorize.structures import FORMS
from sepconvert.network.calls import Kernel
from sepconvert.network.rewrite import Replacement
from sepconvert.network.trace import ConvSite


def fit_problem(site: ConvSite, moments: Moments, evidence: Evidence | None) -> Problem:
    """Return the fit of a layer to some moments, its outputs weighted by their importance where known."""
    importance = None if evidence is None else evidence.importance.get(site.name)
    return Problem(site.dense.spec, site.dense.weight, moments, importance)


def for_each_layer(
    model: nn.Module,
    sites: Sequence[ConvSite],
    evidence: Evidence | None,
    fit: Callable[[ConvSite, Moments], Kernel | None],
    progress: Progress,
    description: str,
    known: Mapping[str, Kernel] | None = None,
) -> None:
    """Call `fit` with every layer and the moments that it is to be fitted to.

    With calibration images these are moments of the layer's inputs, presented in the order of execution; each
    kernel that `fit` returns stands in the model while the layers behind it are looked at. Layers with a
    `known` kernel are not fitted again. Without images, the moments are those that make it a fit of the
    weights.

    Raises:
        SepconvertError: the model cannot run on the images, or too few of them are there for all processes.
    """
    everyone = [site for site in sites if site.conv is not None]
    layers = [site for site in everyone if not known or site.name not in known]
    if evidence is None:
        for site in progress(layers, description):
            fit(site, Moments.of_weights(site.dense.spec, site.dense.weight))
        return
    share, memory = evidence.calibration.share(model), evidence.calibration.memory
    stream = calibrate(model, share, everyone, evidence.recorded, known, memory)
    kernel: Kernel | None = None
    for _ in progress(layers, description):
        try:
            with stage(Stage.MOMENTS):
                site, moments = stream.send(kernel)
        except StopIteration:  # the images do not reach the layers that are left
            break
        kernel = fit(site, moments)
    stream.close()


def kernel_of(site: ConvSite, fitted: Approximation) -> Kernel:
    """Return the dense kernel that the factors of a layer amount to, and its bias, in float64."""
    weights = (weight.double() for weight in fitted.weights)
    return FORMS[fitted.scheme].compose(site.dense.spec, *weights), bias_of(site, fitted)


def bias_of(site: ConvSite, fitted: Approximation) -> Tensor:
    """Return the bias that goes with the factors of a layer, in float64."""
    return fitted.bias_shift if site.dense.bias is None else site.dense.bias.double() + fitted.bias_shift


def replacement(site: ConvSite, fitted: Approximation) -> Replacement:
    """Return the factors of a layer and its new bias, both in the layer's dtype."""
    dtype = site.dense.weight.dtype
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return Replacement(fitted.scheme, fitted.rank, Border(), weights, bias_of(site, fitted).to(dtype))
