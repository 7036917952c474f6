"""The document holds what the report holds, as plain JSON."""

import json
import math
from dataclasses import replace

import pytest

from sepconvert import __version__
from sepconvert.measure.verification.outputs import OutputCheck
from sepconvert.report.document import SCHEMA, report_document


def test_every_part_is_in_its_place(report, document):
    assert document["schema"] == SCHEMA
    assert document["model"] == report.source
    assert document["environment"]["sepconvert"] == __version__
    assert document["environment"]["threads"] == report.runtime.threads
    assert document["original"] == report.original.to_json()
    assert document["converted"]["latency_ms"] == report.converted.latency.to_dict()
    assert [layer["name"] for layer in document["layers"]] == ["stem.conv", "large.conv"]
    assert document["verification"] == report.verification.to_json()
    assert document["export"] == {
        "dynamic_batch": True, "onnx_dtype": "float32", "reason": None, "missing": {},
    }  # fmt: skip
    assert document["stages"] == list(report.stages)
    for name in ("mode", "seed", "dtype", "command", "approximation"):
        assert document[name] == getattr(report, name)


def test_the_difference_is_original_over_converted(report, document):
    assert document["delta"] == {
        "params_ratio": 4.0,
        "macs_ratio": 2_012_345 / 1_006_172,
        "latency_speedup": report.speedup.to_dict(),
        **report.accuracy.to_dict(),
    }


def test_what_was_not_measured_is_null(bare):
    assert bare["delta"] == {
        "params_ratio": 4.0, "macs_ratio": None, "latency_speedup": None, "metric": None,
        "accuracy_drop_pp": None, "agreement": None,
    }  # fmt: skip
    assert bare["model"] is bare["execution"] is bare["changed_predictions"] is bare["command"] is None


def test_it_is_plain_json(document, approximate):
    for found in (document, approximate):
        assert json.loads(json.dumps(found)) == found


def test_numbers_that_json_does_not_have_are_refused(report):
    off = replace(report.verification, torch=OutputCheck(math.nan, 1e-6, "float64"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_document(replace(report, verification=off))
