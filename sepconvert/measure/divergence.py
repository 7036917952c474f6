"""Distances of the outputs of one model from those of another."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.network.tensors import InputBatch, tensor_leaves


def divergence(expected: Sequence[Tensor], actual: Sequence[Tensor], temperature: float = 1) -> Tensor:
    """Return the divergence of `actual` from `expected`, the outputs for one batch; 0 means equal.

    Both are floating-point tensors with the batch in dimension 0, as `outputs` returns them. The outputs
    decide which of two divergences it is:

    - Kullback-Leibler divergence of logits at a temperature, in nats at T = 1, for a single tensor that
      `is_logits`: `T² KL(softmax(expected / T) ‖ softmax(actual / T))` over dimension 1, a mean over samples
      and positions (Hinton et al., arXiv:1503.02531).
    - Relative squared error, without a unit, for anything else (regression, pictures, several tensors):
      `relative_error`, a mean over the tensors, independent of the temperature. 1 is the error of a model
      that always returns the mean.

    The result is a 0-d tensor, differentiable and computed in float32 at least. Raises `SepconvertError` if
    the tensors differ in number or shape, or there are none.
    """
    shapes, others = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in actual]
    if shapes != others or not shapes:
        raise SepconvertError(
            f"outputs: expected floating-point tensors of the shapes {shapes}, as the original's, got"
            f" {others}; compare a model with its own conversion"
        )
    if len(expected) == 1 and is_logits(expected[0]):
        wanted, given = ((_precise(t) / temperature).log_softmax(1) for t in (expected[0], actual[0]))
        terms = F.kl_div(given, wanted, reduction="none", log_target=True)
        return temperature**2 * terms.sum(1).mean()
    return torch.stack([relative_error(e, a) for e, a in zip(expected, actual, strict=True)]).mean()


def is_logits(output: Tensor) -> bool:
    """Return whether a model's only output is taken for logits over dimension 1.

    N×K with K ≥ 2 is, and so is N×K×H×W, except with 1 or 3 channels: that is a picture.
    """
    classes = output.shape[1] if output.ndim > 1 else 0
    return (output.ndim == 2 and classes >= 2) or (output.ndim == 4 and classes not in (0, 1, 3))


def relative_error(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the mean squared difference over the variance of `expected`, which counts as 1 if it is 0."""
    wanted, given = _precise(expected), _precise(actual)
    variance = wanted.var(correction=0)
    return (given - wanted).square().mean() / torch.where(variance > 0, variance, 1)


def outputs(model: nn.Module, samples: InputBatch) -> list[Tensor]:
    """Return the floating-point tensors among the outputs of `model` for some samples.

    Raises `SepconvertError` if it cannot run on them.
    """
    try:
        returned = samples.run(model)
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join(map(str, samples.shapes))
        raise SepconvertError(
            f"data: expected inputs that the model takes, got shape {shapes}, on which it fails with"
            f" {type(error).__name__}: {first_line(error)}; check the size and the channels of the data"
        ) from error
    return [leaf for leaf in tensor_leaves(returned) if leaf.is_floating_point()]


def _precise(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True)
class OutputDifference:
    """Difference of one output b from the base's output a, over all samples.

    `max_abs` and `mean_abs` are those of |b − a|, `relative` is ‖b − a‖ / ‖a‖ and `cosine` is a·b / (‖a‖
    ‖b‖), over all elements as one vector; `snr_db` is 10 log₁₀(‖a‖² / ‖b − a‖²), None for equal outputs.
    `agreement` is the share of samples whose largest element is the same one, for outputs N×K with K ≥ 2.
    What is not defined, or not finite, is None.
    """

    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    snr_db: float | None
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return an entry of `outputs` in the JSON of a comparison."""
        return asdict(self)


class OutputComparison:
    """Sums over the batches of one output, in float64."""

    def __init__(self) -> None:
        self._largest = self._absolute = 0.0
        self._error = self._base = self._other = self._product = 0.0
        self._elements = self._samples = self._equal = 0
        self._ranked = True

    def add(self, base: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
        """Add a batch of both, in the same shape."""
        a, b = base.astype(np.float64), other.astype(np.float64)
        # NaN and Inf in either are an infinite difference, not a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(a == b, 0.0, np.abs(b - a))
            finite = np.isfinite(difference).all()
            self._largest = max(self._largest, float(difference.max(initial=0)) if finite else math.inf)
            self._absolute += float(difference.sum())
            self._error += float(np.square(difference).sum())
            self._base += float(np.square(a).sum())
            self._other += float(np.square(b).sum())
            self._product += float((a * b).sum())
        self._elements += a.size
        self._ranked &= a.ndim == 2 and a.shape[1] > 1
        if self._ranked:
            self._samples += len(a)
            self._equal += int((a.argmax(1) == b.argmax(1)).sum())

    def result(self) -> OutputDifference:
        """Return the difference over all batches that were added."""
        norms = math.sqrt(self._base) * math.sqrt(self._other)
        return OutputDifference(
            max_abs=_finite(self._largest),
            mean_abs=_finite(self._absolute / self._elements) if self._elements else None,
            relative=_finite(math.sqrt(self._error / self._base)) if self._base else None,
            cosine=_finite(self._product / norms) if norms else None,
            snr_db=10 * (math.log10(self._base) - math.log10(self._error))
            if all(0 < power < math.inf for power in (self._base, self._error))
            else None,
            agreement=self._equal / self._samples if self._ranked and self._samples else None,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
