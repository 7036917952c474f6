"""Plots to embed in a page as SVG text, and kernels as PNG data URLs."""

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sepconvert.report.pictures.exhibits import KernelPair
from sepconvert.report.pictures.images import png
from sepconvert.report.text.forms import NAMES
from sepconvert.report.text.numbers import Document, Quality, heading

# Placeholders for the colours of text, before and after, which the page's light or dark scheme defines.
_INK, _BEFORE, _AFTER = "#010203", "#010204", "#010205"


STAGE_COLOURS = (
    "var(--bar)", "var(--after)", "var(--good)",
    *(f"color-mix(in srgb, var(--{name}) 50%, var(--paper))" for name in ("bar", "after", "good")),
    "color-mix(in srgb, var(--ink) 50%, var(--paper))", "color-mix(in srgb, var(--ink) 20%, var(--paper))",
)  # fmt: skip
"""Colours of the stages of a conversion, from the longest on; the last is that of all shorter ones."""

_PAPER, *_STAGES = (f"#0102{number:02x}" for number in range(6, 7 + len(STAGE_COLOURS)))


_PAGE_COLOURS = {
    _INK: "currentColor", _BEFORE: "var(--bar)", _AFTER: "var(--after)", _PAPER: "var(--paper)",
    **dict(zip(_STAGES, STAGE_COLOURS, strict=True)),
}  # fmt: skip


_KERNEL_COLOURS = "RdBu_r"


_LINE_STYLES = ("-", "--", ":", "-.")  # for the second and later models


_PIXELS_PER_WEIGHT = 12


def trade_off(curve: Sequence[Document], quality: Quality) -> str:
    """Return a plot of divergence, and of the change of the metric if measured, against each plan's gain.

    `curve` is that of the report; plans that were not carried out are left out. Markers of plans whose
    measured speed-up is within noise are hollow.
    """
    plans = [point for point in curve if point["heldout"] is not None and point["converted"]]
    scored = [point for point in plans if point["drop"] is not None]
    timed = all(point["latency_speedup"] is not None for point in plans)

    def gain(point: Document) -> float:
        return float(point["latency_speedup"]["median"] if timed else point["macs_ratio"])

    figure = Figure(figsize=(7, 5 if scored else 3), layout="constrained")
    upper, *lower = figure.subplots(1 + bool(scored), sharex=True, squeeze=False)[:, 0]
    divergences = [point["heldout"]["divergence"] for point in plans]
    line = sorted(zip(map(gain, plans), divergences, strict=True))
    upper.plot(*zip(*line, strict=True), "-", color=_INK, alpha=0.4, linewidth=1)
    for point, divergence in zip(plans, divergences, strict=True):
        upper.plot(gain(point), divergence, "o", **_marker(point))
    if divergences and min(divergences) > 0:
        upper.set_yscale("log")
    upper.set_ylabel("divergence from\nthe original", color=_INK)
    for axes in lower:
        axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
        for point in scored:
            sign = -1 if quality.higher_is_better else 1
            change, *ends = (sign * value for value in (point["drop"]["value"], *point["drop"]["ci95"]))
            bars = [[change - min(ends)], [max(ends) - change]]
            axes.errorbar(gain(point), change, bars, fmt="o", capsize=3, **_marker(point))
        axes.set_ylabel(f"change of\n{heading(quality.heading, quality.unit)}", color=_INK)
    last = lower[0] if lower else upper
    last.set_xlabel("measured speed-up, ×" if timed else "fewer MACs, ×", color=_INK)
    for axes in (upper, *lower):
        _dress(axes)
    return _svg(
        figure, f"Divergence and change of {quality.noun} against the gain, for every plan carried out"
    )


def _marker(point: Document) -> dict[str, Any]:
    marker = {"color": _AFTER, "markersize": 9} if point["delivered"] else {"color": _BEFORE, "markersize": 6}
    speedup = point["latency_speedup"]
    hollow = speedup is not None and not speedup["significant"]  # noise can explain it
    return {**marker, "markerfacecolor": "none"} if hollow else marker


def four_forms(document: Document) -> str:
    """Return a plot of the metric against the measured speed-up over the original in floating point.

    It shows the four forms of a conversion to int8, and a line through the int8 plans of the curve. Without a
    metric, the divergence is not comparable between forms: only speeds are shown.
    """
    forms, quality = document["forms"], Quality.of(document)
    base = forms["int8"]["delta"]["latency_speedup"]["median"]
    approximation = document["approximation"]
    curve = () if approximation is None else approximation["curve"]
    plans = [point for point in curve if point["latency_speedup"] and point["drop"]]
    original = forms["float"]["metric"]
    sign = -1 if quality.higher_is_better else 1
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    line = sorted(
        (base * point["latency_speedup"]["median"], original["value"] + sign * point["drop"]["value"])
        for point in plans
    )
    if line:
        axes.plot(*zip(*line, strict=True), ".-", color=_INK, alpha=0.4, linewidth=1, label="int8 plans")
    for (key, name), marker in zip(NAMES.items(), "osDv", strict=True):
        form = forms[key]
        speedup = form["delta"]["latency_speedup"]
        colour = _AFTER if key == "converted_int8" else _BEFORE
        axes.plot(
            1.0 if speedup is None else speedup["median"], form["metric"]["value"], marker, color=colour,
            markersize=9, label=name,
        )  # fmt: skip
    axes.legend(loc="lower left", frameon=False, labelcolor=_INK, fontsize=8)
    axes.set_xlabel("measured speed-up over the original in floating point, ×", color=_INK)
    axes.set_ylabel(quality.of_values, color=_INK)
    _dress(axes)
    return _svg(figure, f"{quality.of_values} against the measured speed-up, for each form")


