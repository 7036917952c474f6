import click
import pytest

from sepconvert.base.options import Budget, Calibration, Finetuning, Selection, Timing, options_of
from sepconvert.cli.main import cli
from sepconvert.cli.options import in_flags, value_of
from sepconvert.pipeline.job import Job

VALUES = (Budget, Selection, Timing, Calibration, Finetuning, Job)
FLAGS = {parameter.name: parameter for parameter in cli.commands["convert"].params}


def flag_of(option):
    return option.metadata.get("flag", option.name).replace("-", "_")


@pytest.mark.parametrize(
    "option", [each for kind in VALUES for each in options_of(kind)], ids=lambda option: option.name
)
def test_every_option_is_a_flag_with_its_default_and_its_help(option):
    parameter = FLAGS[flag_of(option)]
    assert parameter.opts[0] == f"--{flag_of(option).replace('_', '-')}"
    assert given()[parameter.name] == option.default
    assert parameter.help.startswith(in_flags(option.metadata["help"]).rstrip("."))


def given(*arguments):
    """The options of a command line, as the command gets them."""
    return cli.commands["convert"].make_context("convert", ["model.pt", *arguments]).params


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--max-drop", "0.5", "--min-speedup", "2"], Budget(max_drop=0.5, min_speedup=2.0)),
        (["--calib-images", "64", "--memory", "1.5"], Calibration(images=64, memory=1.5e9)),
        (["--include", "a*", "--include", "b", "--exclude", "c"], Selection(("a*", "b"), ("c",))),
        (["--runs", "3", "--threads", "2", "--provider", "CPU"], Timing(threads=2, runs=3)),
        (["--finetune", "2", "--precision", "bf16"], Finetuning(epochs=2, precision="bf16")),
        ([], Timing()),
    ],
)
def test_a_command_line_makes_the_values(arguments, value):
    assert value_of(type(value), given(*arguments)) == value


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "a,b"], "expected numbers, joined by commas, e.g. 0.485,0.456,0.406, got 'a,b'"),
        (["--resize", "1x2x3"], "expected N or HxW in pixels, e.g. 224, got '1x2x3'"),
        (["--rank", "some"], "'some' is not a valid integer"),
        (["--mode", "best"], "'best' is not one of 'exact', 'approx', 'auto'"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_by_click(arguments, message):
    with pytest.raises(click.BadParameter, match=message):
        given(*arguments)


@pytest.mark.parametrize(("text", "size"), [("224", 224), ("120x160", (120, 160))])
def test_sizes(text, size):
    assert given("--resize", text)["resize"] == size


def test_batch_sizes_are_whole():
    with pytest.raises(click.BadParameter, match="expected whole numbers from 1, joined by commas"):
        cli.commands["profile"].make_context("profile", ["model.pt", "--batches", "1,0"])
