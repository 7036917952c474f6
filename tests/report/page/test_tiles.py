"""Tiles hold absolute values before and after, and what was gained or lost."""

import pytest
from report.int8_forms import deployed

from sepconvert.report.page.tiles import Tile, legend, report_tiles, tiles


def by_label(document) -> dict[str, Tile]:
    return {tile.label: tile for tile in report_tiles(document)}


def test_absolute_values_before_and_after(document):
    found = by_label(document)
    values = {label: tile.values for label, tile in found.items()}
    assert values == {
        "outputs": ("exact",),
        "accuracy (top-1)": ("96.75", "96.50 %"),
        "time per run": ("1.50", "1.00 ms"),
        "MACs": ("2.01M", "1.01M"),
        "parameters": ("4k", "1k"),
        "ONNX file": ("20 kB", "5 kB"),
    }
    assert {label: tile.change for label, tile in found.items()} == {
        "outputs": "the same but for rounding (4e-08)",
        "accuracy (top-1)": "0.25 pp lost [-0.05, 0.55]",
        "time per run": "1.50× as fast [1.40, 1.60]",
        "MACs": "2.00× fewer",
        "parameters": "4.00× fewer",
        "ONNX file": "4.00× smaller",
    }


def test_exact_is_said_only_of_what_is_exact(document, approximate):
    assert "outputs" not in by_label(approximate)
    document["layers"][1]["exact"] = False
    assert by_label(document)["outputs"].values == ("within tolerance",)
    document["layers"] = document["layers"][:1]  # which is kept
    assert "outputs" not in by_label(document)


def test_what_was_not_measured_has_no_tile(bare):
    assert {*by_label(bare)} == {"outputs", "MACs", "parameters", "ONNX file"}
    bare["converted"]["onnx_bytes"] = None
    assert "ONNX file" not in by_label(bare)
    assert by_label(bare)["MACs"].change == ""  # of no MACs there is no ratio


def test_gains_and_losses_in_words(document):
    metric = document["delta"]["metric"]
    metric.update(drop=-0.5, ci95=[-0.75, 0.125])
    assert by_label(document)["accuracy (top-1)"].change == "0.50 pp gained [-0.12, 0.75]"
    metric.update(drop=0.0, ci95=[-0.25, 0.25])
    assert by_label(document)["accuracy (top-1)"].change == "unchanged [-0.25, 0.25]"


def test_a_metric_of_which_less_is_better(restored):
    assert by_label(restored)["psnr"].values == ("28.20", "28.10 dB")
    assert by_label(restored)["psnr"].change == "0.098 dB lost [0.0901, 0.106]"
    restored["delta"]["metric"]["higher_is_better"] = False
    assert by_label(restored)["psnr"].change == "0.098 dB worse [0.0901, 0.106]"


def test_noise_is_marked_and_explained(document):
    assert "~" not in legend(report_tiles(document))
    document["delta"]["latency_speedup"]["significant"] = False
    assert by_label(document)["time per run"].change.endswith("[1.40, 1.60]\N{NO-BREAK SPACE}~")
    assert "~: a difference that noise may explain" in legend(report_tiles(document))


def test_words_that_need_it_are_explained(document, restored):
    assert "MACs: multiply-adds" in legend(report_tiles(document))
    assert "pp: percentage points" in legend(report_tiles(document))
    assert "pp:" not in legend(report_tiles(restored))


def test_more_is_not_called_fewer(document):
    document["converted"].update(params=8000, macs=document["original"]["macs"], onnx_bytes=40_000)
    document["delta"].update(params_ratio=0.5, macs_ratio=1.0)
    found = by_label(document)
    assert found["parameters"].change == "2.00× more"
    assert found["ONNX file"].change == "2.00× larger"
    assert found["MACs"] == Tile("MACs", ("2.01M",), "unchanged")


def test_a_batch_is_named(document):
    for side in ("original", "converted"):
        document[side]["latency_ms"]["batch"] = 8
    assert "time per run of 8 samples" in by_label(document)


def test_in_int8_speed_is_that_over_int8_alone_and_over_floating_point(approximate):
    found = by_label(deployed(approximate))
    assert found["time per run"].change == "1.50× as fast as int8 alone [1.40, 1.60]"
    assert found["time per run"].note == "3.00× as fast as in floating point (3.00 ms)"
    assert found["accuracy (top-1)"].note == "from floating point to int8"
    untimed = by_label(deployed(approximate, timed=False))
    assert untimed["time per run"].note == ""


@pytest.mark.parametrize("missing", ["original", "converted"])
def test_reports_of_an_earlier_version_know_no_metric(document, missing):
    del document[missing]["metric"]
    assert "accuracy (top-1)" not in by_label(document)


def test_profiles_that_were_measured_apart_have_no_speedup(document):
    delta = {"latency_speedup": None, "metric": None, "macs_ratio": 2.0, "params_ratio": 4.0}
    found = {tile.label: tile for tile in tiles(document["original"], document["converted"], delta)}
    assert found["time per run"] == Tile("time per run", ("1.50", "1.00 ms"))
    assert found["accuracy (top-1)"].values == ("96.75", "96.50 %")
    assert found["accuracy (top-1)"].change == ""
