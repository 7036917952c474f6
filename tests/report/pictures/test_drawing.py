"""Figures become SVG that needs nothing from elsewhere, in the colours of the page."""

import re

from sepconvert.report.pictures.drawing import AFTER, BEFORE, INK, dress, name_lines, sheet, svg


def test_the_legend_is_above_the_axes():
    figure = sheet(2, slim=True)
    axes = figure.subplots()
    axes.plot([0, 1], [1, 1], label="a model")
    name_lines(figure, 1)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert (legend.y0 + legend.y1) / 2 > axes.get_window_extent().y1


def drawn(*, slim: bool = False) -> str:
    figure = sheet(2, slim=slim)
    axes = figure.subplots()
    for colour in (BEFORE, AFTER, INK):
        axes.plot([0, 1], [0, 1], color=colour)
    axes.set_xlabel("a < b")
    dress(axes)
    return svg(figure, 'a "name" & more', slim=slim)


def test_colours_are_those_of_the_page():
    text = drawn()
    for colour in ("var(--bar)", "var(--after)", "currentColor"):
        assert colour in text
    assert not {*re.findall(r"#[0-9a-f]{6}\b", text)} - {"#ffffff", "#000000"}


def test_it_is_labelled_and_loads_nothing():
    text = drawn()
    assert text.startswith('<svg role="img" aria-label="a &quot;name&quot; &amp; more"')
    assert ">a &lt; b</text>" in text
    assert "http" not in text
    assert "metadata" not in text


def test_the_same_figure_gives_the_same_text():
    assert drawn() == drawn()
    assert drawn(slim=True) != drawn()
