"""Make the figures and tables of the documentation with the code that they describe.

    python docs/figures.py [FOLDER]

Every figure comes twice, for light and for dark pages. Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; lines and points also differ in shape.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon
from torch import Tensor, nn
from torch.nn import functional as F

import sepconvert
from sepconvert.base.environment import Runtime, environment
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Finding, analyse
from sepconvert.factorize.exact.factors import branches, factorize
from sepconvert.factorize.geometry import ConvSpec, chain_macs
from sepconvert.factorize.structures import FORMS
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import Deployed, Speedup, speedup, time_all
from sepconvert.report.text.tables import layer_table, structure_table

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
RUNS = 30  # timed rounds: the interval of a median is narrow enough to be drawn
IMAGES = 64
SPATIAL, PER_CHANNEL = "spatial-vh", "channelwise-spatial-vh"
DEPTHWISE = "depthwise-pointwise"


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


def make(folder: Path) -> None:
    """Draw every figure, and write every table, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (look_up, paint) in FIGURES.items():
        facts = look_up()
        for theme, colours in THEMES.items():
            with mpl.rc_context(_style(colours)):
                figure = Figure(layout="constrained")
                paint(figure, facts, colours)
                path = folder / f"{name}-{theme}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
    layers = sepconvert.inspect(load(), _images(1))["layers"]
    (folder / "layers.txt").write_text(layer_table(layers) + "\n", encoding="utf-8")
    shown = [layer for layer in layers if layer["name"] in ("large.conv", "head.conv")]
    (folder / "structures.txt").write_text(structure_table(shown) + "\n", encoding="utf-8")


def _style(theme: Theme) -> dict[str, Any]:
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


def _images(count: int) -> Tensor:
    return to_input(evaluation_data(count).x)


def _spec(layer: nn.Conv2d) -> ConvSpec:
    """Return the geometry of a layer with equal padding on all sides."""
    pad = int(layer.padding[0])
    return ConvSpec(
        layer.in_channels, layer.out_channels, tuple(layer.kernel_size), padding=((pad, pad), (pad, pad)),
        bias=layer.bias is not None,
    )  # fmt: skip


# One kernel as a column times a row -----------------------------------------------------------------


@dataclass(frozen=True)
class RankOne:
    """A 3×3 kernel, its nearest column times row, and the error of that product."""

    name: str
    kernel: Tensor
    column: Tensor
    row: Tensor
    error: float
    values: tuple[float, ...]  # singular values; their squares sum up to 1

    @classmethod
    def of(cls, name: str, kernel: Tensor) -> "RankOne":
        """Factor a kernel: exactly where that is possible, which keeps small integers."""
        spec, weight = ConvSpec(1, 1, (3, 3)), kernel[None, None]
        analysis = analyse(spec, weight, [(8, 8)])
        finding = next(each for each in analysis.findings if each.scheme == PER_CHANNEL)
        if finding.holds:
            column, row = factorize(analysis, finding, weight).weights
        else:
            fit = Problem(spec, weight, Moments.of_weights(spec, weight)).fit(PER_CHANNEL, 1)
            column, row = fit.weights
            balance = (row.norm() / column.norm()).sqrt() * column.sum().sign()
            column, row = column * balance, row / balance
        return cls(name, kernel, column[0, 0], row[0, 0], finding.best_error, finding.spectrum)


def three_kernels() -> list[RankOne]:
    """Return Sobel's, Laplace's, and the slice of a trained layer with the median rank-1 error."""
    slices = load().head.conv.weight.detach().flatten(0, 1)
    values = torch.linalg.svdvals(slices)
    errors = values[:, 1:].norm(dim=1) / values.norm(dim=1)
    typical = slices[errors.argsort()[len(errors) // 2]]
    return [
        RankOne.of("Sobel", torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])),
        RankOne.of("Laplacian", torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])),
        RankOne.of("trained", typical),
    ]


def draw_kernels(figure: Figure, found: Sequence[RankOne], theme: Theme) -> None:
    """Draw one row per kernel."""
    figure.set_size_inches(9.6, 7)
    grid = figure.subplots(len(found), 5, width_ratios=(3, 1.5, 3, 3, 3.6))
    for name, axes in zip(("kernel", "k×1", "1×k", "column × row", "singular values"), grid[0], strict=True):
        axes.set_title(name, pad=12)
    for each, (kernel, column, row, product, bars) in zip(found, grid, strict=True):
        largest = float(each.kernel.abs().max())
        kernel.set_ylabel(each.name, fontsize=12, labelpad=10)
        _matrix(kernel, each.kernel, largest)
        _matrix(column, each.column, float(each.column.abs().max()))
        _matrix(row, each.row, float(each.row.abs().max()))
        _matrix(product, each.column @ each.row, largest)
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


def _matrix(axes: Axes, values: Tensor, largest: float) -> None:
    """Draw numbers on colours: blue for negative values, red for positive ones."""
    axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest)
    for (row, column), value in np.ndenumerate(values.numpy()):
        nearest = round(float(value))
        text = str(nearest) if abs(value - nearest) < 1e-6 else f"{value:.2f}"
        colour = "black" if abs(value) < 0.8 * largest else "white"
        axes.text(column, row, text.replace("-", "−"), ha="center", va="center", color=colour)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


# Spectra of whole layers ----------------------------------------------------------------------------


def two_spectra() -> dict[str, Finding]:
    """Return the spectra of a layer that was trained as a pair and merged, and of an ordinary one."""
    net, found = load(), {}
    for name, layer in (("large.conv, 7×7", net.large.conv), ("head.conv, 3×3", net.head.conv)):
        analysis = analyse(_spec(layer), layer.weight.detach(), [(24, 24)])
        found[name] = next(each for each in analysis.findings if each.scheme == SPATIAL)
    return found


