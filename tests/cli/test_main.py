"""The command line as its users meet it: exit codes, the two output streams, files, and interruptions.

What needs a process of its own (signals, terminals, imports, a full disk) runs in one; the rest runs here.
"""

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import small_net
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sepconvert.base.documents import sealed
from sepconvert.cli import commands, inputs, progress
from sepconvert.cli import main as cli

COMMANDS = ["convert", "inspect", "profile", "compare", "apply", "demo"]
RESULTS = [
    "converted.onnx", "converted.pt2", "converted.safetensors",
    "original.onnx", "plan.json", "report.html", "report.json",
]  # fmt: skip
SHAPE = ("--input-shape", "3x8x8")

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return 2 * self.conv(x)

def build():
    print("the user's own words")
    return Scaled().eval()

def fail():
    raise RuntimeError("two\\nlines")

def number():
    return 7

def late_stranger():
    y = torch.zeros(12, dtype=torch.int64)
    y[-1] = 4
    return DataLoader(TensorDataset(torch.zeros(12, 3, 8, 8), y), batch_size=4)

class Failing(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 9:
            raise OSError(5, "Input/output error", "9.png")
        return torch.zeros(3, 8, 8), 0

def failing(workers=0):
    return DataLoader(Failing(), batch_size=4, num_workers=workers)

def failing_in_a_worker():
    return failing(1)

class Short(Failing):
    def __getitem__(self, index):
        if index == 9:
            raise StopIteration
        return torch.zeros(3, 8, 8), 0

def short():
    return DataLoader(Short(), batch_size=4)

class Leaving(Failing):
    def __getitem__(self, index):
        raise SystemExit(0)

def leaving():
    return DataLoader(Leaving(), batch_size=4)
"""


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def network() -> nn.Module:
    """Two convolutions of random kernels, the second (`mix`) the product of a spatial pair of rank 2."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1),
            act=nn.ReLU(),
            mix=nn.Conv2d(8, 8, 3, padding=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(8, 4),
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        vertical = torch.randn(2, 8, 3, dtype=torch.float64, generator=generator)
        horizontal = torch.randn(8, 2, 3, dtype=torch.float64, generator=generator)
        model.mix.weight.copy_(torch.einsum("rci,orj->ocij", vertical, horizontal) / 8)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Models and data, good and bad, by name."""
    folder = tmp_path_factory.mktemp("files")
    model = network()
    torch.save(model, folder / "net.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), folder / "linear.pt")
    stem = nn.Conv2d(3, 8, 5, padding=2)
    torch.save(nn.Sequential(OrderedDict({**model._modules, "stem": stem})), folder / "wider.pt")
    mix = nn.Conv2d(8, 8, 5, padding=2)
    torch.save(nn.Sequential(OrderedDict({**model._modules, "mix": mix})), folder / "other.pt")
    torch.save(Evil(), folder / "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (folder / "truncated.pt").write_bytes((folder / "net.pt").read_bytes()[:2000])
    (folder / "text.pt").write_text("not a model\nat all\n")
    (folder / "empty.pt").touch()
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "no model")

    (folder / "cli_test_code.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        scaled = importlib.import_module("cli_test_code").Scaled().eval()
        torch.save(scaled, folder / "scaled.pt")
        torch.save(scaled.state_dict(), folder / "scaled-weights.pt")
    del sys.modules["cli_test_code"]

    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 3, 8, 8)).astype(np.float32), random.integers(0, 4, 20)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "channels.npz", x=x[:, :2], y=y)
    np.savez(folder / "labels.npz", x=x, y=y + 1)
    np.savez(folder / "none.npz", x=x[:0], y=y[:0])
    np.savez(folder / "unlabelled.npz", x=x)
    np.savez(folder / "images.npz", x=random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), y=y)
    return folder


def listing(folder: Path) -> list[str]:
    """Every path below `folder`, hidden ones too, but for the byte code of the user's modules."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts)


def listing_of(out: str) -> list[str]:
    """Paths that a conversion to `out` leaves."""
    return [out, *(f"{out}/{name}" for name in RESULTS)]


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """A working directory with a copy of all files."""
    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch):
    """`sepconvert` with arguments, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(progress, "_LINE_EVERY", math.inf)  # else a slow machine says more than a fast one

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sepconvert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    yield call
    sys.modules.pop("cli_test_code", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(*arguments: str | Path, **keywords: Any) -> subprocess.Popen[bytes]:
    """`sepconvert` with arguments, in a process of its own."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "sepconvert", *map(str, arguments)]
    return subprocess.Popen(command, **{**streams, **keywords})  # noqa: S603


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory) -> SimpleNamespace:
    """A conversion in its own process, as a program would call it."""
    folder = tmp_path_factory.mktemp("converted")
    process = start(
        files / "net.pt", "--data", files / "data.npz", "--runs", "3", "--out", folder / "out", "--json",
        preexec_fn=lambda: os.umask(0o027),
    )  # fmt: skip
    out, err = process.communicate()
    return SimpleNamespace(code=process.returncode, out=out.decode(), err=err.decode(), folder=folder / "out")


