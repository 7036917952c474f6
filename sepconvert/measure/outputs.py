"""How far the outputs of one model are from another's, gathered batch by batch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


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
