"""The document holds what the report holds, as plain JSON."""

import json
import math
from dataclasses import replace
from datetime import timedelta, timezone

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


def test_what_the_report_is_about(report, document):
    assert document["name"] == "net.pt"
    assert document["created"] == "2026-07-17T12:34:56Z"
    assert document["input_shapes"] == [[1, 8, 4, 4]]
    east = report.created.astimezone(timezone(timedelta(hours=9)))
    assert report_document(replace(report, created=east))["created"] == "2026-07-17T12:34:56Z"
    unknown = report_document(replace(report, name=None, created=None, input_shapes=None))
    assert not {"name", "created", "input_shapes"} & unknown.keys()


def test_factors_stand_in_their_order_with_their_macs(document):
    kept, converted = document["layers"]
    assert kept["factors"] == []
    vertical, horizontal = converted["factors"]
    assert (vertical["kernel_size"], horizontal["kernel_size"]) == ([3, 1], [1, 3])
    assert (vertical["in_channels"], vertical["out_channels"], horizontal["out_channels"]) == (8, 2, 16)
    assert (vertical["macs"], horizontal["macs"]) == (16 * 8 * 2 * 3, 16 * 2 * 16 * 3)  # 4×4 pixels


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
