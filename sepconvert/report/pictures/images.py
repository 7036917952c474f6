"""Images to embed in a page, as PNG data URLs."""

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]
"""Grey values H × W, or colours H × W × 3 or 4."""


def png(pixels: Pixels) -> str:
    """Return pixels as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: Tensor) -> dict[str, Any]:
    """Return an image C × H × W as a data URL, stretched from black to white, and its size in pixels."""
    shown = stretched(image)
    height, width = shown.shape[:2]
    return {"url": png(shown), "width": width, "height": height}


def stretched(image: Tensor) -> Pixels:
    """Return an image C × H × W as pixels, its least value black and its largest white."""
    found = _visible(image)
    return pixels_of(found, float(found.min()), float(found.max()))


def pixels_of(image: Tensor, low: float, high: float) -> Pixels:
    """Return an image C × H × W as pixels, where `low` is black and `high` white.

    Channels are averaged unless there are 1 or 3.
    """
    found = _visible(image)
    shares = ((found - low) / ((high - low) or 1.0)).clamp(0, 1)
    shown: Pixels = (shares * 255).round().byte().permute(1, 2, 0).numpy()
    return shown.squeeze(2) if len(found) == 1 else shown


def _visible(image: Tensor) -> Tensor:
    """Return an image of 1 or 3 channels in float64: the mean of any other number of channels."""
    found = image.detach().double().cpu()
    return found if len(found) in (1, 3) else found.mean(0, keepdim=True)