def distributions(latencies: Sequence[tuple[str, Document]]) -> str:
    """Return a plot of the cumulative distribution of latencies, with the 95 % interval of each median.

    `latencies` are names of models and their `latency_ms` objects.
    """
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, latency) in enumerate(latencies):
        colour, style = (_AFTER, _LINE_STYLES[(number - 1) % len(_LINE_STYLES)]) if number else (_BEFORE, "-")
        shares = np.linspace(0, 100, len(latency["quantiles"]))
        axes.plot(latency["quantiles"], shares, color=colour, linestyle=style, linewidth=2, label=name)
        axes.axvspan(*latency["ci95"], color=colour, alpha=0.25, linewidth=0)
    axes.legend(loc="lower right", frameon=False, labelcolor=_INK, fontsize=8)
    axes.set_xlabel("milliseconds per run", color=_INK)
    axes.set_ylabel("runs at or below, %", color=_INK)
    # The slowest runs lie outside: to include them would leave no room for the others.
    axes.set_xlim(0, 1.15 * max(latency["quantiles"][-2] for _, latency in latencies))
    _dress(axes)
    return _svg(figure, "Distribution of the latencies")


def time_bar(seconds: Sequence[float]) -> str:
    """Return a bar divided among the stages of a conversion by their seconds, in `STAGE_COLOURS`.

    There is no text in it, which would be too small on a narrow screen: a table has to explain the colours.
    """
    figure = Figure(figsize=(7, 0.35))
    axes: Axes = figure.add_axes((0, 0, 1, 1))
    last = len(_STAGES) - 1
    lengths = [*seconds[:last], sum(seconds[last:])]
    starts = itertools.accumulate(lengths, initial=0.0)
    for colour, length, start in zip(_STAGES, lengths, starts, strict=False):
        axes.barh(0, length, 1, start, color=colour, edgecolor=_PAPER, linewidth=1)
    axes.set_xlim(0, sum(lengths))
    axes.set_ylim(-0.5, 0.5)
    axes.set_axis_off()
    return _svg(figure, "Shares of the stages of the conversion in its time, the longest first")


def spectrum(content: Document) -> str:
    """Return a plot of the singular values of one kernel, on a logarithmic scale, and of the cut."""
    figure = Figure(figsize=(1.5, 0.6))
    axes: Axes = figure.add_axes((0.01, 0.04, 0.98, 0.92))
    numbers, values = zip(*content["values"], strict=True)
    largest = max(values) or 1.0
    axes.semilogy(numbers, np.clip(values, 1e-9 * largest, None), color=_BEFORE, linewidth=1.5)
    if content["cut"] is not None:
        axes.axvline(content["cut"] + 0.5, color=_AFTER, linewidth=1.5)
    axes.set_axis_off()
    axes.patch.set_alpha(0)
    cut = "not cut" if content["cut"] is None else f"cut after {content['cut']}"
    return _svg(figure, f"{content['full_rank']} singular values as {content['scheme']}, {cut}")


def kernels(pair: KernelPair) -> dict[str, Any]:
    """Return filters before and after as data URLs, on one colour scale, and the size of each in pixels."""
    largest = float(max(part.abs().max() for part in (pair.before, pair.after))) or 1.0
    before, after = (_strip(part, largest) for part in (pair.before, pair.after))
    height, width = before.shape[:2]
    return {
        "before": png(before), "after": png(after),
        "width": _PIXELS_PER_WEIGHT * width, "height": _PIXELS_PER_WEIGHT * height,
    }  # fmt: skip


def _strip(filters: Tensor, largest: float) -> npt.NDArray[np.uint8]:
    """Return filters side by side, one pixel per weight, separated by transparent columns."""
    colours = mpl.colormaps[_KERNEL_COLOURS]((filters / largest + 1).numpy() / 2)
    padded = np.pad(colours, ((0, 0), (0, 0), (0, 1), (0, 0)))
    strip: npt.NDArray[np.uint8] = (np.concatenate(padded, axis=1)[:, :-1] * 255).round().astype(np.uint8)
    return strip


def _dress(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=_INK, labelsize=8)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)


def _svg(figure: Figure, label: str) -> str:
    """Return a figure as inline SVG in the colours of the page, labelled for screen readers."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sepconvert", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # implied in HTML
    for placeholder, colour in _PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
