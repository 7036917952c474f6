"""Warnings before anybody deploys a result: its data may mean nothing, or it may have cost accuracy."""

import math
from collections.abc import Sequence
from dataclasses import replace

from sepconvert.base.notes import Note, info, warning
from sepconvert.measure.statistics import difference_interval, proportion_interval
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    drop_text,
    measured_drop,
    percent_text,
    range_text,
    with_unit,
)

# A measured drop is reported if it exceeds the default `max_drop`, unless chance alone explains it. Metrics
# that are no shares have no default: a hundredth of the original's value takes its place.
_DROP_PP, _DROP_SHARE = 1.0, 0.01


# Thresholds for when accuracy was not measured. Plans that lost a point on a ResNet-9 agreed on 96 to 97 % of
# the held-out images, with output errors of 0.1 to 0.3 in each layer. Depthwise convolutions of multiplier 1
# in place of all layers had errors of 0.4 to 0.6, and lost ten points.
_AGREEMENT = 0.95


_OUTPUT_ERROR = 0.5


# Depthwise convolutions of multiplier 1 keep a ninth of a wide 3×3 layer. With fewer parameters, little is
# left to tune.
_LAYER_SHARE, _MODEL_SHARE = 1 / 16, 1 / 8


_NAMED_LAYERS = 4


# Share of the way from chance to perfection, below which the original can do nothing. Networks that are fed
# images without their preprocessing stay near it.
_LITTLE = 0.05


# Inputs suit an original that goes this share of the way, whatever their values are.
_MUCH = 0.5


# More than training images are usually classified better than others.
_FAR_BELOW = 0.10


# Inputs with mean 0 and variance 1 seldom exceed 10, and images of 8 bits go to 255.
_NORMALISED, _PIXELS, _BEYOND_EXAMPLE = 10, 20, 4


NEAR_CHANCE = (
    "The original itself is near chance on `data`; check the images, how they are preprocessed, and the "
    "weights."
)
"""What to do where figures say nothing."""


def doubts(document: Document) -> list[Note]:
    """Return warnings that results on the data may mean nothing, as data and original do not fit."""
    data, accuracy = document["data"], document["original"]["accuracy"]
    if data is None:
        return []
    skill = None if accuracy is None else _skill(data["labels"], accuracy["top1"])
    notes = _range_doubts(data["values"], skill)
    if accuracy is not None:
        notes += classifier_doubts(accuracy, data["labels"])
        notes += _calibration_doubts(accuracy, data["calibration_accuracy"])
    return notes + _interval_doubt(document) + _repetition_doubt(data["repeated"])


def classifier_doubts(accuracy: Document, labels: Document) -> list[Note]:
    """Return warnings about a classifier that is near chance, and about labels that lack classes."""
    return _chance_doubts(accuracy, labels) + _label_doubts(labels)


def is_near_chance(document: Document) -> bool:
    """Return whether the original can do nothing on the data, so that no drop says anything."""
    data, accuracy = document["data"], document["original"]["accuracy"]
    return data is not None and accuracy is not None and not _is_skilled(data["labels"], accuracy)


def _repetition_doubt(repeated: int) -> list[Note]:
    """Return that images are scored several times; reports of earlier versions do not count them."""
    if not repeated:
        return []
    return [
        info(
            f"{repeated:,} scored images are equal to others of `data`: each counts as often as it "
            "occurs, so that the interval of the drop is too narrow; take the repetitions out."
        )
    ]


def unseen(document: Document) -> list[Note]:
    """Return what an approximate conversion leaves to be expected on unseen images.

    Where a classifier itself can do nothing, its drop says nothing about them. What a metric without a level
    of chance has dropped by holds in any case.
    """
    approximation = document["approximation"]
    choice, most, quality = approximation["choice"], approximation["budget"]["max_drop"], Quality.of(document)
    if choice is None or is_near_chance(document):
        return []
    expected = f"expect a drop of up to {quality.drop(choice['bound'])}"
    if choice["confidence"] is not None:
        return [
            info(
                f"With {100 * choice['confidence']:g} % confidence, the drop on unseen images of the same "
                f"kind is at most {with_unit(f'{most:g}', quality.unit)} (`max_drop`). Plans that were "
                f"tested, in an order fixed beforehand: {choice['plans']}."
            )
        ]
    if choice["plans"] <= 1:
        return [info(f"On unseen images of the same kind, {expected} (95 % confidence).")]
    among = (
        f"{choice['plans']} plans were measured on {choice['images']:,} images; the best was taken, which "
    )
    among += "favours it"
    rest = choice["rest"]
    free = f"; on {rest['n']:,} others, its drop is {drop_text(rest)}" if rest is not None else ""
    return [
        info(
            f"{among}{free}. On unseen images of the same kind, {expected} (95 % confidence, with allowance "
            "for the choice)."
        )
    ]


