"""Make the figures, tables and definitions that the documentation shows, and the numbers behind them.

    python docs/figures.py [--redraw] [FOLDER]

They are stored in docs/stored, so that building the documentation computes and times nothing: run this after
a change of what they show. `--redraw` keeps the numbers of `facts.json`, times among them, and draws the
figures anew. Every figure comes twice, for light and for dark pages. The entries of docs/glossary.md are
written from those of reports.
"""

import json
import textwrap
from pathlib import Path

import click
import matplotlib as mpl
import msgspec
from drawing import THEMES, draw_curves, draw_flow, draw_forms, draw_kernels, draw_spectra, style
from facts import Facts, tables
from matplotlib.figure import Figure

from sepconvert.report.text.glossary import STEPS, WORDS, Entry

GLOSSARY = Path(__file__).parent / "glossary.md"
MARKS = ("<!-- written by docs/figures.py from sepconvert/report/text/glossary.py -->", "<!-- end -->")
STORED = Path(__file__).parent / "stored"
NUMBERS = "facts.json"
STEPS_ARE = (
    "The table *Effect of each step* of a report measures the model after each step on the held-out images: "
    "its divergence from the original, the equal predictions, and the accuracy where there are labels."
)
FIGURES = {
    "kernels": draw_kernels,
    "spectra": draw_spectra,
    "flow": draw_flow,
    "forms": draw_forms,
    "curves": draw_curves,
}


def stored(folder: Path = STORED) -> Facts:
    """Return the numbers that were stored."""
    return msgspec.json.decode((folder / NUMBERS).read_bytes(), type=Facts)


def store(folder: Path, facts: Facts) -> None:
    """Write numbers, a line for each figure, and tables."""
    lines = (f'"{name}": {json.dumps(each, ensure_ascii=False)}' for name, each in plain(facts).items())
    (folder / NUMBERS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for name, text in tables().items():
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def plain(facts: Facts) -> dict[str, object]:
    """Return facts as values of JSON."""
    return {**msgspec.json.decode(msgspec.json.encode(facts))}


def draw(folder: Path, facts: Facts) -> None:
    """Draw every figure for every theme."""
    for name, paint in FIGURES.items():
        for theme, colours in THEMES.items():
            with mpl.rc_context(style(colours)):
                figure = Figure(layout="constrained")
                paint(figure, getattr(facts, name), colours)
                metadata = {"Date": None, "Creator": None}
                figure.savefig(folder / f"{name}-{theme}.svg", transparent=True, metadata=metadata)


def glossary(page: str) -> str:
    """Return the page of the glossary with the entries of reports between its marks."""
    before, after = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
    sections = [
        *map(_section, WORDS),
        "## The steps of an approximation",
        _filled(STEPS_ARE),
        *map(_section, STEPS),
    ]
    return "\n\n".join([f"{before}{MARKS[0]}", *sections, f"{MARKS[1]}{after}"])


def _section(entry: Entry) -> str:
    more = f" [More]({entry.more})" if entry.more else ""
    return f"### {entry.word}\n\n{_filled(entry.text + more)}"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=STORED)
@click.option("--redraw", is_flag=True, help="Draw the stored numbers.")
def main(folder: Path, redraw: bool) -> None:
    """Make everything, or draw what is stored."""
    folder.mkdir(parents=True, exist_ok=True)
    if not redraw:
        store(folder, Facts.gathered())
    draw(folder, stored(folder))
    GLOSSARY.write_text(glossary(GLOSSARY.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
