"""The curve shows each plan that was carried out, the delivered one always, with the signs of the tables."""

import re
import xml.etree.ElementTree as ET

import pytest
from report.int8_forms import deployed

from sepconvert.report.pictures import curve


def plan(number: int, drop: float | None = None, n: int = 2000, **others) -> dict:
    """A plan that was carried out and timed; the more layers, the faster and the worse."""
    drops = None if drop is None else {
        "value": drop, "unit": "pp", "ci95": [drop - 0.5, drop + 0.5], "n": n,
    }  # fmt: skip
    return {
        "converted": number,
        "macs_ratio": 1.5 + number,
        "heldout": {"divergence": 0.01 * 4**number},
        "drop": drops,
        "latency_speedup": {"median": 1.25 + number, "significant": True},
        "delivered": False,
    } | others


ORIGINAL = plan(0, latency_speedup=None, heldout=None)


@pytest.fixture
def drawn(approximate):
    """Return a report with the given plans on its curve."""

    def with_plans(*plans: dict) -> dict:
        approximate["approximation"]["curve"] = [ORIGINAL, *plans]
        return approximate

    return with_plans


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


@pytest.mark.parametrize("slim", [False, True])
def test_the_picture_is_well_formed_and_in_the_colours_of_the_page(drawn, slim):
    svg = curve.trade_off(drawn(plan(1, 0.25), plan(2, 0.5, delivered=True)), slim=slim)
    root = ET.fromstring(svg.replace("xlink:href", "href"))  # noqa: S314  (our own)
    assert root.get("aria-label")
    assert "var(--after)" in svg
    assert not re.search(r"#01020[345]|http", svg)


def test_one_plan_is_a_curve(drawn):
    """However few plans were carried out, the delivered one is among them."""
    found, timed = curve.marks(drawn(plan(1, 0.25, delivered=True)))
    assert timed
    assert [(mark.name, mark.delivered) for mark in found] == [("original", False), ("", True)]
    assert "← delivered" in texts(curve.trade_off(drawn(plan(1, 0.25, delivered=True))))


def test_a_delivered_plan_that_was_not_measured_has_the_results_of_the_files(drawn):
    document = drawn(plan(1, heldout=None, latency_speedup=None, delivered=True))
    (_, delivered), timed = curve.marks(document)
    assert timed
    assert delivered.gain == document["delta"]["latency_speedup"]["median"] == 1.5
    assert (delivered.change, delivered.ends) == (-0.25, (-0.55, 0.05))
    assert "← delivered" in texts(curve.trade_off(document))


def test_the_original_is_delivered_where_no_plan_is(drawn):
    document = drawn(plan(1, 5.0))
    document["approximation"]["curve"][0] = {**ORIGINAL, "delivered": True}
    assert "original ← delivered" in texts(curve.trade_off(document))


def test_plans_that_were_not_carried_out_are_left_out(drawn):
    found, _ = curve.marks(drawn(plan(1, 0.25), plan(2, heldout=None), plan(3, 0.75)))
    assert [mark.gain for mark in found] == [1.0, 2.25, 4.25]


def test_signs_are_those_of_the_tables(drawn):
    noisy = {"median": 1.5, "significant": False}
    document = drawn(
        plan(1, 0.25, latency_speedup=noisy),
        plan(2, 0.5, n=500),
        plan(3, 0.75, n=500, latency_speedup={**noisy, "median": 4.25}),
        plan(4, 1.0, delivered=True),
    )
    found, _ = curve.marks(document)
    assert [mark.signs for mark in found] == ["", "~", "*", "~*", ""]
    shown = texts(curve.trade_off(document))
    for sign in ("~", "*", "~*", "← delivered"):
        assert sign in shown


