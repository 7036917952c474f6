"""Commands `profile` and `compare`: what they print, write and refuse."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from command_line import SHAPE, WRITTEN, listing


def test_a_profile_is_written_and_compared(here, run):
    outcome = run("profile", "net.pt", *SHAPE, "--runs", "3", "--out", "net.json", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document == json.loads((here / "net.json").read_text())
    assert document["schema"] == "sepconvert.profile/1"
    assert document["flops"] == 2 * document["macs"] > 0
    assert document["latency_ms"]["runs"] == 3
    assert {each["batch"] for each in document["anatomy"]["latencies_ms"]} == {1, 8}
    shown = run("profile", "net.pt", *SHAPE, "--runs", "3", "--batches", "2,4").out
    assert "samples/s" in shown
    assert re.search(r"\bmix +Conv ", shown)
    assert f"Timed on {document['environment']['cpu']} (" in " ".join(shown.split())

    table = run("compare", "net.json", "net.pt", *SHAPE, "--runs", "3")
    assert table.code == 0
    assert "(1.00×)" in table.out
    assert "not tested for significance" in table.out
    compared = json.loads(run("compare", "net.json", "net.json", "--format", "json").out)
    assert [profile["macs"] for profile in compared["profiles"]] == [document["macs"]] * 2
    assert compared["deltas"] == [
        {
            "params_ratio": 1,
            "macs_ratio": 1,
            "latency_speedup": None,
            "metric": None,
            "accuracy_drop_pp": None,
            "agreement": None,
            "outputs": [],
        }
    ]


FILES = "net-sepconvert/original.onnx", "net-sepconvert/converted.onnx"


@pytest.fixture
def results(here, converted):
    """The files of a conversion of net.pt, in the working directory."""
    shutil.copytree(converted.folder, here / "net-sepconvert")


@pytest.mark.usefixtures("results")
def test_models_and_files_are_compared_in_turns(run):
    outcome = run("compare", "net.pt", *FILES, "--data", "data.npz", "--runs", "6", "--fail-if", "drop > 0.5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "base: net.pt" in outcome.out
    assert "Measured together: 6 interleaved rounds" in outcome.out
    assert "provider cpu, " in " ".join(outcome.out.split())
    assert all(len(line) <= 80 for line in outcome.out.splitlines())


@pytest.mark.usefixtures("results")
def test_more_threads_than_cores_are_warned_of(run):
    threads = (os.cpu_count() or 1) + 1
    text = " ".join(run("compare", *FILES, "--runs", "2", "--threads", threads).out.split())
    assert f"Warning: {threads} threads share " in text
    assert "pass --threads " in text


@pytest.mark.usefixtures("results")
def test_a_condition_that_holds_fails_after_the_comparison_is_printed(run):
    outcome = run("compare", *FILES, "--runs", "0", "--json", "--fail-if", "macs < -1%")
    assert outcome.code == 3
    assert re.fullmatch(r"sepconvert: --fail-if: .*converted.onnx: macs is -\d.*\n", outcome.err)
    (delta,) = json.loads(outcome.out)["deltas"]
    assert delta["macs_ratio"] > 1
    assert delta["outputs"][0]["relative"] < 1e-4


def test_an_accuracy_that_means_nothing_is_warned_of(here, run):
    """Labels that are never what the network answers."""
    with np.load(here / "data.npz") as data:
        x = np.concatenate([data["x"]] * 4)
    with torch.no_grad():
        answers = torch.load(here / "net.pt", weights_only=False)(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(here / "shifted.npz", x=x, y=(answers + 1) % (answers.max() + 1))
    for command in (["profile", "net.pt"], ["compare", "net.pt", "net.pt"]):
        wrong = " ".join(run(*command, "--data", "shifted.npz", "--runs", "0").out.split())
        assert "Warning: the original itself classifies 0.00 % of 80 images correctly" in wrong
        assert "Check the preprocessing (--mean, --std, --resize)" in wrong


@pytest.mark.usefixtures("results")
def test_models_are_compared_on_images_without_labels(here, run):
    with np.load(here / "data.npz") as data:
        np.savez(here / "images.npz", x=data["x"])
    (here / "images.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader\n"
        "def make():\n    return DataLoader(torch.ones(8, 3, 8, 8), 4)\n"
    )
    for data in ("images.npz", "images.py:make"):
        outcome = run("compare", *FILES, "--data", data, "--runs", "0", "--fail-if", "agreement < 50%")
        assert (outcome.code, outcome.err) == (0, "")
        assert re.search(r"same argmax +- +100.00%", outcome.out)
        assert "top-1" not in outcome.out
        refused = run("compare", *FILES, "--data", data, "--runs", "0", "--fail-if", "drop > 1")
        assert refused.code == 2
        assert "drop" in refused.err
    first = run("compare", *FILES, "--data", "images.npz", "--fail-if", "drop > 1")
    assert (first.code, first.out) == (2, "")
    assert "the images of --data have no labels, which drop needs" in first.err


@pytest.mark.usefixtures("results")
def test_formats_of_a_comparison(here, run):
    outcome = run("compare", *FILES, "--runs", "0", "--format", "csv")
    assert outcome.out.splitlines()[0] == f",{FILES[0]},{FILES[1]}"
    size = (here / FILES[0]).stat().st_size
    assert f"ONNX bytes,{size}," in outcome.out  # without separators of thousands
    page = run("compare", *FILES, "--runs", "3", "--format", "html").out
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    for expected in (*FILES, "Measured together: 3 interleaved rounds", "max abs Δ", "<svg", "Timed on "):
        assert expected in page
    page = run("compare", *FILES, "--runs", "0", "--format", "html").out
    assert "<svg" not in page
    assert "Timed on " not in page
    assert "Measured together" in page


@pytest.mark.usefixtures("results")
def test_a_file_is_profiled_and_compared_with_the_profile_of_a_model(here, run):
    assert run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.json").code == 0
    profiled = run("profile", FILES[1], "--data", "data.npz", "--runs", "3", "--out", "file.json", "--json")
    document = json.loads(profiled.out)
    assert document["accuracy"]["n"] == 20
    assert document["latency_ms"]["runs"] == 3
    assert document["onnx_bytes"] == (here / FILES[1]).stat().st_size
    assert document["model"]["sha256"] == hashlib.sha256((here / FILES[1]).read_bytes()).hexdigest()
    assert "Measured separately" in run("compare", "net.json", "file.json", FILES[0], "--runs", "0").out


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("arguments", [(*FILES, "--fail-if", "speed > 1"), (FILES[0], "gone.onnx")])
def test_a_bad_condition_and_a_missing_file_are_errors_of_one_line(run, arguments):
    outcome = run("compare", *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_profiles_from_elsewhere_are_warned_of(here, run):
    assert run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.json").code == 0
    assert "Warning" not in run("compare", "net.json", "net.json").out
    document = json.loads((here / "net.json").read_text())
    document["environment"]["cpu"] = "an abacus"
    document["model"]["sha256"] = "0" * 64
    (here / "other.json").write_text(json.dumps(document))
    text = " ".join(run("compare", "net.json", "other.json").out.split())
    assert "Warning: other.json was measured in another environment than net.json: cpu (" in text
    assert ", an abacus)" in text
    assert "Warning: other.json was made from a different file named net.pt" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "sepconvert.profile/2"}', "null"])
def test_what_is_no_profile_is_one_line(here, run, text):
    (here / "odd.json").write_text(text)
    outcome = run("compare", "odd.json", "odd.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("sepconvert: odd.json: ")
    assert outcome.err.count("\n") == 1


def test_a_profile_of_a_missing_file_leaves_nothing(here, run):
    before = listing(here)
    assert run("profile", "absent.pt", *SHAPE, "--out", "absent.json").code == 2
    assert listing(here) == before


def test_a_profile_replaces_nothing_but_a_profile(here, run):
    before = (here / "net.pt").read_bytes()
    outcome = run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.pt")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "sepconvert: net.pt: exists and is no profile of this version; pass another --out\n"
    )
    assert (here / "net.pt").read_bytes() == before
    for _ in range(2):
        assert run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.json").code == 0


def test_a_place_for_a_profile_that_is_not_there(here, run):
    outcome = run("profile", "net.pt", *SHAPE, "--out", "none/x.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "sepconvert: none/x.json: cannot be written: there is no none; pass another --out\n"
    )


def processes(path):
    """Return the names of the processes of a trace, and the layers of each."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    return {
        name: [each["name"] for each in events if each["ph"] == "X" and each["pid"] == process]
        for process, name in names.items()
    }