# Help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["sepconvert", *COMMANDS])
def test_help_is_instant_and_loads_no_torch(command):
    def ask() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        process = start(*command, "--help")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert b"Usage: " in out
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    assert min(ask() for _ in range(3)) <= 0.3


def test_no_heavy_library_is_imported_for_help():
    arguments = [sys.executable, "-X", "importtime", "-m", "sepconvert", "convert", "--help"]
    imports = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr  # noqa: S603
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports.splitlines()}
    assert {"click", "sepconvert"} <= names
    assert not {"torch", "numpy", "onnx", "onnxruntime", "scipy", "jinja2", "tabulate", "tqdm"} & names


def test_without_arguments_the_help_is_shown_as_an_error(run):
    outcome = run()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: sepconvert")


def test_version(run):
    assert re.fullmatch(r"sepconvert, version \d+\.\d+\.\d+\n", run("--version").out)


def test_every_option_of_every_command_is_explained():
    for command in cli.cli.commands.values():
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, parameter.name


# Convert is the default ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "net.pt", *SHAPE, "--dry-run", "--json"],
        ["--mode", "exact", "--dry-run", *SHAPE, "--json", "net.pt"],
        ["--json", "--dry-run", "net.pt/", *SHAPE],
        ["--dry-run", "--json", *SHAPE, "--", "net.pt"],
    ],
)
def test_convert_is_the_default_command(here, run, arguments):
    expected = run("net.pt", *SHAPE, "--dry-run", "--json")
    assert expected.code == 0
    assert run(*arguments) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_named_like_a_command(here, run, name):
    (here / "net.pt").rename(here / name)
    assert run(f"./{name}", *SHAPE, "--dry-run").code == 0


# What a conversion leaves --------------------------------------------------------------------------


def test_json_is_all_that_is_printed(converted):
    assert (converted.code, converted.err) == (0, "")
    assert json.loads(converted.out) == json.loads((converted.folder / "report.json").read_text())


def test_the_directory_holds_the_seven_files(converted):
    assert listing(converted.folder) == RESULTS
    assert listing(converted.folder.parent) == ["out", *(f"out/{name}" for name in RESULTS)]


def test_permissions_honour_the_umask(converted):
    assert converted.folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in converted.folder.iterdir()} == {0o640}


def test_the_report_is_that_of_the_contract(converted, files):
    report = json.loads(converted.out)
    digest = hashlib.sha256((files / "net.pt").read_bytes()).hexdigest()
    assert report["schema"] == "sepconvert.report/1"
    assert report["model"] == {"path": str(files / "net.pt"), "sha256": digest}
    assert {layer["name"]: layer["decision"] for layer in report["layers"]} == {
        "stem": "kept",
        "mix": "converted",
    }
    assert report["original"]["accuracy"]["n"] == 20
    assert report["delta"]["agreement"] == 1
    assert report["delta"]["latency_speedup"]["ci95"]
    assert report["verification"]["passed"] is True


@pytest.mark.parametrize("name", ["original", "converted"])
def test_onnx_files_are_single_valid_and_do_what_the_model_does(converted, name):
    path = converted.folder / f"{name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    runner = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    (actual,) = runner.run(None, {runner.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), network()(x), rtol=1e-4, atol=1e-5)