def _skill(labels: Document, share: float) -> float:
    """Return how far an accuracy is on the way from chance, 0, to perfection, 1."""
    chance: float = labels["chance"]
    return (share - chance) / (1 - chance) if chance < 1 else 1.0


def _is_skilled(labels: Document, accuracy: Document) -> bool:
    """Return whether the original is surely better than one answer for all images."""
    right, n = round(accuracy["top1"] * accuracy["n"]), accuracy["n"]
    return _skill(labels, proportion_interval(right, n).lo) > _LITTLE


def _range_doubts(values: Document, skill: float | None) -> list[Note]:
    """Return warnings about images whose values leave the range of the example, or of normalised images."""
    notes = []
    example = values["example"]
    for name in ("scored", "calibration"):
        if (found := values[name]) is None:
            continue
        most = max(map(abs, found))
        if example is not None and most > max(_NORMALISED, _BEYOND_EXAMPLE * max(map(abs, example))):
            notes.append(
                warning(
                    f"the values of {name} images range over {range_text(found)}, those of the example "
                    f"inputs over {range_text(example)}; preprocess both alike."
                )
            )
        elif most > _PIXELS if skill is None else skill < _MUCH and (most > _PIXELS or min(found) >= 0):
            notes.append(
                warning(
                    f"the values of {name} images range over {range_text(found)}, as if they were not "
                    "normalised; unless the model was trained so, preprocess them as in training (`mean` and "
                    "`std` are for uint8 images; float images are used as they are)."
                )
            )
    return notes


def _chance_doubts(accuracy: Document, labels: Document) -> list[Note]:
    """Return a warning about an original that is near chance."""
    if _is_skilled(labels, accuracy):
        return []
    return [
        warning(
            f"the original itself classifies {percent_text(accuracy['top1'])} % of {accuracy['n']:,} images "
            f"correctly, where one answer for all gives {percent_text(labels['chance'])} %: drop and "
            "agreement mean nothing. Check the preprocessing (`mean`, `std`, `resize`), the numbering of the "
            "classes and the weights, or pass more images."
        )
    ]


def _calibration_doubts(accuracy: Document, calibration: Document | None) -> list[Note]:
    """Return a warning about an original that is far worse than on calibration images."""
    if calibration is None:
        return []
    (top1, n), (before, images) = ((each["top1"], each["n"]) for each in (accuracy, calibration))
    if difference_interval((round(before * images), images), (round(top1 * n), n)).lo <= _FAR_BELOW:
        return []
    return [
        warning(
            f"the original classifies {percent_text(before)} % of {images:,} calibration images as labelled, "
            f"but {percent_text(top1)} % of {n:,} scored ones. Unless it has overfitted to the former, check "
            "the labels and the preprocessing of `data`."
        )
    ]


def _label_doubts(labels: Document) -> list[Note]:
    """Return a warning about classes that no label names, though there are labels enough."""
    expected, missing = labels["missing_by_chance"], labels["missing"]
    if missing <= expected + 3 * math.sqrt(expected):  # three standard deviations of a Poisson variable
        return []
    if labels["smallest"] == 1 and labels["largest"] == labels["classes"] - 1:
        return [
            warning(
                f"labels range over {range_text([1, labels['largest']])}, the model's {labels['classes']:,} "
                "classes are numbered from 0; subtract 1 if the labels are numbered from 1."
            )
        ]
    more = missing - len(labels["missing_shown"])
    names = ", ".join(map(str, labels["missing_shown"])) + (f" and {more:,} more" if more else "")
    return [
        warning(
            f"no scored image is labelled {names}, though the model has {labels['classes']:,} classes: the "
            "result holds for the others alone. Check the numbering of the classes, and pass images of all."
        )
    ]


