"""The words of reports are explained once, and those that tables show are."""

import ast
from pathlib import Path

import pytest

import sepconvert
from sepconvert.report.text.glossary import STEPS, WORDS, Entry


@pytest.mark.parametrize(
    ("word", "anchor"),
    [
        ("Held-out", "held-out"),
        ("Equal predictions", "equal-predictions"),
        ("follow the drift, correct the bias", "follow-the-drift-correct-the-bias"),
    ],
)
def test_anchors_are_those_of_headings(word, anchor):
    assert Entry(word, "").anchor == anchor


def test_links_lead_to_one_entry():
    anchors = [entry.anchor for entry in (*WORDS, *STEPS)]
    assert len({*anchors}) == len(anchors)


def test_every_step_is_explained_under_its_name():
    named = set()
    for path in Path(sepconvert.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function, *arguments = node.func, *node.args
            if getattr(function, "id", "") == "partial" and arguments:
                function, *arguments = arguments
            if getattr(function, "id", "") == "Step":
                named |= {each.value for each in arguments[1:2] if isinstance(each, ast.Constant)}
    assert len(named) > 4
    assert {entry.word for entry in STEPS} == named


def test_definitions_are_sentences_without_markup():
    for entry in (*WORDS, *STEPS):
        assert entry.text.endswith(".")
        assert entry.text.count("`") % 2 == 0
        assert "](" not in entry.text
