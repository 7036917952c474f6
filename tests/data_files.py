"""Images and labels for tests of data, and checks of what `load_data` returns or refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import load_data

RNG = np.random.default_rng(0)


IMAGES = RNG.integers(0, 256, (10, 8, 6, 3), dtype=np.uint8)


LABELS = np.arange(10) % 4


def everything(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def folder_of(path, images):
    """Save images, arrays or Pillow's own, by their names in a folder."""
    for name, image in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path / name)
    return path


def palette(classes):
    """A palette image, whose colours have nothing to do with the class numbers."""
    image = Image.fromarray(classes.astype(np.uint8), "P")
    image.putpalette([value for number in range(256) for value in (255 - number, 17, 3 * number % 256)])
    return image


def refused(match, spec, *arguments, **options):
    with pytest.raises(SepconvertError, match=match) as error:
        everything(load_data(str(spec), *arguments, **options))
    assert "\n" not in str(error.value)
