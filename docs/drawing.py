"""The figures of the documentation, drawn from their facts.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines and points also differ
in shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from facts import DEPTHWISE, SPATIAL, Curve, Flow, Point, RankOne, TwoForms, Values
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"


@dataclass(frozen=True)
class Theme:
    """Colours of a page theme."""

    ink: str
    faint: str
    paper: str
    blue: str  # of lines and points


THEMES = {
    "light": Theme("#1f2328", "#8a9199", "#ffffff", BLUE),
    "dark": Theme("#e3e6ea", "#8b929a", "#131416", "#56B4E9"),
}


def style(theme: Theme) -> dict[str, Any]:
    """Return matplotlib's settings of a theme; ids within the drawings do not depend on chance."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(names, theme.ink),
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "sepconvert",
    }


# One kernel as a column times a row -----------------------------------------------------------------


def draw_kernels(figure: Figure, found: Sequence[RankOne], theme: Theme) -> None:
    """Draw one row per kernel."""
    figure.set_size_inches(9.6, 7)
    grid = figure.subplots(len(found), 5, width_ratios=(3, 1.5, 3, 3, 3.6))
    for name, axes in zip(("kernel", "k×1", "1×k", "column × row", "singular values"), grid[0], strict=True):
        axes.set_title(name, pad=12)
    for each, (kernel, column, row, product, bars) in zip(found, grid, strict=True):
        largest = np.abs(each.kernel).max()
        kernel.set_ylabel(each.name, fontsize=12, labelpad=10)
        _matrix(kernel, each.kernel, largest)
        _matrix(column, each.column, np.abs(each.column).max())
        _matrix(row, each.row, np.abs(each.row).max())
        _matrix(product, np.array(each.column) @ np.array(each.row), largest)
        column.set_xlim(-0.75, 0.75)
        row.set_ylim(1.5, -1.5)
        numbers = np.arange(1, 4)
        bars.bar(numbers, each.values, color=[theme.blue, ORANGE, ORANGE], width=0.6)
        for number, value in zip(numbers, each.values, strict=True):
            bars.text(number, value + 0.03, f"{value:.2f}" if value > 1e-6 else "0", ha="center", va="bottom")
        bars.set_ylim(0, 1.3)
        bars.set_yticks([0, 0.5, 1])
        bars.set_xticks(numbers)
        bars.text(
            3.4, 1.29, "exact" if each.error < 1e-6 else f"best rank 1 is off by {100 * each.error:.0f} %",
            ha="right", va="top", fontsize=11,
        )  # fmt: skip