def draw_spectra(figure: Figure, found: dict[str, Finding], theme: Theme) -> None:
    """Draw the singular values in order, and the tolerance below which rounding explains them."""
    figure.set_size_inches(8, 3.8)
    axes = figure.subplots()
    places = {True: (60, 2e-8), False: (60, 0.13)}  # of names, beside the points that they name
    for (name, each), colour, marker in zip(found.items(), (theme.blue, ORANGE), "os", strict=True):
        numbers = np.arange(1, len(each.spectrum) + 1)
        axes.semilogy(numbers, each.spectrum, marker, color=colour, markersize=4)
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


@dataclass(frozen=True)
class Flow:
    """Multiplications of both layers, as `sepconvert.profile` counts them."""

    dense: int
    separable: int


def multiplications() -> Flow:
    """Count a 5×5 convolution from 3 to 256 channels on a 12×12 image, and its separable replacement."""
    image = torch.zeros(1, 3, 12, 12)
    dense = nn.Conv2d(3, 256, 5, bias=False)
    separable = nn.Sequential(nn.Conv2d(3, 3, 5, groups=3, bias=False), nn.Conv2d(3, 256, 1, bias=False))
    return Flow(
        *(
            sepconvert.profile(each, image, timing=sepconvert.Timing(runs=0)).macs
            for each in (dense, separable)
        )
    )


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

    pen.heading(10.6, "Depthwise separable: transformed once, then elongated")
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


@dataclass(frozen=True)
class FormOf:
    """A trained layer in one form at one rank."""

    rank: int
    macs: float  # share of the dense layer's
    weight_error: float
    output_error: float
    time: Speedup


def two_forms() -> dict[str, list[FormOf]]:
    """Fit the demo network's `head.conv` (3×3, 32 → 32) in depthwise and, at no lower cost, spatial form."""
    net, images = load(), _images(IMAGES)
    layer, seen = net.head.conv, []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(images)
    handle.remove()
    spec, weight, size = _spec(layer), layer.weight.detach(), (seen[0].shape[2], seen[0].shape[3])
    problem = Problem(spec, weight, _moments(spec, weight, seen[0]))
    multipliers = range(1, 7)
    each, one = (chain_macs(FORMS[scheme].split(spec, 1), size) for scheme in (DEPTHWISE, SPATIAL))
    forms = [(SPATIAL, -(-m * each // one)) for m in multipliers] + [(DEPTHWISE, m) for m in multipliers]
    times = _times(spec, forms, (1, spec.in_channels, *size))
    found: dict[str, list[FormOf]] = {SPATIAL: [], DEPTHWISE: []}
    for (scheme, rank), time in zip(forms, times, strict=True):
        fit = problem.fit(scheme, rank)
        macs = chain_macs(FORMS[scheme].split(spec, rank), size) / spec.macs(size)
        found[scheme].append(FormOf(rank, macs, fit.weight_error, fit.output_error, time))
    return found


def _moments(spec: ConvSpec, weight: Tensor, inputs: Tensor) -> Moments:
    """Return moments of all patches, for a layer of one group whose targets are its own outputs."""
    (top, _), _ = spec.padding
    patches = F.unfold(inputs.double(), spec.kernel_size, padding=top).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    covariance = (patches - mean).mT @ (patches - mean) / len(patches)
    kernel = weight.double().flatten(1)
    nothing = torch.zeros(1, *kernel.shape, dtype=torch.float64)
    return Moments(
        count=len(patches),
        covariance=covariance[None],
        cross=nothing,
        mean=mean[None],
        residual_mean=nothing[0, :, 0],
        residual_covariance=nothing[:, :, :1] @ nothing[:, :, :1].mT,
        output_covariance=(kernel @ covariance @ kernel.mT)[None],
    )


def _times(spec: ConvSpec, forms: Sequence[tuple[str, int]], shape: Sequence[int]) -> list[Speedup]:
    """Time each form against the dense layer, in rounds in which each of them runs once."""
    layouts = [branches(spec, *form, Border()) for form in ((ZERO_BORDER, 0), *forms)]
    feed = {"input": np.random.default_rng(0).standard_normal(shape, np.float32)}
    dense, *others = [(Deployed(layer_onnx(each, shape), Runtime(1)), feed) for each in layouts]
    first, again, *samples = time_all([dense, dense, *others], runs=RUNS, seed=0)
    return [speedup(first, again, each) for each in samples]


def draw_forms(figure: Figure, found: dict[str, list[FormOf]], theme: Theme) -> None:
    """Draw errors and time against MACs."""
    figure.set_size_inches(9.6, 3.9)
    kernel, outputs, clock = figure.subplots(1, 3)
    styles = {SPATIAL: (theme.blue, "o-"), DEPTHWISE: (ORANGE, "s--")}
    for scheme, forms in found.items():
        colour, style = styles[scheme]
        macs = [100 * each.macs for each in forms]
        kernel.plot(macs, [100 * each.weight_error for each in forms], style, color=colour, label=scheme)
        outputs.plot(macs, [100 * each.output_error for each in forms], style, color=colour)
        ratios = np.array([(each.time.median, each.time.ci95.lo, each.time.ci95.hi) for each in forms])
        middle, high, low = 100 / ratios.T  # the largest ratio is the least time
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
    clock.set_xlabel(f"on {environment(Runtime(1))['cpu']}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


FIGURES: dict[str, tuple[Callable[[], Any], Callable[[Figure, Any, Theme], None]]] = {
    "kernels": (three_kernels, draw_kernels),
    "spectra": (two_spectra, draw_spectra),
    "flow": (multiplications, draw_flow),
    "forms": (two_forms, draw_forms),
}


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "_generated")
