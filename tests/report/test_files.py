"""The three documents of a result directory, as files."""

import json

import pytest

from sepconvert import SepconvertError
from sepconvert.report.files import write_documents
from sepconvert.report.html import render_html

PLAN = {"schema": "sepconvert.plan/1", "layers": []}


def test_three_documents(document, tmp_path):
    write_documents(document, PLAN, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == document
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(document)
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == PLAN


def test_paths_that_are_no_text_are_escaped(document, tmp_path):
    document["model"]["path"] = b"net\xff.pt".decode(errors="surrogateescape")
    write_documents(document, PLAN, tmp_path)
    assert r"net\udcff.pt" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["model"]["path"] == document["model"]["path"]


def test_a_file_that_cannot_be_written_is_named(document, tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(SepconvertError, match=r"^report\.json: cannot be written: "):
        write_documents(document, PLAN, tmp_path)
