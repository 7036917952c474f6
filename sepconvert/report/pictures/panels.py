"""Panels that show a sample before and after a conversion: masks, pictures, or boxes on the image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from sepconvert.report.pictures.images import Pixels, pixels_of, png, stretched
from sepconvert.report.pictures.samples import ChangedSample, ChangedSamples, Kind

_LONG_SIDE = 256  # pixels, of each panel

_SMALL = 128  # pixels; smaller panels are shown enlarged

_BACKGROUND, _UNSCORED = (40, 40, 40), (170, 170, 170)

_LOST, _WON, _OTHER = (214, 39, 40), (44, 160, 44), (255, 196, 0)

_CROP = 40  # pixels, at most, of each side of a crop
_GAP = 4


@dataclass(frozen=True)
class Panel:
    """An image with a caption, as a data URL, and the size in pixels that it is shown in."""

    caption: str
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Gallery:
    """Samples that changed, each with its panels, and a legend of these."""

    legend: str
    samples: tuple[tuple[ChangedSample, tuple[Panel, ...]], ...]


def gallery(changed: ChangedSamples) -> Gallery | None:
    """Return the panels of samples that changed, by the kind of their outputs; None without samples."""
    kind, shown = changed.kind, changed.shown
    if kind is None:
        return None
    if kind == "boxes":
        least = _score_of_as_many_as_labelled(shown)
        legend = (
            f"Each class has a colour. Boxes of a score of {least:.2f} or more are drawn: of these, the "
            "original finds as many here as are labelled."
        )
        return Gallery(legend, tuple((each, _boxes(each, least)) for each in shown))
    panels = _masks if kind == "masks" else _pictures
    return Gallery(_LEGENDS[kind], tuple((each, panels(each)) for each in shown))


_LEGENDS: Mapping[Kind, str] = {
    "masks": "Each class has a colour; what is not scored is light grey. Where before and after differ, red "
    "was right before, green is right now, and yellow is neither.",
    "pictures": "The difference is that of after from before, black where they are equal. The crop shows "
    "where it is largest.",
}


def _panel(caption: str, pixels: Pixels, *, smooth: bool = True) -> Panel:
    """Return pixels as a panel whose long side is `_LONG_SIDE` at most."""
    image = Image.fromarray(pixels)
    resampling = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    image.thumbnail((_LONG_SIDE, _LONG_SIDE), resampling)
    factor = max(1, math.ceil(_SMALL / max(image.size)))
    width, height = image.size
    return Panel(caption, png(np.asarray(image)), factor * width, factor * height)


# Masks ----------------------------------------------------------------------------------------------


def _masks(sample: ChangedSample) -> tuple[Panel, ...]:
    label = sample.target.reshape(sample.target.shape[-2:]).numpy().astype(np.int64)
    before, after = (_classes(made) for made in (sample.before, sample.after))
    known = (label >= 0) & (label < max(sample.before.shape[1], 2))
    differ = np.repeat(_grey(sample.image[0], label.shape)[..., None] // 2, 3, 2)
    for colour, places in (
        (_OTHER, before != after),
        (_LOST, (before == label) & (after != label)),
        (_WON, (before != label) & (after == label)),
        (_UNSCORED, ~known & (before != after)),
    ):
        differ[places] = colour
    changed = 100 * float((known & (before != after)).mean())
    return (
        _panel("image", stretched(sample.image[0])),
        _panel("label", _coloured(np.where(known, label, -1)), smooth=False),
        _panel("before", _coloured(before), smooth=False),
        _panel("after", _coloured(after), smooth=False),
        _panel(f"where they differ, {changed:.2g} % of the pixels", differ, smooth=False),
    )


def _classes(outputs: Tensor) -> npt.NDArray[np.int64]:
    """Return the class of each pixel; of one channel, whether it is more likely than not."""
    if outputs.shape[1] > 1:
        found = outputs[0].argmax(0)
    else:  # as torchmetrics takes it: probabilities, unless values leave their range
        are_shares = bool(((outputs >= 0) & (outputs <= 1)).all())
        found = outputs[0, 0] > (0.5 if are_shares else 0.0)
    classes: npt.NDArray[np.int64] = found.long().numpy()
    return classes


def _coloured(classes: npt.NDArray[np.int64]) -> Pixels:
    """Return a colour for each class; class 0 is dark, and what is below it is not scored."""
    colours = np.array([_UNSCORED, _BACKGROUND, *map(_colour, range(1, 21))], np.uint8)
    return colours[np.where(classes > 0, (classes - 1) % 20 + 2, classes + 1)]


def _colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class from 1 to 20: ten dark ones, then ten light ones."""
    place = number - 1
    red, green, blue, _ = mpl.colormaps["tab20"]((2 * place + place // 10) % 20)
    return round(255 * red), round(255 * green), round(255 * blue)


def _grey(image: Tensor, size: tuple[int, ...]) -> Pixels:
    """Return an image as grey values of another size."""
    grey = Image.fromarray(stretched(image.mean(0, keepdim=True)))
    return np.asarray(grey.resize((size[1], size[0]), Image.Resampling.NEAREST))


# Pictures -------------------------------------------------------------------------------------------


def _pictures(sample: ChangedSample) -> tuple[Panel, ...]:
    target, before, after = (_channels(made) for made in (sample.target, sample.before, sample.after))
    low, high = _limits(target)
    size = (after - before).abs()
    factor = amplification(float(np.quantile(size.numpy(), 0.999)), high - low)
    image = sample.image[0].double()
    least, most = np.quantile(image.numpy(), (0.05, 0.95))
    room = (high - low) / 4  # noise leaves the range, normalised images have another
    alike = low - room <= least and most <= high + room
    return (
        _panel("input", pixels_of(image, low, high) if alike else stretched(image)),
        _panel("target", pixels_of(target, low, high)),
        _panel("before", pixels_of(before, low, high)),
        _panel("after", pixels_of(after, low, high)),
        _panel(f"difference × {factor:g}", pixels_of(size * factor, 0.0, high - low)),
        _crops(target, before, after, (low, high)),
    )


def _channels(value: Tensor) -> Tensor:
    """Return a batch of one picture as C × H × W, in float64."""
    return (value[0] if value.ndim == 4 else value).double()


def _limits(target: Tensor) -> tuple[float, float]:
    """Return the values that are black and white: 0 and 1, unless those of the target leave this range."""
    low, high = float(target.min()), float(target.max())
    return (0.0, 1.0) if low >= 0 and 0 < high <= 1 else (low, high if high > low else low + 1)


def amplification(difference: float, whole: float) -> float:
    """Return the largest of 1, 2, 5, 10, … by which a difference does not exceed the whole range."""
    if not difference:
        return 1.0
    ratio = max(1.0, whole / difference)
    unit = 10.0 ** math.floor(math.log10(ratio))
    return max(step * unit for step in (1, 2, 5) if step * unit <= ratio)


def _crops(target: Tensor, before: Tensor, after: Tensor, limits: tuple[float, float]) -> Panel:
    """Return the region of the largest difference of the target, before and after, side by side."""
    difference = (after - before).square().mean(0)
    side = max(1, min(_CROP, *(length // 2 for length in difference.shape)))
    means = F.avg_pool2d(difference[None, None], side, stride=1)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    region = slice(None), slice(top, top + side), slice(left, left + side)
    crops = [pixels_of(each[region], *limits) for each in (target, before, after)]
    enlarged = max(1, (_LONG_SIDE - 2 * _GAP) // (3 * side))
    gap = np.full((side * enlarged, _GAP, *crops[0].shape[2:]), 255, np.uint8)
    label, old, new = (crop.repeat(enlarged, 0).repeat(enlarged, 1) for crop in crops)
    joined = np.concatenate([label, gap, old, gap, new], 1)
    return _panel(f"{side} × {side} pixels: target, before, after", joined, smooth=False)


# Boxes ----------------------------------------------------------------------------------------------


def _score_of_as_many_as_labelled(samples: Sequence[ChangedSample]) -> float:
    """Return the score above which the original finds as many boxes in some samples as they have labels."""
    scores = torch.cat([sample.before[0]["scores"].reshape(-1) for sample in samples]).sort(descending=True)
    wanted = max(1, sum(len(sample.target[0]["boxes"]) for sample in samples))
    return float(scores.values[:wanted].min()) if len(scores.values) else 0.0


def _boxes(sample: ChangedSample, least: float) -> tuple[Panel, ...]:
    image, wanted = sample.image[0], sample.target[0]
    return (
        _panel("label", _drawn(image, wanted)),
        _panel("before", _drawn(image, _found(sample.before[0], least))),
        _panel("after", _drawn(image, _found(sample.after[0], least))),
    )


def _found(made: Mapping[str, Any], least: float) -> Mapping[str, Any]:
    """Return the boxes of at least this score, the best last, so that it is drawn above the others."""
    order = made["scores"].argsort()
    order = order[made["scores"][order] >= least]
    return {key: made[key][order] for key in ("boxes", "labels")}


def _drawn(image: Tensor, found: Mapping[str, Any]) -> Pixels:
    """Return an image with boxes (left, top, right, bottom) in the colours of their classes."""
    pixels = Image.fromarray(stretched(image)).convert("RGB")
    scale = _LONG_SIDE / max(pixels.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    pixels = pixels.resize((round(scale * pixels.width), round(scale * pixels.height)), resampling)
    pen = ImageDraw.Draw(pixels)
    boxes = scale * torch.as_tensor(found["boxes"]).double().reshape(-1, 4)
    for box, label in zip(boxes.tolist(), torch.as_tensor(found["labels"]).tolist(), strict=True):
        left, right = sorted(box[::2])
        top, bottom = sorted(box[1::2])
        pen.rectangle((left, top, right, bottom), outline=_colour(int(label) % 20 + 1), width=3)
    return np.asarray(pixels)