def _matrix(axes: Axes, values: npt.ArrayLike, largest: float) -> None:
    """Draw numbers on colours: blue for negative values, red for positive ones."""
    numbers = np.asarray(values)
    axes.imshow(numbers, cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest)
    for (row, column), value in np.ndenumerate(numbers):
        nearest = round(float(value))
        text = str(nearest) if abs(value - nearest) < 1e-6 else f"{value:.2f}"
        colour = "black" if abs(value) < 0.8 * largest else "white"
        axes.text(column, row, text.replace("-", "−"), ha="center", va="center", color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


# Spectra of whole layers ----------------------------------------------------------------------------


def draw_spectra(figure: Figure, found: dict[str, Values], theme: Theme) -> None:
    """Draw the singular values in order, and the tolerance below which rounding explains them."""
    figure.set_size_inches(8, 3.8)
    axes = figure.subplots()
    places = {True: (60, 2e-8), False: (60, 0.13)}  # of names, beside the points that they name
    for (name, each), colour, marker in zip(found.items(), (theme.blue, ORANGE), "os", strict=True):
        numbers = np.arange(1, len(each.values) + 1)
        axes.semilogy(numbers, each.values, marker, color=colour, markersize=4)
        kind = "it separates" if each.holds else "it does not separate"
        axes.text(*places[each.holds], f"{name}: rank {each.rank} of {each.full_rank}, {kind}", va="center")
    pair = next(each for each in found.values() if each.holds)
    axes.axvline(pair.rank + 0.5, color=theme.faint, linestyle=":")
    axes.text(pair.rank + 3, 0.6, f"cut after {pair.rank}", va="center")
    axes.axhline(pair.tolerance, color=theme.faint, linestyle="--")
    axes.text(
        pair.full_rank, 1.5 * pair.tolerance, "tolerance: what rounding explains", va="bottom", ha="right"
    )
    axes.set_xlim(0, pair.full_rank + 4)
    axes.set_ylim(top=1.5)
    axes.set_xlabel("number of the singular value, of the kernel unfolded as (c i) × (o j)")
    axes.set_ylabel("share of the kernel's norm")


# How data flow --------------------------------------------------------------------------------------


def draw_flow(figure: Figure, flow: Flow, theme: Theme) -> None:
    """Draw the tensors as blocks, to scale in height and width."""
    figure.set_size_inches(9.6, 6.6)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(0, 48)
    axes.set_ylim(-2.4, 31.5)
    channels = (VERMILION, GREEN, BLUE)
    pen = _Pen(axes, theme)

    pen.heading(30.8, "Convolution: the image is transformed 256 times")
    pen.stack(1, 18.6, 6, channels)
    pen.caption(4.7, 14.2, "image 12×12×3")
    for y in (25.4, 21, 15.4):
        pen.stack(15, y, 2.5, channels)
        pen.arrow((9.4, 22.2), (14.4, y + 1.9))
        pen.arrow((19.4, y + 1.9), (24.4, 22.2))
    axes.text(16.9, 20, "⋮", ha="center", va="center", fontsize=14)
    pen.caption(16.9, 14.2, "256 kernels 5×5×3")
    pen.long(25, 20, 4, 13)
    pen.caption(32, 14.2, "8×8×256")
    pen.count(12.6, f"8·8 positions × 5·5·3 × 256 = {flow.dense:,} multiplications")

    pen.heading(10.6, "Depthwise separable: transformed once, then expanded")
    pen.stack(1, 1.3, 6, channels)
    pen.caption(4.7, -0.4, "image 12×12×3")
    for y, colour in zip((6.9, 4, 1.1), channels, strict=True):
        pen.stack(12.4, y, 2.5, [colour])
        pen.arrow((9.4, 5.2), (11.9, y + 1.2))
        pen.arrow((15.4, y + 1.2), (17.8, 5.2))
    pen.caption(13.7, -0.4, "3 kernels 5×5")
    pen.stack(18.4, 2.6, 4, channels)
    pen.caption(21.1, -0.4, "8×8×3")
    for y in (8, 6.4, 1.8):
        pen.sticks(26.6, y, channels)
        pen.arrow((24.2, 5.2), (26.1, y + 0.4))
        pen.arrow((29.4, y + 0.4), (31.4, 5.2))
    axes.text(27.8, 4.3, "⋮", ha="center", va="center", fontsize=14)
    pen.caption(27.8, -0.4, "256 mixtures 1×1×3")
    pen.long(32, 2.6, 4, 10.4)
    pen.caption(39, -0.4, "8×8×256")
    first, second = 8 * 8 * 5 * 5 * 3, 8 * 8 * 3 * 256
    assert first + second == flow.separable  # noqa: S101  (the drawn numbers are those counted)
    ratio = flow.dense / flow.separable
    pen.count(
        -2,
        f"8·8 × 5·5·3 = {first:,}  and  8·8 × 3 × 256 = {second:,}:  together {flow.separable:,} "
        f"multiplications, {ratio:.1f} times fewer",
    )


class _Pen:
    """A pen that draws on one pair of axes."""

    def __init__(self, axes: Axes, theme: Theme) -> None:
        self.axes, self.theme = axes, theme

    def stack(self, x: float, y: float, size: float, colours: Sequence[str], step: float = 0.7) -> None:
        """Draw square channels one behind the other, the first in front."""
        for depth in reversed(range(len(colours))):
            self._square(x + step * depth, y + step * depth, size, colours[depth])

    def sticks(self, x: float, y: float, colours: Sequence[str]) -> None:
        """Draw one weight per channel."""
        for place, colour in enumerate(colours):
            self._square(x + 0.8 * place, y, 0.8, colour)

    def long(self, x: float, y: float, size: float, length: float) -> None:
        """Draw a block of very many channels."""
        dx, dy = length, 0.28 * length
        corners = np.array([(x, y), (x + size, y), (x + size, y + size), (x, y + size)])
        behind = corners + np.array([dx, dy])
        top = [corners[3], corners[2], behind[2], behind[3]]
        side = [corners[1], behind[1], behind[2], corners[2]]
        for points, alpha in ((top, 0.45), (side, 0.6)):
            self._polygon(points, ORANGE, alpha)
        for share in np.linspace(0.1, 0.9, 9):
            ridge = np.array([corners[3], corners[2], corners[1]]) + share * np.array([dx, dy])
            self.axes.plot(*ridge.T, color=self.theme.paper, linewidth=0.8)
        self._polygon(corners, ORANGE, 1)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw an arrow from one block to another."""
        look = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=self.theme.faint, **look))

    def heading(self, y: float, text: str) -> None:
        """Write the heading of a row."""
        self.axes.text(0.5, y, text, fontsize=12, va="center", weight="bold")

    def caption(self, x: float, y: float, text: str) -> None:
        """Write a caption below a block."""
        self.axes.text(x, y, text, ha="center", va="center")

    def count(self, y: float, text: str) -> None:
        """Write the count at the end of a row."""
        self.axes.text(0.5, y, text, va="center", fontsize=11)

    def _square(self, x: float, y: float, size: float, colour: str) -> None:
        self._polygon([(x, y), (x + size, y), (x + size, y + size), (x, y + size)], colour, 1)

    def _polygon(self, points: Any, colour: str, alpha: float) -> None:
        """Draw an opaque polygon, however light its colour is."""
        paper, face = self.theme.paper, mpl.colors.to_rgba(colour, alpha)
        self.axes.add_patch(Polygon(np.array(points), facecolor=paper, edgecolor="none"))
        self.axes.add_patch(Polygon(np.array(points), facecolor=face, edgecolor=paper, linewidth=0.8))


# One layer in two forms ------------------------------------------------------------------------------


def draw_forms(figure: Figure, found: TwoForms, theme: Theme) -> None:
    """Draw errors and time against MACs."""
    figure.set_size_inches(9.6, 3.9)
    kernel, outputs, clock = figure.subplots(1, 3)
    styles = {SPATIAL: (theme.blue, "o-"), DEPTHWISE: (ORANGE, "s--")}
    for scheme, forms in found.forms.items():
        colour, style = styles[scheme]
        macs = [100 * each.macs for each in forms]
        kernel.plot(macs, [100 * each.weight_error for each in forms], style, color=colour, label=scheme)
        outputs.plot(macs, [100 * each.output_error for each in forms], style, color=colour)
        middle, low, high = 100 * np.array([each.time for each in forms]).T
        clock.errorbar(macs, middle, (middle - low, high - middle), fmt=style, color=colour, capsize=3)
    clock.plot([0, 100], [0, 100], ":", color=theme.faint)
    clock.axhline(100, color=theme.faint, linewidth=0.8)
    clock.text(98, 5, "dotted: as MACs promise", ha="right", fontsize=9)
    for axes, title in (
        (kernel, "error of the kernel, %"),
        (outputs, "error of the outputs, %, log scale"),
        (clock, "time, % of the dense layer's"),
    ):
        axes.set_title(title)
        axes.set_xlim(0, 100)
        if axes is not outputs:
            axes.set_ylim(bottom=0)
    outputs.set_yscale("log")
    outputs.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    outputs.minorticks_off()
    outputs.set_xlabel("MACs, % of the dense layer's")
    clock.set_xlabel(f"on {found.machine}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


# Plans of three networks -----------------------------------------------------------------------------


def draw_curves(figure: Figure, curves: Sequence[Curve], theme: Theme) -> None:
    """Draw what each plan loses against how fast it is, and the budget."""
    figure.set_size_inches(9.6, 3.9)
    for axes, curve in zip(figure.subplots(1, len(curves)), curves, strict=True):
        axes.axhspan(0, curve.budget, color=GREEN, alpha=0.15, linewidth=0)
        axes.axhline(0, color=theme.faint, linewidth=0.8)
        _points(axes, curve.plans, "o", color=theme.faint, markersize=4, label="other plans")
        _points(axes, [curve.plans[curve.delivered]], "o", color=theme.blue, label="delivered")
        if curve.finetuned:
            _points(
                axes, [curve.finetuned], "D", color=ORANGE, label="delivered after 5 epochs of fine-tuning"
            )
        axes.set_title(f"{curve.network}, {curve.data}\n{curve.top1}, {curve.milliseconds:g} ms")
        axes.set_xlim(left=1)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.text(
            0.02, curve.budget, f"budget {curve.budget:g} pp", ha="left", va="bottom", fontsize=9,
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    figure.axes[0].set_ylabel("top-1 accuracy lost, pp")
    figure.axes[1].set_xlabel("measured speed-up")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )


def _points(axes: Axes, plans: Sequence[Point], marker: str, **look: Any) -> None:
    """Draw plans with the 95 % intervals of both numbers."""
    (x, left, right), (y, low, high) = (
        np.array(each).T for each in zip(*((plan.speedup, plan.drop) for plan in plans), strict=True)
    )
    axes.errorbar(x, y, (y - low, high - y), (x - left, right - x), fmt=marker, capsize=2, **look)
