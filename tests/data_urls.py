"""Pixels of images that a page embeds."""

import base64
import io

import numpy as np
from PIL import Image


def pixels(url: str) -> np.ndarray:
    """Return the pixels of a PNG data URL."""
    assert url.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
