"""Results in Markdown: tables that parse, and sentences that say what the numbers do."""

import re
from dataclasses import replace

import numpy as np
import pytest
from profiles import profile, speedup
from report.int8_forms import deployed

from sepconvert.base.environment import Runtime, environment
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.divergence import OutputDifference
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import MeanDrop
from sepconvert.report.text.markdown import comparison, conversion

PLACE = {**environment(Runtime(1)), "cpu": "Fast <b>*CPU*", "cores": 4, "load_average": 0.0}
PAIR = Comparison((profile(1), profile(0.5, macs=400)), ("a/old.onnx", "a/new.onnx"), (Delta(speedup(2)),))


def tables(text):
    """Return the tables of a text as Markdown has them: lists of rows, which all have as many cells."""
    found, lines = [], text.splitlines()
    for place, line in enumerate(lines):
        if not re.fullmatch(r"\|(:?-+:?\|)+", line):
            continue
        assert not lines[place - 2 : place - 1] or lines[place - 2] == ""  # a paragraph would take it in
        end = next((n for n in range(place, len(lines)) if not lines[n]), len(lines))
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", each)[1:-1]]
            for each in (lines[place - 1], *lines[place + 1 : end])
        ]
        assert {len(row) for row in rows} == {line.count("|") - 1}
        found.append(rows)
    return found


def cells(table):
    return {name: values for name, *values in table}


def test_a_comparison():
    text = comparison(PAIR.to_json(), PLACE, {})
    first, *_ = text.splitlines()
    assert first == "**`new.onnx` is 2.00× [1.98, 2.02] as fast as `old.onnx`.**"
    (table,) = tables(text)
    assert cells(table) == {
        "": ["`old.onnx`", "`new.onnx`"],
        "latency, ms": ["1.000 [0.900, 1.100]", "0.500 [0.450, 0.550]"],
        "speed-up": ["", "2.00× [1.98, 2.02]"],
        "MACs": ["1,000", "400 (-60.0 %)"],
        "parameters": ["100", "100"],
        "ONNX file, bytes": ["4,000", "4,000"],
    }
    last = text.splitlines()[-1]
    assert last.startswith(r"<sub>Timed on Fast \<b>\*CPU\* (4 cores")
    assert last.endswith(f"Brackets are 95 % intervals. sepconvert {PLACE['sepconvert']}.</sub>")


@pytest.mark.parametrize(
    ("drop", "spread", "said"),
    [
        (0.5, 0.1, "and 0.50 pp [0.49, 0.51] worse in top-1 (300 samples)"),
        (-0.5, 0.1, "and 0.50 pp [0.49, 0.51] better in top-1 (300 samples)"),
        (0.005, 1.0, "worse in top-1 (300 samples; the interval includes 0)"),
        (-0.005, 1.0, "better in top-1 (300 samples; the interval includes 0)"),
        (0.0, 1.0, "and equal in top-1 (300 samples; the interval includes 0)"),
    ],
)
def test_what_is_said_of_the_metric(drop, spread, said):
    rows = drop + spread * np.resize([-1.0, 1.0], 300)
    delta = MetricDelta(named("top1"), 90.0, 90 - drop, drop, MeanDrop(rows))
    found = Comparison((profile(1, 0.9),) * 2, ("a", "b"), (Delta(speedup(1.0), delta),))
    first, *_ = comparison(found.to_json(), None, {}).splitlines()
    assert "`b` is 1.00× [0.99, 1.01] as fast as `a`, which is within noise, and " in first
    assert said in first


def test_other_metrics_have_their_names_and_units():
    def reached(value):
        return replace(profile(1.0), metric=MetricValue("psnr", "dB", True, value, 300))

    delta = MetricDelta(named("psnr"), 28.2, 28.1, 0.1, MeanDrop(np.full(300, 0.1)), agreement=None)
    found = Comparison((reached(28.2), reached(28.1)), ("a", "b"), (Delta(accuracy=delta),))
    text = comparison(found.to_json(), None, {})
    assert text.splitlines()[0] == (
        "**`b` has as many MACs as `a`, and 0.1 dB [0.1, 0.1] worse in psnr (300 samples).**"
    )
    rows = cells(tables(text)[0])
    assert rows["psnr"] == ["28.20 dB", "28.10 dB"]
    assert rows["worse by"] == ["", "0.1 dB [0.1, 0.1]"]


