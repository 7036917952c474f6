"""Reports as the type of report.json describes them."""

import json

import jsonschema
import msgspec
import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.report.schema.published import json_schema
from sepconvert.report.schema.report import ReportDocument


@pytest.mark.parametrize("fixture", ["document", "bare", "approximate", "restored"])
def test_documents_of_the_tests_conform(request, fixture):
    document = request.getfixturevalue(fixture)
    assert_conforms(document, ReportDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda document: document.pop("layers"), "missing required field `layers`"),
        (lambda document: document.update(schema="sepconvert.report/2"), "$.schema"),
        (lambda document: document["layers"][1].update(decision="perhaps"), "$.layers[1].decision"),
        (lambda document: document["delta"].update(agreement=1.5), "$.delta.agreement"),
        (lambda document: document["original"].update(params="4000"), "$.original.params"),
    ],
)
def test_other_documents_do_not(document, change, where):
    change(document)
    assert_refused(document, ReportDocument, where)


def test_keys_of_later_versions_are_allowed(document):
    document["original"]["joules"] = 1.0
    jsonschema.validate(document, json_schema(ReportDocument))
    msgspec.convert(document, ReportDocument)


def test_documents_can_be_read_by_their_types(document):
    report = msgspec.json.decode(json.dumps(document), type=ReportDocument)
    assert report.delta.latency_speedup.median == document["delta"]["latency_speedup"]["median"]
    assert report.converted.accuracy.n == 2000
