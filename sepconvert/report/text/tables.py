"""The report in tables for a terminal of 80 columns, made from the JSON document."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from tabulate import tabulate

from sepconvert.base.errors import some_of
from sepconvert.base.notes import NoteLevel
from sepconvert.measure.metrics.metric import value_number, written_drop
from sepconvert.report.text import forms
from sepconvert.report.text.numbers import (
    TOP1,
    Document,
    Quality,
    as_fast_text,
    by_time,
    count_text,
    divergence_text,
    drop_text,
    duration_text,
    estimate_text,
    fold,
    heading,
    measured_drop,
    peak_memory,
    percent_text,
    ratio_text,
    speedup_text,
    total_time,
    written_count,
    written_size,
)
from sepconvert.report.text.sentences import causes, sentences
from sepconvert.report.text.verdict import convolutions, verdict

_SLOWEST = 12  # operators that have a row of their own

# Stages of a conversion that are named, the least share of one, and the share below which others are none.
_LONGEST, _WORTH_NAMING, _UNNAMED = 5, 0.05, 0.005


def overview(document: Document, style: Literal["text", "html"] = "text") -> str:
    """Return the verdict, and costs and quality of both models, as text or in HTML."""
    notes = [str(note) for note in verdict(document)]
    if style == "html":
        table: str = tabulate(cost_rows(document), _COST_HEADERS, tablefmt="html", disable_numparse=True)
        escaped = map(coded, notes)
        return "\n".join([*(f"<p>{note}</p>" for note in escaped), table])
    return "\n".join([*map(fold, notes), "", _cost_table(document)])


def coded(text: object) -> str:
    """Return a text as HTML, in which what stands in backticks is marked up as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(text)))


def summary(document: Document) -> str:
    """Return the verdict and `details`."""
    first, *_ = sentences(document)
    return f"{fold(str(first))}\n{details(document)}"


def details(document: Document) -> str:
    """Return all that follows the verdict: warnings, tables, the other sentences, causes, and time.

    Reports of version 0.1.0 do not know the stages that the time went to.
    """
    _, *others = sentences(document)
    warnings, notes = (
        [fold(str(note)) for note in others if (note.level is NoteLevel.WARNING) == warns]
        for warns in (True, False)
    )
    lines = [*warnings, "", _cost_table(document)]
    if "forms" in document:
        lines += ["", "In each form, measured together; drops are from the original in floating point:"]
        lines += [
            text_table(forms.rows(document), forms.headers(document), [10, None, None, 13, 13, None, 10])
        ]
    if (approximation := document["approximation"]) is not None:
        lines += _curve_lines(approximation) + _step_lines(approximation)
    lines += ["", *notes]
    if reasons := causes(document):
        lines += ["", "Where the time goes:", *map(fold, reasons)]
    if stages := document.get("stages"):
        lines += ["", fold(time_line(stages))]
    return "\n".join(lines)


def time_line(stages: Sequence[Document]) -> str:
    """Return how long a conversion took, the longest stages with their shares, and the peak memory."""
    total, memory = total_time(stages), written_size(peak_memory(stages))
    shares = [(stage["stage"], stage["wall_s"] / total) for stage in by_time(stages)]
    named = [(name, share) for name, share in shares if share >= _WORTH_NAMING and name != "rest"][:_LONGEST]
    others = max(0.0, 1 - sum(share for _, share in named))
    texts = [f"{name} {percent_text(share, 0)} %" for name, share in (*named, ("others", others))]
    if others < _UNNAMED:
        del texts[-1]
    return f"Time: {duration_text(total)} ({', '.join(texts)}); peak memory {memory}."


def layer_table(layers: Sequence[Document]) -> str:
    """Return one row for every convolution, and below them each reason with its layers."""
    rows = [
        [layer["name"], kernel_text(layer), _scheme(layer), change_text(*layer["macs"]), _error(layer)]
        for layer in layers
    ]
    headers = ["layer", "kernel", "scheme", "MACs", "error"]
    table = text_table(rows, headers, [20, None, 21, 13, None])
    return "\n".join([table, "", *map(fold, reasons(layers))])


