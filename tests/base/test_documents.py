"""JSON documents are read as values, or named with the place at fault."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import pytest

from sepconvert.base.documents import decode, is_intact, sealed, structured
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


@dataclass(frozen=True)
class Point:
    name: str
    sizes: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]
    kind: Literal["inner", "outer"] = "inner"

    def __post_init__(self):
        if len(self.sizes) > 3:
            raise ValueError("more than three sizes")


@dataclass(frozen=True)
class Curve:
    points: tuple[Point, ...]


def test_a_parsed_document_is_read_into_its_type():
    text = '{"points": [{"name": "a", "sizes": [1, 2]}, {"name": "b", "sizes": [], "kind": "outer"}]}'
    expected = Curve((Point("a", (1, 2)), Point("b", (), "outer")))
    assert structured(json.loads(text), Curve, "here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the document: expected object, got array"),
        ("{}", "the document: object missing required field points"),
        ('{"points": [{"name": "a"}]}', r"points\[0\]: object missing required field sizes"),
        ('{"points": [{"name": 3, "sizes": []}]}', r"points\[0\].name: expected str, got int"),
        (
            '{"points": [{"name": "a", "sizes": [1, true]}]}',
            r"points\[0\].sizes\[1\]: expected int, got bool",
        ),
        ('{"points": [{"name": "a", "sizes": [0]}]}', r"points\[0\].sizes\[0\]: expected int >= 1"),
        ('{"points": [{"name": "a", "sizes": [1, 1, 1, 1]}]}', r"points\[0\]: more than three sizes"),
        (
            '{"points": [{"name": "a", "sizes": [], "kind": "odd"}]}',
            r"points\[0\].kind: invalid enum value 'odd'",
        ),
    ],
)
def test_the_key_at_fault_of_a_parsed_document_is_named(text, message):
    with pytest.raises(SepconvertError, match=f"^here: .*{message}") as caught:
        structured(json.loads(text), Curve, "here")
    assert "\n" not in str(caught.value)
    assert "`" not in str(caught.value)  # which would make it an option's name


def test_damage_shows_in_the_checksum():
    document = sealed({"a": 1, "b": [2.5, None]})
    assert is_intact(json.loads(json.dumps(document)))
    assert not is_intact({**document, "a": 2})
    assert not is_intact({"a": 1, "b": [2.5, None]})
