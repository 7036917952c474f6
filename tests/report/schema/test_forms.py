"""The forms of a conversion to int8, as the type of report.json describes them."""

import json

import msgspec
import pytest
from report.int8_forms import deployed, ratio
from schemas import assert_conforms, assert_refused

from sepconvert.report.schema.forms import Forms
from sepconvert.report.schema.report import ReportDocument


@pytest.mark.parametrize(
    "numbers",
    [{}, {"timed": False}, {"values": None}, {"name": "mse", "unit": "", "higher_is_better": False}],
)
def test_documents_of_the_tests_conform(document, numbers):
    assert_conforms(deployed(document, **numbers), ReportDocument)


def test_a_decision_for_floating_point_conforms(document):
    document["int8_gain"] = ratio(0.75)
    assert_conforms(document, ReportDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda forms: forms.pop("converted_int8"), "missing required field `converted_int8`"),
        (lambda forms: forms["quantization"].update(method="guess"), "$.forms.quantization.method"),
        (lambda forms: forms["quantization"].update(activations="int4"), "$.forms.quantization.activations"),
        (lambda forms: forms["quantization"].update(images=0), "$.forms.quantization.images"),
        (lambda forms: forms["quantization"].update(files=[0.0]), "$.forms.quantization.files"),
        (lambda forms: forms["int8"].pop("delta"), "missing required field `delta`"),
        (lambda forms: forms["int8"]["delta"].update(agreement=2), "$.forms.int8.delta.agreement"),
        (
            lambda forms: forms["converted"]["delta"].pop("latency_speedup_over_int8"),
            "missing required field `latency_speedup_over_int8`",
        ),
        (lambda forms: forms["float"].update(onnx_bytes=-1), "$.forms.float.onnx_bytes"),
    ],
)
def test_other_documents_do_not(document, change, where):
    change(deployed(document)["forms"])
    assert_refused(document, ReportDocument, where)


def test_forms_can_be_read_by_their_types(document):
    content = json.dumps(deployed(document))
    found = msgspec.json.decode(content, type=ReportDocument).forms
    assert isinstance(found, Forms)
    assert found.int8.delta.latency_speedup.median == 2.0
    assert found.converted_int8.delta.latency_speedup_over_int8.median == 1.5
    assert found.converted_int8.delta.metric.drop == 0.5
    assert found.float.delta.latency_speedup is None
    assert found.quantization.files["converted-int8.onnx"].rounding == 0.125
    del document["forms"]
    assert msgspec.convert(document, ReportDocument).forms is msgspec.UNSET
