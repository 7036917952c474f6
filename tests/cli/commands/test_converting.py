"""What each command prints, writes and leaves."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import small_net
import torch
from command_line import SHAPE, WRITTEN, listing, listing_of, network, start
from safetensors.torch import load_file, save_file
from shadows import all_shadowed

from sepconvert.base.documents import sealed
from sepconvert.base.modules import unshadowed
from sepconvert.cli import inputs


def test_json_is_all_that_is_printed(converted):
    assert converted.code == 0
    # Timed on a busy machine, the original may differ from itself, and a small layer may be slower.
    assert all(line.startswith("Warning: ") for line in converted.err.splitlines())
    assert json.loads(converted.out) == json.loads((converted.folder / "report.json").read_text())


def test_the_stages_take_all_the_time_of_the_process(converted):
    stages = {stage["stage"]: stage for stage in json.loads(converted.out)["stages"]}
    assert list(stages)[:3] == ["start", "rest", "load"]
    assert {"trace", "checks", "accuracy", "timing", "verification", "export", "report"} < set(stages)
    assert all(min(stage["wall_s"], stage["cpu_s"]) >= 0 < stage["peak_bytes"] for stage in stages.values())
    assert stages["start"]["wall_s"] > 0.5  # of imports
    # The report is written, and the process ends, after the clock. The system's record of a start is coarse.
    assert 0.5 < sum(stage["wall_s"] for stage in stages.values()) / converted.seconds < 1.05


def test_permissions_honour_the_umask(converted):
    assert converted.folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in converted.folder.iterdir()} == {0o640}


def test_the_report_names_the_file_and_decides_by_the_kernels(converted, files):
    report = json.loads(converted.out)
    digest = hashlib.sha256((files / "net.pt").read_bytes()).hexdigest()
    assert report["model"] == {"path": str(files / "net.pt"), "sha256": digest}
    assert {layer["name"]: layer["decision"] for layer in report["layers"]} == {
        "stem": "kept",
        "mix": "converted",
    }
    assert report["original"]["accuracy"]["n"] == 20
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
    assert outcome.out.startswith("1 of 2 convolutions converted, ")
    assert "Written to net-sepconvert/" in outcome.out
    assert listing(here / "net-sepconvert") == WRITTEN


def test_a_summary_for_a_pull_request(here, run):
    outcome = run("net.pt", *SHAPE, "--runs", "0", "--format", "markdown")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("**1 of 2 convolutions converted, ")
    assert "| original" in outcome.out
    assert "Written to" not in outcome.out
    assert listing(here / "net-sepconvert") == WRITTEN


def test_a_pickled_model_that_shadows_names(here, run):
    torch.save(all_shadowed(), here / "shadowing.pt")
    outcome = run("shadowing.pt", "--allow", "shadows.Shadowing", *SHAPE, "--runs", "0", "--json")
    assert outcome.code == 0, outcome.err
    assert [layer["decision"] for layer in json.loads(outcome.out)["layers"]] == ["converted", "converted"]
    assert listing(here / "shadowing-sepconvert") == WRITTEN
    save_file(unshadowed(all_shadowed()).state_dict(), here / "weights.safetensors")
    outcome = run("inspect", "weights.safetensors", "--factory", "shadows:all_shadowed", *SHAPE)
    assert outcome.code == 0, outcome.err
    assert "block.conv" in outcome.out


def test_quiet_says_nothing_and_user_code_keeps_off_standard_output(here, run):
    outcome = run(
        "scaled-weights.pt", "--factory", "cli_test_code.py:build", *SHAPE, "--runs", "0", "--quiet",
        "--out", "a b/ü →/out",
    )  # fmt: skip
    assert (outcome.code, outcome.out) == (0, "")
    words, *warnings = outcome.err.splitlines()
    assert words == "the user's own words"
    assert [each[:38] for each in warnings] == ["Warning: nothing was converted. Of 1 c"]
    assert listing(here / "a b" / "ü →" / "out") == WRITTEN


def test_quiet_warns_nonetheless(here, run):
    outcome = run("net.pt", *SHAPE, "--mode", "approx", "--rank", "1", "--runs", "0", "--quiet")
    assert (outcome.code, outcome.out) == (0, "")
    first, second = outcome.err.splitlines()
    assert first.startswith("Warning: not yet to be deployed: 1 of 2 convolutions converted, ")
    assert second.startswith("Warning: without calibration images")


def test_a_model_without_convolutions_is_fine(here, run):
    outcome = run("linear.pt", *SHAPE, "--runs", "0")
    assert outcome.code == 0
    assert outcome.out.startswith("Warning: nothing was converted. The model runs no convolution")


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


def test_force_keeps_what_is_no_result(here, run):
    (here / "net-sepconvert").mkdir()
    (here / "net-sepconvert" / "thesis.txt").write_text("mine")
    before = listing(here)
    outcome = run("net.pt", *SHAPE, "--runs", "0", "--force")
    assert outcome.code == 2
    assert "net-sepconvert: holds thesis.txt, which is no result of a conversion" in outcome.err
    assert listing(here) == before


@pytest.mark.slow
def test_names_that_are_not_text(here, run):
    name = os.fsdecode(b"caf\xe9.pt")
    (here / "net.pt").rename(here / name)
    outcome = run(name, *SHAPE, "--runs", "0")
    assert (outcome.code, outcome.err) == (0, "")
    assert r"caf\udce9.pt" in (here / os.fsdecode(b"caf\xe9-sepconvert") / "report.html").read_text()


@pytest.mark.slow
def test_of_two_runs_to_one_place_the_first_stays(here):
    """Neither found anything there when it began."""
    arguments = ("net.pt", *SHAPE, "--runs", "0", "--out", "new", "--quiet")
    both = [start(*arguments, cwd=here) for _ in range(2)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2]
    assert [err for err, code in ends if code] == [
        "sepconvert: new: exists already; pass --force to replace it, or another --out\n"
    ]
    assert listing(here / "new") == WRITTEN


@pytest.mark.slow
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


def test_inspect_json(here, run):
    before = listing(here)
    outcome = run("inspect", "net.pt", *SHAPE, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    layers = {layer["name"]: layer for layer in json.loads(outcome.out)["layers"]}
    assert list(layers) == ["stem", "mix"]
    errors = {s["scheme"]: s["best_relative_error"] for s in layers["mix"]["structures"]}
    assert errors["spatial-vh"] < 1e-6 < errors["zero-border"]
    assert all(s["best_relative_error"] > 1e-3 for s in layers["stem"]["structures"])
    assert listing(here) == before


def test_inspect_table(here, run):
    before = listing(here)
    outcome = run("inspect", "net.pt", *SHAPE)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("1 of 2 convolutions separates exactly")
    assert "2 of 24" in outcome.out
    assert "2/24 holds" in run("inspect", "net.pt", *SHAPE, "--all").out
    assert run("inspect", "net.pt", *SHAPE, "--brief").out.count("\n") == 1
    assert listing(here) == before


def test_a_dry_run_of_auto_says_what_would_be_tried(here, run):
    before = listing(here)
    words = ("net.pt", *SHAPE, "--mode", "auto", "--min-speedup", "2", "--dry-run")
    outcome = run(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "of 2 convolutions would be tried, in about" in " ".join(outcome.out.split())
    assert outcome.out.endswith("Dry run: nothing was written.\n")
    found = json.loads(run(*words, "--json").out)
    assert found["images"] == {"fitted": 0, "held out": 0, "scored": 0}
    assert 0 < found["seconds"][0] < found["seconds"][1]
    assert listing(here) == before


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
        r"sepconvert: twin\.pt: is not the model that the plan was made from \(SHA-256 .*\n", outcome.err
    )
    assert not (here / "again").exists()


def test_where_a_plan_names_no_file_nothing_is_compared(here, run, plan):
    edit(plan, model_sha256=None)
    outcome = run("apply", "net.pt", plan, "--out", "again", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == {"out": "again", "converted": 1, "verification": None}


@pytest.mark.slow
def test_a_factory_gives_the_weights_of_a_model_without_a_file(here, run):
    """Inspected, converted, applied, profiled and compared, by a name that the documents repeat."""
    loading = ("--factory", "cli_test_code.py:trained")
    note = "sepconvert: yolov8: there is no such file; the weights are those that --factory gives\n"
    for command in ((), ("inspect",), ("profile",)):
        runs = ("--runs", "0") if command != ("inspect",) else ()
        outcome = run(*command, "yolov8", *SHAPE, *loading, "--json", *runs)
        assert (outcome.code, outcome.err) == (0, note)
        if command != ("inspect",):
            model = json.loads(outcome.out)["model"]
            assert model["path"] == "yolov8"
    plan = here / "yolov8-sepconvert" / "plan.json"
    assert json.loads(plan.read_text())["model_sha256"] == model["sha256"]
    outcome = run("apply", "yolov8", plan, *loading, "--out", "again")
    assert (outcome.code, outcome.err) == (0, note)
    assert "Verified: " in outcome.out
    outcome = run("apply", "yolov8", plan, "--factory", "cli_test_code.py:another", "--out", "other")
    assert outcome.code == 2
    assert "yolov8: is not the model that the plan was made from (SHA-256 " in outcome.err
    outcome = run("compare", "yolov8", plan.parent / "converted.onnx", *loading, "--runs", "0")
    assert (outcome.code, outcome.err) == (0, note)


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


@pytest.mark.slow
def test_fine_tuning_that_was_killed_is_resumed_to_the_same_weights(here):
    """It says how far it is in the log, and leaves nothing beside the result in the end."""
    small_net.write(here)
    train = ("--finetune", "30", "--calib", "x.npz", "--calib-images", "120")
    arguments = (
        "net.pth",
        "--factory",
        "net.py:make",
        "--mode",
        "approx",
        "--rank",
        "1",
        "--runs",
        "0",
        "-v",
    )
    before = listing(here)
    process = start(*arguments, *train, "--out", "whole")
    _, err = process.communicate()
    assert process.returncode == 0, err
    steps = re.findall(r" fine-tuning: step (\d+) of 90, epoch \d+, loss [\d.]+, .* left\n", err.decode())
    assert [*map(int, steps)] == [*range(9, 91, 9)]

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
    assert b"continuing from resumed.checkpoint" in err
    assert b"step 18 of 90" not in err
    weights = [(here / name / "converted.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    assert set(listing(here)) == {*before, *listing_of("whole"), *listing_of("resumed")}


@pytest.mark.slow
def test_what_is_in_the_place_of_a_checkpoint_and_was_not_used_is_left_alone(here, run):
    """With nothing converted there is no fine-tuning: any file was taken for a checkpoint, and deleted."""
    small_net.write(here)
    arguments = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--runs", "0")
    train = ("--finetune", "1", "--calib", "x.npz", "--calib-images", "120")
    (here / "mine").write_text("precious")
    (here / "mine.2").write_text("precious")
    resumed = (*train, "--checkpoint", "mine", "--resume")
    outcome = run(*arguments, *resumed, "--exclude", "*", "--out", "none")
    assert outcome.code == 0, outcome.err
    outcome = run(*arguments, *resumed, "--out", "some")
    assert outcome.code == 2
    assert "mine: expected a checkpoint, got a damaged or foreign file" in outcome.err
    assert [(here / name).read_text() for name in ("mine", "mine.2")] == ["precious", "precious"]


def test_a_checkpoint_within_the_output_is_refused_before_the_training(here, run):
    small_net.write(here)
    arguments = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--calib", "x.npz")
    outcome = run(*arguments, "--finetune", "1", "--out", "o", "--checkpoint", "o/c.checkpoint")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--checkpoint o/c.checkpoint: lies in o, which is written as a whole" in outcome.err
    assert not (here / "o").exists()


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: S603
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "file"),
    [
        (1, "original.onnx"),
        (7, "converted.pt2"),
        (15, "(plan|report).json"),
    ],
)
def test_a_full_disk(here, run, tiny_disk, pages, file):
    """With so many pages of 4 KiB left, this is the file that fails."""
    (tiny_disk / "ballast").write_bytes(bytes(4096 * (16 - pages)))
    outcome = run("net.pt", *SHAPE, "--runs", "0", "--out", tiny_disk / "out")
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert re.fullmatch(rf"sepconvert: .*{file}: cannot be written: .*\n", outcome.err)
    assert listing(tiny_disk) == ["ballast"]