def _interval_doubt(document: Document) -> list[Note]:
    """Return a warning if the drop is known less exactly than the budget asks."""
    approximation, drop, quality = document["approximation"], measured_drop(document), Quality.of(document)
    if approximation is None or drop is None or approximation["budget"]["confidence"] is not None:
        return []
    low, high = drop["ci95"]
    half, most = (high - low) / 2, approximation["budget"]["max_drop"]
    converted = any(layer["decision"] == "converted" for layer in document["layers"])
    if not most or half <= most or not converted:
        return []
    # The width falls with the square root of the number of images.
    return [
        warning(
            f"the drop is known to ±{quality.drop(half)}, `max_drop` is {quality.limit(most)}: about "
            f"{_rounded_up(drop['n'] * (half / most) ** 2):,} scored images would do, {drop['n']:,} are few."
        )
    ]


def _rounded_up(number: float) -> int:
    """Return the next number of two significant digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def risks(document: Document) -> list[Note]:
    """Return warnings about accuracy or another metric; none in exact mode, or if it was kept.

    A model fitted to the weights alone has none either: `sentences` warns about that fit itself.
    """
    approximation, drop, quality = document["approximation"], measured_drop(document), Quality.of(document)
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    if approximation is None or approximation["calibration"] is None or not layers:
        return []
    if drop is not None:
        allowed = approximation["budget"]["max_drop"] is not None
        if allowed or drop["value"] <= _unremarkable(document) or drop["ci95"][0] <= 0:
            return []
        moves = "falls" if quality.higher_is_better else "rises"
        notes = [warning(f"{quality.noun} {moves} by {drop_text(drop)}.")]
    else:
        notes = _agreement_risk(approximation) + _error_risk(layers, approximation)
    notes += _parameter_risk(layers, document, quality)
    if notes:
        advice = (
            " Demand less (a higher `rank`, a lower `min_speedup`, a `max_drop`), leave layers as they are "
            f"(`exclude`), or recover {quality.noun} by training (`finetune`)."
        )
        notes[-1] = replace(notes[-1], text=notes[-1].text + advice)
    return notes


def _unremarkable(document: Document) -> float:
    """Return the drop up to which nothing is said of it, where none was allowed or forbidden."""
    metric = document["delta"]["metric"]
    return _DROP_PP if metric["unit"] == "pp" else _DROP_SHARE * abs(float(metric["original"]))


def _agreement_risk(approximation: Document) -> list[Note]:
    agreements = [step["agreement"] for step in approximation["steps"] if step["kept"]]
    if not agreements or agreements[-1] is None or agreements[-1] >= _AGREEMENT:
        return []
    images = approximation["calibration"]["heldout"]
    return [
        warning(
            f"accuracy is at risk: only {100 * agreements[-1]:.1f} % of {images:,} held-out images are "
            "classified as before."
        )
    ]


def _error_risk(layers: Sequence[Document], approximation: Document) -> list[Note]:
    if approximation["finetune"]:  # which changes the layers after their errors were measured
        return []
    names = [layer["name"] for layer in layers if (layer["output_error"] or 0) >= _OUTPUT_ERROR]
    if not names:
        return []
    have = "has an output error" if len(names) == 1 else "have output errors"
    return [warning(f"accuracy is at risk: {_listed(names)} {have} of {100 * _OUTPUT_ERROR:.0f} % or more.")]


def _parameter_risk(layers: Sequence[Document], document: Document, quality: Quality) -> list[Note]:
    before, after = (document[side]["params"] for side in ("original", "converted"))
    names = [layer["name"] for layer in layers if layer["params"][1] < _LAYER_SHARE * layer["params"][0]]
    if after < _MODEL_SHARE * before:
        share = f"the model keeps {after:,} of {before:,} parameters"
    elif names:
        keep = "keeps" if len(names) == 1 else "keep"
        share = f"{_listed(names)} {keep} less than {100 * _LAYER_SHARE:.0f} % of the parameters"
    else:
        return []
    return [warning(f"{quality.noun} is at risk: {share}, which may be too few to recover what is lost.")]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_LAYERS
    return ", ".join(names[:_NAMED_LAYERS]) + (f" and {more} more" if more > 0 else "")
