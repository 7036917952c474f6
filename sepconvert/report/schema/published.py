"""JSON Schemas of the documents, for programs in other languages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sepconvert.report.schema.baseline import BaselineDocument
from sepconvert.report.schema.environment import EnvironmentDocument
from sepconvert.report.schema.plan import PlanDocument
from sepconvert.report.schema.profile import ProfileDocument
from sepconvert.report.schema.report import ReportDocument

DOCUMENTS: Mapping[str, type] = {
    "report": ReportDocument,
    "plan": PlanDocument,
    "profile": ProfileDocument,
    "baseline": BaselineDocument,
    "environment": EnvironmentDocument,
}


def json_schema(document: type) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of one of `DOCUMENTS`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(document)}


def write_schemas(folder: Path) -> None:
    """Write the JSON Schema of each document to `<name>.schema.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in DOCUMENTS.items():
        text = json.dumps(json_schema(document), indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.schema.json").write_text(text, encoding="utf-8")
