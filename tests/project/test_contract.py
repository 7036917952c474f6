"""What other programs rely on: commands, flags, exit codes, files, JSON keys and Python calls.

The tables below are the contract, written out by hand. A change of the package that does not keep to them
breaks programs of others: that the package is consistent with itself is no reason to change them.
"""

import inspect
import json
import signal
import time
from dataclasses import dataclass
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from command_line import SHAPE, listing, network, start
from pages import parsed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli import main as cli

# The command line ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """The value of an option that is not given, and the values that it takes, where they are counted."""

    default: Any = None
    choices: tuple[str, ...] = ()


SWITCH = Flag(False)
REPEATED = Flag(())

LOADING = {"--factory": Flag(), "--allow": REPEATED, "--trust": SWITCH, "--input-shape": Flag()}
IMAGES = {"--data": Flag(), "--mean": Flag(), "--std": Flag(), "--resize": Flag()}
LAYERS = {"--include": REPEATED, "--exclude": REPEATED, "--tol": Flag()}
RUNNING = {
    "--batch": Flag(1), "--device": Flag("cpu"), "--seed": Flag(0),
    "--quiet": SWITCH, "--json": SWITCH, "--debug": SWITCH,
}  # fmt: skip
TIMING = {
    "--threads": Flag(), "--provider": Flag("cpu"), "--runs": Flag(50),
    "--graph-optimization": Flag("all", ("all", "extended", "basic", "none")),
    "--provider-option": Flag(), "--spinning": Flag("off", ("off", "on")),
}  # fmt: skip
WRITING = {
    "--out": Flag(),
    "--force": SWITCH,
    "--dynamic-batch": Flag(True),
    "--no-dynamic-batch": Flag(True),
}
FILES_OF_OPTIONS = {"--config": Flag()}

COMMANDS = {
    "convert": ("MODEL", {
        **LOADING, **IMAGES, **LAYERS, **RUNNING, **TIMING, **WRITING,
        "--mode": Flag("exact", ("exact", "approx", "auto")),
        "--gate": Flag(None, ("macs", "latency", "none")),
        "--calib": Flag(), "--calib-images": Flag(1536), "--memory": Flag(),
        "--max-drop": Flag(), "--min-speedup": Flag(), "--target-macs": Flag(), "--target-params": Flag(),
        "--rank": Flag(),
        "--finetune": Flag(0), "--train": Flag(), "--precision": Flag(None, ("no", "bf16", "fp16")),
        "--checkpoint": Flag(), "--resume": SWITCH,
        "--measure-seconds": Flag(300.0), "--cache": Flag(),
        "--dry-run": SWITCH, "--format": Flag("table", ("table", "markdown")), **FILES_OF_OPTIONS,
    }),
    "inspect": ("MODEL", {**LOADING, **IMAGES, **LAYERS, **RUNNING, **FILES_OF_OPTIONS}),
    "profile": ("MODEL", {
        **LOADING, **IMAGES, **RUNNING, **TIMING, "--out": Flag(), "--batches": Flag((8,)), "--trace": Flag(),
        **FILES_OF_OPTIONS,
    }),
    "compare": ("MODELS...", {
        **LOADING, **IMAGES, **RUNNING, **TIMING, "--fail-if": REPEATED,
        "--format": Flag("table", ("table", "markdown", "csv", "json", "html")),
        "--baseline": Flag(), "--update-baseline": SWITCH, "--trace": Flag(), **FILES_OF_OPTIONS,
    }),
    "apply": ("MODEL PLAN", {**LOADING, **RUNNING, **WRITING, **FILES_OF_OPTIONS}),
    "demo": ("", {**RUNNING, **TIMING, "--runs": Flag(12), **WRITING}),
    "env": ("", {"--json": SWITCH, "--debug": SWITCH}),
}  # fmt: skip
ARGUMENTS = {"convert": ["m.pt"], "inspect": ["m.pt"], "profile": ["m.pt"], "compare": ["a.pt", "b.pt"],
             "apply": ["m.pt", "plan.json"], "demo": [], "env": []}  # fmt: skip
