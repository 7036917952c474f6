"""Tiles of a page: each quantity before and after, with what was gained or lost below."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sepconvert.measure.metrics.metric import value_number, written, written_drop, written_interval
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    estimate_text,
    ratio_text,
    three_digits,
    written_count,
    written_size,
)

_LEGEND = {
    "MACs": "MACs: multiply-adds, the arithmetic for one sample.",
    "pp": "pp: percentage points.",
    "[": "[ ]: the range that holds the true value with 95 % confidence.",
    "~": "~: a difference that noise may explain.",
    "top-1": "top-1: the share of samples whose class is found.",
    "top5": "top5: the share of samples whose class is among the five likeliest.",
    "miou": "miou: the overlap of regions that are found with the true ones, over what either covers, as "
    "a mean over classes.",
    "dice": "dice: the overlap of the regions that are found with the true ones.",
    "f1": "f1: how precise and how complete what is found is, in one number.",
    "psnr": "psnr: how close pictures are to the true ones, in decibels.",
    "ssim": "ssim: how alike pictures are to the true ones in structure, 1 at best.",
    "auc": "auc: how often a positive sample is ranked above a negative one.",
    "map": "map: the mean average precision of the boxes that are found.",
    "cer": "cer: the share of characters that are wrong.",
}
"""What a reader may not know, by what occurs in a tile."""


@dataclass(frozen=True)
class Tile:
    """A quantity before and after, or one value for both; `change` says what was gained or lost."""

    label: str
    values: tuple[str, ...]
    change: str = ""
    note: str = ""


def report_tiles(document: Document) -> list[Tile]:
    """Return the tiles of a report.

    In int8, speed and size are compared with the original in int8, the metric with the original in floating
    point.
    """
    before, after, delta = (document[key] for key in ("original", "converted", "delta"))
    outputs = _outputs(document)
    forms = document.get("forms")
    if forms is None:
        return [*outputs, *tiles(before, after, delta)]
    note, in_float = "", forms["float"]["latency_ms"]
    if in_float is not None:
        over = ratio_text(forms["converted_int8"]["delta"]["latency_speedup"]["median"])
        note = f"{over} as fast as in floating point ({three_digits(in_float['median'])} ms)"
    found = tiles(before, after, delta, "int8 alone")
    names = {"time per run": note, "accuracy": "from floating point to int8"}
    return [*outputs, *(Tile(each.label, each.values, each.change, _note(each, names)) for each in found)]


def _note(tile: Tile, notes: dict[str, str]) -> str:
    return next((note for name, note in notes.items() if name in tile.label), tile.note)


def tiles(before: Document, after: Document, delta: Document, base: str = "") -> list[Tile]:
    """Return the tiles of two profiles, and of the differences between them.

    Args:
        before: of a report or of a profile, as JSON.
        after: the same of the other model.
        delta: differences, null where they were not measured.
        base: name of the first, where it is not plain.
    """
    found = [*_quality(before, after, delta), *_time(before, after, delta, base)]
    for label, key, ratio in (("MACs", "macs", "macs_ratio"), ("parameters", "params", "params_ratio")):
        found.append(
            Tile(
                label,
                _pair(written_count(before[key]), written_count(after[key])),
                _ratio(before[key], after[key], delta[ratio]),
            )
        )
    sizes = before["onnx_bytes"], after["onnx_bytes"]
    if None not in sizes:
        change = _ratio(*sizes, sizes[0] / sizes[1], ("smaller", "larger"))
        found.append(Tile("ONNX file", _pair(*map(written_size, sizes)), change))
    return found


def legend(found: Sequence[Tile]) -> str:
    """Return what a reader may not know of the words and signs in tiles."""
    text = " ".join(" ".join((tile.label, *tile.values, tile.change)) for tile in found)
    return " ".join(
        explained
        for sign, explained in _LEGEND.items()
        if (re.search(rf"\b{sign}\b", text) if sign[0].isalpha() else sign in text)
    )


def _outputs(document: Document) -> list[Tile]:
    """Return whether outputs are the same, of an exact conversion that converted anything."""
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    if document["approximation"] is not None or not layers:
        return []
    moved = f"{document['verification']['torch_max_abs_diff']:.0e}"
    if all(layer["exact"] for layer in layers):
        return [Tile("outputs", ("exact",), f"the same but for rounding ({moved})")]
    return [Tile("outputs", ("within tolerance",), f"they differ by up to {moved}")]


def _quality(before: Document, after: Document, delta: Document) -> list[Tile]:
    """Return the value of the metric, if it is known of both."""
    metrics: list[Document] = [side["metric"] for side in (before, after) if side.get("metric")]
    if len(metrics) < 2 or metrics[0]["name"] != metrics[1]["name"]:
        return []
    metric, unit = metrics[1], metrics[1]["unit"]
    quality = Quality(metric["name"], unit, metric["higher_is_better"])
    first, second = (each["value"] for each in metrics)
    values = _pair(value_number(first, unit), value_number(second, unit))
    values = (*values[:-1], written(second, unit))
    label = f"accuracy ({quality.heading})" if quality.is_top1 else quality.name
    change = "" if delta["metric"] is None else _lost(delta["metric"])
    return [Tile(label, values, change, f"on {metric['n']:,} samples")]


def _lost(metric: Document) -> str:
    """Return what a metric lost or gained, with its interval."""
    drop, unit, ends = metric["drop"], metric["unit"], metric["ci95"]
    lost, gained = ("lost", "gained") if metric["higher_is_better"] else ("worse", "better")
    if not drop:
        return f"unchanged {written_interval(ends, unit)}"
    if drop < 0:
        drop, lost, ends = -drop, gained, [-ends[1], -ends[0]]
    return f"{written_drop(drop, unit)} {lost} {written_interval(ends, unit)}"


def _time(before: Document, after: Document, delta: Document, base: str) -> list[Tile]:
    """Return the latencies, if both are known."""
    latencies = [side["latency_ms"] for side in (before, after)]
    if None in latencies:
        return []
    first, second = (three_digits(each["median"]) for each in latencies)
    batch, speedup = latencies[1]["batch"], delta["latency_speedup"]
    change = ""
    if speedup is not None:
        than = f" as {base}" if base else ""
        noise = "" if speedup["significant"] else "\N{NO-BREAK SPACE}~"
        change = f"{estimate_text(speedup['median'], speedup['ci95'], f'× as fast{than}')}{noise}"
    label = "time per run" if batch == 1 else f"time per run of {batch} samples"
    return [Tile(label, (first, f"{second} ms"), change)]


def _ratio(
    before: float, after: float, ratio: float | None, words: tuple[str, str] = ("fewer", "more")
) -> str:
    """Return a ratio of costs in words."""
    if before == after:
        return "unchanged"
    if ratio is None:
        return ""
    return f"{ratio_text(ratio)} {words[0]}" if ratio >= 1 else f"{ratio_text(1 / ratio)} {words[1]}"


def _pair(before: str, after: str) -> tuple[str, ...]:
    return (after,) if before == after else (before, after)
