"""Figures as inline SVG in the colours of the page, for wide and for narrow screens."""

import contextlib
import html
import io
import re

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK, BEFORE, AFTER = "#010203", "#010204", "#010205"
"""Placeholders for the colours of text, before and after, which the page's light or dark scheme defines."""


STAGE_COLOURS = (
    "var(--bar)", "var(--after)", "var(--good)",
    *(f"color-mix(in srgb, var(--{name}) 50%, var(--paper))" for name in ("bar", "after", "good")),
    "color-mix(in srgb, var(--ink) 50%, var(--paper))", "color-mix(in srgb, var(--ink) 20%, var(--paper))",
)  # fmt: skip
"""Colours of the stages of a conversion, from the longest on; the last is that of all shorter ones."""


PAPER, *STAGES = (f"#0102{number:02x}" for number in range(6, 7 + len(STAGE_COLOURS)))
"""Placeholders for the background, and for `STAGE_COLOURS`."""


_PAGE_COLOURS = {
    INK: "currentColor", BEFORE: "var(--bar)", AFTER: "var(--after)", PAPER: "var(--paper)",
    **dict(zip(STAGES, STAGE_COLOURS, strict=True)),
}  # fmt: skip


# Inches of a figure that fills the page on a screen, and on a phone: at these widths, text of SMALL points is
# as large as small print.
_WIDE, _SLIM = 11.5, 4.3


SMALL = 9
"""Points of the text in a figure."""


class _ShownFigure(Figure):
    """A figure that notebooks show by themselves; others they show only after `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def sheet(height: float, *, slim: bool) -> Figure:
    """Return an empty figure of a height in inches, for a narrow screen or for a wide one."""
    return _ShownFigure(figsize=(_SLIM if slim else _WIDE, height), layout="constrained")


def dress(axes: Axes) -> None:
    """Give axes the colours of text, and a grid."""
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=INK, labelsize=SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(SMALL)
        label.set_color(INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def name_lines(figure: Figure, columns: int) -> None:
    """Add the legend, above the axes, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=SMALL)


def on_paper(figure: Figure) -> Figure:
    """Return a figure with the placeholders of colours exchanged for those of a light page."""
    colours = {INK: "#1c1c1c", BEFORE: "#5b7fa6", AFTER: "#d9731a"}
    for artist in figure.findobj():
        for name in ("color", "markerfacecolor", "markeredgecolor", "edgecolor", "facecolor"):
            get, put = (getattr(artist, f"{verb}_{name}", None) for verb in ("get", "set"))
            if get is None or put is None:
                continue
            with contextlib.suppress(ValueError):  # several colours, or none
                if (colour := colours.get(to_hex(get()))) is not None:
                    put(colour)
    figure.patch.set_facecolor("white")
    return figure


def svg(figure: Figure, label: str, *, slim: bool = False) -> str:
    """Return a figure as inline SVG in the colours of the page, labelled for screen readers.

    A page may hold a figure in both widths. Their parts have different names: those of a hidden picture
    cannot be drawn.
    """
    buffer = io.StringIO()
    salt = "sepconvert-slim" if slim else "sepconvert"
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # implied in HTML
    for placeholder, colour in _PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
