"""Histories of comparisons as their type describes them."""

import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.base.environment import environment
from sepconvert.report.schema.baseline import BaselineDocument


@pytest.fixture
def history(report):
    """What `sepconvert compare --update-baseline` writes."""
    model = {"name": "net.onnx", "sha256": "0" * 64, "profile": report.original.to_json(), "speedup": None}
    entry = {
        "date": "2026-01-01T00:00:00+00:00", "environment": environment(report.runtime), "batch": 1,
        "runs": 9,
        "task": {"metric": None, "output": 1, "postprocess": "f.py:g"}, "data_sha256": None,
        "models": [model, {**model, "sha256": None, "speedup": report.speedup.to_dict()}],
    }  # fmt: skip
    return {"schema": "sepconvert.baseline/1", "entries": [entry, entry]}


def test_a_history(history):
    assert_conforms(history, BaselineDocument)
    assert_conforms({**history, "entries": []}, BaselineDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda entry: entry.update(models=[]), "$.entries[0].models"),
        (lambda entry: entry.update(batch=0), "$.entries[0].batch"),
        (lambda entry: entry.update(data_sha256="0"), "$.entries[0].data_sha256"),
        (lambda entry: entry.pop("environment"), "missing required field `environment`"),
        (lambda entry: entry["models"][0].update(profile=None), "$.entries[0].models[0].profile"),
        (lambda entry: entry["models"][0].update(speedup=2.0), "$.entries[0].models[0].speedup"),
    ],
)
def test_other_histories(history, change, where):
    change(history["entries"][0])
    assert_refused(history, BaselineDocument, where)


def test_other_versions(history):
    assert_refused({**history, "schema": "sepconvert.baseline/2"}, BaselineDocument, "$.schema")
