"""Results of fine-tuning: steps, epochs and the tuned model."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class TrainingStep:
    """Progress of training: `loss` is that of the step just done, `seconds_left` an estimate."""

    step: int
    steps: int
    epoch: int
    loss: float
    seconds_left: float


@dataclass(frozen=True)
class Epoch:
    """Scores of the student on held-out data after an epoch; epoch 0 is before the first.

    `heldout_loss` (the training loss without embedding and features), `divergence` (see
    `sepconvert.measure.divergence`) and `accuracy`, a fraction (None without labels), are those of the
    trained weights or of their moving average, whichever has the lower loss; `weights` says which. `loss` is
    the mean over the epoch's steps, `seconds` the time since the start.
    """

    epoch: int
    step: int
    loss: float | None
    weights: Literal["start", "trained", "average"]
    heldout_loss: float
    divergence: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A student of the same class, dtype, device and training flags, and the history of its training.

    `model` has the weights of the entry `delivered` of `history`. `precision` is the mixed precision of the
    steps, or "no". `stopped` says why training ended early; None if it did not.
    """

    model: nn.Module
    history: tuple[Epoch, ...]
    delivered: Epoch
    precision: str
    stopped: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the `finetune` object of the JSON report."""
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "delivered": asdict(self.delivered),
            "precision": self.precision,
            "stopped": self.stopped,
        }