@pytest.mark.usefixtures("results")
def test_traces_of_one_model_and_of_several(here, run):
    for model in ("net.pt", FILES[1]):
        outcome = run("profile", model, *SHAPE, "--runs", "0", "--trace", "trace.json", "--json")
        assert (outcome.code, outcome.err) == (0, "")
        (found,) = processes(here / "trace.json").items()
        assert found[0] == model
        assert {"run", "stem"} <= {*found[1]}
    outcome = run("compare", "net.pt", *FILES, *SHAPE, "--runs", "0", "--trace", "trace.json")
    assert (outcome.code, outcome.err) == (0, "")
    found = processes(here / "trace.json")
    assert list(found) == ["net.pt", *FILES]
    assert "mix" in found["net.pt"]
    assert any(name.startswith("mix.") for name in found[FILES[1]])
    assert listing(here / "net-sepconvert") == WRITTEN


@pytest.mark.usefixtures("results")
def test_a_trace_that_cannot_be_written(here, run, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(here), "write_text", full)
    outcome = run("profile", FILES[0], "--runs", "0", "--trace", "trace.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "sepconvert: trace.json: cannot be written: No space left on device; pass another --trace\n"
    )


@pytest.mark.usefixtures("results")
def test_a_comparison_for_a_pull_request(run):
    conditions = ("--fail-if", "drop > 0.5", "--fail-if", "macs < -1%")
    outcome = run("compare", *FILES, "--data", "data.npz", "--runs", "5", "--format", "markdown", *conditions)
    assert outcome.code == 3
    first, *_ = outcome.out.splitlines()
    assert re.match(r"\*\*`converted.onnx` is .*× \[.*\] as fast as `original.onnx`.* in top-1 ", first)
    assert "Checks failed:\n\n- net-sepconvert/converted.onnx: macs is -" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("<sub>Timed on ")
    untimed = run("compare", *FILES, "--runs", "0", "--format", "markdown", "--fail-if", "macs > 1%")
    assert untimed.code == 0
    assert "<sub>" not in untimed.out
    assert "Checks passed: `macs > 1%`." in untimed.out
