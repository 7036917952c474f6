"""Conditions of `compare --fail-if`."""

import pytest


@pytest.mark.parametrize(
    ("condition", "more"),
    [
        ("drop > 1", ()),
        ("agreement < 99%", ()),
        ("latency > 5%", ("--runs", "0")),
        ("speedup < 1", ("--runs", "0")),
    ],
)
def test_conditions_on_what_will_not_be_measured_are_refused_first(here, run, condition, more):
    """Before files are read, which are none."""
    for name in ("a.onnx", "b.onnx"):
        (here / name).write_bytes(b"none")
    outcome = run("compare", "a.onnx", "b.onnx", "--fail-if", condition, *more)
    assert outcome.code == 2
    assert f"--fail-if '{condition}': {condition.split()[0]} is not measured; " in outcome.err
    assert "a.onnx" in run("compare", "a.onnx", "b.onnx", "--fail-if", "macs > 1%").err
    # No condition would fail.
    alone = run("compare", "a.onnx", "--fail-if", "macs > 1%")
    assert (alone.code, alone.out) == (2, "")
    assert "compare: expected two models or more, got one" in alone.err
