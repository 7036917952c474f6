"""The trade-off curve: what each plan gains and what it costs, with the signs of the tables beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sepconvert.report.pictures.drawing import AFTER, BEFORE, INK, SMALL, dress, sheet, svg
from sepconvert.report.text.numbers import Document, Quality, measured_drop

DELIVERED, NOISE, FEWER = "←", "~", "*"
"""Signs of the delivered plan, of a speed-up within noise, and of a drop measured on fewer images."""


_ROOM = 0.16  # of the width of the curve, on its right, for the sign of the fastest plan
# Changes are drawn as far as this multiple of the budget, or of the change of the delivered plan: one plan
# that destroys the network would leave no room to tell the others apart. It is marked at the edge.
_REACH = 5


_DECADE = 10  # divergences that lie farther apart are drawn on a logarithmic scale


_WIDE_HEIGHT, _SLIM_HEIGHT = 3.4, 2.9  # inches, of all, and of each of two plots above each other


@dataclass(frozen=True)
class Mark:
    """A plan as it is drawn; None for what was not measured."""

    gain: float  # ratio of latencies, or of MACs
    divergence: float | None
    change: float | None  # of the metric: above 0 it rose
    ends: tuple[float, float] | None  # 95 % interval of the change
    delivered: bool = False
    noisy: bool = False
    fewer: bool = False  # samples than decided
    name: str = ""

    @property
    def signs(self) -> str:
        """Signs of noise and of fewer samples."""
        return NOISE * self.noisy + FEWER * self.fewer

    @property
    def label(self) -> str:
        """All signs, and the name."""
        return " ".join(filter(None, [self.name, self.signs, f"{DELIVERED} delivered" * self.delivered]))


def marks(document: Document) -> tuple[list[Mark], bool]:
    """Return the original and the plans that were carried out, and whether gains are measured speed-ups.

    The delivered plan is always among them: what its point on the curve lacks is that of the report.
    """
    curve = [_completed(point, document) for point in document["approximation"]["curve"]]
    plans = [point for point in curve if point["delivered"] or (point["heldout"] and point["converted"])]
    timed = any(point["converted"] for point in plans) and all(
        point["latency_speedup"] for point in plans if point["converted"]
    )
    most = max((point["drop"]["n"] for point in plans if point["drop"]), default=0)
    sign = -1 if Quality.of(document).higher_is_better else 1
    found = [_original(document, any(point["delivered"] and not point["converted"] for point in plans))]
    for point in plans:
        if not point["converted"]:
            continue
        drop, speedup = point["drop"], point["latency_speedup"]
        found.append(
            Mark(
                gain=speedup["median"] if timed else point["macs_ratio"] or 1.0,
                divergence=point["heldout"] and point["heldout"]["divergence"],
                change=drop and sign * drop["value"],
                ends=drop
                and (min(sign * end for end in drop["ci95"]), max(sign * end for end in drop["ci95"])),
                delivered=point["delivered"],
                noisy=timed and not speedup["significant"],
                fewer=drop is not None and drop["n"] < most,
            )
        )
    return found, timed


def _completed(point: Document, document: Document) -> Document:
    """Return a point of the curve, with the results of the files where the plan was delivered unmeasured."""
    if not point["delivered"] or not point["converted"]:
        return point
    return {
        **point,
        "drop": point["drop"] or measured_drop(document),
        "latency_speedup": point["latency_speedup"] or document["delta"]["latency_speedup"],
    }


def _original(document: Document, delivered: bool) -> Mark:
    """Return the original, in the form that plans are compared with: in int8 it has lost something itself."""
    forms, change = document.get("forms"), None if measured_drop(document) is None else 0.0
    if forms is not None and (lost := forms["int8"]["delta"]["metric"]) is not None:
        change = -lost["drop"] if lost["higher_is_better"] else lost["drop"]
    name = "original" if forms is None else "int8 alone"
    return Mark(1.0, None, change, None, delivered, name=name)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (gain, value) that no other beats in both, by rising gain; higher is better."""
    kept: list[tuple[float, float]] = []
    for gain, value in sorted(set(points), reverse=True):
        if not kept or value > kept[-1][1]:
            kept.append((gain, value))
    return kept[::-1]


def join_frontier(axes: Axes, points: Sequence[tuple[float, float]], better: int) -> None:
    """Draw a line through the points that no other beats; `better` is 1 where higher values are, else -1."""
    line = [(gain, better * value) for gain, value in frontier([(x, better * y) for x, y in points])]
    if line:
        axes.plot(*zip(*line, strict=True), "-", color=INK, alpha=0.4, linewidth=1, zorder=1)


def trade_off(document: Document, *, slim: bool = False) -> str:
    """Return a plot of the change of the metric, if measured, and of the divergence against the gain."""
    quality = Quality.of(document)
    label = f"Change of {quality.noun} and divergence against the gain, for every plan carried out"
    return svg(drawn(document, slim=slim), label, slim=slim)


