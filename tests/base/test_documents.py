"""JSON documents are read as values, or named with the place at fault."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from sepconvert.base.documents import decode
from sepconvert.base.errors import SepconvertError


@dataclass(frozen=True)
class Inner:
    runs: Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class Outer:
    size: float
    inner: Inner


def test_unknown_keys_are_admitted():
    assert decode('{"size": 2, "inner": {"runs": 3, "more": []}}', Outer, "a.json") == Outer(2.0, Inner(3))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"size": 2, "inner": {"runs": 0}}', "Expected 'int' >= 1 - at '$.inner.runs'"),
        ('{"size": 2, "inner": {"runs": true}}', "Expected 'int', got 'bool' - at '$.inner.runs'"),
        ('{"size": 2, "inner": {}}', "Object missing required field 'runs' - at '$.inner'"),
        ('{"size": NaN, "inner": {"runs": 1}}', "JSON is malformed"),
        ('{"size": 1e999, "inner": {"runs": 1}}', "Number out of range - at '$.size'"),
        ('{"size": 1, "inner"', "Input data was truncated"),
        ('{"other": ' + "[" * 100_000, "maximum recursion depth"),
        (b"\xff", "JSON is malformed"),
    ],
)
def test_the_place_at_fault_is_named(text, reason):
    with pytest.raises(SepconvertError) as caught:
        decode(text, Outer, "a.json: not a document", "write it anew")
    message = str(caught.value)
    assert message.startswith(f"a.json: not a document ({reason}")
    assert message.endswith("); write it anew")
    assert "`" not in message  # which would make options of keys
