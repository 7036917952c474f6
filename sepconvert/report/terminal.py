"""The report as text, from the same document as the JSON."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from sepconvert.report.risks import risks

Document = Mapping[str, Any]

_WIDTH = 80  # columns of a terminal
_PLACES = ("converted", "kept", "layout", "other")  # where time goes
_SLOWEST = 12  # operators that are shown one by one

# Even for a layer of some 64 channels, of which an image of 8×8 shows 64 patches with 576 elements each.
_FEW_IMAGES = 64


def layer_table(layers: Sequence[Document]) -> str:
    """One row for every convolution, and below the reasons, each with its layers."""
    rows = [
        [layer["name"], _kernel(layer), _what(layer), _change(*layer["macs"]), _error(layer)]
        for layer in layers
    ]
    headers = ["layer", "kernel", "scheme", "MACs", "error"]
    widths = [20, None, 21, 13, None]
    table = tabulate(rows, headers=headers, maxcolwidths=widths, disable_numparse=True)
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(layer["reason"], []).append(layer["name"])
    return "\n".join([table, "", *(_folded(f"{', '.join(names)}: {why}.") for why, names in reasons.items())])


def anatomy_text(anatomy: Document) -> str:
    """Start-up, memory, latency by threads and batch, and the layers that take longest."""
    startup, peak = anatomy["startup"], anatomy["peak_activation_bytes"]
    lines = [
        f"A new session takes {startup['session_ms']:.1f} ms, its first run {startup['first_run_ms']:.2f} ms "
        f"(medians of {startup['sessions']}).",
        f"Activations: {peak / 2**20:.2f} MiB are alive at once." if peak is not None
        else "Activations: shapes are not known.",
    ]  # fmt: skip
    latencies = [
        [
            each["threads"],
            each["batch"],
            _interval(each, 3),
            f"{each['p90']:.3f}",
            f"{each['per_second']:,.0f}",
        ]
        for each in anatomy["latencies_ms"]
    ]
    headers = ["threads", "batch", "latency, ms", "p90", "samples/s"]
    table = tabulate(latencies, headers=headers, disable_numparse=True)
    return "\n".join([*lines, "", table, "", _operators(anatomy["operators"])])


def _operators(operators: Sequence[Document]) -> str:
    """The slowest, and what the others take together."""
    total = sum(each["milliseconds"] for each in operators) or 1.0
    ordered = sorted(operators, key=lambda each: -each["milliseconds"])
    rows = [
        [
            each["layer"] if each["layer"] is not None else each["name"],
            each["operator"],
            each["kernel"] or "",
            f"{each['milliseconds']:.3f}",
            f"{100 * each['milliseconds'] / total:.1f}",
        ]
        for each in ordered[:_SLOWEST]
    ]
    if rest := ordered[_SLOWEST:]:
        others = sum(each["milliseconds"] for each in rest)
        rows.append([f"{len(rest)} others", "", "", f"{others:.3f}", f"{100 * others / total:.1f}"])
    headers = ["layer", "operator", "kernel", "ms", "%"]
    return tabulate(rows, headers=headers, maxcolwidths=[30, None, None, None, None], disable_numparse=True)


def structure_table(layers: Sequence[Document]) -> str:
    """Rank, best error where it would pay, and singular values at the cut, for every structure."""
    rows = []
    for layer in layers:
        rows.append([layer["name"], "", "", "" if layer["structures"] else "none applies"])
        for structure in layer["structures"]:
            rows.append(
                [
                    f"- {structure['scheme']}",
                    f"{structure['rank']}/{structure['full_rank']}"
                    + (" holds" if structure["holds"] else ""),
                    f"{structure['best_relative_error']:.1e} @ {max(structure['paying_rank'], 1)}",
                    _spectrum(structure),
                ]
            )
    headers = ["layer, structure", "rank", "error @\npaying rank", "singular values\nkept | dropped"]
    return tabulate(rows, headers=headers, maxcolwidths=[24, None, None, 25], disable_numparse=True)


def summary(document: Document) -> str:
    """What the conversion brought, as a table and in sentences."""
    before, after, delta = document["original"], document["converted"], document["delta"]
    rows = [
        ["parameters", f"{before['params']:,}", f"{after['params']:,}", _times(delta["params_ratio"])],
        ["MACs", f"{before['macs']:,}", f"{after['macs']:,}", _times(delta["macs_ratio"])],
        ["FLOPs (2 × MACs)", f"{before['flops']:,}", f"{after['flops']:,}", _times(delta["macs_ratio"])],
        ["weights, bytes", *(_bytes(each["weight_bytes"]) for each in (before, after)), ""],
        ["ONNX file, bytes", *(_bytes(each["onnx_bytes"]) for each in (before, after)), ""],
    ]
    speedup = delta["latency_speedup"]
    if speedup is not None:
        rows.append(
            [
                "latency, ms",
                _interval(before["latency_ms"], 3),
                _interval(after["latency_ms"], 3),
                _speedup(speedup),
            ]
        )
    if before["accuracy"] is not None:
        rows.append(["top-1, %", _percent(before, "top1"), _percent(after, "top1"), _drop(delta)])
        if before["accuracy"]["top5"] is not None:
            rows.append(["top-5, %", _percent(before, "top5"), _percent(after, "top5"), ""])
    widths = [None, None, None, 18]
    headers = ["", "original", "converted", "gain"]
    table: str = tabulate(rows, headers=headers, maxcolwidths=widths, disable_numparse=True)
    lines = [*map(_folded, sentences(document)), *_approximation_tables(document)]
    if reasons := causes(document):
        lines += ["", "Where the time goes:", *map(_folded, reasons)]
    return "\n".join([table, "", *lines])


def story(document: Document) -> list[str]:
    """A conversion in plain words, for somebody who sees one for the first time."""
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    delta, schemes = document["delta"], sorted({layer["scheme"] for layer in layers})
    how = f" ({', '.join(schemes)})" if schemes else ""
    lines = [
        f"{len(layers)} of {len(document['layers'])} convolutions were replaced{how}.",
        f"For an image that is {_times(delta['macs_ratio'])} fewer multiplications, and the network has "
        f"{_times(delta['params_ratio'])} fewer parameters.",
    ]
    if document["approximation"] is None:
        lines.append(
            "Its answers are the same: they differ by "
            f"{document['verification']['torch_max_abs_diff']:.0e}, which is rounding."
        )
    if (speedup := delta["latency_speedup"]) is not None:
        lines.append(f"Measured in ONNX Runtime it is {_speedup(speedup)} as fast.")
    if (drop := delta["accuracy_drop_pp"]) is not None:
        count = document["original"]["accuracy"]["n"]
        right = [_percent(document[which], "top1") for which in ("converted", "original")]
        lines.append(
            f"Of {count:,} images it classifies {right[0]} % rightly, the original {right[1]} %: "
            f"{_points(drop)} points lost."
        )
    return [_folded(line) for line in (*lines, *_untimed_sentences(document), *warnings_of(document))]


def modes_table(documents: Mapping[str, Document]) -> str:
    """One row for each conversion of the same model."""
    rows = []
    for name, document in documents.items():
        delta = document["delta"]
        speedup, drop = delta["latency_speedup"], delta["accuracy_drop_pp"]
        rows.append(
            [
                name,
                _times(delta["params_ratio"]),
                _times(delta["macs_ratio"]),
                "-" if speedup is None else _interval(speedup, 2),
                "-" if drop is None else _points(drop),
            ]
        )
    headers = ["mode", "fewer\nparameters", "fewer\nMACs", "times\nas fast", "accuracy\nlost, pp"]
    table: str = tabulate(rows, headers=headers, disable_numparse=True)
    return table


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
    untimed = [layer["name"] for layer in document["layers"] if "--measure-seconds" in layer["reason"]]
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
        f"{_interval(speedup, 2)}×, which leaves it open: measure on an idle machine with more --runs."
    ]


def _missing_sentences(missing: Mapping[str, str]) -> list[str]:
    if not missing:
        return []
    reasons = "; ".join(dict.fromkeys(missing.values()))
    return [
        f"Warning: not written: {', '.join(missing)}. {reasons}. The converted model is in plan.json and "
        "converted.safetensors: sepconvert.apply(model, 'plan.json') in Python."
    ]


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


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


def _approximation_tables(document: Document) -> list[str]:
    """What each step brought, and the curve; each after a blank line."""
    found, lines = document["approximation"], list[str]()
    if found is None:
        return lines
    if found["steps"]:
        names = ["step", "divergence", "agree, %"]
        labelled = any(step["accuracy"] is not None for step in found["steps"])
        headers = [*names, "accuracy, %"] if labelled else names
        rows = [
            [
                step["name"] + ("" if step["kept"] else " (not kept)" if "BatchNorm" in step["name"] else ""),
                f"{step['divergence']:.4f}",
                *(
                    "-" if step[name] is None else f"{100 * step[name]:.1f}"
                    for name in ("agreement", "accuracy")[: len(headers) - 2]
                ),
            ]
            for step in found["steps"]
        ]
        lines += ["", "On the images held out:", tabulate(rows, headers=headers, disable_numparse=True)]
    if len(found["curve"]) > 1:
        measured = found["plans_measured_on_data"]
        lines += [
            "",
            curve_table(found["curve"]),
            f"{measured} plans were measured on --data; <- is delivered.",
        ]
    return lines


def curve_table(curve: Sequence[Document]) -> str:
    """Accuracy against cost: one row for every plan that was looked at."""
    rows = []
    for point in curve:
        heldout, drop, speedup = point["heldout"], point["accuracy_drop_pp"], point["latency_speedup"]
        rows.append(
            [
                _times(point["macs_ratio"]),
                point["converted"],
                "-" if heldout is None else f"{heldout['divergence']:.4f}",
                "-" if drop is None else _points(drop),
                _times(point["predicted_speedup"]) or "-",
                "-" if speedup is None else _interval(speedup, 2),
                "<-" if point["delivered"] else "",
            ]
        )
    headers = ["fewer\nMACs", "layers", "diver-\ngence", "drop, pp", "speed-up,\npredicted", "measured", ""]
    table: str = tabulate(rows, headers=headers, disable_numparse=True)
    return table


def _folded(sentence: str) -> str:
    """On lines of a terminal, the second and later ones indented."""
    return textwrap.fill(
        sentence, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


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
        f"The whole model: {_times(document['delta']['macs_ratio'] or 1.0)} fewer MACs, "
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


def _kernel(layer: Document) -> str:
    spec = layer["kernel"]
    if spec is None:
        return str(layer["kind"])
    size = "×".join(map(str, spec["kernel_size"]))
    groups = f" /{spec['groups']}" if spec["groups"] > 1 else ""
    return f"{size} {spec['in_channels']}→{spec['out_channels']}{groups}"


def _what(layer: Document) -> str:
    if layer["decision"] == "kept":
        return "kept"
    return str(layer["scheme"]) if layer["rank"] is None else f"{layer['scheme']} {layer['rank']}"


def _change(before: int, after: int) -> str:
    return _short(before) if before == after else f"{_short(before)} → {_short(after)}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _error(layer: Document) -> str:
    if layer["approximation"] is not None:
        return f"{layer['output_error']:.2f} out"
    if layer["weight_error"] is not None:
        return f"{layer['weight_error']:.1e}" if layer["weight_error"] else "0"
    errors = [structure["best_relative_error"] for structure in layer["structures"]]
    return f"≥ {min(errors):.1e}" if errors else ""


def _spectrum(structure: Document) -> str:
    kept, dropped = (
        " ".join(f"{value:.1e}" for value in structure[f"singular_values_{side}"])
        for side in ("kept", "dropped")
    )
    return f"{kept} | {dropped or '-'}" if kept else ""


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _interval(values: Document, digits: int) -> str:
    low, high = values["ci95"]
    return f"{values['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _points(drop: Document) -> str:
    low, high = drop["ci95"]
    return f"{drop['value']:.2f} [{low:.2f}, {high:.2f}]"


def _speedup(speedup: Document) -> str:
    note = "" if speedup["significant"] else " ~ within noise"
    return f"{_interval(speedup, 2)}×{note}"


def _percent(profile: Document, key: str) -> str:
    return f"{100 * profile['accuracy'][key]:.2f}"


def _drop(delta: Document) -> str:
    drop = delta["accuracy_drop_pp"]
    low, high = drop["ci95"]
    return f"drop {drop['value']:.2f} pp [{low:.2f}, {high:.2f}]"