def drawn(document: Document, *, slim: bool = False) -> Figure:
    """Return the figure of `trade_off`, in the placeholders of colours.

    Lines join the plans that no other beats. Markers of speed-ups within noise are hollow.
    """
    quality = Quality.of(document)
    found, timed = marks(document)
    scored = any(mark.change is not None for mark in found[1:])
    compared = any(mark.divergence is not None for mark in found)
    count = max(1, scored + compared)
    figure = sheet(count * _SLIM_HEIGHT if slim else _WIDE_HEIGHT, slim=slim)
    rows, columns, shares = (count, 1, [1]) if slim else (1, count, [3, 2][:count])
    places = list(figure.subplots(rows, columns, squeeze=False, width_ratios=shares).flat)
    better = 1 if quality.higher_is_better else -1
    if scored or not compared:
        _draw_changes(places[0], found, quality, document["approximation"]["budget"]["max_drop"])
        places[0].set_ylabel(f"{quality.heading} {quality.of_drops}")
        # As the tables have it: what is lost is above 0, whichever way the metric goes.
        places[0].yaxis.set_major_formatter(lambda value, _: f"{0.0 - better * value:.3g}")
    if compared:
        _draw(places[-1], found, lambda mark: mark.divergence, named=count == 1, better=-1)
        divergences = [mark.divergence for mark in found if mark.divergence is not None]
        if max(divergences) > _DECADE * min(divergences) > 0:
            places[-1].set_yscale("log")
        places[-1].set_ylabel("divergence from the original")
    for axes in places:
        axes.set_xlabel("measured speed-up, ×" if timed else "fewer MACs, ×")
        axes.margins(y=0.15)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + _ROOM * (high - low) * (2 if slim else 1))
        dress(axes)
    return figure


def _draw(
    axes: Axes, found: Sequence[Mark], value: Callable[[Mark], float | None], *, named: bool, better: int = 1
) -> None:
    """Draw the marks that have a value, their signs, and the line through those that no other beats."""
    drawn = [(mark, height) for mark in found if (height := value(mark)) is not None]
    join_frontier(axes, [(mark.gain, height) for mark, height in drawn], better)
    for mark, height in drawn:
        axes.plot(mark.gain, height, **_marker(mark))
        if text := mark.label if named else mark.signs:
            # The original is named below its mark, where no plan is.
            axes.annotate(
                text, (mark.gain, height), (-4, -16) if mark.name else (9, 5), textcoords="offset points",
                fontsize=SMALL, color=AFTER if mark.delivered else INK,
            )  # fmt: skip


def _draw_changes(axes: Axes, found: Sequence[Mark], quality: Quality, allowed: float | None) -> None:
    """Draw changes and their intervals, and the lines of no change and of the budget."""
    better = 1 if quality.higher_is_better else -1
    _draw(axes, found, lambda mark: mark.change, named=True, better=better)
    for mark in found:
        if mark.change is not None and mark.ends is not None:
            axes.plot([mark.gain] * 2, mark.ends, "-", color=AFTER if mark.delivered else BEFORE, linewidth=1)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5, zorder=1)
    _keep_in_sight(axes, found, _far(found, quality, allowed), better)
    limits = axes.get_ylim()
    if allowed is not None and limits[0] < -better * allowed < limits[1]:
        axes.axhline(-better * allowed, color=AFTER, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            "allowed", (1, -better * allowed), (-2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=SMALL, color=AFTER,
        )  # fmt: skip
        axes.set_ylim(limits)


def far_off(document: Document) -> list[Mark]:
    """Return the plans that are too much worse than the delivered one to be drawn at their height."""
    return _far(marks(document)[0], Quality.of(document), document["approximation"]["budget"]["max_drop"])


def _far(found: Sequence[Mark], quality: Quality, allowed: float | None) -> list[Mark]:
    changed = [mark for mark in found if mark.change is not None]
    reach = _REACH * max([allowed or 0.0, *(abs(mark.change or 0.0) for mark in changed if mark.delivered)])
    worse = -1 if quality.higher_is_better else 1
    return [mark for mark in changed if reach and worse * (mark.change or 0.0) > reach]


def _keep_in_sight(axes: Axes, found: Sequence[Mark], far: Sequence[Mark], better: int) -> None:
    """Leave room for the other plans, and mark those at the edge that are far off."""
    near = [
        end
        for mark in found
        if mark.change is not None and mark not in far
        for end in (mark.change, *(mark.ends or ()))
    ]
    if not far or not near:
        return
    low, high = min(near), max(near)
    room = 0.15 * (high - low) or 1.0
    axes.set_ylim(low - room, high + room)
    edge = axes.get_ylim()[0 if better > 0 else 1]
    for mark in far:
        axes.plot(mark.gain, edge, "v" if better > 0 else "^", color=BEFORE, markersize=6, clip_on=False)
        axes.annotate(
            f"{mark.change:.3g} {mark.label}".rstrip(), (mark.gain, edge), (8, 3 * better),
            textcoords="offset points", fontsize=SMALL, color=INK, va="bottom" if better > 0 else "top",
        )  # fmt: skip


def _marker(mark: Mark) -> dict[str, Any]:
    colour = AFTER if mark.delivered else BEFORE
    shape = {"marker": "s" if mark.name else "o", "markersize": 9 if mark.delivered else 6, "color": colour}
    return {**shape, "markerfacecolor": "none"} if mark.noisy or (mark.name and not mark.delivered) else shape
