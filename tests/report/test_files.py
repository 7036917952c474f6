"""Documents are written beside the weights that they belong to."""

import hashlib
import json

import pytest

from sepconvert import SepconvertError
from sepconvert.base.documents import is_intact
from sepconvert.report.files import write_documents
from sepconvert.report.html import render_html

PLAN = {"schema": "sepconvert.plan/1", "weights_sha256": None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "converted.safetensors").write_bytes(b"weights")
    return tmp_path


def test_three_documents(document, folder):
    write_documents(document, PLAN, folder)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == document
    assert (folder / "report.html").read_text(encoding="utf-8") == render_html(document)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert is_intact(plan)


def test_paths_that_are_no_text_are_escaped(document, folder):
    document["model"]["path"] = b"net\xff.pt".decode(errors="surrogateescape")
    write_documents(document, PLAN, folder)
    assert r"net\udcff.pt" in (folder / "report.html").read_text(encoding="utf-8")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["model"]["path"] == document["model"]["path"]


def test_a_file_that_cannot_be_written_is_named(document, folder):
    (folder / "report.json").mkdir()
    with pytest.raises(SepconvertError, match=r"^report\.json: cannot be written: "):
        write_documents(document, PLAN, folder)
