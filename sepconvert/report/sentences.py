"""The report in sentences, from the same document as the JSON."""

from collections.abc import Mapping, Sequence

from sepconvert.report.numbers import (
    Document,
    folded,
    interval_text,
    percent_text,
    points_text,
    speedup_text,
    times_text,
)
from sepconvert.report.risks import risks

_PLACES = ("converted", "kept", "layout", "other")  # where time goes


# Even for a layer of some 64 channels, of which an image of 8×8 shows 64 patches with 576 elements each.
_FEW_IMAGES = 64


def story(document: Document) -> list[str]:
    """A conversion in plain words, for somebody who sees one for the first time."""
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    delta, schemes = document["delta"], sorted({layer["scheme"] for layer in layers})
    how = f" ({', '.join(schemes)})" if schemes else ""
    lines = [
        f"{len(layers)} of {len(document['layers'])} convolutions were replaced{how}.",
        f"For an image that is {times_text(delta['macs_ratio'])} fewer multiplications, and the network has "
        f"{times_text(delta['params_ratio'])} fewer parameters.",
    ]
    if document["approximation"] is None:
        lines.append(
            "Its answers are the same: they differ by "
            f"{document['verification']['torch_max_abs_diff']:.0e}, which is rounding."
        )
    if (speedup := delta["latency_speedup"]) is not None:
        lines.append(f"Measured in ONNX Runtime it is {speedup_text(speedup)} as fast.")
    if (drop := delta["accuracy_drop_pp"]) is not None:
        count = document["original"]["accuracy"]["n"]
        right = [percent_text(document[which], "top1") for which in ("converted", "original")]
        lines.append(
            f"Of {count:,} images it classifies {right[0]} % rightly, the original {right[1]} %: "
            f"{points_text(drop)} points lost."
        )
    return [folded(line) for line in (*lines, *_untimed_sentences(document), *warnings_of(document))]


def sentences(document: Document) -> list[str]:
    """What the numbers mean, in words."""
    layers, check, delta = document["layers"], document["verification"], document["delta"]
    converted = [layer for layer in layers if layer["decision"] == "converted"]
    exact = sum(layer["exact"] for layer in converted)
    inexact = (
        ""
        if exact == len(converted) or document["approximation"] is not None
        else f", {len(converted) - exact} of them within --tol only, not exactly"
    )
    lines = [f"{len(converted)} of {len(layers)} convolutions converted{inexact}."]
    if layers and not converted and document["mode"] == "exact":
        lines.append(
            "Nothing separates exactly where that pays: --mode auto, with --calib and --data, finds what pays"
            " at a small loss of accuracy."
        )
    lines.append(_verification(check))
    if document["approximation"] is not None:
        lines.extend(_merge_sentences(document["approximation"].get("merges", [])))
        lines.extend(_approximation_sentences(document["approximation"]))
        lines.extend(risks(document))
    lines += _missing_sentences(document["export"]["missing"])
    if document["export"]["onnx_dtype"] != document["dtype"]:
        lines.append(
            f"The ONNX files are {document['export']['onnx_dtype']}, ONNX Runtime having no "
            f"{document['dtype']} convolutions; converted.pt2 keeps {document['dtype']}."
        )
    if document["export"]["reason"]:
        lines.append(f"The batch dimension of the ONNX files is fixed: {document['export']['reason']}.")
    lines.extend(_latency_sentences(document, converted))
    lines.extend(_demand_sentences(document))
    lines.extend(_untimed_sentences(document))
    if delta["agreement"] is not None:
        count = document["original"]["accuracy"]["n"]
        lines.append(f"Predictions agree on {100 * delta['agreement']:.2f} % of {count:,} images.")
    uncounted = document["original"]["uncounted_ops"]
    if uncounted:
        names = ", ".join(name.removeprefix("aten::") for name in sorted(uncounted))
        lines.append(f"Not counted in MACs: {names}.")
    return lines


def warnings_of(document: Document) -> list[str]:
    """Of the `sentences` those that even somebody who wants no output must see."""
    return [line for line in sentences(document) if line.startswith(("Warning:", "Attention:"))]


def _verification(check: Document) -> str:
    runtime = (
        f"ONNX Runtime could not be asked: {check['onnx_reason']}"
        if check["onnx_max_abs_diff"] is None
        else f"{check['onnx_max_abs_diff']:.1e} (tolerance {check['onnx_tolerance']:.1e})"
    )
    moved = f"{check['torch_max_abs_diff']:.1e}"
    if check["torch_tolerance"] is None:
        if check["onnx_max_abs_diff"] is None:
            return f"Approximate: outputs differ from the original's by up to {moved}. {runtime}."
        return (
            f"Approximate: outputs differ from the original's by up to {moved}. Verified: converted.onnx "
            f"in ONNX Runtime against the converted model in PyTorch: {runtime}."
        )
    asked = (
        "; " if check["onnx_max_abs_diff"] is None else f", ONNX Runtime {check['onnx_dtype']} outputs by "
    )
    return (
        f"Verified: PyTorch {check['torch_dtype']} outputs differ by {moved} "
        f"(tolerance {check['torch_tolerance']:.1e}){asked}{runtime}."
    )


def _untimed_sentences(document: Document) -> list[str]:
    """Where more time may find more."""
    untimed = [layer["name"] for layer in document["layers"] if layer["reason_code"] == "untimed"]
    if not untimed:
        return []
    return [f"Kept, since no time was left to measure their forms: {', '.join(untimed)} (--measure-seconds)."]