def reasons(layers: Sequence[Document], *, most: int | None = None, otherwise: str = "") -> list[str]:
    """Return a sentence for each reason, with its layers, of which no more than `most` are named.

    The reason of a layer that has none is `otherwise`.
    """
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer["reason"] or otherwise, []).append(layer["name"])
    return [
        f"{', '.join(names) if most is None else some_of(names, most)}: {text}."
        for text, names in found.items()
    ]


def structure_table(layers: Sequence[Document]) -> str:
    """Return rank, error at a rank that pays, and singular values, for every structure of every layer."""
    rows = []
    for layer in layers:
        rows.append([layer["name"], "", "", "" if layer["structures"] else "none applies"])
        for structure in layer["structures"]:
            holds = " holds" if structure["holds"] else ""
            rows.append(
                [
                    f"- {structure['scheme']}",
                    f"{structure['rank']}/{structure['full_rank']}{holds}",
                    f"{structure['best_relative_error']:.1e} @ {max(structure['paying_rank'], 1)}",
                    _singular_values(structure),
                ]
            )
    headers = ["layer, structure", "rank", "error @\npaying rank", "singular values\nkept | dropped"]
    return text_table(rows, headers, [24, None, None, 25])


def headline(documents: Mapping[str, Document]) -> str:
    """Return how fast and how good a model became in each of several conversions, in one sentence."""
    found = []
    for name, document in documents.items():
        speedup, drop = document["delta"]["latency_speedup"], measured_drop(document)
        gain = f"{ratio_text(document['delta']['macs_ratio'])} fewer MACs"
        if speedup is not None:
            gain = as_fast_text(speedup)
        lost = "" if drop is None else f" at a drop of {written_drop(drop['value'], drop['unit'])}"
        found.append(f"{name} {gain}{lost}")
    count, _ = convolutions(next(iter(documents.values())))
    return f"One network of {count} convolutions, converted in {len(found)} modes: {', '.join(found)}."


def modes_table(documents: Mapping[str, Document]) -> str:
    """Return one row for each conversion of the same model."""
    rows = []
    for name, document in documents.items():
        delta, drop = document["delta"], measured_drop(document)
        speedup = delta["latency_speedup"]
        rows.append(
            [
                name,
                ratio_text(delta["params_ratio"]),
                ratio_text(delta["macs_ratio"]),
                "-" if speedup is None else speedup_text(speedup),
                "-" if drop is None else " → ".join(_values(document)),
                "-" if drop is None else drop_text(drop, unit=False),
            ]
        )
    measured = (Quality.of(each) for each in documents.values() if each["delta"]["metric"] is not None)
    quality = next(measured, TOP1)
    names = "fewer\nparams", "fewer\nMACs", "as fast", quality.of_values, quality.of_drops
    headers = ["mode", *names]
    # The mark of a speed-up is below its interval: beside it, rows would be wider than a terminal.
    return text_table(rows, headers, [None, None, None, 18, None, None])


def _values(document: Document) -> list[str]:
    """Return the value of the metric, without its unit, of the original and of the converted model."""
    metric = document["delta"]["metric"]
    return [value_number(metric[side], metric["unit"]) for side in ("original", "converted")]


def curve_table(curve: Sequence[Document]) -> str:
    """Return the drop of the metric against cost: one row for every plan that was considered."""
    rows = []
    drops = [point["drop"] for point in curve if point["drop"] is not None]
    most = max((drop["n"] for drop in drops), default=0)
    for point in curve:
        heldout, drop, speedup = point["heldout"], point["drop"], point["latency_speedup"]
        rows.append(
            [
                ratio_text(point["macs_ratio"]),
                point["converted"],
                "-" if heldout is None else divergence_text(heldout["divergence"]),
                # Units are in the header: with them, rows would be wider than a terminal.
                "-" if drop is None else drop_text(drop, unit=False) + _fewer(drop, most),
                ratio_text(point["predicted_speedup"]) or "-",
                "-"
                if speedup is None
                else estimate_text(speedup["median"], speedup["ci95"]) + _noise(speedup),
                "<-" if point["delivered"] else "",
            ]
        )
    lost = heading("drop", drops[0]["unit"] if drops else "")
    predicted, measured = "speed-\nup,\npre-\ndicted", "speed-up\nmeasured"
    headers = ["fewer\nMACs", "lay-\ners", "diver-\ngence", lost, predicted, measured, ""]
    legend = ["~ within noise"] if any(_noise(point["latency_speedup"]) for point in curve) else []
    fewer = sorted({drop["n"] for drop in drops if drop["n"] < most})
    if fewer:
        legend.append(f"* by {' or '.join(f'{n:,}' for n in fewer)} of the {most:,} images, which decided")
    return "\n".join([text_table(rows, headers), *legend])


