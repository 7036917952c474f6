"""Plots to embed in a page as SVG text, and kernels as PNG data URLs."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sepconvert.report.pictures.curve import join_frontier
from sepconvert.report.pictures.drawing import (
    AFTER,
    BEFORE,
    INK,
    PAPER,
    STAGES,
    dress,
    name_lines,
    sheet,
    svg,
)
from sepconvert.report.pictures.exhibits import KernelPair
from sepconvert.report.pictures.images import png
from sepconvert.report.text.forms import NAMES
from sepconvert.report.text.numbers import Document, Quality

_KERNEL_COLOURS = "RdBu_r"


_LINE_STYLES = ("-", "--", ":", "-.")  # for the second and later models


_PIXELS_PER_WEIGHT = 12


def four_forms(document: Document, *, slim: bool = False) -> str:
    """Return a plot of the metric against the measured speed-up over the original in floating point.

    It shows the four forms of a conversion to int8 and the int8 plans of the curve, with a line through those
    that no other beats. Without a metric, there is no plot: the divergence is not comparable between forms.
    """
    forms, quality = document["forms"], Quality.of(document)
    base = forms["int8"]["delta"]["latency_speedup"]["median"]
    approximation = document["approximation"]
    curve = () if approximation is None else approximation["curve"]
    plans = [point for point in curve if point["latency_speedup"] and point["drop"]]
    original = forms["float"]["metric"]
    sign = -1 if quality.higher_is_better else 1
    figure = sheet(3.2, slim=slim)
    axes = figure.subplots()
    found = [
        (base * point["latency_speedup"]["median"], original["value"] + sign * point["drop"]["value"])
        for point in plans
    ]
    if found:
        axes.plot(*zip(*found, strict=True), ".", color=INK, alpha=0.6, label="int8 plans")
        join_frontier(axes, found, -sign)
    for (key, name), marker in zip(NAMES.items(), "osDv", strict=True):
        form = forms[key]
        speedup = form["delta"]["latency_speedup"]
        colour = AFTER if key == "converted_int8" else BEFORE
        axes.plot(
            1.0 if speedup is None else speedup["median"], form["metric"]["value"], marker, color=colour,
            markersize=9, label=name,
        )  # fmt: skip
    name_lines(figure, 2 if slim else 5)
    axes.set_xlabel("measured speed-up over the original in floating point, ×")
    axes.set_ylabel(quality.of_values)
    dress(axes)
    return svg(figure, f"{quality.of_values} against the measured speed-up, for each form", slim=slim)


def distributions(latencies: Sequence[tuple[str, Document]], *, slim: bool = False) -> str:
    """Return a plot of the cumulative distribution of latencies, with the 95 % interval of each median.

    The slowest 5 % of the runs of each model are not drawn: they would leave no room for the others.
    `latencies` are names of models and their `latency_ms` objects.
    """
    figure = sheet(2.6, slim=slim)
    axes = figure.subplots()
    for number, (name, latency) in enumerate(latencies):
        colour, style = (AFTER, _LINE_STYLES[(number - 1) % len(_LINE_STYLES)]) if number else (BEFORE, "-")
        shown = latency["quantiles"][:-1]
        shares = np.linspace(0, 95, len(shown))
        axes.plot(shown, shares, color=colour, linestyle=style, linewidth=2, label=name)
        axes.axvspan(*latency["ci95"], color=colour, alpha=0.25, linewidth=0)
    name_lines(figure, 1 if slim else len(latencies))
    axes.set_xlabel("milliseconds per run")
    axes.set_ylabel("runs at or below, %")
    axes.set_xlim(0, 1.05 * max(latency["quantiles"][-2] for _, latency in latencies))
    axes.set_ylim(0, 100)
    dress(axes)
    return svg(figure, "Distribution of the latencies", slim=slim)


def outliers(latency: Document) -> int:
    """Return how many runs are slower than those that `distributions` draws."""
    last = int(latency["runs"]) - 1
    return last - math.floor(0.95 * last)


def time_bar(seconds: Sequence[float]) -> str:
    """Return a bar divided among the stages of a conversion by their seconds, in `STAGE_COLOURS`.

    There is no text in it, which would be too small on a narrow screen: a table has to explain the colours.
    """
    figure = Figure(figsize=(7, 0.35))
    axes: Axes = figure.add_axes((0, 0, 1, 1))
    last = len(STAGES) - 1
    lengths = [*seconds[:last], sum(seconds[last:])]
    starts = itertools.accumulate(lengths, initial=0.0)
    for colour, length, start in zip(STAGES, lengths, starts, strict=False):
        axes.barh(0, length, 1, start, color=colour, edgecolor=PAPER, linewidth=1)
    axes.set_xlim(0, sum(lengths))
    axes.set_ylim(-0.5, 0.5)
    axes.set_axis_off()
    return svg(figure, "Shares of the stages of the conversion in its time, the longest first")


def spectrum(content: Document) -> str:
    """Return a plot of the singular values of one kernel, on a logarithmic scale, and of the cut."""
    figure = Figure(figsize=(1.5, 0.6))
    axes: Axes = figure.add_axes((0.01, 0.04, 0.98, 0.92))
    numbers, values = zip(*content["values"], strict=True)
    largest = max(values) or 1.0
    axes.semilogy(numbers, np.clip(values, 1e-9 * largest, None), color=BEFORE, linewidth=1.5)
    if content["cut"] is not None:
        axes.axvline(content["cut"] + 0.5, color=AFTER, linewidth=1.5)
    axes.set_axis_off()
    axes.patch.set_alpha(0)
    cut = "not cut" if content["cut"] is None else f"cut after {content['cut']}"
    return svg(figure, f"{content['full_rank']} singular values as {content['scheme']}, {cut}")


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
