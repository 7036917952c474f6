"""Errors that a fit has once its factors, and the values between them, are rounded to int8.

Factors have one scale for each output channel, symmetric: weights are rounded to multiples of the largest
magnitude over `levels`. A value between two factors has one scale, and its channels are equalized first
(`sepconvert.files.onnx.int8.equalize`), so that each of them, of standard deviation σ, spans the same range
of 2 · `_PEAK` σ in 255 steps Δ. Rounding adds a variance of Δ²/12 to it, independent in each channel and
place: to the output, that times the energy of the layer with its contributions of random sign.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sepconvert.factorize.approximate.problem import Approximation, Problem
from sepconvert.factorize.approximate.weighted import flatten_by_group
from sepconvert.factorize.structures import FORMS

_PEAK = 6.0  # largest magnitude between two factors, in standard deviations


_STEPS = 255


def rounded(weight: Tensor, levels: int) -> Tensor:
    """Return a kernel O × C/g × kh × kw with each output channel rounded to `levels` steps on either side."""
    weight = weight.double()
    step = weight.abs().amax((1, 2, 3), keepdim=True) / levels
    return torch.where(step > 0, (weight / step).round() * step, weight)


def with_rounding(problem: Problem, fitted: Approximation, levels: int) -> Approximation:
    """Return a fit with the output errors that it has in int8.

    Args:
        problem: the layer.
        fitted: with its kernel.
        levels: steps of a weight on either side of 0: 127, or 64 in a reduced range.
    """
    spec, moments = problem.spec, problem.moments
    compose = FORMS[fitted.scheme].compose
    moved = fitted.kernel - compose(spec, *(rounded(weight, levels) for weight in fitted.weights))
    generator = torch.Generator().manual_seed(0)
    first, *others = fitted.weights
    signs = [
        weight * (2.0 * torch.randint(2, weight.shape, generator=generator, dtype=torch.float64) - 1)
        for weight in others
    ]
    scattered = compose(spec, first, *signs)
    noise = len(others) * (2 * _PEAK / _STEPS) ** 2 / 12

    def energy(kernel: Tensor, importance: Tensor | None) -> float:
        flat = flatten_by_group(spec, kernel)
        weighted = flat if importance is None else importance @ flat
        return float((weighted * (flat @ moments.covariance)).sum())

    def added(importance: Tensor | None) -> float:
        return energy(moved, importance) + noise * energy(scattered, importance)

    return replace(
        fitted,
        output_error=(fitted.output_error**2 + added(None) / (moments.power or 1.0)) ** 0.5,
        weighted_error=None
        if fitted.weighted_error is None
        else fitted.weighted_error + added(problem.importance),
    )