def _fewer(drop: Document, most: int) -> str:
    """Return a mark if a drop was measured on some of the images only."""
    return " *" if drop["n"] < most else ""


def _noise(speedup: Document | None) -> str:
    """Return a mark if noise can explain a speed-up."""
    return "" if speedup is None or speedup["significant"] else " ~"


def anatomy_text(anatomy: Document) -> str:
    """Return start-up times, memory, latency by threads and batch, and the slowest operators."""
    startup, peak = anatomy["startup"], anatomy["peak_activation_bytes"]
    lines = [
        f"Creating a session takes {startup['session_ms']:.1f} ms, its first run "
        f"{startup['first_run_ms']:.2f} ms (medians of {startup['sessions']} sessions).",
        "Peak memory of activations: unknown, as shapes are not known."
        if peak is None
        else f"Peak memory of activations: {peak / 2**20:.2f} MiB.",
    ]
    rows = [
        [
            latency["threads"],
            latency["batch"],
            estimate_text(latency["median"], latency["ci95"], digits=3),
            f"{latency['p90']:.3f}",
            f"{latency['per_second']:,.0f}",
        ]
        for latency in anatomy["latencies_ms"]
    ]
    table = text_table(rows, ["threads", "batch", "latency, ms", "p90", "samples/s"])
    return "\n".join([*map(fold, lines), "", table, "", _operator_table(anatomy["operators"])])


def text_table(
    rows: Sequence[Sequence[object]], headers: Sequence[str], widths: Sequence[int | None] | None = None
) -> str:
    """Return a table for a terminal; `widths` are those at which the cells of columns are folded."""
    # Numbers are formatted already: tabulate would align and round them anew.
    table: str = tabulate(rows, headers=headers, maxcolwidths=widths, disable_numparse=True)
    return table


def _operator_table(operators: Sequence[Document]) -> str:
    """Return the slowest operators one by one, and the others together."""
    total = sum(operator["milliseconds"] for operator in operators) or 1.0
    ordered = sorted(operators, key=lambda operator: -operator["milliseconds"])
    rows = [
        [
            operator["name"] if operator["layer"] is None else operator["layer"],
            operator["operator"],
            operator["kernel"] or "",
            f"{operator['milliseconds']:.3f}",
            percent_text(operator["milliseconds"] / total, 1),
        ]
        for operator in ordered[:_SLOWEST]
    ]
    if rest := ordered[_SLOWEST:]:
        others = sum(operator["milliseconds"] for operator in rest)
        rows.append([f"{len(rest)} others", "", "", f"{others:.3f}", percent_text(others / total, 1)])
    return text_table(rows, ["layer", "operator", "kernel", "ms", "%"], [30, None, None, None, None])


_COST_HEADERS = ["", "original", "converted", "gain"]


def _cost_table(document: Document) -> str:
    return text_table(cost_rows(document), _COST_HEADERS, [None, None, None, 18])


