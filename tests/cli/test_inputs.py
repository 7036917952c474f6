"""What commands read, good and bad: models, data, factories, loaders."""

import re
import shlex

import pytest
import torch
from command_line import SHAPE, Outcome, listing


def test_weights_of_another_precision_are_told_of(here, run):
    weights = torch.load("scaled-weights.pt")
    torch.save({name: value.half() for name, value in weights.items()}, "half.pt")
    arguments = (*SHAPE, "--factory", "cli_test_code.py:build")
    assert "float16 weights, in the float32 model" in run("inspect", "half.pt", *arguments).err
    assert "float" not in run("inspect", "scaled-weights.pt", *arguments).err


def test_extra_keys_of_a_checkpoint_are_left_out_by_the_option_that_the_error_names(here, run):
    weights = torch.load("scaled-weights.pt")
    torch.save({**weights, "head.weight": torch.ones(2), "head.bias": torch.ones(2)}, "extra.pt")
    arguments = ("inspect", "extra.pt", *SHAPE, "--factory", "cli_test_code.py:build")
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    (option,) = re.findall(r"--ignore-extra-keys \S+$", outcome.err.rstrip())
    assert option == "--ignore-extra-keys 'head.*'"
    outcome = run(*arguments, *shlex.split(option))
    assert outcome.code == 0
    told = "sepconvert: extra.pt: 2 keys are left out (--ignore-extra-keys): head.weight, head.bias\n"
    assert told in outcome.err


CONVERSIONS = {
    "missing file": ("nope.pt", *SHAPE),
    "directory": (".", *SHAPE),
    "truncated": ("truncated.pt", *SHAPE),
    "text": ("text.pt", *SHAPE),
    "empty": ("empty.pt", *SHAPE),
    "zip": ("zip.pt", *SHAPE),
    "evil": ("evil.pt", *SHAPE),
    "evil pickle": ("evil.pkl", *SHAPE),
    "evil, allowed": ("evil.pt", *SHAPE, "--allow", "posix.system"),
    "no factory": ("weights.pt", *SHAPE),
    "factory raises": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:fail"),
    "factory is missing": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:nothing"),
    "factory file is missing": ("weights.pt", *SHAPE, "--factory", "nothing.py:build"),
    "factory module is missing": ("weights.pt", *SHAPE, "--factory", "nothing.here:build"),
    "factory makes a number": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:number"),
    "factory of another model": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:build"),
    "extra keys without a factory": ("net.pt", *SHAPE, "--ignore-extra-keys", "*"),
    "a name without weights": ("net", *SHAPE, "--factory", "cli_test_code.py:build"),
    "another name without weights": ("a-net", *SHAPE, "--factory", "cli_test_code.py:build"),
    "factory is no name": ("weights.pt", *SHAPE, "--factory", "build"),
    "wrong channels": ("net.pt", "--input-shape", "4x8x8"),
    "wrong rank": ("net.pt", "--input-shape", "8"),
    "bad shape": ("net.pt", "--input-shape", "3xx8"),
    "zero shape": ("net.pt", "--input-shape", "3x0x8"),
    "huge shape": ("net.pt", "--input-shape", "3x99999999x99999999"),
    "no shape": ("net.pt",),
    "data with wrong channels": ("net.pt", "--data", "channels.npz"),
    "data of another shape": ("net.pt", *SHAPE, "--data", "channels.npz"),
    "no data": ("net.pt", "--data", "none.npz"),
    "data without y": ("net.pt", "--data", "unlabelled.npz"),
    "data that are missing": ("net.pt", "--data", "nope.npz"),
    "data that are no data": ("net.pt", "--data", "text.pt"),
    "batch above the data": ("net.pt", "--data", "data.npz", "--batch", "21"),
    "mean of two": ("net.pt", "--data", "images.npz", "--mean", "0.5,0.5"),
    "mean of words": ("net.pt", "--data", "images.npz", "--mean", "a,b,c"),
    "std of zero": ("net.pt", "--data", "images.npz", "--std", "0,0,0"),
    "mean for floats": ("net.pt", "--data", "data.npz", "--mean", "0.5,0.5,0.5"),
    "mean without data": ("net.pt", *SHAPE, "--mean", "0.5,0.5,0.5"),
    "resize to nothing": ("net.pt", "--data", "images.npz", "--resize", "0"),
    "resize to words": ("net.pt", "--data", "images.npz", "--resize", "big"),
    "below a file": ("net.pt", *SHAPE, "--out", "text.pt/a/b"),
    "in proc": ("net.pt", *SHAPE, "--out", "/proc/out"),
    "out is a file": ("net.pt", *SHAPE, "--out", "text.pt", "--force"),
    "out is here": ("net.pt", *SHAPE, "--out", ".", "--force"),
    "tol": ("net.pt", *SHAPE, "--tol", "1"),
    "negative tol": ("net.pt", *SHAPE, "--tol", "-1e-3"),
    "tol is no number": ("net.pt", *SHAPE, "--tol", "nan"),
    "unknown option": ("net.pt", "--bogus"),
    "unknown mode": ("net.pt", "--mode", "magic"),
    "unknown command": ("convrt", "net.pt"),
    "no model": ("--quiet",),
    "batch of too many": ("net.pt", *SHAPE, "--batch", "100000000"),
    "threads without end": ("net.pt", *SHAPE, "--threads", "100000000"),
    "seed of 70 bits": ("net.pt", *SHAPE, "--seed", str(2**70)),
    "no memory": ("net.pt", *SHAPE, "--mode", "approx", "--rank", "1", "--memory", "nan"),
    "device without data": ("net.pt", *SHAPE, "--device", "meta"),
    "train without fine-tuning": (
        "net.pt",
        *SHAPE,
        "--mode",
        "approx",
        "--rank",
        "1",
        "--train",
        "data.npz",
    ),
    "checkpoint in exact mode": ("net.pt", *SHAPE, "--checkpoint", "c.pt"),
    "dry run of another mode": ("net.pt", *SHAPE, "--mode", "auto", "--min-speedup", "2", "--dry-run"),
    "loader that ends the program": ("net.pt", "--data", "cli_test_code.py:leaving"),
    "batch of none": ("net.pt", *SHAPE, "--batch", "0"),
    "runs of words": ("net.pt", *SHAPE, "--runs", "many"),
}


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_bad_usage_and_input_give_one_line_and_leave_nothing(here, run, arguments):
    before = listing(here.parent)
    if "--out" not in arguments:
        arguments = (*arguments, "--out", "new/out")
    outcome = run(*arguments)
    lines = [line for line in outcome.err.splitlines() if line != "the user's own words"]
    assert (outcome.code, outcome.out) == (2, "")
    assert len(lines) == 1, outcome.err
    assert re.match(r"sepconvert: \S", lines[0])
    assert not re.search(r"unexpected [A-Z]|\.;", lines[0])
    assert listing(here.parent) == before


