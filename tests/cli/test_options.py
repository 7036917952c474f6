"""Options: what the help says of them, and values that they do not take."""

import json
import re

import pytest
from command_line import SHAPE

from sepconvert.cli import main as cli


def test_every_option_of_every_command_is_explained():
    for command in cli.cli.commands.values():
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, parameter.name


def test_layers_can_be_left_out(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--json", "--exclude", "m*")
    reasons = {layer["name"]: layer["reason"] for layer in json.loads(outcome.out)["layers"]}
    assert reasons["mix"] == "not selected" != reasons["stem"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batches", "2,x"), "--batches 2,x: expected whole numbers from 1, joined by commas, e.g. 1,8,32"),
        (("--batches", "0"), "--batches 0: expected whole numbers from 1, joined by commas, e.g. 1,8,32"),
        (("--provider", "npu"), "(--)?provider: expected one that the installed onnxruntime has"),
    ],
)
def test_a_profile_of_what_there_is_not(here, run, options, message):
    outcome = run("profile", "net.pt", *SHAPE, "--runs", "2", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.match(f"sepconvert: {message}", outcome.err)
    assert outcome.err.count("\n") == 1
