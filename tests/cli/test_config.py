"""Options from a file, and the file that a conversion writes."""

import itertools
import os
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_line import SHAPE

from sepconvert import __version__
from sepconvert.cli.config import run_file, tomllib
from sepconvert.cli.main import cli


def context_of(*arguments, command="convert"):
    """Return the context of a command as click makes it, and with it the options."""
    return cli.commands[command].make_context(command, [str(each) for each in arguments])


def options_of(*arguments, **keywords):
    return context_of(*arguments, **keywords).params


@pytest.fixture
def file(tmp_path):
    """Writes a file of options and returns its path."""

    def write(text, name="options.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


LINES = {
    'model = "a b.pt"': {"model": Path("a b.pt")},
    'mode = "auto"': {"mode": "auto"},
    "max-drop = 1": {"max_drop": 1.0},
    "max_drop = 0.5": {"max_drop": 0.5},
    "rank = 2": {"rank": 2},
    'exclude = ["a*", "b"]': {"exclude": ("a*", "b")},
    'provider-option = ["device_id=1"]': {"provider_option": {"device_id": "1"}},
    "dynamic-batch = false": {"dynamic_batch": False},
    "quiet = true": {"quiet": True},
    "json = true": {"as_json": True},
    'int8 = "auto"': {"int8": "auto"},
    "int8 = true": {"int8": "on"},
    "mean = [0.5, 0.25, 1]": {"mean": (0.5, 0.25, 1.0)},
    'std = ".5,.25,1"': {"std": (0.5, 0.25, 1.0)},
    "resize = 224": {"resize": 224},
    "resize = [120, 160]": {"resize": (120, 160)},
    "input-shape = [3, 224, 224]": {"input_shape": "3x224x224"},
    "output = 1": {"output": "1"},
}


@pytest.mark.parametrize(("line", "given"), LINES.items())
def test_a_line_of_a_file_is_an_option(file, line, given):
    found = options_of("net.pt", "--config", file(line))
    if "model" in given:
        found = options_of("--config", file(line))
    expected = {**options_of("net.pt"), **given}
    assert found == expected


@pytest.mark.parametrize(
    "line",
    [
        "max-drop = 0.5\n",
        "\ufeffmax-drop = 0.5\r\n# a comment\r\n",  # as editors of Windows save it
    ],
)
def test_the_command_line_prevails(file, line):
    path = file(line)
    assert options_of("net.pt", "--config", path)["max_drop"] == 0.5
    for arguments in itertools.permutations((("--config", path), ("--max-drop", 2), ("net.pt",))):
        assert options_of(*itertools.chain(*arguments))["max_drop"] == 2


@pytest.mark.parametrize(
    ("command", "arguments", "line", "name", "value"),
    [
        ("inspect", ["net.pt"], "tol = 0.1", "tol", 0.1),
        ("profile", ["net.pt"], "batches = [1, 4]", "batches", (1, 4)),
        ("profile", ["net.pt"], "batches = 4", "batches", (4,)),
        ("compare", ["a.onnx", "b.onnx"], 'fail-if = ["macs > 1%"]', "fail_if", ("macs > 1%",)),
        ("compare", ["a.onnx", "b.onnx"], 'format = "csv"', "style", "csv"),
        ("apply", ["net.pt"], 'plan = "plan.json"', "plan", Path("plan.json")),
    ],
)
def test_other_commands_take_files_too(file, command, arguments, line, name, value):
    assert options_of(*arguments, "--config", file(line), command=command)[name] == value


MISTAKES = {
    "max-dop = 1": "max-dop: is no option of sepconvert convert that files can set; did you mean max-drop?",
    "max_dop = 1": "max_dop: is no option of sepconvert convert that files can set; did you mean max-drop?",
    "[convert]": "convert: is no option of sepconvert convert that files can set; remove it; --help lists",
    "debug = true": "debug: is no option of sepconvert convert that files can set",
    "config = 'a.toml'": "config: is no option of sepconvert convert that files can set",
    "max-drop = 'one'": 'max-drop: expected a number, got "one"; write it as: max-drop = 0.5',
    "max-drop = true": "max-drop: expected a number, got true; write it as: max-drop = 0.5",
    "max-drop = -1": "--max-drop: expected a number from 0, got -1",
    "max-drop = nan": "--max-drop: expected a number from 0, got nan",
    "rank = 1.5": "rank: expected a whole number, got 1.5; write it as: rank = 8",
    "quiet = 1": "quiet: expected true or false, got 1; write it as: quiet = true",
    "exclude = 'a'": 'exclude: expected an array of texts, got "a"; write it as: exclude = ["…", "…"]',
    "exclude = [1]": "exclude: expected an array of texts, got [1]; write it as: exclude",
    "model = 3": 'model: expected a text, got 3; write it as: model = "…"',
    "mode = true": "mode: expected a text, got true; write it as: mode",
    "mode = 2020-01-01": 'mode: expected a text, got "2020-01-01"; write it as: mode',
    "mode = 'best'": "mode: 'best' is not one of 'exact', 'approx', 'auto'; correct the file",
    "data = {a = 1}": "data: expected a text, got a table; write it as: data",
    "mean = ['a']": 'mean: expected a text, got ["a"]; write it as: mean',
    "mean = 'a'": "mean: expected numbers, joined by commas, e.g. 0.485,0.456,0.406, got 'a'; correct",
    "provider-option = ['a']": "provider-option: expected KEY=VALUE, e.g. device_id=1, got 'a'; correct",
    "batch = 0": "batch: 0 is not in the range x>=1; correct the file",
    "seed = 1\nseed = 2": "is no TOML file: Cannot overwrite a value (at ",
    "max-drop = 1\nmax_drop = 1": "max_drop: is given twice, with - and with _; keep one of them",
    "max-drop 1": "is no TOML file: Expected '=' after a key in a key/value pair (at line 1, column 10)",
    "a = " + "[" * 5000: "is no TOML file: ",
    b"mode = '\xff'": "is no TOML file: byte 8 is not UTF-8; pass a text file, such as the run.toml of",
    b"\x00\x01": "is no TOML file: ",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=[str(text)[:30] for text in MISTAKES])
def test_a_mistake_in_a_file_is_an_error_of_one_line(file, run, monkeypatch, text, message):
    monkeypatch.setattr("sepconvert.cli.main._commands", None)
    path = file(text)
    outcome = run("net.pt", "--config", path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith(f"sepconvert: {path}: {message}")


def test_a_file_that_cannot_be_read(tmp_path, run):
    for path, reason in {
        tmp_path: "it is no regular file",
        tmp_path / "absent.toml": "No such file or directory",
    }.items():
        outcome = run("net.pt", "--config", path)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == f"sepconvert: {path}: cannot be read: {reason}; check the path\n"


GIVEN = {
    "a model": ["net.pt"],
    "numbers": ["net.pt", "--max-drop", "0.5", "--rank", "2", "--memory", "1.5", "--measure-seconds", "1e-3"],
    "what equals its default": ["net.pt", "--mode", "exact", "--runs", "50", "--dynamic-batch"],
    "lists": ["net.pt", "--exclude", "layer1.*", "--exclude", 'a"b', "--include", "*"],
    "pairs": ["net.pt", "--provider-option", "a=1", "--provider-option", 'load_config={"x": "y=z"}'],
    "sizes": ["net.pt", "--resize", "120x160", "--mean", ".5,.25,1", "--std", "1,1,1"],
    "one size": ["net.pt", "--resize", "224", "--input-shape", "3x224x224"],
    "switches": ["net.pt", "--no-dynamic-batch", "--quiet", "--int8"],
    "paths": ["a b/ü →.pt", "--out", "o\\p", "--cache", "/c", "--data", "val.npz", "--calib", "x.py:f"],
    "a line break": ["net.pt", "--data", "a\nb = 1"],
    "an output by number": ["net.pt", "--output", "1", "--metric", "psnr"],
}


@pytest.mark.parametrize("arguments", GIVEN.values(), ids=GIVEN)
def test_what_is_written_gives_the_same_options(file, arguments):
    context = context_of(*arguments)
    text = run_file(context)
    assert f"sepconvert {__version__}" in text.splitlines()[0]
    again = context_of("--config", file(text))
    assert again.params == context.params
    assert run_file(again) == text


def test_only_what_was_given_is_written(file):
    text = run_file(context_of("net.pt", "--config", file("runs = 50\nseed = 1"), "--seed", "2"))
    assert tomllib.loads(text) == {"model": "net.pt", "runs": 50, "seed": 2}


def test_consents_are_not_given_again(file):
    """To replace what is there, or to continue from what an interrupted run left."""
    text = run_file(context_of("net.pt", "--force", "--finetune", "2", "--resume", "--trust", "--debug"))
    assert tomllib.loads(text) == {"model": "net.pt", "finetune": 2, "trust": True}


def test_a_path_that_is_no_text_is_told(file):
    text = run_file(context_of("caf\udce9.pt", "--runs", "3"))
    assert tomllib.loads(text) == {"runs": 3}
    assert "# model: is no Unicode text, which TOML needs; give it on the command line\n" in text
    assert options_of("other.pt", "--config", file(text))["runs"] == 3


def test_every_option_of_every_command_can_be_written_and_read(file):
    """Whatever types options of later versions have: the default is what the parser makes of it."""
    for name in ("convert", "inspect", "profile", "apply"):
        arguments = ["net.pt", "plan.json"] if name == "apply" else ["net.pt"]
        for option in cli.commands[name].params:
            if not isinstance(option, click.Option) or option.name in NOT_WRITTEN:
                continue
            example = EXAMPLES.get(option.name) or ([] if option.is_flag else [example_of(option)])
            context = context_of(*arguments, option.opts[0], *example, command=name)
            written = file(run_file(context))
            assert context_of("--config", written, command=name).params == context.params, option.name


# Of this run alone, and of its output on the terminal.
NOT_WRITTEN = ("config", "force", "resume", "debug", "style", "brief", "as_json")

EXAMPLES = {
    "mean": ["1,2,3"],
    "std": ["1,2,3"],
    "batches": ["1,2"],
    "resize": ["9"],
    "provider_option": ["a=b"],
    "factory_args": ['{"width": 12}'],
    "input_names": ["image,mask"],
    "opset": ["20"],
    "log_file": [os.devnull],
}


def example_of(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return option.type.choices[0]
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
        return "0.9" if option.name in ("confidence", "target_macs", "target_params") else "1"
    return "text"


def test_a_repeated_conversion_replaces_its_own_result_alone(here, run):
    given = ("--runs", "0", "--exclude", "stem", "--quiet", "--format", "markdown")
    assert run("net.pt", *SHAPE, *given).code == 0
    path = here / "net-sepconvert" / "run.toml"
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {
        "model": "net.pt", "input-shape": "3x8x8", "runs": 0, "exclude": ["stem"], "quiet": True,
    }  # fmt: skip
    first = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    assert run("--config", "net-sepconvert/run.toml").code == 0
    again = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    for name in ("original.onnx", "converted.onnx", "converted.safetensors", "plan.json", "run.toml"):
        assert again[name] == first[name], name
    (here / "other.toml").write_bytes(first["run.toml"])
    refused = run("--config", "other.toml")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "sepconvert: net-sepconvert: exists already; pass --force to replace it, or another --out\n"
    )
    assert run("--config", "other.toml", "--force").code == 0


def test_the_help_names_the_option():
    for name in ("convert", "inspect", "profile", "compare", "apply"):
        assert re.search(r"--config FILE +TOML file of options", CliRunner().invoke(cli, [name, "-h"]).output)