def test_speedups_within_noise_are_hollow(drawn):
    hollow = "fill-opacity: 0; stroke: var(--after)"
    assert hollow not in curve.trade_off(drawn(plan(1, 0.25, delivered=True)))
    noisy = {"median": 1.5, "significant": False}
    assert hollow in curve.trade_off(drawn(plan(1, 0.25, delivered=True, latency_speedup=noisy)))


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([], []),
        ([(1, 5)], [(1, 5)]),
        ([(1, 5), (2, 4), (3, 3)], [(1, 5), (2, 4), (3, 3)]),
        ([(1, 5), (2, 3), (3, 4)], [(1, 5), (3, 4)]),  # the second is slower and worse than the third
        ([(1, 5), (1, 4), (2, 5)], [(2, 5)]),
    ],
)
def test_the_frontier_is_what_no_other_beats(points, kept):
    assert curve.frontier(points[::-1]) == kept


def line(svg: str) -> list[tuple[float, float]]:
    """Ends of the grey line, which is the first with several points in the colour of text at 0.4."""
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: currentColor; stroke-opacity: 0\.4', svg)[:1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_the_line_joins_the_frontier_alone(drawn):
    document = drawn(plan(1, 0.25), plan(2, 2.0), plan(3, 0.75, delivered=True))
    assert len(line(curve.trade_off(document))) == 3  # the original, the first and the third
    document = drawn(plan(1, 0.25), plan(2, 0.5), plan(3, 0.75, delivered=True))
    assert len(line(curve.trade_off(document))) == 4


def test_less_may_be_better(drawn):
    document = drawn(plan(1, 0.25), plan(2, 2.0, delivered=True))
    document["delta"]["metric"] |= {"name": "mse", "unit": "", "higher_is_better": False}
    found, _ = curve.marks(document)
    assert [mark.change for mark in found] == [0.0, 0.25, 2.0]  # what rises is worse
    svg = curve.trade_off(document)
    assert any("mse" in text for text in texts(svg))
    heights = [height for _, height in line(svg)]
    assert heights == sorted(heights, reverse=True)  # from above: the line rises to the worse


def test_the_axis_is_that_of_the_metric(drawn):
    document = drawn(plan(1, 0.25, delivered=True))
    assert any("top-1" in text for text in texts(curve.trade_off(document)))
    document["delta"]["metric"] |= {"name": "psnr", "unit": "dB"}
    assert any("psnr drop, dB" in text for text in texts(curve.trade_off(document)))


def test_without_data_there_is_the_divergence_alone(drawn):
    document = drawn(plan(1, delivered=True))
    document["delta"]["metric"] = None
    shown = " ".join(texts(curve.trade_off(document)))
    assert "divergence from the original" in shown
    assert "drop" not in shown
    assert "← delivered" in shown


def test_a_curve_is_over_macs_unless_all_is_timed(drawn):
    plans = [plan(1, 0.25), plan(2, 0.5, delivered=True)]
    assert "measured speed-up, ×" in texts(curve.trade_off(drawn(*plans)))
    plans[0]["latency_speedup"] = None
    assert "fewer MACs, ×" in texts(curve.trade_off(drawn(*plans)))


def test_a_plan_that_destroys_the_network_leaves_room_for_the_others(drawn):
    document = drawn(plan(1, 0.25, delivered=True), plan(2, 60.0))
    assert [mark.change for mark in curve.far_off(document)] == [-60.0]
    shown = texts(curve.trade_off(document))
    assert "-60" in shown  # its value, at the edge
    assert "−60" not in shown  # not a tick
    near = drawn(plan(1, 0.25, delivered=True), plan(2, 2.0))
    assert not curve.far_off(near)


def test_what_is_allowed_is_shown_where_it_is_in_sight(drawn):
    document = drawn(plan(1, 0.25), plan(2, 1.5, delivered=True))
    assert "allowed" in texts(curve.trade_off(document))
    document["approximation"]["budget"]["max_drop"] = 50.0
    assert "allowed" not in texts(curve.trade_off(document))
    document["approximation"]["budget"]["max_drop"] = None
    assert "allowed" not in texts(curve.trade_off(document))


def test_in_int8_plans_are_compared_with_int8_alone(drawn):
    document = deployed(drawn(plan(1, 1.0, delivered=True)))
    found, _ = curve.marks(document)
    assert found[0].name == "int8 alone"
    assert found[0].change == pytest.approx(-0.25)  # which int8 loses itself
