"""Images and labels for tests of data, and checks of what `load_data` returns or refuses."""

import numpy as np
import pytest
import torch

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import load_data

RNG = np.random.default_rng(0)


IMAGES = RNG.integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)


LABELS = np.arange(10) % 4


def everything(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def refused(match, spec, *arguments, **options):
    with pytest.raises(SepconvertError, match=match) as error:
        everything(load_data(str(spec), *arguments, **options))
    assert "\n" not in str(error.value)
