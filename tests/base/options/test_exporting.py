"""Names and opset of ONNX files, checked when they are given."""

import pytest

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.exporting import Export


def test_names_are_kept_in_order():
    export = Export(input_names=["a", "b"], output_names=("c",), opset=20)
    assert (export.input_names, export.output_names, export.opset) == (("a", "b"), ("c",), 20)
    assert export.given() == ["input_names", "output_names", "opset"]
    assert Export().given() == []


MISTAKES = {
    "`input_names`: expected a list of names, got 'ab'": {"input_names": "ab"},
    "`output_names`: expected a list of names": {"output_names": ["a", 1]},
    "`input_names`: a name is empty, or begins or ends with a space": {"input_names": ["a", ""]},
    "`output_names`: a name is empty, or begins or ends with a space": {"output_names": [" a"]},
    "`input_names`: a name is empty": {"input_names": []},
    "`input_names`, `output_names`: a is given twice": {"input_names": ["a"], "output_names": ["a"]},
    "`opset`: expected a whole number from 18, got 17": {"opset": 17},
    "`opset`: expected a whole number from 18, got 20.5": {"opset": 20.5},
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_refused(message, options):
    with pytest.raises(SepconvertError) as caught:
        Export(**options)
    assert str(caught.value).startswith(message)
