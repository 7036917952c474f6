"""What is told before torch is imported, and that it is not imported for that."""

import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_line import COMMANDS, Outcome, listing

from sepconvert.cli import preflight

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "scipy", "safetensors", "PIL", "jinja2", "matplotlib")

TUNED = "net.pt --mode approx --rank 1 --finetune 1"

# Command lines, and what is said of each.
MISTAKES = {
    # Models
    "absent.pt": "absent.pt: there is no such file; expected a model saved by torch.save, a .safetensors",
    "inspect absent.pt": "absent.pt: there is no such file; expected a model",
    "profile absent.pt": "absent.pt: there is no such file; expected a model",
    "apply absent.pt plan.json": "absent.pt: there is no such file; expected a model",
    "compare net.pt absent.pt": "absent.pt: there is no such file; expected a model",
    "absent.onnx": "absent.onnx: there is no such file; expected a model",
    "nets.py:build": "nets.py:build: is code, no model; pass --factory nets.py:build to build the model",
    "absent.pyth": "absent.pyth: there is no such file; expected a model",
    "nets.py": "nets.py: is code, no model; pass --factory nets.py:FUNCTION to build the model by it",
    "profile absent.onnx": "absent.onnx: cannot be read: No such file or directory; check the path",
    "compare net.pt absent.json": "absent.json: cannot be read: No such file or directory; check the path",
    "apply net.pt absent/plan.json": "absent/plan.json: cannot be read: No such file or directory; check",
    "text.pt": "text.pt: is a text file that begins 'not a model",
    "truncated.pt": "truncated.pt: a truncated or damaged archive",
    "timm:": "timm:: names no model; expected a name such as timm:resnet50",
    "inspect 'timm:res net'": "timm:res net: names 'res net'; expected a name such as timm:resnet50",
    "profile torchvision:segmentation/fcn": "torchvision:segmentation/fcn: names 'segmentation/fcn'; expect",
    "compare net.pt 'timm:a?weights'": "timm:a?weights: expected KEY=VALUE after the ?, and between &, got",
    "apply hf-hub:net plan.json": "hf-hub:net: names 'net'; expected a name such as hf-hub:timm/resnet18.a1",
    "tmm:resnet50": "tmm:resnet50: there is no such file; expected a model saved by torch.save",
    "timm:resnet50 --factory code.py:make": "timm:resnet50: is built by timm, and --factory builds a model",
    "timm:resnet50 --trust": "--trust: only for files, and a library builds this model; leave --trust out",
    "compare net.pt": "compare: expected two models or more, got one; profile measures one, and --baseline",
    "compare --baseline plan.json": "Missing argument 'MODELS...'",
    # Options that do not go together, or not with the model
    "net.pt --mode exakt": "Invalid value for '--mode': 'exakt' is not one of",
    "net.pt --max-drop 1": "--mode: budgets, calibration and fine-tuning are for the modes approx and auto",
    "net.pt --dry-run --max-drop 1": "--mode: budgets, calibration and fine-tuning are for the modes",
    "net.pt --mode auto": "--mode: approx and auto need a budget; pass --rank, --target-macs",
    "net.pt --mode auto --max-drop 1": "--max-drop: needs labelled data to measure the drop on; pass --data",
    "net.pt --mode approx --min-speedup 2 --runs 0": "--min-speedup: needs timed runs; pass --runs above 0",
    "net.pt --mode approx --rank 1 --target-macs 0.5": "--rank and --target-macs: each fixes the plan by",
    "net.pt --mode auto --rank 1": "--rank: fixes the multiplier of approx mode; pass another budget",
    "net.pt --mode approx --rank 1 --train data.npz": "--train: only for fine-tuning; pass --finetune too",
    "net.pt --int8-calibration entropy": "--int8-calibration: only for int8; pass --int8 too, or leave it",
    "net.pt --loss code.py:loss": "--loss: only for fine-tuning; pass --finetune too, or leave it out",
    "profile net.pt --provider-option a=1": "--provider-option: the provider cpu has none, got {'a': '1'}",
    "demo --threads 2000": "--threads: expected a whole number from 1 to 1,024, got 2000",
    "inspect net.pt --tol 2": "--tol: expected a relative error in [0, 1), got 2.0",
    "net.pt --input-shape 3xx8": "--input-shape '3xx8': expected sizes joined by x, such as 3x224x224",
    "net.pt --mean 0.5": "--mean: only for uint8 images; pass --data, --calib or --train too",
    "net.pt --targets masks": "--targets: are those of the images of --data; pass that folder too, or leave",
    "inspect net.pt --layout nhwc": "--layout nhwc: is for ONNX files, and layers of torch take images as",
    "net.onnx --opset 20": "--opset: an ONNX file keeps the names and the opset that it has; leave it out",
    "net.pt --opset 17": "--opset: expected a whole number from 18, got 17",
    "net.pt --input-names a,,b": "--input-names: a name is empty, or begins or ends with a space; got",
    "apply net.pt plan.json --input-names a,a": "--input-names, --output-names: a is given twice; name each",
    "inspect net.onnx --device cuda": "--device cuda: ONNX files are run on the CPU here; leave it",
    "compare net.pt net.pt --fail-if 'speed > 1'": "--fail-if 'speed > 1': expected one of latency, speedup",
    # Data and code
    "net.pt --data absent.npz": "--data absent.npz: there is no such file or folder; expected an .npz",
    "net.pt --mode approx --rank 1 --calib absent": "--calib absent: there is no such file or folder;",
    f"{TUNED} --train absent": "--train absent: there is no such file or folder; expected an .npz file",
    "net.pt --data . --targets absent": "--targets absent: there is no such folder; pass the one that holds",
    "net.pt --data absent.py:make": "--data absent.py:make: there is no file absent.py",
    "net.pt --factory absent.py:make": "--factory absent.py:make: there is no file absent.py",
    "net.pt --factory-args {}": "--factory-args: are what --factory is called with; pass --factory too",
    "net.pt --factory code.py:make --factory-args {": "Invalid value for '--factory-args': expected JSON, e",
    "net.pt --factory code.py:make --factory-args [1]": "Invalid value for '--factory-args': expected a JSON",
    "profile net.pt --data data.npz --metric absent.py:f": "--metric absent.py:f: there is no file absent.py",
    "profile net.pt --postprocess softmax": "--postprocess softmax: expected pkg.mod:callable or file.py:",
    # Places to write to
    "net.pt --out full": "full: exists already; pass --force to replace it, or another --out",
    "apply net.pt plan.json --out full": "full: exists already; pass --force to replace it, or another --out",
    "demo --out full": "full: exists already; pass --force to replace it, or another --out",
    "net.pt --out full --force": "full: holds notes.txt, which is no result of a conversion and which",
    "net.pt --data full/report.json --out full --force": "full: holds full/report.json, which replacing it",
    "net.pt --out text.pt/a": "text.pt/a: cannot be written: Not a directory; pass another --out",
    f"{TUNED} --out new --checkpoint new/c": "--checkpoint new/c: lies in new, which is written as a whole",
    f"{TUNED} --checkpoint text.pt": "text.pt: an interrupted run left it; pass --resume to continue, or",
    "profile net.pt --trace absent/x.json": "absent/x.json: cannot be written: there is no absent; pass",
    "profile net.pt --trace net.pt": "net.pt: exists and is no trace; pass another --trace",
    "compare net.pt net.pt --trace .": ".: cannot be read: it is no regular file; check the path",
    "compare net.pt plan.json --trace x.json": "--trace: is of models that are run now, got a stored",
    "compare net.pt plan.json --baseline plan.json": "--baseline: is of models that are run now, got",
    "compare net.pt --update-baseline": "compare: expected two models or more, got one; profile measures one",
    "compare net.pt net.pt --update-baseline": "--update-baseline: adds this run to a history; pass",
    "compare net.pt --baseline absent.json": "--baseline absent.json: there is no such file; pass --update-",
    "compare net.pt --baseline full": "full: cannot be read: it is no regular file; check the path",
    "compare net.pt --baseline absent/h.json --update-baseline": "absent/h.json: cannot be written: there",
    "profile net.pt --out absent/x.json": "absent/x.json: cannot be written: there is no absent; pass",
}


