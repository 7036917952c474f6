"""Documents that show whether they are as they were written: damage on disk must not pass for a decision."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """With the SHA-256 of all else that it holds, as JSON with sorted keys."""
    return {**document, CHECKSUM: _checksum(document)}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Does the document have the checksum that it says?"""
    return document.get(CHECKSUM) == _checksum(document)


def _checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
