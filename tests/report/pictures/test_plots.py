"""Plots are SVG in the colours of the page, and kernels show the values that they are given."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from data_urls import pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from sepconvert.report.pictures import plots
from sepconvert.report.pictures.exhibits import KernelPair
from sepconvert.report.text.numbers import TOP1, Quality


def points(count: int, drops=()) -> list[dict]:
    return [
        {
            "converted": number + 1,
            "macs_ratio": 1.5 + number,
            "heldout": {"divergence": 0.01 * 2**number},
            "drop": None if drop is None else {"value": drop, "ci95": [drop - 0.5, drop + 0.5]},
            "latency_speedup": {"median": 1.25 + number, "significant": True},
            "delivered": number == 0,
        }
        for number, drop in zip(range(count), [*drops, *[None] * count], strict=False)
    ]


SPECTRUM = {"scheme": "spatial-vh", "cut": 2, "full_rank": 24, "values": [[1, 0.75], [2, 0.5], [24, 1e-12]]}


@pytest.fixture(params=["trade-off", "distributions", "spectrum", "time"])
def svg(request, document) -> str:
    if request.param == "trade-off":
        return plots.trade_off(points(3, [0.25]), TOP1)
    if request.param == "spectrum":
        return plots.spectrum(SPECTRUM)
    if request.param == "time":
        return plots.time_bar([2.0, 1.0])
    return plots.distributions(
        [("a < b", document[side]["latency_ms"]) for side in ("original", "converted")]
    )


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


def test_a_curve_without_accuracy_has_one_plot():
    assert "top-1" not in plots.trade_off(points(2), TOP1)
    assert "top-1" in plots.trade_off(points(2, [0.5]), TOP1)


def drawn_height(svg: str, gain: int) -> float:
    """Where the marker of a plan is in the lower plot, from above."""
    return [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"[^>]*var\(--(?:bar|after)\)', svg)][gain]


def test_the_lower_axis_is_that_of_the_metric():
    curve = points(2, [0.5, 1.0])
    assert "psnr, dB" in plots.trade_off(curve, Quality("psnr", "dB", higher_is_better=True))
    shown = plots.trade_off(curve, Quality("mse", "", higher_is_better=False))
    assert "change of" in shown
    assert ">mse<" in shown


def test_what_is_worse_lies_lower_unless_less_is_better():
    curve = points(2, [0.5, 1.0])
    better, worse = (drawn_height(plots.trade_off(curve, TOP1), -place) for place in (2, 1))
    assert better < worse
    error = Quality("mse", "", higher_is_better=False)
    better, worse = (drawn_height(plots.trade_off(curve, error), -place) for place in (2, 1))
    assert better > worse


def test_a_curve_is_drawn_over_macs_unless_all_is_timed():
    curve = points(3)
    assert "measured speed-up" in plots.trade_off(curve, TOP1)
    curve[1]["latency_speedup"] = None
    assert "fewer MACs" in plots.trade_off(curve, TOP1)


def test_speedups_within_noise_are_hollow():
    curve = points(3)
    assert "fill-opacity: 0; stroke: var(--bar)" not in plots.trade_off(curve, TOP1)
    curve[1]["latency_speedup"]["significant"] = False
    assert "fill-opacity: 0; stroke: var(--bar)" in plots.trade_off(curve, TOP1)


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
    colours, total = plots.STAGE_COLOURS, sum(seconds)
    own, shorter = seconds[: len(colours) - 1], seconds[len(colours) - 1 :]
    found = bars(plots.time_bar(seconds))
    assert [colour for colour, _ in found] == list(colours[: len(own) + 1])
    assert [share for _, share in found] == pytest.approx(
        [each / total for each in (*own, sum(shorter))], abs=1e-4
    )
