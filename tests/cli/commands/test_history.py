"""`compare --baseline`: a history is begun, judged by, and continued; what cannot be judged is told."""

import json
import re
import shutil

import numpy as np
import pytest
from command_line import listing

FILES = "net-sepconvert/original.onnx", "net-sepconvert/converted.onnx"
QUICK = ("--runs", "5", "--threads", "1")
HISTORY = ("--baseline", "history.json")
UPDATED = (*HISTORY, "--update-baseline")


@pytest.fixture(autouse=True)
def results(here, converted):
    """The files of a conversion of net.pt, in the working directory."""
    shutil.copytree(converted.folder, here / "net-sepconvert")


def written(here):
    return json.loads((here / "history.json").read_text())


def rewrite(here, change):
    """Change the last run of the history by hand."""
    document = written(here)
    change(document["entries"][-1])
    (here / "history.json").write_text(json.dumps(document))


def test_a_history_is_begun_by_the_first_run(here, run):
    conditions = ("--fail-if", "latency > 900%", "--fail-if", "drop > 1")
    first = run("compare", *FILES, "--data", "data.npz", *QUICK, *UPDATED, *conditions)
    assert first.code == 0
    assert first.err == "sepconvert: history.json: begun; later runs are judged by this one\n"
    assert "Since the baseline" not in first.out
    (entry,) = written(here)["entries"]
    assert [model["name"] for model in entry["models"]] == list(FILES)
    assert entry["models"][0]["speedup"] is None
    assert entry["models"][1]["speedup"]["median"] > 0
    assert entry["task"]["metric"] is None

    again = run("compare", *FILES, "--data", "data.npz", *QUICK, *HISTORY, *conditions)
    assert (again.code, again.err) == (0, "")
    assert len(written(here)["entries"]) == 1
    table = again.out.partition("Since the baseline history.json:\n")[2]
    assert re.search(r"converted.onnx +speed-up +\d+\.\d\d× +\d+\.\d\d×", table)
    assert all(len(line) <= 80 for line in again.out.splitlines())
    assert run("compare", *FILES, "--data", "data.npz", *QUICK, *UPDATED).err == (
        "sepconvert: history.json: holds 2 runs now\n"
    )


def test_a_condition_is_judged_by_the_baseline_and_a_failing_run_is_not_added(here, run):
    """The first model has more MACs: the change since the baseline decides, not that from it."""
    assert run("compare", *FILES, "--runs", "0", *UPDATED, "--quiet").code == 0
    rewrite(here, lambda entry: entry["models"][1]["profile"].update(macs=15_000))
    outcome = run("compare", *FILES, "--runs", "0", *UPDATED, "--fail-if", "macs > 1%", "--quiet")
    assert (outcome.code, outcome.out) == (3, "")
    assert re.fullmatch(
        r"sepconvert: --fail-if: net-sepconvert/converted.onnx: macs is \+\d+.* % since 20.* \(macs > 1%\)\n",
        outcome.err,
    )
    assert len(written(here)["entries"]) == 1
    assert run("compare", *FILES, "--runs", "0", "--fail-if", "macs > 1%", "--quiet").code == 0


def test_what_is_no_change_is_judged_in_this_run(here, run):
    assert run("compare", *FILES, *QUICK, *UPDATED, "--quiet").code == 0
    for condition, code in {"speedup < 0.0001": 0, "speedup > 0.0001": 3, "max_abs > 1": 0}.items():
        assert run("compare", *FILES, *QUICK, *HISTORY, "--fail-if", condition, "--quiet").code == code


