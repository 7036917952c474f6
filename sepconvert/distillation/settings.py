"""Settings of fine-tuning as one value."""

import math
from dataclasses import asdict, dataclass

from sepconvert.base.errors import SepconvertError, check_number


@dataclass(frozen=True)
class Settings:
    """Options that the weights depend on; see `sepconvert.finetune`.

    Raises:
        SepconvertError: a value is out of range.
    """

    epochs: int
    labelled: bool
    learning_rate: float
    temperature: float
    feature_weight: float
    seed: int
    renew_statistics: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number("epochs", self.epochs, 1, whole=True)
        for name, value, allowed, expected in (
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a number above 0"),
            (
                "temperature",
                self.temperature,
                0 < self.temperature < math.inf,
                "a number above 0, about 1 to 4",
            ),
            ("feature_weight", self.feature_weight, 0 <= self.feature_weight < math.inf, "0 or more"),
        ):
            if not allowed:
                raise SepconvertError(f"`{name}`: expected {expected}, got {value}; pass another value")

    def __str__(self) -> str:
        """The settings on one line, as a checkpoint stores them."""
        return " ".join(f"{name}={value!r}" for name, value in asdict(self).items())
