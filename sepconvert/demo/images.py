"""Labelled images of shapes, drawn from a seed.

Each image shows one shape at a random place, size, rotation and contrast, on a textured background with
a bar behind it and often one in front of it, out of focus and noisy. Small, faint or covered shapes are
truly ambiguous (a hexagon and a disc, say), so a good network stays some points below 100 %.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

SIZE = 48
"""Height and width of an image, in pixels."""

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
"""Preprocessing of the pixels scaled to [0, 1], per channel: `(x / 255 - MEAN) / STD`."""

EVALUATION_SEED = 7
"""Draws the evaluation split."""

TRAINING_SEED = 1_000
"""The training script draws from this seed and the few hundred that follow it, never from the one above."""


class LabelledImages(NamedTuple):
    """Images `x`, uint8 N×H×W×C, and their classes `y`, int64 N: positions in `CLASSES`."""

    x: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]


def evaluation_data(n: int = 2_000) -> LabelledImages:
    """Return the first `n` images of the evaluation split."""
    return draw(n, EVALUATION_SEED)


def draw(n: int, seed: int) -> LabelledImages:
    """Draw `n` labelled images, `SIZE`×`SIZE`×3; a shorter draw of the same seed is the start of a longer."""
    # A generator for each quantity, filled image by image: else `n` would shift all but the first.
    generators = (np.random.default_rng([seed, stream]) for stream in count())

    def uniform(low: float, high: float, *shape: int) -> Floats:
        values = next(generators).random((n, *(shape or (1, 1, 1))), dtype=np.float32)
        return low + (high - low) * values

    softness = uniform(1, 4)
    across = np.arange(SIZE, dtype=np.float32)[None, None, :, None] - (SIZE - 1) / 2
    down = across.transpose(0, 2, 1, 3)

    def rotate(x: Floats, y: Floats) -> tuple[Floats, Floats]:
        angle = uniform(0, 2 * np.pi)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def bar(half_width: Floats) -> Floats:
        distance, _ = rotate(across, down)
        return _coverage(np.abs(distance - uniform(-SIZE / 2, SIZE / 2)) - half_width, softness)

    y = next(generators).integers(len(CLASSES), size=n)
    radius = uniform(9, 17)
    reach = SIZE / 2 + 1 - radius
    u, v = rotate(across - reach * uniform(-1, 1), down - reach * uniform(-1, 1))
    distance = np.empty((n, SIZE, SIZE, 1), np.float32)
    for index, shape in enumerate(CLASSES.values()):
        chosen = y == index
        distance[chosen] = shape(u[chosen] / radius[chosen], v[chosen] / radius[chosen])

    ground = uniform(0.2, 0.8, 1, 1, 3)
    contrast = uniform(-1, 1, 1, 1, 3)
    contrast *= uniform(0.35, 0.9) / np.linalg.norm(contrast, axis=-1, keepdims=True)

    image: Floats = ground + uniform(0, 0.6) * _smooth(uniform(-0.5, 0.5, 7, 7, 3))
    image = _over(image, bar(uniform(1, 4)), uniform(0, 1, 1, 1, 3))
    figure = ground + contrast + uniform(0, 0.3) * _smooth(uniform(-0.5, 0.5, 7, 7, 3))
    image = _over(image, _coverage(distance * radius, softness), figure)
    image = _over(image, bar(uniform(-4, 4)), uniform(0, 1, 1, 1, 3))
    image += uniform(0, 0.1) * next(generators).standard_normal(image.shape, dtype=np.float32)
    return LabelledImages(np.rint(255 * image.clip(0, 1)).astype(np.uint8), y)


def _coverage(distance: Floats, softness: Floats) -> Floats:
    """Turn signed distances (pixels, negative inside) into opacities, over an edge `softness` wide."""
    return (0.5 - distance / softness).clip(0, 1)


def _over(image: Floats, opacity: Floats, colour: Floats) -> Floats:
    return image + opacity * (colour - image)


def _smooth(grid: Floats) -> Floats:
    """Interpolate N×G×G×C values bilinearly to N×`SIZE`×`SIZE`×C."""
    nodes = grid.shape[1]
    position = np.linspace(0, nodes - 1, SIZE, dtype=np.float32)
    hat = (1 - np.abs(position[:, None] - np.arange(nodes, dtype=np.float32))).clip(0)
    image: Floats = np.einsum("yg,ngkc,xk->nyxc", hat, grid, hat, optimize=True)
    return image


def _box(u: Floats, v: Floats, width: float, height: float) -> Floats:
    distance: Floats = np.maximum(np.abs(u) - width, np.abs(v) - height)
    return distance


def _star(u: Floats, v: Floats) -> Floats:
    sector = 2 * np.pi / 5
    from_tip = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    distance: Floats = np.hypot(u, v) * np.cos(from_tip - 0.9) - np.cos(0.9)
    return distance


def _checker(u: Floats, v: Floats) -> Floats:
    column, row = np.abs(u) - 0.27, np.abs(v) - 0.27
    same_side = np.sign(column * row) * np.minimum(np.abs(column), np.abs(row))
    distance: Floats = np.maximum(_box(u, v, 0.8, 0.8), -same_side)
    return distance


CLASSES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.25,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.5,
    "hexagon": lambda u, v: np.maximum(0.866 * np.abs(u) + 0.5 * np.abs(v), np.abs(v)) - 0.87,
    "cross": lambda u, v: np.minimum(_box(u, v, 1, 0.3), _box(u, v, 0.3, 1)),
    "star": _star,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v)),
    "stripes": lambda u, v: np.maximum(_box(u, v, 0.8, 0.8), np.abs((u + 0.32) % 0.64 - 0.32) - 0.16),
    "checker": _checker,
}
"""The names of the classes, and their shapes: the signed distance to the outline, roughly, negative inside.

Coordinates and distance are in units of the shape's radius.
"""
