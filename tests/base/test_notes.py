"""Reasons and notes, as values and as text."""

import json

from sepconvert.base.notes import Reason, ReasonCode, info, warning


def test_a_warning_is_marked_in_the_text_alone():
    assert str(info("the batch is fixed")) == "the batch is fixed"
    assert str(warning("accuracy is at risk")) == "Warning: accuracy is at risk"
    assert info("a") != warning("a")


def test_codes_are_plain_strings_in_json():
    reason = Reason(ReasonCode.FULL_RANK, "no exact structure")
    assert str(reason) == "no exact structure"
    assert json.dumps({"code": reason.code}) == '{"code": "full-rank"}'