FLAGS = [(command, flag) for command, (_, flags) in COMMANDS.items() for flag in flags]

DONE, BAD_USAGE, NOT_MET, INTERRUPTED = 0, 2, 3, 130

# Files and JSON ------------------------------------------------------------------------------------

FILES = {
    "original.onnx", "converted.onnx", "converted.pt2", "plan.json", "converted.safetensors", "report.json",
    "report.html", "run.toml",
}  # fmt: skip


@dataclass(frozen=True)
class OrNull:
    """A value of this form, or null."""

    form: Any


@dataclass(frozen=True)
class Pair:
    """A list of two values of this form."""

    form: Any


NUMBER = (int, float)
INTERVAL = Pair(NUMBER)
# A mapping has these keys, and maybe more; the items of a list have this form; a set holds all values.
LATENCY = {"median": NUMBER, "ci95": INTERVAL, "p90": NUMBER, "runs": int, "threads": int, "batch": int}
PROFILE = {
    "params": int, "macs": NUMBER, "flops": NUMBER, "onnx_bytes": OrNull(int), "latency_ms": OrNull(LATENCY),
    "accuracy": OrNull({"top1": NUMBER, "top5": OrNull(NUMBER), "n": int}),
    # Operator → how often it was met. A list of names was intended, but the mapping was released first.
    "uncounted_ops": dict,
}  # fmt: skip
ENVIRONMENT = {
    "sepconvert": str, "torch": str, "onnxruntime": str, "cpu": str, "instruction_sets": [str], "cores": int,
    "clock_mhz": OrNull(NUMBER), "load_average": OrNull(NUMBER), "threads": int, "spinning": {"off", "on"},
    "execution_mode": {"sequential"}, "inter_op_threads": int, "graph_optimization": str, "provider": str,
    "provider_options": dict, "provider_takes_threads": bool,
}  # fmt: skip
FILE = {"path": str, "sha256": str}
DELTA = {
    "params_ratio": OrNull(NUMBER), "macs_ratio": OrNull(NUMBER),
    "latency_speedup": OrNull({"median": NUMBER, "ci95": INTERVAL, "significant": bool}),
    "accuracy_drop_pp": OrNull({"value": NUMBER, "ci95": INTERVAL}), "agreement": OrNull(NUMBER),
}  # fmt: skip
DECISION = {
    "name": str, "kind": str, "decision": {"converted", "kept"}, "reason": str, "scheme": OrNull(str),
    "rank": OrNull(int), "macs": Pair(NUMBER), "params": Pair(int),
}  # fmt: skip
LAYER = {
    **DECISION, "exact": bool, "weight_error": OrNull(NUMBER), "output_error": OrNull(NUMBER),
    "latency_ms": OrNull(Pair(NUMBER)),
}  # fmt: skip
REPORT = {
    "schema": {"sepconvert.report/1"}, "mode": {"exact", "approx", "auto"}, "model": FILE,
    "environment": ENVIRONMENT, "seed": int, "original": PROFILE, "converted": PROFILE, "delta": DELTA,
    "layers": [LAYER], "verification": {"torch_max_abs_diff": NUMBER, "onnx_max_abs_diff": OrNull(NUMBER)},
}  # fmt: skip
PLAN = {
    "schema": {"sepconvert.plan/1"}, "mode": {"exact", "approx", "auto"}, "gate": {"macs", "latency", "none"},
    "tol": OrNull(NUMBER), "seed": int, "model_sha256": OrNull(str), "weights_sha256": OrNull(str),
    "input_shapes": [[int]], "merges": [[str]],
    "layers": [{**DECISION, "spec": OrNull(dict), "border": dict, "bias": bool, "tolerance": OrNull(NUMBER)}],
}  # fmt: skip
STORED_PROFILE = {"schema": {"sepconvert.profile/1"}, "model": FILE, "environment": ENVIRONMENT, **PROFILE}
INSTALLATION = {
    "schema": {"sepconvert.environment/1"}, "sepconvert": str, "python": str, "platform": str, "cpu": str,
    "instruction_sets": [str], "missing_instruction_sets": [str], "cores": int, "available_cores": int,
    "memory_bytes": int, "free_memory_bytes": int, "onnxruntime": OrNull(str), "providers": [str],
    "packages": dict,
}  # fmt: skip
CHANGE = {
    "quantity": {"params", "macs", "bytes", "metric", "latency"}, "then": NUMBER, "now": NUMBER,
    "change": NUMBER, "unit": str, "since": str, "latency_speedup": OrNull({"median": NUMBER}),
}  # fmt: skip
SINCE = {"baseline": {"path": str, "models": [{"model": str, "changes": [CHANGE], "missing": dict}]}}
HISTORY = {
    "schema": {"sepconvert.baseline/1"},
    "entries": [
        {
            "date": str, "environment": ENVIRONMENT, "batch": int, "runs": int, "task": dict,
            "data_sha256": OrNull(str),
            "models": [
                {"name": str, "sha256": str, "profile": PROFILE, "speedup": OrNull(DELTA["latency_speedup"])}
            ],
        }
    ],
}  # fmt: skip
COMPARISON = {"profiles": [PROFILE], "deltas": [DELTA]}
INSPECTION = {
    "layers": [{**DECISION, "structures": [{"scheme": str, "rank": int, "best_relative_error": NUMBER}]}],
}