def _demand_sentences(document: Document) -> list[str]:
    """Where the files are not as fast as was demanded, which the plan was when it was timed."""
    found, speedup = document["approximation"], document["delta"]["latency_speedup"]
    demand = None if found is None else found["budget"]["min_speedup"]
    if demand is None or speedup is None or speedup["median"] >= demand:
        return []
    return [
        f"Warning: {demand:g}× was demanded, and measured when plans were timed; the files are measured "
        f"{interval_text(speedup, 2)}×, which leaves it open: measure on an idle machine with more --runs."
    ]


def _missing_sentences(missing: Mapping[str, str]) -> list[str]:
    if not missing:
        return []
    reasons = "; ".join(dict.fromkeys(missing.values()))
    return [
        f"Warning: not written: {', '.join(missing)}. {reasons}. The converted model is in plan.json and "
        "converted.safetensors: sepconvert.apply(model, 'plan.json') in Python."
    ]


def _merge_sentences(merges: Sequence[Document]) -> list[str]:
    lines = [
        f"Merged: {each['second']} into {each['first']}; {each['reason']}."
        for each in merges
        if each["decision"] == "merged"
    ]
    kept = len(merges) - len(lines)
    if kept:
        lines.append(f"Linear pairs of convolutions kept: {kept} of {len(merges)}; report.json says why.")
    return lines


def _approximation_sentences(found: Document) -> list[str]:
    calibration = found["calibration"]
    if calibration is None:
        return [
            "Warning: without calibration images, factors were fitted to the weights alone, which as a rule "
            "destroys a trained network; pass --calib or --data."
        ]
    lines = [
        f"Calibrated on {calibration['images']:,} images ({calibration['origin']}); "
        f"plans judged on {calibration['heldout']:,} others."
    ]
    if calibration["images"] < _FEW_IMAGES:
        lines.append(
            "Warning: what is fitted to so few images may not hold on others; some hundred are needed "
            "(--calib, --calib-images)."
        )
    attempts = found["finetune"]["attempts"] if found["finetune"] else []
    lines += [
        f"Fine-tuning brought a drop of {each['drop_before_pp']:.2f} pp to {each['drop_pp']:.2f} pp"
        + (": delivered." if each["delivered"] else ", of a plan that is not delivered.")
        for each in attempts
    ]
    return lines


def _optimization(document: Document) -> str:
    """Where it is not the runtime's default."""
    level = document["environment"]["graph_optimization"]
    return "" if level == "all" else f", graph optimization {level}"


def _latency_sentences(document: Document, converted: Sequence[Document]) -> list[str]:
    speedup = document["delta"]["latency_speedup"]
    if speedup is None:
        return []
    latency = document["converted"]["latency_ms"]
    threads = f"{latency['threads']} thread{'s' * (latency['threads'] > 1)}"
    noise_low, noise_high = speedup["noise_floor"]
    lines = [
        f"Latency: {latency['runs']} interleaved runs, batch {latency['batch']}, "
        f"{threads}{_optimization(document)}, median and 95 % interval; "
        f"the original against itself: [{noise_low:.3f}, {noise_high:.3f}]."
    ]
    if not noise_low <= 1 <= noise_high:
        lines.append(
            "Attention: the original differs from itself by more than chance explains: the machine was busy "
            "or changed its pace; measure again (--runs) while it is idle."
        )
    fewer_macs = (document["delta"]["macs_ratio"] or 1) > 1
    if speedup["significant"] and speedup["median"] < 1 and fewer_macs:
        lines.append(
            f"Attention: fewer MACs, yet {1 / speedup['median']:.2f}× the latency. "
            "--gate latency converts only layers that are measured to be faster."
        )
    slower = [
        layer["name"]
        for layer in converted
        if layer["macs"][1] < layer["macs"][0] and _is_slower(layer["latency_speedup"])
    ]
    if slower:
        lines.append(
            f"Attention: fewer MACs but slower when timed alone: {', '.join(slower)}. "
            "--gate latency keeps such layers dense."
        )
    return lines


def causes(document: Document) -> list[str]:
    """Why the gain in time is not that in MACs: of the whole model, then of layers."""
    found, speedup = document["execution"], document["delta"]["latency_speedup"]
    if found is None or speedup is None or document["delta"]["macs_ratio"] == 1:
        return []
    total = sum(found[place][1] for place in _PLACES) or 1.0
    kept, layout = (100 * found[place][1] / total for place in ("kept", "layout"))
    lines = [
        f"The whole model: {times_text(document['delta']['macs_ratio'] or 1.0)} fewer MACs, "
        f"{speedup['median']:.2f}× measured; {kept:.0f} % of the time left is in layers that were not "
        f"replaced, {layout:.0f} % in copies to other layouts; {found['operators'][1]} operators instead of "
        f"{found['operators'][0]}."
    ]
    for layer in document["layers"]:
        if layer["execution"] is not None and layer["execution"]["cause"] is not None:
            macs, gain = layer["macs"], layer["latency_speedup"]["median"]
            lines.append(
                f"{layer['name']}: {macs[0] / macs[1]:.2f}× fewer MACs, {gain:.2f}× measured alone; "
                f"{layer['execution']['cause']}."
            )
    return lines


def _is_slower(speedup: Document | None) -> bool:
    return speedup is not None and speedup["significant"] and speedup["median"] < 1