@pytest.mark.parametrize(
    ("outputs", "cell"),
    [
        (None, "other shapes"),
        ((OutputDifference(None, None, None, None, None, None),), "not finite"),
        ((OutputDifference(1e-3, 0.0, 0.0, 1.0, 1.0, 1.0), OutputDifference(2e-3, 0, 0, 1, 1, 1)), "2.0e-03"),
    ],
)
def test_differences_of_outputs(outputs, cell):
    found = Comparison((profile(1), profile(1)), ("a", "b"), (Delta(outputs=outputs),))
    (table,) = tables(comparison(found.to_json(), None, {}))
    assert cells(table)["largest difference of outputs"] == ["", cell]


@pytest.mark.parametrize(
    ("macs", "said"),
    [(400, "60.0 % fewer MACs than"), (1100, "10.0 % more MACs than"), (1000, "as many MACs as")],
)
def test_models_that_were_not_timed_are_judged_by_their_macs(macs, said):
    found = Comparison((profile(1), profile(1, macs=macs)), ("a", "b"), (Delta(),))
    assert comparison(found.to_json(), None, {}).splitlines()[0] == f"**`b` has {said} `a`.**"


def test_checks_come_before_the_tables():
    checks = {"latency > +5%": [], "drop > 1": []}
    assert "\n\nChecks passed: `latency > +5%`, `drop > 1`.\n\n|" in comparison(PAIR.to_json(), None, checks)
    checks["drop > 1"] = ["b: drop is 2 pp (drop > 1)"]
    text = comparison(PAIR.to_json(), None, checks)
    assert "\n\nChecks failed:\n\n- b: drop is 2 pp (drop > 1)\n\n|" in text
    assert "passed" not in text


def test_names_of_files_that_are_alike_keep_their_folders():
    found = Comparison(PAIR.profiles, ("a/x|.onnx", "b/x|.onnx"), PAIR.deltas)
    (table,) = tables(comparison(found.to_json(), None, {}))
    assert table[0] == ["", r"`a/x\|.onnx`", r"`b/x\|.onnx`"]


def test_one_model_and_several():
    one = Comparison(PAIR.profiles[:1], ("a",), ())
    (table,) = tables(comparison(one.to_json(), None, {}))
    assert table[0] == ["", "`a`"]
    three = Comparison((*PAIR.profiles, profile(2)), ("a", "b", "c"), (*PAIR.deltas, Delta(speedup(0.5))))
    text = comparison(three.to_json(), None, {})
    assert [line[:8] for line in text.splitlines()[:3]] == ["**`b` is", "", "**`c` is"]
    assert cells(tables(text)[0])["speed-up"] == ["", "2.00× [1.98, 2.02]", "0.50× [0.49, 0.51]"]


CHANGE = {"quantity": "macs", "metric": None, "then": 400, "now": 500, "change": 25.0, "unit": "%",
          "since": "2026-01-02T00:00:00+00:00", "latency_speedup": None}  # fmt: skip


def test_changes_since_a_baseline():
    models = [{"model": "a/new.onnx", "changes": [CHANGE], "missing": {"latency": "that <was> another"}}]
    document = {**PAIR.to_json(), "baseline": {"path": "h.json", "models": models}}
    text = comparison(document, None, {})
    _, table = tables(text)
    assert table[1] == ["new.onnx", "MACs", "400", "500", "+25 %", "2026-01-02"]
    assert "\n- a/new.onnx, speed-up: not compared, that \\<was> another.\n" in text
    document["baseline"]["models"] = []
    assert "baseline" not in comparison(document, None, {})


# Conversions ---------------------------------------------------------------------------------------


def test_a_conversion(document):
    text = conversion(document)
    assert re.match(r"\*\*.+\*\*\n\n\|", text)
    rows = cells(tables(text)[0])
    assert rows[""] == ["original", "converted"]
    assert rows["MACs"] == ["2,012,345", "1,006,172 (-50.0 %)"]
    assert rows["speed-up"] == ["", "1.50× [1.40, 1.60]"]
    assert rows["top-1"] == ["96.75 %", "96.50 %"]
    assert rows["worse by"] == ["", "0.25 pp [-0.05, 0.55]"]
    assert text.splitlines()[-1].startswith("<sub>Timed on ")
    assert len(text) < 3000


def test_a_conversion_that_was_not_measured(bare):
    text = conversion(bare)
    assert "Timed on" not in text
    assert "latency" not in cells(tables(text)[0])


def test_a_conversion_to_int8_shows_all_forms(document):
    text = conversion(deployed(document))
    _, forms = tables(text)
    assert [row[0] for row in forms[1:]] == [
        "original, float", "original, int8", "converted, float", "converted, int8"
    ]  # fmt: skip


def test_warnings_of_a_conversion_are_listed_once(document):
    document["environment"]["threads"] = document["environment"]["cores"] + 1
    assert conversion(document).count("\n- Warning: ") == 1
