"""Documents with a checksum, and errors of reading and writing them."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.documents import is_intact, read_file, sealed, writing
from sepconvert.base.errors import SepconvertError

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


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SepconvertError, match="is no regular file"):
        read_file(tmp_path / "pipe")


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
