"""Facts about the data that show whether results on them mean anything: labels, ranges of values."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from sepconvert.calibration.split import OWN_PART, CalibrationSet
from sepconvert.measure.metrics.classes import Accuracy, Labels, Predictions
from sepconvert.measure.metrics.evaluation import Scoring, evaluate
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, tensors_in
from sepconvert.network.trace import TracedModel


class ValueRange:
    """The smallest and the largest of all finite values that were added."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """Add the values of some tensors."""
        self._low, self._high = math.inf, -math.inf
        for x in tensors:
            self.add(x)

    def add(self, x: Tensor) -> None:
        """Add the values of a tensor."""
        finite = x[x.isfinite()]
        if len(finite):
            low, high = finite.aminmax()
            self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def to_json(self) -> list[float] | None:
        """Return both ends; None without values."""
        return [self._low, self._high] if self._low <= self._high else None


@dataclass(frozen=True)
class DataFacts:
    """The data of a conversion: labels, accuracy on calibration images, ranges of the inputs' values.

    What there is no data for is None. `repeated` counts the scored images that are equal to an earlier one.
    """

    labels: Labels | None
    calibration_accuracy: Accuracy | None  # the original's, on the labels of calibration images
    example: ValueRange
    scored: ValueRange
    calibration: ValueRange
    repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the report's `data` object."""
        accuracy = self.calibration_accuracy
        return {
            "labels": None if self.labels is None else asdict(self.labels),
            "calibration_accuracy": None if accuracy is None else accuracy.to_dict(),
            "repeated": self.repeated,
            "values": {
                "example": self.example.to_json(),
                "scored": self.scored.to_json(),
                "calibration": self.calibration.to_json(),
            },
        }


def find_facts(
    original: TracedModel,
    predictions: Predictions | None,
    scored: ValueRange,
    calibration: CalibrationSet | None,
    scoring: Scoring,
) -> DataFacts:
    """Return the facts about the data of a conversion.

    Args:
        original: the model, and the inputs that it is run, verified and timed on.
        predictions: its predictions on the scored images, if it is a classifier.
        scored: values of these images.
        calibration: the images to fit to, if any.
        scoring: how outputs are judged.
    """
    images = () if calibration is None else (*calibration.fit, *calibration.heldout)
    values = (value for samples in images for value in samples.floating)
    accuracy: Accuracy | None = None
    # Calibration images that are a part of the scored data have the same labels and preprocessing.
    if predictions is not None and calibration is not None and calibration.origin != OWN_PART:
        accuracy = _accuracy(original.model, calibration, predictions.classes, scoring)
    return DataFacts(
        labels=None if predictions is None else Labels.of(predictions),
        calibration_accuracy=accuracy,
        example=ValueRange(value for value in tensors_in(original.inputs) if value.is_floating_point()),
        scored=scored,
        calibration=ValueRange(values),
    )


def _accuracy(
    model: nn.Module, calibration: CalibrationSet, classes: int, scoring: Scoring
) -> Accuracy | None:
    """Return a classifier's accuracy on the held-out calibration images that have a label."""
    labelled: list[tuple[Inputs, Tensor]] = []
    for x, y in zip(calibration.heldout, calibration.labels, strict=True):
        known = (y >= 0) & (y < classes)
        if known.any():
            labelled.append((x[known].inputs, y[known]))
    if not labelled:
        return None
    found = evaluate(private_copy(model), labelled, replace(scoring, metric=None)).predictions
    return None if found is None else found.accuracy()
