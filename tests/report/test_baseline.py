"""Histories of comparisons: what is compared with an earlier run, with which, and what is not."""

import json
import os
import re
from dataclasses import replace

import msgspec
import pytest
from profiles import profile, speedup

from sepconvert.base.environment import Runtime, environment
from sepconvert.base.errors import SepconvertError
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.report import baseline
from sepconvert.report.baseline import changes_since, read_baseline, write_baseline
from sepconvert.report.schema.baseline import BaselineDocument, BaselineEntry

MACHINE = {**environment(Runtime(1)), "cpu": "one", "instruction_sets": ["AVX2"]}
A, B, DATA, OTHER = "a" * 64, "b" * 64, "c" * 64, "d" * 64


def entry(*models, date="2026-01-01T00:00:00+00:00", **about):
    """Return a run of models, each of which is a dictionary of what differs from the usual."""
    document = {
        "date": date, "environment": {**MACHINE, **about.pop("machine", {})}, "batch": 1, "runs": 9,
        "task": {"metric": None}, "data_sha256": DATA,
        "models": [
            {"name": "net.onnx", "sha256": A, "profile": profile(1, 0.9).to_json(), "speedup": None, **model}
            for model in models
        ],
        **about,
    }  # fmt: skip
    return msgspec.convert(document, BaselineEntry)


REFERENCE = {}


def converted(ratio=2.0, *, top1=0.9, macs=500, name="new.onnx", noise=0.02):
    found = replace(profile(0.5, top1, macs), params=50)
    return {
        "name": name, "sha256": B, "profile": found.to_json(),
        "speedup": None if ratio is None else speedup(ratio, noise).to_dict(),
    }  # fmt: skip


def since(now, *entries):
    """Return the changes of the last model of a run."""
    history = BaselineDocument(schema=baseline.SCHEMA, entries=entries)
    return changes_since(history, now)[-1]


def test_what_is_that_of_the_model_is_compared_in_any_case():
    then = entry(REFERENCE, converted(macs=400), machine={"cpu": "another"}, data_sha256=OTHER)
    found = since(entry(REFERENCE, converted()), then)
    assert found.name == "new.onnx"
    assert {each.quantity: (each.then, each.now) for each in found.changes} == {
        "params": (50, 50), "macs": (400, 500), "bytes": (4000, 4000),
    }  # fmt: skip
    assert found.change("macs").amount == pytest.approx(25)
    assert found.change("macs").unit == "%"
    assert found.change("params").amount == 0
    assert found.change("metric") is None


def test_a_latency_is_compared_as_the_ratio_to_the_reference():
    found = since(entry(REFERENCE, converted(1.6)), entry(REFERENCE, converted(2.0)))
    change = found.change("latency")
    assert (change.then, change.now) == (2.0, 1.6)
    assert change.speedup.median == pytest.approx(0.8)
    # The widest that two intervals of ± 1 % allow.
    assert change.speedup.ci95.to_list() == pytest.approx([0.8 * 0.99 / 1.01, 0.8 * 1.01 / 0.99])
    assert change.amount == pytest.approx(25)
    # The reference itself has none.
    history = BaselineDocument(schema=baseline.SCHEMA, entries=(entry(REFERENCE, converted()),))
    reference, _ = changes_since(history, entry(REFERENCE, converted()))
    assert reference.change("latency") is None
    assert "latency" not in reference.missing