def test_the_archive_loads_without_sepconvert(converted, tmp_path):
    x = torch.randn(5, 3, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['sepconvert'] = None\n"
        f"model = torch.export.load({str(converted.folder / 'converted.pt2')!r}).module()\n"
        "torch.save(model(torch.load('x.pt')), 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, check=True)  # noqa: S603
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), network()(x), rtol=1e-4, atol=1e-5)


def test_the_weights_are_those_of_the_plan(converted):
    plan = json.loads((converted.folder / "plan.json").read_text())
    weights = converted.folder / "converted.safetensors"
    assert plan["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert any(name.startswith("mix.") for name in load_file(weights))


def test_tables_on_standard_output(here, run):
    outcome = run("net.pt", *SHAPE, "--runs", "0")
    assert (outcome.code, outcome.err) == (0, "")
    assert "spatial-vh 2" in outcome.out
    assert "1 of 2 convolutions converted." in outcome.out
    assert "Written to net-sepconvert/" in outcome.out
    assert listing(here / "net-sepconvert") == RESULTS


def test_quiet_says_nothing_and_user_code_keeps_off_standard_output(here, run):
    outcome = run(
        "scaled-weights.pt", "--factory", "cli_test_code.py:build", *SHAPE, "--runs", "0", "--quiet",
        "--out", "a b/ü →/out",
    )  # fmt: skip
    assert outcome == Outcome(0, "", "the user's own words\n")
    assert listing(here / "a b" / "ü →" / "out") == RESULTS


def test_weights_of_another_precision_are_told_of(here, run):
    weights = torch.load("scaled-weights.pt")
    torch.save({name: value.half() for name, value in weights.items()}, "half.pt")
    arguments = (*SHAPE, "--factory", "cli_test_code.py:build")
    assert "float16 weights, in the float32 model" in run("inspect", "half.pt", *arguments).err
    assert "float" not in run("inspect", "scaled-weights.pt", *arguments).err


def test_quiet_warns_nonetheless(here, run):
    outcome = run("net.pt", *SHAPE, "--mode", "approx", "--rank", "1", "--runs", "0", "--quiet")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith("Warning: without calibration images")
    assert outcome.err.count("\n") == 1


def test_a_model_without_convolutions_is_fine(here, run):
    outcome = run("linear.pt", *SHAPE, "--runs", "0")
    assert outcome.code == 0
    assert "0 of 0 convolutions converted." in outcome.out


def test_dry_run_writes_nothing(here, run):
    (here / "net-sepconvert").mkdir()
    before = listing(here)
    outcome = run("net.pt", *SHAPE, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Dry run: nothing was written." in outcome.out
    assert listing(here) == before


def test_an_existing_result_is_found_out_before_any_work(here, run, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", None)
    (here / "net-sepconvert").mkdir()
    (here / "net-sepconvert" / "mine.txt").write_text("mine")
    before = listing(here)
    outcome = run("net.pt", *SHAPE)
    assert outcome.code == 2
    assert outcome.err == (
        "sepconvert: net-sepconvert: exists already; pass --force to replace it, or another --out\n"
    )
    assert listing(here) == before


def test_force_replaces_the_directory(here, run):
    (here / "net-sepconvert").mkdir()
    (here / "net-sepconvert" / "plan.json").write_text("old")
    assert run("net.pt", *SHAPE, "--runs", "0", "--force").code == 0
    assert listing(here / "net-sepconvert") == RESULTS


def test_force_keeps_what_is_no_result(here, run):
    (here / "net-sepconvert").mkdir()
    (here / "net-sepconvert" / "thesis.txt").write_text("mine")
    before = listing(here)
    outcome = run("net.pt", *SHAPE, "--runs", "0", "--force")
    assert outcome.code == 2
    assert "net-sepconvert: holds thesis.txt, which is no result of a conversion" in outcome.err
    assert listing(here) == before


def test_names_that_are_not_text(here, run):
    name = os.fsdecode(b"caf\xe9.pt")
    (here / "net.pt").rename(here / name)
    outcome = run(name, *SHAPE, "--runs", "0")
    assert (outcome.code, outcome.err) == (0, "")
    assert r"caf\udce9.pt" in (here / os.fsdecode(b"caf\xe9-sepconvert") / "report.html").read_text()


# Bad usage and bad input ---------------------------------------------------------------------------


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
    assert re.fullmatch(rf"sepconvert: --data, .*a loader failed.*{cause}; mend it.*\n", outcome.err)
    assert listing(here.parent) == before


def test_a_loader_that_ends_too_soon(here, run):
    """torch takes StopIteration out of a data set for the end of the data."""
    before = listing(here.parent)
    outcome = run("net.pt", "--data", "cli_test_code.py:short", "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert "data: the loader ended after 2 of 3 batches; fix its data set" in outcome.err
    assert listing(here.parent) == before


def test_an_output_that_cannot_be_written(here):
    with Path("/dev/full").open("wb") as full:
        process = start("inspect", here / "net.pt", *SHAPE, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.decode() == (
        "sepconvert: the output cannot be written: no space is left; write it elsewhere\n"
    )


def test_of_two_runs_to_one_place_the_first_stays(here):
    """Neither found anything there when it began."""
    arguments = ("net.pt", *SHAPE, "--runs", "0", "--out", "new")
    both = [start(*arguments, cwd=here) for _ in range(2)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2]
    assert [err for err, code in ends if code] == [
        "sepconvert: new: exists already; pass --force to replace it, or another --out\n"
    ]
    assert listing(here / "new") == RESULTS


@pytest.mark.parametrize("arguments", [["--debug"], []])
def test_only_debug_shows_a_traceback(here, run, arguments, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(inputs, "load_model", broken)
    outcome = run("net.pt", *SHAPE, *arguments)
    assert outcome.code == 2
    assert ("Traceback" in outcome.err) == bool(arguments)
    assert outcome.err.endswith(
        "sepconvert: unexpected ZeroDivisionError: first; run again with --debug and report it\n"
    )
    assert not (here / "net-sepconvert").exists()


def test_debug_shows_what_the_exporter_said_of_files_that_are_missing(here):
    (here / "untranslated.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Bessel(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.special.bessel_j0(x)\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), Bessel())\n"
    )
    save_file({"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(4)}, here / "bessel.safetensors")
    arguments = ("bessel.safetensors", "--factory", "untranslated.py:build", *SHAPE, "--runs", "0")
    process = start(*arguments, "--debug")
    out, err = (stream.decode() for stream in process.communicate())
    assert process.returncode == 0
    # The cause, and not the step at which the exporter met it.
    assert "cannot export this model: No ONNX function found for" in " ".join(out.split())
    assert "bessel_j0" in out
    assert "Traceback" in err
    assert "Error when translating node" in err


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


# Inspect -------------------------------------------------------------------------------------------


def test_inspect_json(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    layers = {layer["name"]: layer for layer in json.loads(outcome.out)["layers"]}
    assert list(layers) == ["stem", "mix"]
    errors = {s["scheme"]: s["best_relative_error"] for s in layers["mix"]["structures"]}
    assert errors["spatial-vh"] < 1e-6 < errors["zero-border"]
    assert all(s["best_relative_error"] > 1e-3 for s in layers["stem"]["structures"])
    assert listing(here) == listing(here)


def test_inspect_table(here, run):
    before = listing(here)
    outcome = run("inspect", "net.pt", *SHAPE)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2/24 holds" in outcome.out
    assert listing(here) == before


def test_layers_can_be_left_out(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--json", "--exclude", "m*")
    reasons = {layer["name"]: layer["reason"] for layer in json.loads(outcome.out)["layers"]}
    assert reasons["mix"] == "not selected" != reasons["stem"]


# Apply ---------------------------------------------------------------------------------------------


@pytest.fixture
def plan(converted, here) -> Path:
    """The plan of a conversion, its weights beside it."""
    for name in ("plan.json", "converted.safetensors"):
        (here / "plan").mkdir(exist_ok=True)
        shutil.copy(converted.folder / name, here / "plan")
    return here / "plan" / "plan.json"


def edit(plan: Path, **changes: Any) -> None:
    plan.write_text(json.dumps(sealed({**json.loads(plan.read_text()), **changes})))


def tamper(plan: Path) -> None:
    """Move the factors of `mix` by a thousandth, and make the plan vouch for them."""
    path = plan.parent / "converted.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.startswith("mix.") and weights[name].ndim == 4:
            weights[name] = weights[name] * 1.001
    path.chmod(0o644)
    save_file(weights, path)
    edit(plan, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_apply_replays_the_plan(here, run, plan):
    outcome = run("apply", "net.pt", plan, "--out", "again")
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 convolutions replaced as planned; written to again/" in outcome.out
    assert "Verified: " in outcome.out
    assert listing(here / "again") == ["converted.onnx", "converted.pt2"]
    x = torch.randn(2, 3, 8, 8)
    runner = onnxruntime.InferenceSession(here / "again" / "converted.onnx")
    (actual,) = runner.run(None, {runner.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), network()(x), rtol=1e-4, atol=1e-5)


def test_a_plan_is_for_the_file_that_it_was_made_of(here, run, plan):
    twin = network()
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    torch.save(twin, here / "twin.pt")
    outcome = run("apply", "twin.pt", plan, "--out", "again")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(
        r"sepconvert: twin\.pt: is another file than the plan was made of \(SHA-256 .*\n", outcome.err
    )
    assert not (here / "again").exists()


def test_where_a_plan_names_no_file_nothing_is_compared(here, run, plan):
    edit(plan, model_sha256=None)
    outcome = run("apply", "net.pt", plan, "--out", "again", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == {"out": "again", "converted": 1, "verification": None}


def test_apply_does_not_replace_its_own_plan(here, run, plan):
    outcome = run("apply", "net.pt", plan, "--out", plan.parent, "--force")
    assert outcome.code == 2
    assert "plan.json, which replacing it would delete" in outcome.err
    assert plan.exists()


def test_a_failed_verification_names_the_layer(here, run, plan):
    tamper(plan)
    before = listing(here.parent)
    outcome = run("apply", "net.pt", plan, "--out", "again")
    assert (outcome.code, outcome.out) == (3, "")
    assert re.fullmatch(r"sepconvert: verification failed: .* mix; .*\n", outcome.err)
    assert listing(here.parent) == before


APPLICATIONS = {
    "another kernel": ("other.pt", {}),
    "no such layer": ("linear.pt", {}),
    "no such model": ("nope.pt", {}),
    "another version": ("net.pt", {"schema": "sepconvert.plan/2"}),
    "no schema": ("net.pt", {"schema": None}),
    "layers of words": ("net.pt", {"layers": "mix"}),
    "an unknown key": ("net.pt", {"surprise": 1}),
    "another weights hash": ("net.pt", {"weights_sha256": "0" * 64}),
}


@pytest.mark.parametrize(("model", "changes"), APPLICATIONS.values(), ids=APPLICATIONS)
def test_what_does_not_fit_is_refused(here, run, plan, model, changes):
    edit(plan, **changes)
    before = listing(here.parent)
    outcome = run("apply", model, plan, "--out", "again")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"sepconvert: .*\n", outcome.err)
    assert not re.search("unexpected [A-Z]", outcome.err)
    assert listing(here.parent) == before


@pytest.mark.parametrize("name", ["plan.json", "converted.safetensors"])
def test_a_missing_part_of_the_plan_is_named(here, run, plan, name):
    (plan.parent / name).unlink()
    outcome = run("apply", "net.pt", plan, "--out", "again")
    assert outcome.code == 2
    assert re.fullmatch(rf"sepconvert: .*{name}: cannot be read: No such file or directory.*\n", outcome.err)
    assert not (here / "again").exists()


# Demo ----------------------------------------------------------------------------------------------


def test_demo(here, run, monkeypatch):
    monkeypatch.setattr(commands, "_DEMO_IMAGES", 128)
    monkeypatch.setattr(commands, "_DEMO_SCORED", 400)
    monkeypatch.setattr(commands, "_DEMO_SECONDS", 3.0)
    outcome = run("demo", "--runs", "3", "--quiet")
    assert outcome.code == 0
    modes = ("approx", "auto", "exact")
    assert listing(here / "demo-sepconvert") == sorted(
        path for mode in modes for path in (mode, *(f"{mode}/{name}" for name in RESULTS))
    )
    reports = [
        json.loads((here / "demo-sepconvert" / mode / "report.json").read_text())
        for mode in ("exact", "approx", "auto")
    ]
    assert [report["mode"] for report in reports] == ["exact", "approx", "auto"]
    assert sum(layer["decision"] == "converted" for layer in reports[0]["layers"]) == 8
    assert reports[1]["delta"]["macs_ratio"] > reports[0]["delta"]["macs_ratio"] > 2
    assert reports[2]["delta"]["accuracy_drop_pp"]["value"] <= 1


# Streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "kernel"), [("latin-1", "3×3 8?8"), ("ascii", "3×3 8→8"), ("utf-8", "3×3 8→8")]
)
def test_the_encoding_of_the_terminal(here, run, monkeypatch, encoding, kernel):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    assert run("inspect", "net.pt", *SHAPE).code == 0
    # To a terminal that claims ASCII, click writes UTF-8, which it most likely reads.
    assert kernel in buffer.getvalue().decode(encoding if encoding == "latin-1" else "utf-8")


def test_a_reader_that_leaves_early_causes_no_traceback(here):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("inspect", "net.pt", *SHAPE, stdout=writer)
    os.close(writer)
    assert process.communicate()[1] == b""
    assert process.returncode == 2


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """The master and the slave of a pseudo terminal of 24 × 80."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        yield master, slave
    finally:
        os.close(master)


def read_until(master: int, text: bytes | None) -> bytes:
    """What appears on a terminal, up to `text` or its end."""
    seen = b""
    with contextlib.suppress(OSError):  # the end of a pseudo terminal is an error
        while (text is None or text not in seen) and (part := os.read(master, 4096)):
            seen += part
    return seen


def test_progress_on_a_terminal_until_ctrl_c(here):
    before = listing(here.parent)
    with terminal() as (master, slave):
        process = start("net.pt", *SHAPE, stderr=slave)
        os.close(slave)
        seen = read_until(master, b"exporting: ")
        process.send_signal(signal.SIGINT)
        rest = read_until(master, None)
        assert process.communicate()[0] == b""
    assert b"analysing kernels: " in seen
    assert process.returncode == 130
    assert rest.count(b"sepconvert: interrupted\r\n") == 1
    assert b"Traceback" not in rest
    assert listing(here.parent) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("arguments", "expected"), [([], True), (["--json"], True), (["--quiet"], False)])
def test_progress_unless_quiet(here, run, monkeypatch, arguments, expected):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("inspect", "net.pt", *SHAPE, *arguments).code == 0
    assert ("analysing kernels" in stream.getvalue()) is expected


def test_progress_in_lines_where_there_is_no_terminal(here, run, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    lines = run("inspect", "net.pt", *SHAPE).err.splitlines()
    assert lines[0].startswith("analysing kernels: 1 of ")
    assert run("inspect", "net.pt", *SHAPE, "--quiet").err == ""


def test_no_standard_streams_at_all(here, run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["sepconvert", "inspect", "net.pt", *SHAPE])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (0, None)


# Interruption and a full disk ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(here, number):
    before = listing(here.parent)
    process = start("net.pt", *SHAPE, "--out", "new/out", "--runs", "100000")
    while listing(here.parent) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1)  # well into the work
    process.send_signal(number)
    process.send_signal(signal.SIGINT)  # impatience
    out, err = process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert err.strip() == b"sepconvert: interrupted"
    assert listing(here.parent) == before


def test_fine_tuning_that_was_killed_is_resumed_to_the_same_weights(here):
    """It says how far it is on a pipe too, and leaves nothing beside the result in the end."""
    small_net.write(here)
    train = ("--finetune", "30", "--calib", "x.npz", "--calib-images", "120")
    arguments = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--runs", "0")
    before = listing(here)
    process = start(*arguments, *train, "--out", "whole")
    _, err = process.communicate()
    assert process.returncode == 0, err
    lines = [line for line in err.decode().splitlines() if line.startswith("fine-tuning: ")]
    assert [
        int(re.search(r"step (\d+) of 90, epoch \d+, loss [\d.]+, \d+ s left", line)[1]) for line in lines
    ] == [*range(9, 91, 9)]

    process = start(*arguments, *train, "--out", "resumed")
    while b"step 18 of 90" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    left = set(listing(here)) - set(before) - set(listing_of("whole"))
    assert "resumed.checkpoint" in left
    assert any(path.startswith(".sepconvert-") for path in left)
    outcome = start(*arguments, *train, "--out", "resumed", "--resume")
    _, err = outcome.communicate()
    assert outcome.returncode == 0, err
    assert b"going on from resumed.checkpoint" in err
    assert b"step 18 of 90" not in err
    weights = [(here / name / "converted.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    assert set(listing(here)) == {*before, *listing_of("whole"), *listing_of("resumed")}


def test_what_is_in_the_place_of_a_checkpoint_and_was_not_used_is_left_alone(here):
    """With nothing converted there is no fine-tuning: any file was taken for a checkpoint, and deleted."""
    small_net.write(here)
    arguments = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--runs", "0")
    (here / "mine").write_text("precious")
    (here / "mine.2").write_text("precious")
    train = (
        "--finetune",
        "1",
        "--calib",
        "x.npz",
        "--calib-images",
        "120",
        "--checkpoint",
        "mine",
        "--resume",
    )
    process = start(*arguments, *train, "--exclude", "*", "--out", "none")
    _, err = process.communicate()
    assert process.returncode == 0, err
    process = start(*arguments, *train, "--out", "some")
    _, err = process.communicate()
    assert process.returncode == 2
    assert b"mine: expected a checkpoint, got a damaged or foreign file" in err
    assert [(here / name).read_text() for name in ("mine", "mine.2")] == ["precious", "precious"]


def test_a_checkpoint_within_the_output_is_refused_before_the_training(here, run):
    small_net.write(here)
    arguments = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--calib", "x.npz")
    outcome = run(*arguments, "--finetune", "1", "--out", "o", "--checkpoint", "o/c.checkpoint")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--checkpoint o/c.checkpoint: lies in o, which is written as a whole" in outcome.err
    assert not (here / "o").exists()


def test_a_signal_while_torch_is_imported_raises_nothing(here, tmp_path):
    """An exception out of a callback of torch's would abort the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sepconvert.commands':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n"
        "            except BaseException as error:\n"
        "                os.write(2, f'raised {error!r}'.encode())\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    places = [str(tmp_path), str(Path(cli.__file__).parents[2])]
    process = start("net.pt", *SHAPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)})
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"sepconvert: interrupted\n")


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: S603
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607


@pytest.mark.parametrize(
    ("pages", "file"),
    [
        (1, "original.onnx"),
        (7, "converted.pt2"),
        (15, "(plan|report).json"),
    ],
)
def test_a_full_disk(here, tiny_disk, pages, file):
    """With so many pages of 4 KiB left, this is the file that fails."""
    (tiny_disk / "ballast").write_bytes(bytes(4096 * (16 - pages)))
    process = start("net.pt", *SHAPE, "--runs", "0", "--out", tiny_disk / "out")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, b""), err
    assert re.fullmatch(rf"sepconvert: .*{file}: cannot be written: .*\n", err.decode())
    assert listing(tiny_disk) == ["ballast"]


# Profile and compare -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batches", "2,x"), "--batches 2,x: expected whole numbers from 1, joined by commas, e.g. 1,8,32"),
        (("--batches", "0"), "--batches 0: expected whole numbers from 1, joined by commas, e.g. 1,8,32"),
        (("--provider", "npu"), "provider: expected one that the installed onnxruntime has"),
    ],
)
def test_a_profile_of_what_there_is_not(here, run, options, message):
    outcome = run("profile", "net.pt", *SHAPE, "--runs", "2", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"sepconvert: {message}")
    assert outcome.err.count("\n") == 1


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
            "accuracy_drop_pp": None,
            "agreement": None,
            "outputs": [],
        }
    ]


def test_models_and_files_are_compared_in_turns(here, run):
    assert run("net.pt", "--data", "data.npz", "--runs", "0").code == 0
    files = "net-sepconvert/original.onnx", "net-sepconvert/converted.onnx"
    outcome = run("compare", "net.pt", *files, "--data", "data.npz", "--runs", "6", "--fail-if", "drop > 0.5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "base: net.pt" in outcome.out
    assert "Measured together: 6 interleaved rounds" in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    outcome = run("compare", *files, "--runs", "0", "--json", "--fail-if", "macs < -1%")
    assert outcome.code == 3
    assert re.fullmatch(r"sepconvert: --fail-if: .*converted.onnx: macs is -\d.*\n", outcome.err)
    (delta,) = json.loads(outcome.out)["deltas"]
    assert delta["macs_ratio"] > 1
    assert delta["outputs"][0]["relative"] < 1e-4
    outcome = run("compare", *files, "--runs", "0", "--format", "csv")
    assert outcome.out.splitlines()[0] == f",{files[0]},{files[1]}"
    size = (here / files[0]).stat().st_size
    assert f"ONNX bytes,{size}," in outcome.out  # without separators of thousands
    page = run("compare", *files, "--runs", "3", "--format", "html").out
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    for expected in (*files, "Measured together: 3 interleaved rounds", "max abs Δ", "<svg"):
        assert expected in page
    page = run("compare", *files, "--runs", "0", "--format", "html").out
    assert "<svg" not in page
    assert "Measured together" in page
    assert run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.json").code == 0
    profiled = run("profile", files[1], "--data", "data.npz", "--runs", "3", "--out", "file.json", "--json")
    document = json.loads(profiled.out)
    assert document["accuracy"]["n"] == 20
    assert document["latency_ms"]["runs"] == 3
    assert document["onnx_bytes"] == (here / files[1]).stat().st_size
    assert document["model"]["sha256"] == hashlib.sha256((here / files[1]).read_bytes()).hexdigest()
    assert "Measured apart" in run("compare", "net.json", "file.json", files[0], "--runs", "0").out
    for arguments in ((*files, "--fail-if", "speed > 1"), (files[0], "gone.onnx")):
        outcome = run("compare", *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("condition", "more"),
    [
        ("drop > 1", ()),
        ("agreement < 99%", ()),
        ("latency > 5%", ("--runs", "0")),
        ("speedup < 1", ("--runs", "0")),
    ],
)
def test_conditions_on_what_will_not_be_measured_are_refused_first(here, run, condition, more):
    """Before files are read, which are none."""
    for name in ("a.onnx", "b.onnx"):
        (here / name).write_bytes(b"none")
    outcome = run("compare", "a.onnx", "b.onnx", "--fail-if", condition, *more)
    assert outcome.code == 2
    assert f"--fail-if '{condition}': {condition.split()[0]} is not measured; " in outcome.err
    assert "a.onnx" in run("compare", "a.onnx", "b.onnx", "--fail-if", "macs > 1%").err
    # No condition would fail.
    alone = run("compare", "a.onnx", "--fail-if", "macs > 1%")
    assert (alone.code, alone.out) == (2, "")
    assert "compare: expected two models or more, got one" in alone.err


def test_profiles_from_elsewhere_are_warned_of(here, run):
    assert run("profile", "net.pt", *SHAPE, "--runs", "0", "--out", "net.json").code == 0
    assert "Warning" not in run("compare", "net.json", "net.json").out
    document = json.loads((here / "net.json").read_text())
    document["environment"]["cpu"] = "an abacus"
    document["model"]["sha256"] = "0" * 64
    (here / "other.json").write_text(json.dumps(document))
    text = run("compare", "net.json", "other.json").out
    assert "Warning: other.json was measured elsewhere than net.json:" in text
    assert ", an abacus)" in text
    assert "Warning: other.json is of another file of the name net.pt" in text


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
