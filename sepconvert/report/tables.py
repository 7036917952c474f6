"""The report in tables, from the same document as the JSON."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from sepconvert.report.numbers import (
    Document,
    bytes_text,
    drop_text,
    folded,
    interval_text,
    percent_text,
    points_text,
    speedup_text,
    times_text,
)
from sepconvert.report.sentences import causes, sentences

_SLOWEST = 12  # operators that are shown one by one


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
    return "\n".join([table, "", *(folded(f"{', '.join(names)}: {why}.") for why, names in reasons.items())])


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
            interval_text(each, 3),
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
        ["parameters", f"{before['params']:,}", f"{after['params']:,}", times_text(delta["params_ratio"])],
        ["MACs", f"{before['macs']:,}", f"{after['macs']:,}", times_text(delta["macs_ratio"])],
        ["FLOPs (2 × MACs)", f"{before['flops']:,}", f"{after['flops']:,}", times_text(delta["macs_ratio"])],
        ["weights, bytes", *(bytes_text(each["weight_bytes"]) for each in (before, after)), ""],
        ["ONNX file, bytes", *(bytes_text(each["onnx_bytes"]) for each in (before, after)), ""],
    ]
    speedup = delta["latency_speedup"]
    if speedup is not None:
        rows.append(
            [
                "latency, ms",
                interval_text(before["latency_ms"], 3),
                interval_text(after["latency_ms"], 3),
                speedup_text(speedup),
            ]
        )
    if before["accuracy"] is not None:
        rows.append(["top-1, %", percent_text(before, "top1"), percent_text(after, "top1"), drop_text(delta)])
        if before["accuracy"]["top5"] is not None:
            rows.append(["top-5, %", percent_text(before, "top5"), percent_text(after, "top5"), ""])
    widths = [None, None, None, 18]
    headers = ["", "original", "converted", "gain"]
    table: str = tabulate(rows, headers=headers, maxcolwidths=widths, disable_numparse=True)
    lines = [*map(folded, sentences(document)), *_approximation_tables(document)]
    if reasons := causes(document):
        lines += ["", "Where the time goes:", *map(folded, reasons)]
    return "\n".join([table, "", *lines])


def modes_table(documents: Mapping[str, Document]) -> str:
    """One row for each conversion of the same model."""
    rows = []
    for name, document in documents.items():
        delta = document["delta"]
        speedup, drop = delta["latency_speedup"], delta["accuracy_drop_pp"]
        rows.append(
            [
                name,
                times_text(delta["params_ratio"]),
                times_text(delta["macs_ratio"]),
                "-" if speedup is None else interval_text(speedup, 2),
                "-" if drop is None else points_text(drop),
            ]
        )
    headers = ["mode", "fewer\nparameters", "fewer\nMACs", "times\nas fast", "accuracy\nlost, pp"]
    table: str = tabulate(rows, headers=headers, disable_numparse=True)
    return table


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
                times_text(point["macs_ratio"]),
                point["converted"],
                "-" if heldout is None else f"{heldout['divergence']:.4f}",
                "-" if drop is None else points_text(drop),
                times_text(point["predicted_speedup"]) or "-",
                "-" if speedup is None else interval_text(speedup, 2),
                "<-" if point["delivered"] else "",
            ]
        )
    headers = ["fewer\nMACs", "layers", "diver-\ngence", "drop, pp", "speed-up,\npredicted", "measured", ""]
    table: str = tabulate(rows, headers=headers, disable_numparse=True)
    return table


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
