"""Tables of models side by side, and which of them are dominated."""

import re
from dataclasses import replace

import numpy as np
import pytest
from profiles import profile, speedup

from sepconvert.measure.comparison import Comparison, Delta, short_names
from sepconvert.measure.divergence import OutputDifference
from sepconvert.measure.latency import Latency, Speedup
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import Discordant, MeanDrop
from sepconvert.measure.profiling import Profile
from sepconvert.measure.statistics import Interval, paired_difference_interval


def test_who_is_dominated():
    profiles = profile(1, 0.9), profile(2, 0.9), profile(0.5, 0.8), profile(0.5, 0.8), profile(0.7, 0.79)
    deltas = (Delta(),) * 4
    assert Comparison(profiles, "abcde", deltas).dominated == (False, True, False, False, True)
    assert "dominated" in str(Comparison(profiles, "abcde", deltas))
    # Of two, or of what was measured apart, nothing is said.
    assert Comparison(profiles[:2], "ab", deltas[:1]).dominated == (False, False)
    assert not any(Comparison(profiles).dominated)
    unmeasured = (replace(profiles[0], metric=None), *profiles[1:])
    assert Comparison(unmeasured, "abcde", deltas).dominated == (False, False, False, False, True)


def test_differences_within_noise_are_no_speedups():
    found = Comparison((profile(1), profile(0.99)), ("a", "b"), (Delta(speedup(1.01)),))
    assert re.search(r"1\.01× \[1\.00, 1\.02\]\n +~ within noise\n", str(found))
    assert "1.01× [1.00, 1.02] ~ within noise" in found.text("markdown")


def test_other_styles():
    found = Comparison((profile(1), profile(0.5)), ("a", "b,c"), (Delta(speedup(2)),))
    assert found.text("markdown").splitlines()[3].startswith("|")
    header, *rows = found.text("csv").splitlines()
    assert header == ',a,"b,c"'
    assert rows[0] == "parameters,100,100 (1.00×)"
    assert all(len(line) <= 80 for line in str(found).splitlines())


def test_a_latency_within_the_intervals_dominates_nothing():
    deltas = (Delta(),) * 2
    alike = (profile(1.0, 0.9), profile(1.05, 0.9), profile(0.5, 0.8))
    assert Comparison(alike, "abc", deltas).dominated == (False, False, False)
    better = (profile(1.0, 0.8), profile(1.05, 0.9), profile(0.5, 0.7))  # more accurate, and not slower
    assert Comparison(better, "abc", deltas).dominated == (True, False, False)


def test_outputs_that_are_not_finite_are_reported():
    nothing = OutputDifference(None, None, None, None, None, None)
    text = str(Comparison((profile(1.0), profile(1.0)), "ab", (Delta(outputs=(nothing,)),)))
    assert "not finite" in text


def test_every_output_has_its_numbers():
    outputs = (
        OutputDifference(1.5, 0.5, 0.25, 0.875, 12.0, 0.75),
        OutputDifference(2.5, 0.5, 0.25, 0.875, None, None),
    )  # fmt: skip
    comparison = Comparison((profile(1.0), profile(1.0)), "ab", (Delta(outputs=outputs),))
    rows = {name: cells for name, *cells in comparison.rows()}
    assert rows["max abs Δ"] == ["-", "1.50e+00, 2.50e+00"]
    assert rows["SNR, dB"] == ["-", "12.0, -"]
    assert rows["same argmax"] == ["-", "75.00%, -"]


def test_the_drop_is_in_the_unit_of_its_metric():
    counts = Discordant(lost=8, won=3, n=2000)
    accuracy = MetricDelta(named("top1"), 90.0, 89.75, 0.25, counts, agreement=0.995)
    comparison = Comparison((profile(1.0, 0.9), profile(1.0, 0.9)), "ab", (Delta(accuracy=accuracy),))
    rows = {name: cells for name, *cells in comparison.rows()}
    low, high = paired_difference_interval(8, 3, 2000).to_list()
    assert rows["drop, pp"] == ["-", f"0.25 [{100 * low:.2f}, {100 * high:.2f}]"]
    assert rows["agreement"] == ["-", "99.50 %"]


def test_other_metrics_have_a_row_of_values_and_their_own_unit():
    def reached(value):
        return replace(profile(1.0), metric=MetricValue("psnr", "dB", True, value, 300))

    delta = MetricDelta(named("psnr"), 28.2, 28.1, 0.1, MeanDrop(np.full(300, 0.1)))
    found = Comparison((reached(28.2), reached(28.1)), "ab", (Delta(accuracy=delta),))
    rows = {name: cells for name, *cells in found.rows()}
    assert rows["psnr"] == ["28.20 dB of 300", "28.10 dB of 300"]
    assert rows["drop, dB"] == ["-", "0.1 [0.1, 0.1]"]
    assert "top-1" not in rows
    assert "McNemar p" not in rows
    assert found.to_json()["deltas"][0]["metric"]["unit"] == "dB"
    # Without a unit, there is none to print.
    delta = MetricDelta(named("mse"), 0.5, 0.625, 0.125, MeanDrop(np.full(9, 0.125)))
    found = Comparison((profile(1.0), profile(1.0)), "ab", (Delta(accuracy=delta),))
    assert ["drop", "-", "0.125 [0.125, 0.125]"] in found.rows()


def test_the_verdict_is_on_the_fastest():
    def timed(milliseconds, macs):
        latency = Latency(milliseconds, Interval(milliseconds, milliseconds), (milliseconds,) * 21, 5, 1, 1)
        return Profile(10, macs, None, None, latency, None, {})

    profiles = timed(3.0, 600), timed(2.0, 300), timed(1.5, 400)
    deltas = tuple(
        Delta(Speedup(ratio, Interval(ratio - 0.1, ratio + 0.1), Interval(0.9, 1.1))) for ratio in (1.5, 2.0)
    )
    found = Comparison(profiles, ("a/net.onnx", "b/small.onnx", "b/fast.onnx"), deltas)
    assert found.verdict == (
        "fast.onnx, the fastest of 2, is 2.00× [1.90, 2.10] as fast as net.onnx, with 1.50× fewer MACs."
    )
    assert Comparison(profiles[:2], ("a/net.onnx", "b/net.onnx"), deltas[:1]).verdict.startswith(
        "b/net.onnx is"
    )
    noisy = Delta(Speedup(1.05, Interval(0.9, 1.2), Interval(0.9, 1.1)))
    assert Comparison(profiles[:2], (), (noisy,)).verdict == (
        "#2 is as fast as #1, within noise, with 2.00× fewer MACs."
    )
    assert Comparison(profiles[:2]).verdict == "#2 was not timed together with #1, with 2.00× fewer MACs."
    assert Comparison(profiles[:1]).verdict == (
        "3.000 [3.000, 3.000] ms a batch of 1 on 1 thread, 10 parameters, 600 MACs."
    )
    assert "<table>" in found._repr_html_()
    assert repr(found).count("\n") < 20


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.onnx", "b/y.onnx"], ("x.onnx", "y.onnx")),
        (["a/x.onnx", "b/x.onnx"], ("a/x.onnx", "b/x.onnx")),
        (["a/x.onnx"], ("x.onnx",)),
        ([], ()),
    ],
)
def test_short_names(paths, names):
    assert short_names(paths) == names
