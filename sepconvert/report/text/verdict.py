"""The verdict on a conversion: what was converted, gained and lost, what to do with it, what to try next."""

from collections import Counter

from sepconvert.base.notes import Note, ReasonCode, info, warning
from sepconvert.report.text import forms
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    drop_text,
    estimate_text,
    measured_drop,
    ratio_text,
    with_unit,
)
from sepconvert.report.text.risks import NEAR_CHANCE, is_near_chance

# Why a layer is kept, for any number of them; the first that occurs has the most to gain from the next step.
_WHY_KEPT = {
    ReasonCode.BUDGET: "kept by the budget",
    ReasonCode.IN_FLOAT: "in floating point",
    ReasonCode.FULL_RANK: "without an exact structure",
    ReasonCode.COSTS_MORE: "without a form that passes the gate",
    ReasonCode.TOO_LARGE: "too large for the memory",
    ReasonCode.OBSTACLE: "not replaceable here",
    ReasonCode.NOT_SELECTED: "not selected",
}


def verdict(document: Document) -> list[Note]:
    """Return what came of a conversion, and what to do next: one note, and in int8 two.

    It is a warning where there is no reason to deploy the converted model.
    """
    converts = any(layer["decision"] == "converted" for layer in document["layers"])
    if (in_int8 := forms.verdict(document)) is not None:
        return [in_int8, info(f"{converted_text(document)}.") if converts else _nothing(document)]
    return [_of_float(document) if converts else _nothing(document)]


def _of_float(document: Document) -> Note:
    """Return the verdict on a conversion of at least one layer, deployed in floating point."""
    speedup = document["delta"]["latency_speedup"]
    outcome = f"{converted_text(document)}, {_gained(document)}, {_lost(document)}"
    if document["approximation"] is not None and "shortfall" in document["approximation"]:
        missed = _demands(document["approximation"]["budget"])
        return warning(f"no plan meets {missed}. This is the nearest: {outcome}.")
    if speedup is not None and speedup["median"] < 1 and speedup["significant"]:
        return warning(
            f"keep the original, which is faster: {outcome}. `gate` latency converts only layers that are "
            "measured to be faster."
        )
    if speedup is not None and not speedup["significant"]:
        low, high = speedup["noise_floor"]
        return warning(
            f"no gain in speed was found: {outcome}, where the original is [{low:.2f}, {high:.2f}]× as fast "
            "as itself. Keep the original, or measure with more `runs` while the machine is idle."
        )
    if document["approximation"] is not None and is_near_chance(document):
        return warning(f"not to be judged by these figures: {outcome}. {NEAR_CHANCE}")
    if document["approximation"] is not None and measured_drop(document) is None:
        return warning(f"not yet to be deployed: {outcome}. Check the converted model on labelled `data`.")
    if speedup is None:
        return info(f"{outcome[0].upper()}{outcome[1:]}. {_untimed(document)}")
    file = "the converted model" if "converted.onnx" in document["export"]["missing"] else "converted.onnx"
    return info(f"Deploy {file}: {outcome}. {_further(document)}".rstrip())


def converted_text(document: Document) -> str:
    """Return how many convolutions were converted, and how many of these only within a tolerance."""
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    inexact = 0 if document["approximation"] is not None else sum(not layer["exact"] for layer in layers)
    within = f" ({inexact} of them only within `tol`, not exactly)" if inexact else ""
    return f"{len(layers)} of {convolutions(document)[0]} convolutions converted{within}"


def convolutions(document: Document) -> tuple[int, int]:
    """Return how many layers are convolutions, and how many others may be part of one."""
    codes = [layer["reason_code"] for layer in document["layers"]]
    others = codes.count(ReasonCode.UNFOLLOWED)
    return len(codes) - others, others


def _gained(document: Document) -> str:
    """Return the speed-up and the ratio of MACs; the latter alone where nothing was timed."""
    delta = document["delta"]
    macs, speedup = ratio_text(delta["macs_ratio"] or 1.0), delta["latency_speedup"]
    if speedup is None:
        return f"{macs} fewer MACs"
    return f"{estimate_text(speedup['median'], speedup['ci95'], '×')} as fast with {macs} fewer MACs"


