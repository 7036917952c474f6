"""Everything that factors are fitted to: calibration images, the original's outputs, their importance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sepconvert.base.progress import Stage, stage
from sepconvert.calibration.importance import fisher_information
from sepconvert.calibration.record import RecordedOutputs, record
from sepconvert.calibration.split import CalibrationSet
from sepconvert.measure.divergence import Yardstick
from sepconvert.network.trace import ConvSite


@dataclass(frozen=True)
class Evidence:
    """Calibration images, and what the original was seen to do on them."""

    calibration: CalibrationSet
    recorded: RecordedOutputs
    importance: Mapping[str, Tensor]  # of the layers' outputs, by name; see `fisher_information`


@stage(Stage.CALIBRATION)
def collect_evidence(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: CalibrationSet,
    *,
    seed: int,
    yardstick: Yardstick | None = None,
) -> Evidence:
    """Run the original on the calibration images.

    Args:
        model: the original; left as it is.
        sites: layers that may be replaced.
        calibration: the images.
        seed: of sampled positions and labels.
        yardstick: what outputs are compared by; decided from the original's if there is none.

    Raises:
        SepconvertError: the model cannot run on the images, or there are fewer batches than processes.
    """
    share = calibration.share(model)
    recorded = record(model, share, sites, images=calibration.images, seed=seed)
    importance = fisher_information(model, share, sites, seed=seed, yardstick=yardstick)
    return Evidence(calibration, recorded, importance)
