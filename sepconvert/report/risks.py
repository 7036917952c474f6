"""Warnings that an approximate conversion may have cost accuracy, given before anybody deploys it."""

from collections.abc import Sequence
from dataclasses import replace

from sepconvert.base.notes import Note, warning
from sepconvert.report.numbers import Document, drop_text

# A measured drop is reported if it exceeds the default `max_drop`, unless chance alone explains it.
_DROP_PP = 1.0


# Thresholds for when accuracy was not measured. Plans that lost a point on a ResNet-9 agreed on 96 to 97 % of
# the held-out images, with output errors of 0.1 to 0.3 in each layer. Depthwise convolutions of multiplier 1
# in place of all layers had errors of 0.4 to 0.6, and lost ten points.
_AGREEMENT = 0.95


_OUTPUT_ERROR = 0.5


# Depthwise convolutions of multiplier 1 keep a ninth of a wide 3×3 layer. With fewer parameters, little is
# left to tune.
_LAYER_SHARE, _MODEL_SHARE = 1 / 16, 1 / 8


_NAMED_LAYERS = 4


def risks(document: Document) -> list[Note]:
    """Return warnings about accuracy; none in exact mode, or if accuracy was kept.

    A model fitted to the weights alone has none either: `sentences` warns about that fit itself.
    """
    approximation, drop = document["approximation"], document["delta"]["accuracy_drop_pp"]
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    if approximation is None or approximation["calibration"] is None or not layers:
        return []
    if drop is not None:
        allowed = approximation["budget"]["max_drop"] is not None
        if allowed or drop["value"] <= _DROP_PP or drop["ci95"][0] <= 0:
            return []
        notes = [warning(f"accuracy falls by {drop_text(drop)}.")]
    else:
        notes = _agreement_risk(approximation) + _error_risk(layers, approximation)
    notes += _parameter_risk(layers, document)
    if notes:
        advice = (
            " Demand less (a higher `rank`, a lower `min_speedup`, a `max_drop`), leave layers as they are "
            "(`exclude`), or recover accuracy by training (`finetune`)."
        )
        notes[-1] = replace(notes[-1], text=notes[-1].text + advice)
    return notes


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


def _parameter_risk(layers: Sequence[Document], document: Document) -> list[Note]:
    before, after = (document[side]["params"] for side in ("original", "converted"))
    names = [layer["name"] for layer in layers if layer["params"][1] < _LAYER_SHARE * layer["params"][0]]
    if after < _MODEL_SHARE * before:
        share = f"the model keeps {after:,} of {before:,} parameters"
    elif names:
        keep = "keeps" if len(names) == 1 else "keep"
        share = f"{_listed(names)} {keep} less than {100 * _LAYER_SHARE:.0f} % of the parameters"
    else:
        return []
    return [warning(f"accuracy is at risk: {share}, which may be too few to recover what is lost.")]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_LAYERS
    return ", ".join(names[:_NAMED_LAYERS]) + (f" and {more} more" if more > 0 else "")
