"""JSON documents read into values: the key at fault is named, on one line."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from sepconvert.base.documents import decode, is_intact, sealed
from sepconvert.base.errors import SepconvertError


@dataclass(frozen=True)
class Point:
    name: str
    sizes: tuple[Annotated[int, Meta(ge=1)], ...]
    kind: Literal["inner", "outer"] = "inner"

    def __post_init__(self):
        if len(self.sizes) > 3:
            raise ValueError("more than three sizes")


@dataclass(frozen=True)
class Curve:
    points: tuple[Point, ...]


def test_a_document_is_read_into_its_type():
    text = '{"points": [{"name": "a", "sizes": [1, 2]}, {"name": "b", "sizes": [], "kind": "outer"}]}'
    expected = Curve((Point("a", (1, 2)), Point("b", (), "outer")))
    assert decode(text, Curve, "here") == decode(text.encode(), Curve, "here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
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
def test_the_key_at_fault_is_named(text, message):
    with pytest.raises(SepconvertError, match=f"^here: .*{message}") as caught:
        decode(text, Curve, "here")
    assert "\n" not in str(caught.value)
    assert "`" not in str(caught.value)  # which would make it an option's name


def test_damage_shows_in_the_checksum():
    document = sealed({"a": 1, "b": [2.5, None]})
    assert is_intact(json.loads(json.dumps(document)))
    assert not is_intact({**document, "a": 2})
    assert not is_intact({"a": 1, "b": [2.5, None]})