def cost_rows(document: Document) -> list[list[str]]:
    """Return costs and quality: name, values of the original and of the converted model, and the gain."""
    before, after, delta = document["original"], document["converted"], document["delta"]
    rows = [
        ["parameters", f"{before['params']:,}", f"{after['params']:,}", ratio_text(delta["params_ratio"])],
        ["MACs", f"{before['macs']:,}", f"{after['macs']:,}", ratio_text(delta["macs_ratio"])],
        ["FLOPs (2 × MACs)", f"{before['flops']:,}", f"{after['flops']:,}", ratio_text(delta["macs_ratio"])],
        ["weights, bytes", *(count_text(side["weight_bytes"]) for side in (before, after)), ""],
        ["ONNX file, bytes", *(count_text(side["onnx_bytes"]) for side in (before, after)), ""],
    ]
    if (speedup := delta["latency_speedup"]) is not None:
        latencies = (side["latency_ms"] for side in (before, after))
        texts = (estimate_text(latency["median"], latency["ci95"], digits=3) for latency in latencies)
        rows.append(["latency, ms", *texts, speedup_text(speedup)])
    return rows + _quality_rows(document)


def _quality_rows(document: Document) -> list[list[str]]:
    """Return the rows of a classifier's accuracy, and of the metric if it is another."""
    before, after = (document[side]["accuracy"] for side in ("original", "converted"))
    quality, drop = Quality.of(document), measured_drop(document)
    change, rows = "" if drop is None else f"drop {drop_text(drop)}", list[list[str]]()
    for key in ("top1", "top5"):
        if before is not None and before[key] is not None:
            shares = (percent_text(side[key]) for side in (before, after))
            rows.append([f"top-{key[-1]}, %", *shares, change if key == quality.name else ""])
    if drop is not None and not any(row[-1] for row in rows):
        rows.append([quality.of_values, *_values(document), change])
    return rows


def _step_lines(approximation: Document) -> list[str]:
    """Return what each step of the fit achieved, after a blank line."""
    steps = approximation["steps"]
    if not steps:
        return []
    labelled = any(step["accuracy"] is not None for step in steps)
    shares = ["agreement", "accuracy"] if labelled else ["agreement"]
    rows = [
        [
            step["name"] + (" (not kept)" if step["kind"] == "batchnorm" and not step["kept"] else ""),
            divergence_text(step["divergence"]),
            *(percent_text(step[share], 1) for share in shares),
        ]
        for step in steps
    ]
    headers = ["step", "divergence", "agree, %", "accuracy, %"]
    return ["", "On the held-out images:", text_table(rows, headers[: 2 + len(shares)])]


def _curve_lines(approximation: Document) -> list[str]:
    """Return the trade-off curve, after a blank line, if it has more than one plan."""
    if len(approximation["curve"]) < 2:
        return []
    measured = approximation["plans_measured_on_data"]
    plans = "1 plan was" if measured == 1 else f"{measured} plans were"
    return ["", curve_table(approximation["curve"]), f"{plans} measured on `data`; <- is delivered."]


def kernel_text(layer: Document) -> str:
    """Return size and channels of a layer's kernel, such as `3×3 64→128`, or the layer's kind."""
    spec = layer["kernel"]
    if spec is None:
        return str(layer["kind"])
    size = "×".join(map(str, spec["kernel_size"]))
    groups = f" /{spec['groups']}" if spec["groups"] > 1 else ""
    return f"{size} {spec['in_channels']}→{spec['out_channels']}{groups}"


def _scheme(layer: Document) -> str:
    if layer["decision"] == "kept":
        return "kept"
    return str(layer["scheme"]) if layer["rank"] is None else f"{layer['scheme']} {layer['rank']}"


def change_text(before: int, after: int) -> str:
    """Return a count before and after, in three digits each, or once if it is the same."""
    return written_count(before) if before == after else f"{written_count(before)} → {written_count(after)}"


def _error(layer: Document) -> str:
    if layer["approximation"] is not None:
        return f"{layer['output_error']:.2f} out"
    if layer["weight_error"] is not None:
        return f"{layer['weight_error']:.1e}" if layer["weight_error"] else "0"
    errors = [structure["best_relative_error"] for structure in layer["structures"]]
    return f"≥ {min(errors):.1e}" if errors else ""


def _singular_values(structure: Document) -> str:
    kept, dropped = (
        " ".join(f"{value:.1e}" for value in structure[f"singular_values_{side}"])
        for side in ("kept", "dropped")
    )
    return f"{kept} | {dropped or '-'}" if kept else ""
