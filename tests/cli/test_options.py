"""Options: made from the values that they fill, explained, and refused where they do not parse."""

import ast
import json
import re
from pathlib import Path

import click
import pytest
from command_line import SHAPE

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.declared import options_of
from sepconvert.base.options.exporting import Export
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Selection,
    Timing,
)
from sepconvert.cli.main import cli
from sepconvert.cli.options import in_flags, value_of
from sepconvert.pipeline.job import Job

VALUES = (Budget, Selection, Timing, Calibration, Finetuning, Export, Job)
CONVERT = {parameter.name: parameter for parameter in cli.commands["convert"].params}
FLAGS = {
    name
    for command in cli.commands.values()
    for parameter in command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
}
# Parameters of functions that no command calls with values of the user's.
OF_PYTHON = {
    "--check", "--example-inputs", "--feature-weight", "--on-step", "--plan", "--progress", "--student",
    "--timing", "--weights",
}  # fmt: skip


def given(*arguments):
    """Return the options of a command line, as the command receives them."""
    return cli.commands["convert"].make_context("convert", ["model.pt", *arguments]).params


def name_of(option):
    return option.metadata.get("flag", option.name).replace("-", "_")


def test_every_option_of_every_command_is_explained():
    for command in cli.commands.values():
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, parameter.name


@pytest.mark.parametrize(
    "option", [each for kind in VALUES for each in options_of(kind)], ids=lambda option: option.name
)
def test_every_option_is_a_flag_with_its_default_and_its_help(option):
    parameter = CONVERT[name_of(option)]
    assert parameter.opts[0] == f"--{name_of(option).replace('_', '-')}"
    assert given()[parameter.name] == option.default
    assert parameter.help.startswith(in_flags(option.metadata["help"]).rstrip("."))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--max-drop", "0.5", "--min-speedup", "2"], Budget(max_drop=0.5, min_speedup=2.0)),
        (["--calib-images", "64", "--memory", "1.5"], Calibration(images=64, memory=1.5e9)),
        (["--include", "a*", "--include", "b", "--exclude", "c"], Selection(("a*", "b"), ("c",))),
        (["--runs", "3", "--threads", "2", "--provider", "CPU"], Timing(threads=2, runs=3)),
        (["--spinning", "on"], Timing(spinning="on")),
        (["--finetune", "2", "--precision", "bf16"], Finetuning(epochs=2, precision="bf16")),
        (["--input-names", "a, b", "--opset", "20"], Export(("a", "b"), None, 20)),
        ([], Timing()),
    ],
)
def test_a_command_line_makes_the_values(arguments, value):
    assert value_of(type(value), given(*arguments)) == value


def test_options_of_the_provider_are_pairs():
    text = '{"CPU": {"NUM_STREAMS": "1"}}'
    found = given("--provider-option", "device_id=1", "--provider-option", f"load_config={text}=")
    assert found["provider_option"] == {"device_id": "1", "load_config": f"{text}="}


def test_fields_that_no_flag_fills_are_given():
    assert value_of(Finetuning, given("--finetune", "2"), on_step=print).on_step is print


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`max_drop`: needs `data`", "--max-drop: needs --data"),
        ("`images`: too few; pass more `calib_images`", "--calib-images: too few; pass more --calib-images"),
        ("`epochs` of `finetune`", "--finetune of --finetune"),
        ("the name `Layer.0` stays", "the name `Layer.0` stays"),
    ],
)
def test_parameters_are_shown_as_flags(text, shown):
    assert in_flags(text) == shown


def strings_with_parameters():
    """Yield every string of the package but its docstrings that has a word between backticks."""
    for path in Path(sepconvert.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if node not in documentation and isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from re.findall(r"`[a-z][a-z0-9_]*`", node.value)


def test_parameters_that_messages_name_are_flags():
    found = {in_flags(name) for name in strings_with_parameters()}
    assert {"--max-drop", "--calib-images", "--force"} <= found
    assert found - FLAGS == OF_PYTHON


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "a,b"], "expected numbers, joined by commas, e.g. 0.485,0.456,0.406, got 'a,b'"),
        (["--resize", "1x2x3"], "expected N or HxW in pixels, e.g. 224, got '1x2x3'"),
        (["--provider-option", "fast"], "expected KEY=VALUE, e.g. device_id=1, got 'fast'"),
        (["--provider-option", "=1"], "expected KEY=VALUE, e.g. device_id=1, got '=1'"),
        (["--rank", "some"], "'some' is not a valid integer"),
        (["--mode", "best"], "'best' is not one of 'exact', 'approx', 'auto'"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_by_click(arguments, message):
    with pytest.raises(click.BadParameter, match=message):
        given(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "`rank`: expected a whole number from 1, got 0"),
        (["--max-drop", "-1"], "`max_drop`: expected a number from 0, got -1.0"),
        (["--memory", "nan"], "`memory`: expected a number from 1, got nan"),
        (["--calib-images", "0"], "`images`: expected a whole number from 1, got 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_before_any_file_is_read(arguments, message):
    with pytest.raises(SepconvertError, match=re.escape(message)):
        given(*arguments)


@pytest.mark.parametrize(("text", "size"), [("224", 224), ("120x160", (120, 160))])
def test_sizes(text, size):
    assert given("--resize", text)["resize"] == size


def test_layers_can_be_left_out(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--json", "--exclude", "m*")
    reasons = {layer["name"]: layer["reason"] for layer in json.loads(outcome.out)["layers"]}
    assert reasons["mix"] == "not selected" != reasons["stem"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--batches", "2,x"),
            "Invalid value for '--batches': expected whole numbers from 1, joined by commas",
        ),
        (
            ("--batches", "0"),
            "Invalid value for '--batches': expected whole numbers from 1, joined by commas",
        ),
        (("--seed", str(2**63)), "--seed: expected a whole number from 0 to 9,223,372,036,854,775,807, got "),
        (("--provider-option", "a=b"), "--provider-option: the provider cpu has none, got {'a': 'b'}"),
        (("--provider", "npu"), "--provider: expected one that the installed onnxruntime has"),
    ],
)
def test_a_bad_value_is_an_error_of_one_line(here, run, options, message):
    outcome = run("profile", "net.pt", *SHAPE, "--runs", "2", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"sepconvert: {message}")
    assert outcome.err.count("\n") == 1