@pytest.fixture
def place(here):
    """The working directory, with a folder that a conversion must not replace."""
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    (here / "full" / "report.json").touch()
    (here / "plan.json").touch()
    (here / "trace.json").write_text('{"displayTimeUnit": "ms", "traceEvents": []}')
    (here / "code.py").write_text("1 / 0")
    (here / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\xff")
    return here


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_told_before_the_commands_are_imported(place, run, monkeypatch, line, message):
    monkeypatch.setattr("sepconvert.cli.main._commands", None)
    before = listing(place.parent)
    outcome = run(*shlex.split(line))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith(f"sepconvert: {message}")
    assert listing(place.parent) == before


@pytest.mark.usefixtures("place")
def test_no_heavy_library_is_imported_for_any_mistake():
    """All are made in one process, one after the other: what is imported once stays so."""
    program = (
        "import contextlib, sys\n"
        "from sepconvert.cli import main\n"
        f"for arguments in {[shlex.split(line) for line in MISTAKES]!r}:\n"
        "    sys.argv = ['sepconvert', *arguments]\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main.main()\n"
        f"    if found := {{*{HEAVY!r}}} & {{*sys.modules}}:\n"
        "        sys.exit(f'{arguments}: {found}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr.count("\n")) == (0, len(MISTAKES)), done.stderr


def test_the_environment_is_told_without_torch():
    program = (
        "import sys\n"
        "from sepconvert.cli.main import cli\n"
        "cli.main(['env'], standalone_mode=False)\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_right_passes_and_leaves_nothing(place, run, monkeypatch):
    called = []
    commands = SimpleNamespace(**{name: lambda name=name, **_: called.append(name) for name in COMMANDS})
    monkeypatch.setattr("sepconvert.cli.main._commands", lambda module: commands)
    before = listing(place.parent)
    for line in (
        "net.pt --data data.npz --mode auto --max-drop 1 --metric code.py:f --out new/out",
        "inspect net.onnx --layout nhwc",
        "profile net.pt --out plan.json",
        "compare net.pt net.onnx plan.json --data code:loader --device cuda --layout nhwc",
        "compare net.pt --baseline plan.json --trace new.json",
        "compare net.pt --baseline new.json --update-baseline --trace trace.json",
        "apply yolov8 plan.json --factory code.py:build",
        "demo --runs 0",
    ):
        assert run(*shlex.split(line)) == Outcome(0, "", "")
    assert list(dict.fromkeys(called)) == COMMANDS[:-1]
    assert listing(place.parent) == before


def test_a_dry_run_needs_no_place(place, run, monkeypatch):
    monkeypatch.setattr("sepconvert.cli.main._commands", lambda module: SimpleNamespace(convert=dict))
    assert run("net.pt", "--out", "full", "--dry-run").code == 0
    assert run("net.pt", "--out", "full").code == 2


def test_of_several_processes_one_needs_the_place(place, run, monkeypatch):
    monkeypatch.setattr("sepconvert.cli.main._commands", lambda module: SimpleNamespace(convert=dict))
    monkeypatch.setenv("RANK", "1")
    assert run("net.pt", "--out", "full").code == 0
    monkeypatch.setenv("RANK", "0")
    assert run("net.pt", "--out", "full").code == 2


def test_a_place_for_a_profile_that_may_not_be_written(place, run, monkeypatch):
    """Denied by a stand-in: root may write anywhere."""
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: mode != os.W_OK)
    outcome = run("profile", "net.pt", "--out", "x.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "sepconvert: x.json: cannot be written: Permission denied; pass another --out\n"
