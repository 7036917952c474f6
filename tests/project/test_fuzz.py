"""Some of the cases of `fuzz.py`, in this process."""

import random
from pathlib import Path

import fuzz
import pytest

CASES = 25


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, list[bytes]]:
    return fuzz.seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("kind", fuzz.READERS)
def test_mutated_files_are_read_or_refused(good, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, reader = fuzz.READERS[kind]
    outcomes = []
    for number in range(CASES):
        rng = random.Random(f"1/{kind}/{number}")  # noqa: S311
        path = tmp_path / name
        path.write_bytes(fuzz.mutated(kind, rng.choice(good[kind]), good[kind], rng))
        outcomes.append(fuzz.outcome_of(reader, path))
    assert set(outcomes) <= {"read", "refused"}
    assert "refused" in outcomes
    assert not [path for path in Path().rglob("*") if "pwned" in path.name]
