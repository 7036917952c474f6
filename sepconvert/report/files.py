"""Writing of plan.json, report.json and report.html into a result directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepconvert.base.documents import writing
from sepconvert.report.pictures.exhibits import Exhibits


def write_documents(
    report: Mapping[str, Any], plan: Mapping[str, Any], folder: Path, exhibits: Exhibits | None = None
) -> None:
    """Write the three documents into `folder`.

    Raises:
        SepconvertError: a file cannot be written.
    """
    from sepconvert.report.html import render_html  # which imports matplotlib, for plots

    for name, text in {
        "plan.json": _json(plan),
        "report.json": _json(report),
        "report.html": render_html(report, exhibits),
    }.items():
        with writing(folder / name):
            # Paths may hold bytes that are no text (surrogates): those are escaped.
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
