"""Fits of single layers to the moments that calibration presents."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from sepconvert.base.progress import Progress
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
    """Let `fit` see every layer with its moments: of data in the order of execution, or else of weights.

    Those with a `known` kernel are not seen.
    """
    everyone = [site for site in sites if site.conv is not None]
    layers = [site for site in everyone if not known or site.name not in known]
    if evidence is None:
        for site in progress(layers, description):
            if site.conv is not None:
                fit(site, Moments.of_weights(site.conv.spec, site.conv.weight))
        return
    share, memory = evidence.calibration.share(model), evidence.calibration.memory
    stream = calibrate(model, share, everyone, evidence.recorded, known, memory)
    kernel: Kernel | None = None
    for _ in progress(layers, description):
        try:
            site, moments = stream.send(kernel)
        except StopIteration:  # a branch that the images do not take
            break
        kernel = fit(site, moments)
    stream.close()


def kernel_of(site: ConvSite, fitted: Approximation) -> Kernel:
    weights = (weight.double() for weight in fitted.weights)
    return FORMS[fitted.scheme].compose(site.dense.spec, *weights), bias_of(site, fitted)


def bias_of(site: ConvSite, fitted: Approximation) -> Tensor:
    return fitted.bias_shift if site.dense.bias is None else site.dense.bias.double() + fitted.bias_shift


def replacement(site: ConvSite, fitted: Approximation) -> Replacement:
    """The factors in the dtype of the layer, and its new bias."""
    dtype = site.dense.weight.dtype
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return Replacement(fitted.scheme, fitted.rank, Border(), weights, bias_of(site, fitted).to(dtype))
