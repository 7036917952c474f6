"""Plots are SVG in the colours of the page, and kernels show the values that they are given."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from data_urls import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from report.int8_forms import deployed

from sepconvert.report.pictures import plots
from sepconvert.report.pictures.drawing import STAGE_COLOURS
from sepconvert.report.pictures.exhibits import KernelPair
from sepconvert.report.text.forms import NAMES

SPECTRUM = {"scheme": "spatial-vh", "cut": 2, "full_rank": 24, "values": [[1, 0.75], [2, 0.5], [24, 1e-12]]}


@pytest.fixture(params=["distributions", "slim", "spectrum", "time"])
def svg(request, document) -> str:
    if request.param == "spectrum":
        return plots.spectrum(SPECTRUM)
    if request.param == "time":
        return plots.time_bar([2.0, 1.0])
    latencies = [("a < b", document[side]["latency_ms"]) for side in ("original", "converted")]
    return plots.distributions(latencies, slim=request.param == "slim")


def test_plots_are_well_formed_and_need_nothing_from_elsewhere(svg):
    root = ET.fromstring(svg.replace("xlink:href", "href"))  # noqa: S314  (our own)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "http" not in svg


def test_plots_take_the_colours_of_the_page(svg):
    assert "var(--after)" in svg
    assert not re.search(r"#01020[345]", svg)
    # What is left are clip paths, and references to them.
    assert not {*re.findall(r"#[0-9a-f]{6}\b", svg)} - {"#ffffff", "#000000"}


def latency(runs: int, slowest: float) -> dict:
    """Latencies of one to two milliseconds, but for the slowest run."""
    samples = np.array([*np.linspace(1, 2, runs - 1), slowest])
    quantiles = np.quantile(samples, np.linspace(0, 1, 21)).tolist()
    return {"quantiles": quantiles, "ci95": [1.4, 1.6], "runs": runs, "samples": samples}


@pytest.mark.parametrize("runs", [21, 50, 51, 100, 257])
def test_the_slowest_runs_are_counted_and_not_drawn(runs):
    found = latency(runs, 1000.0)
    assert plots.outliers(found) == (found["samples"] > found["quantiles"][19]).sum()
    # The axis ends near the 95th percentile: a run of a second would make it a thousand times as long.
    ticks = [*map(float, re.findall(r">([\d.]+)</text>", plots.distributions([("a", found)])))]
    assert any(1 < tick < 2 for tick in ticks)
    assert max(ticks) == 100  # of percent


def in_int8(document, *plans: tuple[float, float]) -> dict:
    """Return a report on int8 whose plans have these speed-ups and drops."""
    document["approximation"]["curve"] = [
        {"latency_speedup": {"median": gain}, "drop": {"value": drop}} for gain, drop in plans
    ]
    return deployed(document)


@pytest.mark.parametrize(
    ("plans", "joined"),
    [([(1.0, 0.1), (2.0, 0.2)], 2), ([(1.0, 0.1), (2.0, 0.5), (3.0, 0.2)], 2), ([(1.0, 0.5), (2.0, 0.2)], 1)],
)
def test_the_line_of_int8_plans_is_their_frontier(approximate, plans, joined):
    svg = plots.four_forms(in_int8(approximate, *plans))
    assert all(name in svg for name in (*NAMES.values(), "int8 plans"))
    lines = re.findall(r'<path d="([^"]+)"[^>]*stroke: currentColor; stroke-opacity: 0\.4', svg)
    assert len(re.findall("[ML]", "".join(lines))) == joined  # a line to a single point is none


def drawn_width(svg: str) -> float:
    return float(re.search(r'width="([\d.]+)pt"', svg)[1])


def test_a_narrow_picture_is_another_one(document):
    latencies = [("a", document["original"]["latency_ms"])]
    wide, slim = (plots.distributions(latencies, slim=slim) for slim in (False, True))
    assert drawn_width(slim) < 0.5 * drawn_width(wide)
    # Nothing of one refers to the other, which is not drawn while it is hidden.
    names = [{*re.findall(r'<clipPath id="([^"]+)"', each)} for each in (wide, slim)]
    assert not names[0] & names[1]


def test_the_label_of_a_spectrum_says_where_it_is_cut():
    assert 'aria-label="24 singular values as spatial-vh, cut after 2"' in plots.spectrum(SPECTRUM)
    assert "spatial-vh, not cut" in plots.spectrum({**SPECTRUM, "cut": None})


def test_a_kernel_of_zeros_is_drawn():
    plots.spectrum({**SPECTRUM, "values": [[1, 0.0], [2, 0.0]]})
    zeros = torch.zeros(2, 3, 3).double()
    assert plots.kernels(KernelPair("conv", zeros, zeros))["width"] > 0


def test_filters_share_one_scale():
    before = torch.tensor([[[-1.0, 1.0]], [[0.0, 0.5]]]).double()
    found = plots.kernels(KernelPair("conv", before, before / 2))
    strong, weak = (pixels(found[side])[0].astype(int) for side in ("before", "after"))
    assert strong.shape == weak.shape == (5, 4)  # two filters of two weights, and a gap
    assert strong[2, 3] == weak[2, 3] == 0  # which is transparent
    assert strong[0, 2] > strong[0, 0]  # negative: blue
    assert strong[1, 0] > strong[1, 2]  # positive: red
    assert strong[1, 1] < weak[1, 1]  # the smaller, the paler
    assert (weak[1] == strong[4]).all()  # both 0.5
    assert (found["width"], found["height"]) == (5 * 12, 12)


def bars(svg: str) -> list[tuple[str, float]]:
    """Colour and share of each part of a bar, from the left on."""
    drawn = re.findall(r'<path d="M ([\d.]+) [^"]*?L ([\d.]+) [^"]*" clip[^>]*style="fill: ([^;]*);', svg)
    ends = [(colour, float(start), float(end)) for start, end, colour in drawn]
    width = max(end for _, _, end in ends)
    return [(colour, (end - start) / width) for colour, start, end in ends]


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=20))
@settings(max_examples=10)
def test_the_parts_of_a_bar_are_as_long_as_the_stages(seconds):
    colours, total = STAGE_COLOURS, sum(seconds)
    own, shorter = seconds[: len(colours) - 1], seconds[len(colours) - 1 :]
    found = bars(plots.time_bar(seconds))
    assert [colour for colour, _ in found] == list(colours[: len(own) + 1])
    assert [share for _, share in found] == pytest.approx(
        [each / total for each in (*own, sum(shorter))], abs=1e-4
    )
