"""Everything that factors are fitted to: calibration images, the original's outputs, their importance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from sepconvert.base.progress import Stage, stage
from sepconvert.calibration.importance import fisher_information
from sepconvert.calibration.record import RecordedOutputs, record
from sepconvert.calibration.split import CalibrationSet
from sepconvert.measure.divergence import Yardstick
from sepconvert.network.trace import ConvSite


@dataclass(frozen=True)
class Evidence:
    """Calibration images, and what the original is seen to do on them, looked at when it is first needed.

    Attributes:
        calibration: the images.
        collect: runs the original on them, and returns the outputs and their importance.
    """

    calibration: CalibrationSet
    collect: Callable[[], tuple[RecordedOutputs, Mapping[str, Tensor]]]

    @cached_property
    def _collected(self) -> tuple[RecordedOutputs, Mapping[str, Tensor]]:
        with stage(Stage.CALIBRATION):
            return self.collect()

    @property
    def recorded(self) -> RecordedOutputs:
        """Outputs of the layers at sampled positions.

        Raises:
            SepconvertError: the model cannot run on the images, or there are fewer batches than processes.
        """
        return self._collected[0]

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Importance of the layers' outputs, by name; see `fisher_information`."""
        return self._collected[1]


def collect_evidence(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: CalibrationSet,
    *,
    seed: int,
    yardstick: Yardstick | None = None,
) -> Evidence:
    """Return the evidence of a model, which is run on the calibration images when that is first needed.

    Args:
        model: the original; left as it is.
        sites: layers that may be replaced.
        calibration: the images.
        seed: of sampled positions and labels.
        yardstick: what outputs are compared by; decided from the original's if there is none.
    """

    def collect() -> tuple[RecordedOutputs, Mapping[str, Tensor]]:
        share = calibration.share(model)
        recorded = record(model, share, sites, images=calibration.images, seed=seed)
        return recorded, fisher_information(model, share, sites, seed=seed, yardstick=yardstick)

    return Evidence(calibration, collect)
