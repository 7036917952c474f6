"""The model card as a type: what it refuses."""

import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.report.schema.report import ReportDocument


def test_reports_of_earlier_versions_have_none(document):
    del document["model_card"]
    assert_conforms(document, ReportDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda card: card.pop("limits"), "missing required field `limits`"),
        (lambda card: card["made"].update(mode="quick"), "$.model_card.made.mode"),
        (lambda card: card["made"].update(converted=-1), "$.model_card.made.converted"),
        (lambda card: card["data"][0].update(use="fun"), "$.model_card.data[0].use"),
        (lambda card: card["data"][0].update(samples=0), "$.model_card.data[0].samples"),
        (lambda card: card["results"].update(macs=[1]), "$.model_card.results.macs"),
    ],
)
def test_what_is_no_card_is_refused(document, change, where):
    change(document["model_card"])
    assert_refused(document, ReportDocument, where)
