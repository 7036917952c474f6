"""Conditions of `compare --fail-if`."""

import numpy as np
import pytest
from profiles import profile, speedup

from sepconvert.base.errors import SepconvertError
from sepconvert.cli.conditions import UNITS, Demand
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import MeanDrop
from sepconvert.report.baseline import Change, ModelChanges


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


@pytest.mark.parametrize(
    ("text", "ratio", "fails"),
    [
        ("latency > +5%", 1 / 1.06, True),
        ("latency > +5%", 1 / 1.04, False),
        ("latency > 1%", 1 / 1.02, False),  # within noise
        ("latency>-20%", 1.2, True),
        ("speedup < 2x", 1.9, True),
        ("speedup < 2", 2.1, False),
        ("macs > -40%", 1, True),
        ("MACS > -10 %", 1, False),
    ],
)
def test_conditions(text, ratio, fails):
    comparison = Comparison((profile(1), profile(1, macs=700)), ("a", "b"), (Delta(speedup(ratio)),))
    assert bool(Demand.parse(text).failures(comparison)) is fails


@pytest.mark.parametrize(
    "text", ["", "latency", "latency > 5", "size > 5%", "drop > 1%", "drop = 1", "latency > x%", "drop > nan"]
)
def test_what_is_no_condition(text):
    with pytest.raises(SepconvertError, match=r"--fail-if .*: expected one of latency, "):
        Demand.parse(text)


@pytest.mark.parametrize("text", ["latency > 5%", "drop > 1", "agreement < 90%", "max_abs > 1"])
def test_conditions_on_what_was_not_measured(text):
    with pytest.raises(SepconvertError, match="is not measured"):
        Demand.parse(text).failures(Comparison((profile(1), profile(1))))


def test_conditions_have_units():
    comparison = Comparison((profile(1.0), profile(2.0)), ("a", "b"), (Delta(speedup(0.5)),))
    assert Demand.parse("latency > 5%").failures(comparison) == ["b: latency is 100 % (latency > 5%)"]


def lost(drop, metric):
    delta = MetricDelta(named(metric), 28.2, 28.2 - drop, drop, MeanDrop(np.full(9, drop)))
    return Comparison((profile(1), profile(1)), ("a", "b"), (Delta(accuracy=delta),))


@pytest.mark.parametrize("text", ["drop > 0.1", "drop > 0.1 dB", "drop > 0.1db"])
def test_drops_are_in_the_unit_of_the_metric(text):
    found = Demand.parse(text)
    assert found.failures(lost(0.125, "psnr")) == [f"b: drop is 0.125 dB ({text})"]
    assert found.failures(lost(0.05, "psnr")) == []
    assert Demand.parse("drop > 0.1").failures(lost(0.125, "mse")) == ["b: drop is 0.125 (drop > 0.1)"]


@pytest.mark.parametrize(
    ("text", "unit", "said"),
    [
        ("drop > 1", "dB", None),
        ("drop > 1 dB", "dB", None),
        ("drop > 1 pp", "pp", None),
        ("drop > 1 pp", "dB", "in dB"),
        ("drop > 1 dB", "pp", "in pp"),
        ("drop > 1 pp", "", "unitless"),
        ("latency > 5%", "dB", None),
    ],
)
def test_a_drop_in_another_unit_is_refused_first(text, unit, said):
    demand = Demand.parse(text)
    if said is None:
        demand.require(together=True, timed=True, data=True, labels=True, unit=unit)
        return
    with pytest.raises(SepconvertError, match=f"drops of this metric are {said}; give the threshold so"):
        demand.require(together=True, timed=True, data=True, labels=True, unit=unit)


def change(quantity, amount, unit="%"):
    return Change(quantity, 1.0, 1.0, amount, unit, "2026-01-01")


@pytest.mark.parametrize(
    ("text", "quantity", "amount", "fails"),
    [
        ("latency > +5%", "latency", 5.1, True),
        ("latency > +5%", "latency", 4.9, False),
        ("macs > 0%", "macs", 0.0, False),
        ("params < -10%", "params", -11, True),
        ("bytes > 1%", "bytes", 2, True),
        ("drop > 0.5", "metric", 0.6, True),
        ("drop > 0.5", "metric", -0.6, False),
    ],
)
def test_changes_since_a_baseline(text, quantity, amount, fails):
    unit = "pp" if quantity == "metric" else "%"
    models = (
        ModelChanges("net.onnx", (change(quantity, amount, unit),), {}),
        ModelChanges("new.onnx", (), {quantity: "there is no earlier run with it"}),
    )
    metric = text.split()[0]
    said = [f"net.onnx: {metric} is {amount:+.4g} {unit} since 2026-01-01 ({text})"]
    assert Demand.parse(text).failures_since(models) == (said if fails else [])


@pytest.mark.parametrize(
    ("metric", "alone"), [(metric, metric in ("macs", "params", "bytes", "drop")) for metric in UNITS]
)
def test_one_model_is_judged_by_its_changes_alone(metric, alone):
    demand = Demand.parse(f"{metric} > 1{UNITS[metric][0]}")
    for models, since, judged in (
        (1, True, alone),
        (1, False, False),
        (2, True, True),
        (2, False, True),
    ):
        if judged:
            demand.require_a_base(models=models, since=since)
            continue
        with pytest.raises(SepconvertError, match=f"{metric} is .* a reference .*compare REFERENCE MODEL"):
            demand.require_a_base(models=models, since=since)


def test_outputs_of_other_shapes_differ_without_limit():
    comparison = Comparison((profile(1), profile(1)), ("a", "b"), (Delta(outputs=None),))
    assert Demand.parse("max_abs > 1").failures(comparison)
