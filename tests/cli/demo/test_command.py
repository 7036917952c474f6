"""Command `demo`."""

import json

import pytest
from command_line import RESULTS, listing


@pytest.mark.slow
def test_demo(here, run):
    outcome = run("demo", "--runs", "3")
    assert outcome.code == 0
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert "leave layers as they are (--exclude)" in " ".join(outcome.out.split())
    modes = ("approx", "auto", "exact")
    assert listing(here / "demo-sepconvert") == sorted(
        path for mode in modes for path in (mode, *(f"{mode}/{name}" for name in RESULTS))
    )
    reports = [
        json.loads((here / "demo-sepconvert" / mode / "report.json").read_text())
        for mode in ("exact", "approx", "auto")
    ]
    assert [report["mode"] for report in reports] == ["exact", "approx", "auto"]
    assert sum(layer["decision"] == "converted" for layer in reports[0]["layers"]) == 8
    assert reports[1]["delta"]["macs_ratio"] > reports[0]["delta"]["macs_ratio"] > 2
    assert reports[2]["delta"]["accuracy_drop_pp"]["value"] <= 1