def _lost(document: Document) -> str:
    """Return what the outputs or the metric lost."""
    drop, quality = measured_drop(document), Quality.of(document)
    if document["approximation"] is None:
        difference = document["verification"]["torch_max_abs_diff"]
        same = f"outputs equal but for rounding ({difference:.0e})"
        exact = all(layer["exact"] for layer in document["layers"] if layer["decision"] == "converted")
        return same if exact else f"outputs differ by {difference:.0e}"
    if drop is None:
        return f"{quality.noun} not measured"
    metric = document["delta"]["metric"]
    values = " → ".join(quality.value(metric[side]) for side in ("original", "converted"))
    allowed = document["approximation"]["budget"]["max_drop"]
    limit = "" if allowed is None else f"; allowed: {with_unit(f'{allowed:g}', quality.unit)}"
    worse = "drop" if quality.higher_is_better else "worse by"  # what rises to the worse does not drop
    return f"{quality.heading} {values} on {metric['n']:,} images ({worse} {drop_text(drop)}{limit})"


def _demands(budget: Document) -> str:
    """Return the demands of a budget, as options."""
    given = [f"`{name}` {value:g}" for name, value in budget.items() if value is not None]
    return " and ".join(given)


def _untimed(document: Document) -> str:
    """Return what to do where nothing was timed."""
    missing = document["export"]["missing"]
    if reason := missing.get("converted.onnx"):
        return f"There is no ONNX file ({reason}): use the converted model in PyTorch."
    return "Nothing was timed: pass `runs` above 0 to see whether it is faster."


def _further(document: Document) -> str:
    """Return what to try next, where the converted model is worth deploying."""
    approximation = document["approximation"]
    if approximation is None:
        return "`mode` auto, with `calib` and `data`, may go further at a small loss."
    drop, budget = measured_drop(document), approximation["budget"]
    limit = budget["max_drop"]
    if limit is not None and budget["confidence"] is None and drop is not None and drop["ci95"][1] > limit:
        return "On other images it may lose more than allowed: `confidence` 0.95 holds the budget there."
    if limit is not None and budget["confidence"] is None and approximation["finetune"] is None:
        return "Training (`finetune` 5) may go further."
    return ""


def _nothing(document: Document) -> Note:
    """Return a warning that nothing was converted, with the reasons and the next step."""
    counts = Counter(ReasonCode(layer["reason_code"]) for layer in document["layers"])
    counts.pop(ReasonCode.UNFOLLOWED, None)
    if not counts:
        return warning(
            "nothing was converted. The model runs no convolution on these inputs; pass one that does."
        )
    found = {code: counts[code] for code in _WHY_KEPT if code in counts}
    reasons = ", ".join(f"{count} {_WHY_KEPT[code]}" for code, count in found.items())
    all_of_them = f"{counts.total()} convolution{'s' * (counts.total() > 1)}"
    step = _next_step(document, next(iter(found)))
    return warning(f"nothing was converted. Of {all_of_them}: {reasons}. {step}")


def _next_step(document: Document, code: ReasonCode) -> str:
    """Return what to try where the layers that matter most were kept for this reason."""
    if code is ReasonCode.BUDGET:
        budget = document["approximation"]["budget"]
        if budget["max_drop"] is None:
            return "The original meets the budget as it is: demand more (`min_speedup`, `target_macs`)."
        others = (
            f"recover {Quality.of(document).noun} by training (`finetune`)"
            if budget["confidence"] is None
            else "pass more scored images, or leave out `confidence`"
        )
        return f"Raise `max_drop` (it is {Quality.of(document).limit(budget['max_drop'])}), or {others}."
    if code is ReasonCode.COSTS_MORE:
        return (
            "`gate` macs converts what gets fewer MACs, and `gate` none whatever has a structure; neither "
            "promises speed."
        )
    return {
        ReasonCode.FULL_RANK: "`mode` auto, with `calib` and `data`, may find approximations that pay at "
        "a small loss of accuracy.",
        ReasonCode.TOO_LARGE: "Pass more `memory`, or fewer `calib_images`.",
        ReasonCode.NOT_SELECTED: "Select other layers (`include`, `exclude`).",
    }.get(code, "The table of layers says what stands in the way.")