@pytest.mark.parametrize("data", ["labels.npz", "cli_test_code.py:late_stranger"])
def test_labels_beyond_the_classes(here, run, data):
    before = listing(here.parent)
    outcome = run("net.pt", "--data", data, "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"sepconvert: .*labels.*expected 0 to 3.*4 classes, got 4.*\n", outcome.err)
    assert listing(here.parent) == before


@pytest.mark.parametrize("loader", ["failing", "failing_in_a_worker"])
def test_a_loader_that_fails_midway(here, run, loader):
    before = listing(here.parent)
    outcome = run("net.pt", "--data", f"cli_test_code.py:{loader}", "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    cause = re.escape("(OSError: [Errno 5] Input/output error: '9.png')")
    assert re.fullmatch(rf"sepconvert: --data, .*a loader failed.*{cause}; fix it.*\n", outcome.err)
    assert listing(here.parent) == before


def test_a_loader_that_ends_too_soon(here, run):
    """torch takes StopIteration out of a data set for the end of the data."""
    before = listing(here.parent)
    outcome = run("net.pt", "--data", "cli_test_code.py:short", "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert "data: the loader ended after 2 of 3 batches; fix its data set" in outcome.err
    assert listing(here.parent) == before


def test_the_refusal_of_a_class_names_the_option_that_admits_it(here, run):
    outcome = run("scaled.pt", *SHAPE, "--runs", "0")
    assert outcome.code == 2
    (option,) = re.findall(r"--allow [\w.]+", outcome.err)
    assert option == "--allow cli_test_code.Scaled"
    outcome = run("scaled.pt", *SHAPE, "--dry-run", *option.split())
    assert (outcome.code, outcome.err) == (0, "")


def test_trust_is_told(here, run, monkeypatch):
    monkeypatch.syspath_prepend(here)
    outcome = run("scaled.pt", *SHAPE, "--dry-run", "--trust", "--quiet")
    assert outcome == Outcome(0, "", "sepconvert: --trust: scaled.pt is run as a program\n")


def test_a_malicious_pickle_never_runs(here, run):
    for file in ("evil.pt", "evil.pkl"):
        for command in (["inspect", file], [file], ["--dry-run", file], [file, "--allow", "posix.system"]):
            assert run(*command, *SHAPE).code == 2
    assert not (here / "pwned").exists()
    assert run("evil.pt", *SHAPE, "--trust").code == 2  # it can run after all, but is no model
    assert (here / "pwned").exists()
