"""Stages as the type of report.json describes them."""

import json

import msgspec
import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.base.progress import Stage
from sepconvert.report.schema.report import ReportDocument


@pytest.mark.parametrize("name", [each.value for each in Stage])
def test_every_stage_conforms(document, name):
    document["stages"][0]["stage"] = name
    assert_conforms(document, ReportDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"stage": "lunch"}, "$.stages[1].stage"),
        ({"wall_s": -0.5}, "$.stages[1].wall_s"),
        ({"cpu_s": "1"}, "$.stages[1].cpu_s"),
        ({"peak_bytes": 0.5}, "$.stages[1].peak_bytes"),
        ({"parts": {"stem": -1.0}}, "$.stages[1].parts"),
    ],
)
def test_other_stages_do_not(document, change, where):
    document["stages"][1].update(change)
    assert_refused(document, ReportDocument, where)


def test_stages_can_be_read_by_their_types(document):
    found = msgspec.json.decode(json.dumps(document), type=ReportDocument).stages
    assert [(each.stage, each.wall_s) for each in found[:2]] == [(Stage.START, 8.0), (Stage.REST, 16.0)]
    assert found[4].parts == {"stem": 24.5, "large": 40.25}


def test_reports_of_version_0_1_0_do_not_have_them(document):
    del document["stages"]
    assert_conforms(document, ReportDocument)
    assert msgspec.convert(document, ReportDocument).stages is msgspec.UNSET
