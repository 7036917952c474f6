"""What of an approximate conversion puts accuracy at risk: said before anybody deploys it."""

from collections.abc import Mapping, Sequence
from typing import Any

# A drop is told of beyond what --max-drop allows by default, unless chance alone explains it.
_DROP_PP = 1.0


# Where accuracy was not measured. Plans that lost a point of a ResNet-9 agreed on 96 to 97 % of the images
# held out, with errors of 0.1 to 0.3 in each layer; depthwise convolutions of multiplier 1 in place of all
# layers, 0.4 to 0.6, lost ten.
_AGREEMENT = 0.95


_OUTPUT_ERROR = 0.5


# Depthwise convolutions of multiplier 1 keep a ninth of a wide 3×3 layer; with less, little is left to tune.
_LAYER_SHARE, _MODEL_SHARE = 1 / 16, 1 / 8


_SHOWN = 4


def risks(document: Mapping[str, Any]) -> list[str]:
    """Warnings, each a sentence, from a report document; none in exact mode, or where accuracy was kept.

    Of fits to the weights alone nothing is said: another warning says that they destroy a network.
    """
    found, drop = document["approximation"], document["delta"]["accuracy_drop_pp"]
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    if found is None or found["calibration"] is None or not layers:
        return []
    if drop is not None:
        low, high = drop["ci95"]
        if drop["value"] <= _DROP_PP or low <= 0 or found["budget"]["max_drop"] is not None:
            return []
        lines = [f"Warning: accuracy falls by {drop['value']:.2f} pp [{low:.2f}, {high:.2f}]."]
    else:
        lines = _agreement(found)
        lines += _errors(layers, found)
    lines += _parameters(layers, document)
    if lines:
        lines[-1] += (
            " Ask for less (a higher --rank, a smaller --min-speedup, --max-drop), leave layers out "
            "(--exclude), or win it back (--finetune)."
        )
    return lines


def _agreement(found: Mapping[str, Any]) -> list[str]:
    kept = [step["agreement"] for step in found["steps"] if step["kept"]]
    if not kept or kept[-1] is None or kept[-1] >= _AGREEMENT:
        return []
    return [
        f"Warning: accuracy is at risk: of {found['calibration']['heldout']:,} images held out, "
        f"{100 * kept[-1]:.1f} % are classified as before."
    ]


def _errors(layers: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    if found["finetune"]:  # by which layers have moved
        return []
    large = [layer["name"] for layer in layers if (layer["output_error"] or 0) >= _OUTPUT_ERROR]
    if not large:
        return []
    return [
        f"Warning: accuracy is at risk: {_named(large)} answer{'s' * (len(large) == 1)} with an error of "
        f"{_OUTPUT_ERROR:.0%} or more of what was answered before."
    ]


def _parameters(layers: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> list[str]:
    before, after = (document[which]["params"] for which in ("original", "converted"))
    small = [layer["name"] for layer in layers if layer["params"][1] < _LAYER_SHARE * layer["params"][0]]
    if after < _MODEL_SHARE * before:
        what = f"the model keeps {after:,} of {before:,} parameters"
    elif small:
        what = f"{_named(small)} keep{'s' * (len(small) == 1)} less than {_LAYER_SHARE:.0%} of the parameters"
    else:
        return []
    return [f"Warning: accuracy is at risk: {what}, and so few may not learn what is lost."]


def _named(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
