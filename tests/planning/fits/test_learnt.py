"""Entries are recalled as they were, for the same model alone, and only so many are kept."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plan_bench import FITS, layer
from strategies import numbered

from sepconvert.calibration.heldout import Divergence
from sepconvert.planning.fits import learnt
from sepconvert.planning.fits.learnt import Learnt, hashed, plain, restored

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


@numbered(100)
@given(VALUES)
def test_values_are_recalled_as_they_were(tmp_path_factory, value):
    kept = Learnt(tmp_path_factory.getbasetemp() / "learnt", "model")
    kept.keep(("name", repr(value)), value)
    assert kept.recall(("name", repr(value))) == value


@numbered(100)
@given(VALUES, VALUES)
def test_hashes_are_equal_only_for_equal_values(one, other):
    assert hashed(one) == hashed(one)
    if repr(one) != repr(other):
        assert hashed(one) != hashed(other)


def test_fits_are_recalled_bit_by_bit(tmp_path):
    surveyed = {"a": layer(400, 1.5), "b": layer(200, 2.0).with_excess(("depthwise-pointwise", 2), 3.0)}
    Learnt(tmp_path, "model").keep("survey", surveyed)
    found = Learnt(tmp_path, "model").recall("survey")
    assert found.keys() == surveyed.keys()
    for name, each in found.items():
        wanted = surveyed[name]
        assert dataclasses.replace(each, offers=()) == dataclasses.replace(wanted, offers=())
        for offer, other in zip(each.offers, wanted.offers, strict=True):
            assert (offer.macs, offer.cost, offer.error) == (other.macs, other.cost, other.error)
            assert all(map(torch.equal, offer.fitted.weights, other.fitted.weights))
            assert torch.equal(offer.fitted.basis, other.fitted.basis)
    assert restored(plain(Divergence(0.5, None))) == Divergence(0.5, None)


@pytest.mark.parametrize(
    "other", ["another", torch.ones(3), torch.zeros(3, dtype=torch.float64), [torch.zeros(3)]]
)
def test_another_model_recalls_nothing(tmp_path, other):
    Learnt(tmp_path, torch.zeros(3)).keep("plan", 1)
    assert Learnt(tmp_path, torch.zeros(3)).recall("plan") == 1
    assert Learnt(tmp_path, other).recall("plan") is None
    assert Learnt(tmp_path, torch.zeros(3)).recall("other plan") is None


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c[:40] + b"x" + c[41:], lambda c: b"", lambda c: c * 2]
)
def test_a_damaged_entry_is_not_recalled(tmp_path, damage):
    kept = Learnt(tmp_path, "model")
    kept.keep("plan", FITS[0])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert kept.recall("plan") is None
    kept.keep("plan", 5)
    assert kept.recall("plan") == 5


def test_what_was_used_longest_ago_is_removed(tmp_path, monkeypatch):
    kept = Learnt(tmp_path, "model")
    for number in range(3):
        kept.keep(number, torch.zeros(1000) + number)
        (path,) = [each for each in tmp_path.iterdir() if each.stat().st_mtime > 10**6]
        os.utime(path, (number, number))
    kept.recall(0)
    monkeypatch.setattr(learnt, "MOST_BYTES", 3 * path.stat().st_size)
    kept.keep(3, torch.zeros(1000) + 3)
    assert [kept.recall(number) is not None for number in range(4)] == [True, False, True, True]


def test_too_large_an_entry_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(learnt, "_LARGEST", 1000)
    kept = Learnt(tmp_path, "model")
    kept.keep("plan", torch.zeros(1000))
    assert kept.recall("plan") is None
    assert not [*tmp_path.iterdir()]


def test_without_a_folder_nothing_is_kept(tmp_path):
    nothing = Learnt()
    nothing.keep("plan", 1)
    assert nothing.recall("plan") is None
    (tmp_path / "file").write_text("")
    Learnt(tmp_path / "file", "model").keep("plan", 1)  # no folder can be made there: no error


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    Learnt(tmp_path, "model").keep("plan", 1)
    assert not [*tmp_path.iterdir()]
