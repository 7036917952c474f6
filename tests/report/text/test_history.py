"""Changes since earlier runs, as text."""

import pytest
from profiles import speedup

from sepconvert.report.text.history import amount_text, change_rows, changes_text, obstacles


def change(quantity, then, now, amount=0.0, **more):
    return {
        "quantity": quantity, "metric": None, "then": then, "now": now, "change": amount, "unit": "%",
        "since": "2026-01-02T03:04:05+00:00", "latency_speedup": None, **more,
    }  # fmt: skip


FASTER = change("latency", 2.0, 4.0, -50.0, latency_speedup=speedup(2.0).to_dict())
MODELS = [
    {"model": "a/old.onnx", "changes": [change("params", 10, 10), change("macs", 1000, 1000)], "missing": {}},
    {
        "model": "a/new.onnx",
        "changes": [
            change("params", 10, 10),
            change("macs", 1000, 1250, 25.0),
            change("metric", 91.25, 90.75, 0.5, metric="top1", unit="pp"),
            FASTER,
        ],
        "missing": {"bytes": "there is no earlier run with it", "latency": "there is no earlier run with it"},
    },
]


def test_rows_of_what_changed_and_one_of_what_did_not():
    assert change_rows(MODELS) == [
        ["old.onnx", "parameters, MACs", "", "", "none", "2026-01-02"],
        ["new.onnx", "MACs", "1,000", "1,250", "+25 %", "2026-01-02"],
        ["new.onnx", "top-1", "91.25 %", "90.75 %", "lost 0.50 pp", "2026-01-02"],
        ["new.onnx", "speed-up", "2.00×", "4.00×", "latency -50.0 % [-50.5, -49.5]", "2026-01-02"],
        ["new.onnx", "parameters", "", "", "none", "2026-01-02"],
    ]


def test_what_did_not_change_is_told_for_each_date():
    changes = [change("params", 1, 1), change("macs", 1, 1, since="2026-01-03T00:00:00+00:00")]
    rows = change_rows([{"model": "a", "changes": changes, "missing": {}}])
    assert [(row[1], row[-1]) for row in rows] == [("parameters", "2026-01-02"), ("MACs", "2026-01-03")]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (change("macs", 1000, 999, -0.1), "-0.1 %"),
        (change("metric", 1.0, 1.5, -0.5, unit="dB"), "gained 0.5 dB"),
        (change("metric", 1.0, 0.5, 0.5, unit=""), "lost 0.5"),
        (change("latency", 2, 2, latency_speedup=speedup(1.0).to_dict()),
         "latency +0.0 % [-1.0, +1.0] ~ within noise"),
    ],
)  # fmt: skip
def test_amounts(given, text):
    assert amount_text(given) == text


def test_reasons_are_told_once_for_each_model():
    assert obstacles(MODELS) == [
        "a/new.onnx, ONNX bytes, speed-up: not compared, there is no earlier run with it."
    ]


def test_a_terminal_is_wide_enough():
    text = changes_text(MODELS)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "not compared" in text
    assert changes_text([{**MODELS[1], "changes": []}]).startswith("a/new.onnx, ONNX bytes")
    assert changes_text([]) == ""