@pytest.mark.parametrize(
    ("ratio", "noise", "changed"),
    [(1.9, 0.001, True), (1.97, 0.001, False), (1.9, 0.03, False), (1.6, 0.03, True), (2.5, 0.03, True)],
)
def test_a_latency_that_the_noise_of_both_runs_explains_has_not_changed(ratio, noise, changed):
    then, now = (entry(REFERENCE, converted(each, noise=noise)) for each in (2.0, ratio))
    assert bool(since(now, then).change("latency").amount) is changed


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"machine": {"cpu": "two"}}, "cpu one, now two"),
        ({"machine": {"instruction_sets": ["AVX2", "FMA"]}}, "instruction_sets AVX2, now AVX2 FMA"),
        ({"machine": {"threads": 2}}, "threads 1, now 2"),
        ({"machine": {"onnxruntime": "0.1"}}, "onnxruntime "),
        ({"machine": {"provider_options": {"a": "b"}}}, "provider_options "),
        ({"batch": 8}, "batch 1, now 8"),
    ],
)
def test_latencies_of_other_machines_and_settings_are_not_compared(about, reason):
    found = since(entry(REFERENCE, converted(), **about), entry(REFERENCE, converted()))
    assert found.change("latency") is None
    assert reason in found.missing["latency"]
    assert found.change("metric") is not None


def test_latencies_over_another_reference_are_not_compared():
    found = since(entry({"sha256": B}, converted()), entry(REFERENCE, converted()))
    assert found.change("latency") is None
    assert "had another reference (net.onnx, SHA-256 aaaaaaaaaaaa…; now " in found.missing["latency"]


def test_a_metric_is_compared_on_the_same_data_scored_in_the_same_way():
    then = entry(REFERENCE, converted(top1=0.9))
    change = since(entry(REFERENCE, converted(top1=0.88)), then).change("metric")
    assert (change.metric, change.unit) == ("top1", "pp")
    assert change.amount == pytest.approx(2)
    for about, reason in (
        ({"data_sha256": OTHER}, "had other data"),
        ({"data_sha256": None}, "had other data"),
        ({"task": {"metric": "f1"}}, "was scored in another way"),
    ):
        found = since(entry(REFERENCE, converted(), **about), then)
        assert found.change("metric") is None
        assert found.missing["metric"].endswith(reason)


def test_a_metric_of_which_less_is_better_drops_by_rising():
    def reached(value):
        metric = {"name": "mse", "unit": "", "higher_is_better": False, "value": value, "n": 9}
        return {"profile": {**profile(1, 0.9).to_json(), "metric": metric}}

    assert since(entry(reached(0.5)), entry(reached(0.25))).change("metric").amount == 0.25


def test_the_last_run_that_can_be_compared_counts():
    runs = [
        entry(REFERENCE, converted(3.0, macs=100), date="2026-01-01T00:00:00+00:00"),
        entry(REFERENCE, converted(2.0, macs=200), date="2026-01-02T00:00:00+00:00"),
        entry(REFERENCE, converted(9.0, macs=300), date="2026-01-03T00:00:00+00:00", machine={"cpu": "two"}),
        entry(REFERENCE, date="2026-01-04T00:00:00+00:00"),
    ]
    found = since(entry(REFERENCE, converted()), *runs)
    assert (found.change("latency").then, found.change("latency").since[:10]) == (2.0, "2026-01-02")
    assert (found.change("macs").then, found.change("macs").since[:10]) == (300, "2026-01-03")


def test_a_model_that_is_new_is_told():
    found = since(entry(REFERENCE, converted(name="newer.onnx")), entry(REFERENCE, converted()))
    assert found.changes == ()
    assert set(found.missing) == {"params", "macs", "bytes", "metric", "latency"}
    assert {*found.missing.values()} == {"there is no earlier run with it"}


def test_what_was_not_measured_is_not_missed():
    unmeasured = replace(profile(1), latency=None, accuracy=None, metric=None, onnx_bytes=None)
    model = {"profile": unmeasured.to_json()}
    found = since(entry(model), entry(REFERENCE))
    assert [each.quantity for each in found.changes] == ["params", "macs"]
    assert found.missing == {}
    # Nor what the earlier run did not.
    assert since(entry(REFERENCE), entry(model)).missing["metric"] == "there is no earlier run with it"


def test_a_model_without_macs_has_not_changed():
    model = {"profile": replace(profile(1), macs=0).to_json()}
    assert since(entry(model), entry(model)).change("macs").amount == 0