# Python --------------------------------------------------------------------------------------------

CALLS = """
import sepconvert
result = sepconvert.convert(model, example_inputs, mode="exact")
result.model, result.plan, result.report
sepconvert.inspect(model, example_inputs)
before = sepconvert.profile(model, example_inputs, data=loader)
after = sepconvert.profile(result.model, example_inputs, data=loader)
print(sepconvert.compare(before, after))
"""


def keeps(value: Any, form: Any, where: str = "document") -> None:
    """Fail, with the place, unless a value of JSON has a form of the tables above."""
    if isinstance(form, OrNull):
        if value is not None:
            keeps(value, form.form, where)
    elif isinstance(form, Pair):
        keeps(value, [form.form], where)
        assert len(value) == 2, where
    elif isinstance(form, dict):
        assert isinstance(value, dict), where
        assert form.keys() <= value.keys(), f"{where}: has no {', '.join(form.keys() - value.keys())}"
        for key, inner in form.items():
            keeps(value[key], inner, f"{where}.{key}")
    elif isinstance(form, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            keeps(item, form[0], f"{where}[{index}]")
    elif isinstance(form, set):
        assert value in form, f"{where}: {value!r}"
    elif form is not Any:
        assert isinstance(value, form), f"{where}: {value!r}"
        assert not isinstance(value, bool) or form is bool, f"{where}: {value!r}"


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of every command."""
    return {
        name: CliRunner().invoke(cli.cli, [name, "--help"], prog_name="sepconvert").output
        for name in COMMANDS
    }


def test_the_commands():
    assert set(COMMANDS) <= set(cli.cli.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_arguments_of_a_command(helps, command):
    arguments, _ = COMMANDS[command]
    usage = " ".join(helps[command].split())
    assert f"Usage: sepconvert {command} [OPTIONS] {arguments}".strip() in usage


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_a_flag(helps, command, flag):
    expected = COMMANDS[command][1][flag]
    assert flag in helps[command].replace(",", " ").replace("/", " ").split()
    (option,) = (
        each for each in cli.cli.commands[command].params if flag in (*each.opts, *each.secondary_opts)
    )
    if option.expose_value:
        assert parsed(cli.cli, [command, *ARGUMENTS[command]])[option.name] == expected.default
    assert (tuple(option.type.choices) if isinstance(option.type, click.Choice) else ()) == expected.choices


def test_a_model_alone_is_converted(here, run):
    assert run("net.pt", *SHAPE, "--dry-run").out == run("convert", "net.pt", *SHAPE, "--dry-run").out != ""


def test_the_files_of_a_result(converted):
    assert converted.code == DONE
    assert all(line.startswith("Warning: ") for line in converted.err.splitlines())  # of a busy machine
    assert {path.name for path in converted.folder.iterdir()} == FILES
    assert listing(converted.folder.parent) == sorted(["out", *(f"out/{name}" for name in FILES)])


def test_the_report(converted):
    report = json.loads((converted.folder / "report.json").read_text())
    keeps(report, REPORT)
    assert report == json.loads(converted.out)
    # All that may be null is there: `--data` was given, and models were timed.
    assert report["original"]["latency_ms"] and report["original"]["accuracy"]  # noqa: PT018
    assert report["delta"]["latency_speedup"] and report["delta"]["accuracy_drop_pp"]  # noqa: PT018
    assert report["delta"]["agreement"] == 1
    for name in ("original", "converted"):
        assert report[name]["flops"] == 2 * report[name]["macs"]
    # One entry for every convolution, with a reason.
    assert [layer["name"] for layer in report["layers"]] == ["stem", "mix"]
    assert all(layer["reason"] for layer in report["layers"])
    for key in ("params", "macs"):
        ratio = report["original"][key] / report["converted"][key]
        assert report["delta"][f"{key}_ratio"] == pytest.approx(ratio)


def test_the_plan(converted):
    keeps(json.loads((converted.folder / "plan.json").read_text()), PLAN)


def test_a_stored_profile(here, run):
    outcome = run("profile", "net.pt", "--data", "data.npz", "--runs", "3", "--out", "net.json", "--json")
    assert outcome.code == DONE
    keeps(json.loads(outcome.out), STORED_PROFILE)
    assert json.loads((here / "net.json").read_text()) == json.loads(outcome.out)


def test_a_comparison(converted, run):
    files = [converted.folder / f"{name}.onnx" for name in ("original", "converted", "original")]
    outcome = run("compare", *files, "--runs", "0", "--format", "json")
    assert outcome.code == DONE
    found = json.loads(outcome.out)
    keeps(found, COMPARISON)
    assert (len(found["profiles"]), len(found["deltas"])) == (3, 2)  # against the first


def test_a_history_of_comparisons(here, converted, run):
    files = [converted.folder / f"{name}.onnx" for name in ("original", "converted")]
    arguments = (
        "compare",
        *files,
        "--runs",
        "3",
        "--baseline",
        "history.json",
        "--update-baseline",
        "--json",
    )
    assert run(*arguments).code == DONE
    outcome = run(*arguments)
    assert outcome.code == DONE
    keeps(json.loads(outcome.out), {**COMPARISON, **SINCE})
    keeps(json.loads((here / "history.json").read_text()), HISTORY)


def test_the_environment(run):
    outcome = run("env", "--json")
    assert outcome.code == DONE
    keeps(json.loads(outcome.out), INSTALLATION)


def test_the_file_of_options_repeats_a_conversion(here, converted, run):
    outcome = run("--config", converted.folder / "run.toml", "--out", "again", "--runs", "0", "--json")
    assert outcome.code == DONE
    keeps(json.loads(outcome.out), REPORT)
    assert {path.name for path in (here / "again").iterdir()} == FILES


def test_an_inspection(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--json")
    assert outcome.code == DONE
    keeps(json.loads(outcome.out), INSPECTION)


BAD = {
    "no such file": ("nope.pt", *SHAPE),
    "no model": ("text.pt", *SHAPE),
    "an unknown option": ("net.pt", "--bogus"),
    "a value that is not taken": ("net.pt", "--mode", "magic"),
    "a class that is not admitted": ("scaled.pt", *SHAPE),
    "an existing result": ("net.pt", *SHAPE, "--out", "mine"),
}
UNMET = {
    "a budget": ("net.pt", *SHAPE, "--mode", "approx", "--target-macs", "0.001", "--runs", "0", "--quiet"),
    "a condition": (
        "compare",
        "net.pt",
        "wider.pt",
        *SHAPE,
        "--runs",
        "0",
        "--json",
        "--fail-if",
        "macs > 1%",
    ),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_usage_is_an_error_of_one_or_two_lines(here, run, arguments):
    (here / "mine").mkdir()
    (here / "mine" / "report.json").write_text("mine")
    before = listing(here)
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (BAD_USAGE, "")
    assert 1 <= len(outcome.err.splitlines()) <= 2
    assert outcome.err.startswith("sepconvert: ")
    assert listing(here) == before
    assert (here / "mine" / "report.json").read_text() == "mine"


@pytest.mark.parametrize("arguments", UNMET.values(), ids=UNMET)
def test_a_demand_that_is_not_met(here, run, arguments):
    before = listing(here)
    outcome = run(*arguments)
    assert outcome.code == NOT_MET
    assert outcome.err.splitlines()[-1].startswith("sepconvert: ")
    assert "Traceback" not in outcome.err
    assert listing(here) == before


def test_only_debug_shows_a_traceback(here, run):
    assert "Traceback" in run("nope.pt", *SHAPE, "--debug").err


def test_force_replaces_a_result_which_has_a_default_place(here, run):
    folder = here / "net-sepconvert"
    folder.mkdir()
    (folder / "report.json").write_text("mine")
    assert run("net.pt", *SHAPE, "--runs", "0", "--force").code == DONE
    assert {path.name for path in folder.iterdir()} == FILES
    keeps(json.loads((folder / "report.json").read_text()), REPORT)


def test_a_plan_is_replayed(here, run, converted):
    outcome = run("apply", "net.pt", converted.folder / "plan.json", "--out", "again")
    assert outcome.code == DONE
    assert {path.name for path in (here / "again").iterdir()} == {"converted.onnx", "converted.pt2"}


def test_an_interruption_leaves_nothing(here):
    before = listing(here.parent)
    process = start("net.pt", *SHAPE, "--out", "new/out", "--runs", "100000", "--quiet")
    while listing(here.parent) == before and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (INTERRUPTED, b"")
    assert err.strip() == b"sepconvert: interrupted"
    assert listing(here.parent) == before


def test_calls_of_python(capsys):
    model, images = network(), torch.randn(8, 3, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(8) % 4), batch_size=4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = {"model": model, "example_inputs": images[:1], "loader": loader}
    exec(CALLS, names)  # noqa: S102
    result = names["result"]
    # The model is untouched, and its copy is one to go on working with.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(result.model, nn.Sequential)
    assert not result.model.training
    mix = result.model.mix
    assert not isinstance(mix, nn.Conv2d)
    torch.testing.assert_close(mix.weight, model.mix.weight, rtol=1e-4, atol=1e-6)
    assert (mix.in_channels, mix.out_channels, mix.stride, mix.padding) == (8, 8, (1, 1), (1, 1))
    keeps(json.loads(json.dumps(result.report, allow_nan=False)), {**REPORT, "model": OrNull(FILE)})
    keeps(json.loads(json.dumps(result.plan, allow_nan=False)), PLAN)
    assert isinstance(names["before"], sepconvert.Profile)
    assert "MACs" in capsys.readouterr().out


def test_the_simple_call_of_auto_mode():
    call = inspect.signature(sepconvert.convert).bind(
        "model", "x", mode="auto", calib="images", data="labelled images", max_drop=1.0
    )
    assert list(call.arguments)[:2] == ["model", "example_inputs"]
    defaults = {name: each.default for name, each in inspect.signature(sepconvert.convert).parameters.items()}
    assert defaults["mode"] == "exact"


@pytest.mark.parametrize(
    ("value", "form"),
    [({}, {"macs": int}), ([1, "2"], [int]), (True, int), (None, str), ([1.0], Pair(NUMBER)), ("x", {"y"})],
)
def test_what_breaks_the_contract_is_found(value, form):
    with pytest.raises(AssertionError):
        keeps(value, form)
