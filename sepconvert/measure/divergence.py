"""How far the outputs of one model are from those of another."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.progress import LoopProgress
from sepconvert.network.copies import evaluation_mode
from sepconvert.network.tensors import fresh, placed, tensor_leaves


def divergence(expected: Sequence[Tensor], actual: Sequence[Tensor], temperature: float = 1) -> Tensor:
    """How far `actual` is from `expected`, the outputs of one batch: a mean over samples, differentiable.

    Both are floating-point tensors with the batch in dimension 0, as `outputs` returns them. The rule:

    - One tensor that `is_logits` is compared by `T² KL(softmax(expected / T) ‖ softmax(actual / T))` over
      dimension 1, a mean over samples and positions (Hinton et al., arXiv:1503.02531). At the temperature
      T = 1 that is the Kullback-Leibler divergence in nats.
    - Anything else (regression, pictures, several tensors) by `relative_error`, a mean over the tensors;
      1 means as far off as if the mean had been answered. The temperature has no part in it.

    It is computed in float32 at least. Returns a 0-d tensor. Raises `SepconvertError` if the tensors differ
    in number or shape, or there are none.
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
    """Whether a model's only output is read as logits over dimension 1.

    N×K with K ≥ 2 is, and so is N×K×H×W, except with 1 or 3 channels: that is a picture.
    """
    classes = output.shape[1] if output.ndim > 1 else 0
    return (output.ndim == 2 and classes >= 2) or (output.ndim == 4 and classes not in (0, 1, 3))


def relative_error(expected: Tensor, actual: Tensor) -> Tensor:
    """Mean squared difference over the variance of `expected` (where that is 0: the difference alone)."""
    wanted, given = _precise(expected), _precise(actual)
    variance = wanted.var(correction=0)
    return (given - wanted).square().mean() / torch.where(variance > 0, variance, 1)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The floating-point tensors in what `model` answers to the batch `x`.

    Raises `SepconvertError` if it cannot run on `x`.
    """
    try:
        answer = model(fresh(x))
    except Exception as error:  # whatever the user's forward raises
        raise SepconvertError(
            f"data: expected inputs that the model takes, got shape {tuple(x.shape)}, on which it fails with"
            f" {type(error).__name__}: {first_line(error)}; check the size and the channels of the data"
        ) from error
    return [leaf for leaf in tensor_leaves(answer) if leaf.is_floating_point()]


@torch.no_grad()
def mean_divergence(
    original: nn.Module,
    converted: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    progress: LoopProgress | None = None,
) -> float:
    """`divergence` of `converted` from `original` over a data set, weighted by the sizes of the batches.

    Both run in eval mode, on their own device and dtype; their training flags are restored. `loader` yields
    batches `(x, y)`, of which the labels are not looked at. `progress` wraps it, as `tqdm` does.

    Raises `SepconvertError` if the loader is empty, a model cannot run on a batch, or the outputs do not
    match.
    """
    total, samples = 0.0, 0
    with evaluation_mode(original), evaluation_mode(converted):
        for x, _ in progress(loader) if progress else loader:
            expected = [t.cpu() for t in outputs(original, placed(x, original))]
            actual = [t.cpu() for t in outputs(converted, placed(x, converted))]
            total += len(x) * float(divergence(expected, actual))
            samples += len(x)
    if not samples:
        raise SepconvertError("data: expected at least one sample, got none; check the data path")
    return total / samples


def _precise(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True)
class OutputDifference:
    """Of one output b from the base's a, over all samples that both have answered.

    `max_abs` and `mean_abs` are of |b − a|, `relative` is ‖b − a‖ / ‖a‖ and `cosine` is a·b / (‖a‖ ‖b‖), over
    all elements as one vector; `snr_db` is 10 log₁₀(‖a‖² / ‖b − a‖²), None for equal outputs. `agreement` is
    the share of samples whose largest element is the same one, for outputs N×K with K ≥ 2. What is not
    defined, or not finite, is None.
    """

    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    snr_db: float | None
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """An entry of `outputs` in the JSON of a comparison."""
        return asdict(self)


class OutputComparison:
    """Sums in float64 over the batches of one output."""

    def __init__(self) -> None:
        self._largest = self._absolute = 0.0
        self._error = self._base = self._other = self._product = 0.0
        self._elements = self._samples = self._equal = 0
        self._ranked = True

    def add(self, base: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
        """A batch of both, in the same shape."""
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
        """Of all that was added."""
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
