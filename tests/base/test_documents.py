"""JSON documents are read as values, or named with the place at fault; damage shows in their checksum."""

import json
import os
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.documents import check_file, decode, is_intact, read_file, sealed, structured, writing
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


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text(min_size=1), values, max_size=5)


@given(documents)
def test_a_sealed_document_is_intact_after_json(document):
    assert is_intact(json.loads(json.dumps(sealed(document))))


@given(documents, st.text(min_size=1), values)
def test_a_change_breaks_the_seal(document, key, value):
    whole = sealed(document)
    changed = {**whole, key: value}
    assert is_intact(changed) == (json.dumps(changed, sort_keys=True) == json.dumps(whole, sort_keys=True))


def test_a_document_without_a_checksum_is_not_intact():
    assert not is_intact({"a": 1})


def test_sealing_again_replaces_the_checksum():
    assert sealed({**sealed({"a": 1}), "a": 2}) == sealed({"a": 2})


def test_files_are_read_up_to_a_size(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"12345")
    assert read_file(path, most=5) == b"12345"
    with pytest.raises(SepconvertError, match=r"has 5 bytes, expected at most 4"):
        read_file(path, most=4)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


@pytest.mark.parametrize("read", [read_file, check_file])
def test_a_pipe_is_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SepconvertError, match="is no regular file"):
        read(tmp_path / "pipe")


def test_a_file_is_checked_without_being_read(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(
        SepconvertError, match=r"plan\.json: cannot be read: No such file or dir.*; check the"
    ):
        check_file(path)
    with path.open("wb") as file:
        file.truncate(2**40)  # of which the disk keeps nothing
    check_file(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left"), (RuntimeError("a\nb"), "a;")],
)
def test_what_cannot_be_written_is_named(tmp_path, error, reason):
    message = rf"^plan\.json: cannot be written: {reason}"
    with pytest.raises(SepconvertError, match=message), writing(tmp_path / "plan.json"):
        raise error


def test_errors_of_ours_pass(tmp_path):
    with pytest.raises(SepconvertError, match=r"^mine$"), writing(tmp_path / "plan.json"):
        raise SepconvertError("mine")