# Files ---------------------------------------------------------------------------------------------


def test_a_history_is_begun_and_continued(tmp_path):
    path = tmp_path / "history.json"
    empty = read_baseline(path)
    assert empty.entries == ()
    first, second = entry(REFERENCE, converted()), entry(REFERENCE, converted(1.9))
    assert write_baseline(path, empty, first) == 1
    assert write_baseline(path, read_baseline(path), second) == 2
    assert read_baseline(path).entries == (first, second)
    assert [each.name for each in tmp_path.iterdir()] == ["history.json"]
    assert path.read_text(encoding="utf-8").startswith('{\n  "schema": "sepconvert.baseline/1"')


def test_a_history_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "MOST_ENTRIES", 3)
    path = tmp_path / "history.json"
    for day in range(5):
        write_baseline(path, read_baseline(path), entry(REFERENCE, date=f"2026-01-0{day + 1}"))
    assert [each.date[-1] for each in read_baseline(path).entries] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no history of comparisons (Input data was truncated); restore it, or begin a new one"),
        ("[]", "is no history of comparisons (Expected 'object', got 'array'); restore it"),
        ("{}", "is no history of comparisons (Object missing required field 'schema'); restore it"),
        ('{"schema": "sepconvert.baseline/2"}', "expected schema 'sepconvert.baseline/1', got 'sepconvert"),
        ('{"schema": "sepconvert.profile/1"}', "expected schema 'sepconvert.baseline/1', got 'sepconvert"),
        ('{"schema": "sepconvert.baseline/1"}', "is no history of comparisons (Object missing required"),
        ('{"schema": "sepconvert.baseline/1", "entries": [{"date": 1}]}', "is no history of comparisons ("),
        ("\0", "is no history of comparisons ("),
    ],
)
def test_what_is_no_history(tmp_path, text, message):
    path = tmp_path / "history.json"
    path.write_text(text)
    with pytest.raises(SepconvertError, match=re.escape(f"{path}: {message}")) as caught:
        read_baseline(path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_history_of_later_versions_may_have_more_keys(tmp_path):
    path = tmp_path / "history.json"
    write_baseline(path, read_baseline(path), entry(REFERENCE))
    document = json.loads(path.read_text())
    document["new"] = document["entries"][0]["new"] = document["entries"][0]["models"][0]["new"] = 1
    path.write_text(json.dumps(document))
    assert read_baseline(path).entries == (entry(REFERENCE),)


def test_a_place_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(SepconvertError, match="is no regular file"):
        read_baseline(tmp_path)
    nothing = BaselineDocument(schema=baseline.SCHEMA, entries=())
    with pytest.raises(SepconvertError, match=r"^h\.json: cannot be written: .*; pass another `baseline`$"):
        write_baseline(tmp_path / "none" / "h.json", nothing, entry(REFERENCE))


def test_a_history_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    write_baseline(path, read_baseline(path), entry(REFERENCE))
    before = path.read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SepconvertError, match="No space left on device; pass another `baseline`"):
        write_baseline(path, read_baseline(path), entry(REFERENCE))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["history.json"]


def test_the_json_of_changes():
    found = since(entry(REFERENCE, converted(1.6)), entry(REFERENCE, converted(2.0))).to_json()
    assert found["model"] == "new.onnx"
    latency = found["changes"][-1]
    ratio = Speedup(0.8, Interval(0.8 * 0.99 / 1.01, 0.8 * 1.01 / 0.99), Interval(0.98 / 1.02, 1.02 / 0.98))
    assert latency == {
        "quantity": "latency", "metric": None, "then": 2.0, "now": 1.6, "change": pytest.approx(25),
        "unit": "%", "since": "2026-01-01T00:00:00+00:00",
        "latency_speedup": {
            **ratio.to_dict(), "median": pytest.approx(0.8), "ci95": pytest.approx(ratio.ci95.to_list()),
            "noise_floor": pytest.approx(ratio.noise_floor.to_list()),
        },
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
