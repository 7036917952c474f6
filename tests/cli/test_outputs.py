"""Results on the terminal and on disk."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from sepconvert.base.errors import SepconvertError
from sepconvert.cli.outputs import (
    check_place,
    checkpoint_of,
    command_line,
    out_of,
    relaxed,
    result_directory_of,
    show,
)

DOCUMENT = {"note": "pass `max_drop`", "arrow": "→"}


def test_the_command_line_is_one_that_a_shell_takes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sepconvert", "my net.pt", "--exclude", "layer1.*"])
    assert command_line() == "sepconvert 'my net.pt' --exclude 'layer1.*'"


@pytest.mark.parametrize(("out", "place"), [(None, "net-sepconvert"), (Path("a/b"), "a/b")])
def test_the_result_directory_is_named_after_the_model(out, place):
    assert out_of({"model": Path("models/net.pt"), "out": out}) == Path(place)


def test_the_result_directory_of_a_named_model():
    assert out_of({"model": Path("timm:a.b?weights=DEFAULT"), "out": None}) == Path("a.b-sepconvert")
    assert out_of({"model": Path("hf-hub:me/net@main"), "out": None}) == Path("net-sepconvert")


def test_the_result_directory_of_the_demo():
    assert out_of({"out": None}) == Path("demo-sepconvert")


@pytest.mark.parametrize(("given", "place"), [(None, "a/b.checkpoint"), (Path("c"), "c")])
def test_the_checkpoint_is_beside_the_result_directory(given, place):
    options = {"model": Path("models/net.pt"), "out": Path("a/b"), "checkpoint": given}
    assert checkpoint_of(options) == Path(place)


SHOWN = {"as_json": False, "quiet": False, "brief": False}


def test_parameters_are_flags_on_the_terminal_alone(capsys):
    show(SHOWN, DOCUMENT, "Pass `max_drop`.", "", "End.")
    assert capsys.readouterr().out == "Pass --max-drop.\n\nEnd.\n"
    show({**SHOWN, "as_json": True}, DOCUMENT, "Pass `max_drop`.")
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_quiet_leaves_out_the_text_and_not_the_document(capsys):
    show({**SHOWN, "quiet": True}, DOCUMENT, "text")
    assert capsys.readouterr().out == ""
    show({**SHOWN, "as_json": True, "quiet": True}, DOCUMENT, "text")
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_brief_is_the_first_sentence_on_one_line(capsys):
    sentence = f"Pass `max_drop`, {'very ' * 30}much."
    show({**SHOWN, "brief": True}, DOCUMENT, sentence, "table")
    assert capsys.readouterr().out == f"{sentence.replace('`max_drop`', '--max-drop')}\n"
    show(SHOWN, DOCUMENT, sentence, "table")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["net.pt", "--min-speedup", "9"], "net.pt --min-speedup 1.25"),
        (
            ["net.pt", "--min-speedup=9", "--max-drop", "1"],
            "net.pt --max-drop 1 --min-speedup 1.25",
        ),
    ],
)
def test_a_command_that_would_succeed(monkeypatch, given, expected):
    monkeypatch.setattr(sys, "argv", ["sepconvert", *given])
    assert relaxed({"min_speedup": 1.25}) == f"sepconvert {expected}"


@pytest.mark.parametrize("name", ["model", "plan", "data", "calib", "train"])
def test_what_a_result_is_made_from_is_not_replaced_by_it(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("made from")
    options = {"force": True, "out": tmp_path / "out", name: tmp_path / "out" / "report.json"}
    for attempt in (result_directory_of(options, tmp_path / "out").__enter__, partial(check_place, options)):
        with pytest.raises(SepconvertError, match=r"report\.json, which replacing it would delete"):
            attempt()
    assert (tmp_path / "out" / "report.json").read_text() == "made from"


def test_a_result_replaces_another(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("old")
    with result_directory_of({"force": True, "data": "pkg.mod:loader"}, tmp_path / "out") as folder:
        (folder / "report.json").write_text("new")
    assert (tmp_path / "out" / "report.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
