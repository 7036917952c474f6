"""Pictures of the report, as SVG text that stands in the page itself."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepconvert.report.terminal import Document

# Colours of the page, whose light or dark text they take on: see the template.
_INK, _LINE, _PLAN, _DELIVERED = "#808080", "#a0a0a0", "#3b6ea5", "#e08a2e"


def trade_off(curve: Sequence[Document]) -> str:
    """Every plan that was carried out: divergence, and drop where it was measured, against the gain."""
    plans = [point for point in curve if point["heldout"] is not None and point["converted"]]
    timed = all(_gain(point, "latency_speedup") is not None for point in plans)
    gains = [_gain(point, "latency_speedup" if timed else "macs_ratio") for point in plans]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sepconvert", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes: Axes = figure.subplots()
        axes.patch.set_alpha(0)
        divergences = [point["heldout"]["divergence"] for point in plans]
        axes.plot(gains, divergences, "-", color=_LINE, linewidth=1, zorder=1)
        for point, gain, divergence in zip(plans, gains, divergences, strict=True):
            colour = _DELIVERED if point["delivered"] else _PLAN
            axes.plot(gain, divergence, "o", color=colour, markersize=9 if point["delivered"] else 6)
            drop = point["accuracy_drop_pp"]
            if drop is not None:
                label = f"{-drop['value']:+.2f} pp" + (", delivered" if point["delivered"] else "")
                axes.annotate(
                    label, (gain, divergence), xytext=(6, -11), textcoords="offset points", fontsize=8,
                    color=_INK,
                )  # fmt: skip
        if divergences and min(divergences) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("measured speed-up, ×" if timed else "fewer MACs, ×", color=_INK)
        axes.set_ylabel("divergence from the original", color=_INK)
        axes.tick_params(which="both", colors=_INK, labelsize=8)
        axes.grid(color=_LINE, alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_LINE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _gain(point: Document, key: str) -> Any:
    value = point[key]
    return value["median"] if isinstance(value, dict) else value