def test_a_latency_of_another_machine_cannot_be_judged(here, run):
    assert run("compare", *FILES, *QUICK, *UPDATED, "--quiet").code == 0
    rewrite(here, lambda entry: entry["environment"].update(cpu="an abacus"))
    condition = ("--fail-if", "latency > 900%")
    outcome = run("compare", *FILES, *QUICK, *HISTORY, *condition)
    assert outcome.code == 2
    assert re.fullmatch(
        r"sepconvert: --fail-if 'latency > 900%': \S+converted.onnx cannot be judged: the run of .* was on "
        r"another machine or with other settings \(cpu an abacus, now .*\); pass --update-baseline.*\n",
        outcome.err,
    )
    assert "speed-up: not compared, the run of" in " ".join(outcome.out.split())
    # Where this run is added, later ones are judged by it.
    added = run("compare", *FILES, *QUICK, *UPDATED, *condition, "--quiet")
    assert added.code == 0
    assert "cannot be judged" in added.err
    assert run("compare", *FILES, *QUICK, *HISTORY, *condition).code == 0


def test_one_model_is_compared_with_its_earlier_self(here, run):
    assert run("compare", *FILES, "--data", "data.npz", *QUICK, *UPDATED, "--quiet").code == 0
    alone = ("compare", FILES[1], "--data", "data.npz", "--runs", "0", *HISTORY)
    outcome = run(*alone, "--fail-if", "macs > 0%", "--fail-if", "drop > 0", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert (len(found["profiles"]), found["deltas"]) == (1, [])
    (model,) = found["baseline"]["models"]
    assert {each["quantity"]: each["change"] for each in model["changes"]} == {
        "params": 0, "macs": 0, "bytes": 0, "metric": 0,
    }  # fmt: skip
    refused = run("compare", FILES[1], *QUICK, *HISTORY, "--fail-if", "latency > 5%")
    assert (refused.code, refused.out) == (2, "")
    assert "pass the reference first: compare REFERENCE MODEL" in refused.err


def test_accuracies_on_other_data_are_not_compared(here, run):
    both = ("compare", *FILES, "--runs", "0", *HISTORY, "--fail-if", "drop > 1")
    assert run(*both[:-2], "--data", "data.npz", "--update-baseline", "--quiet").code == 0
    assert run(*both, "--data", "data.npz").code == 0
    with np.load(here / "data.npz") as data:
        np.savez(here / "other.npz", x=data["x"], y=data["y"][::-1])
    outcome = run(*both, "--data", "other.npz")
    assert outcome.code == 2
    assert "cannot be judged: the run of " in outcome.err
    assert "had other data; pass --update-baseline" in outcome.err


@pytest.mark.parametrize("style", ["csv", "html", "json", "markdown"])
def test_other_formats(here, run, style):
    assert run("compare", *FILES, "--runs", "0", *UPDATED, "--quiet").code == 0
    outcome = run("compare", *FILES, "--runs", "0", *HISTORY, "--format", style)
    assert outcome.code == 0
    beside = style in ("csv", "html")  # which are read by programs, or shown as a page
    assert outcome.err.startswith("model ") is beside
    assert bool(outcome.err) is beside
    if style == "json":
        assert json.loads(outcome.out)["baseline"]["path"] == "history.json"
    if style == "markdown":
        assert "Since the baseline:\n\n| model" in outcome.out


def test_a_history_without_runs_judges_nothing(here, run):
    (here / "history.json").write_text('{"schema": "sepconvert.baseline/1", "entries": []}')
    condition = ("--fail-if", "macs > 1%")
    refused = run("compare", *FILES, "--runs", "0", *HISTORY, *condition)
    assert refused.code == 2
    assert refused.err == (
        "sepconvert: --baseline: holds no run yet; pass --update-baseline to begin with this one\n"
    )
    assert run("compare", *FILES, "--runs", "0", *UPDATED, *condition).code == 0


@pytest.mark.parametrize("text", ["", "{", '{"schema": "sepconvert.baseline/2", "entries": []}', "null"])
def test_a_damaged_history_is_told_before_anything_is_measured(here, run, monkeypatch, text):
    (here / "history.json").write_text(text)
    monkeypatch.setattr("sepconvert.cli.commands.measuring.read_onnx", None)
    before = listing(here)
    outcome = run("compare", *FILES, *UPDATED)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("sepconvert: history.json: ")
    assert (here / "history.json").read_text() == text
    assert listing(here) == before
