"""The published schemas are those of the code, and files of real commands conform to them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import DOCS
from schemas import assert_conforms

from sepconvert.cli.main import cli
from sepconvert.report.schema.published import DOCUMENTS

NETS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    blur = nn.Conv2d(8, 8, 5, padding=2)
    blur.weight.data = torch.einsum("oc,i,j->ocij", torch.randn(8, 8), torch.randn(5), torch.randn(5)) / 30
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), blur, nn.ReLU(),
        nn.Conv2d(8, 32, 1), nn.Conv2d(32, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""
LOADING = ("net.pth", "--factory", "nets.py:make")
DATA = ("--data", "data.npz")
COMMANDS = {
    "exact": (*LOADING, *DATA, "--runs", "3"),
    "auto": (*LOADING, *DATA, "--mode", "auto", "--calib", "calib.npz", "--calib-images", "64",
             "--gate", "macs", "--target-macs", "0.7", "--finetune", "1", "--runs", "3"),
    "untimed": (*LOADING, "--input-shape", "3x8x8", "--mode", "auto", "--target-macs", "1.0",
                "--measure-seconds", "0", "--runs", "0"),
}  # fmt: skip


PROFILES = {
    "profile.json": ("exact/converted.onnx", "--batches", "1,2", "--runs", "3"),
    "plain.json": (*LOADING, *DATA, "--runs", "0"),
}


HISTORY = "history.json"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[str], dict]:
    """Reads a file of a real command, which runs when the first of its files is read."""
    folder = tmp_path_factory.mktemp("schemas")
    (folder / "nets.py").write_text(NETS)
    namespace: dict = {}
    exec(NETS, namespace)  # noqa: S102
    torch.save(namespace["make"]().state_dict(), folder / "net.pth")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((96, 3, 8, 8)).astype(np.float32), random.integers(0, 10, 96)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(
        folder / "calib.npz", x=np.concatenate([x[:1], x[1:] + 1]), y=y
    )  # an image of the data, and others

    def result(file: str) -> dict:
        if not (folder / file).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                if file == HISTORY:
                    result("exact/report.json")
                    command("compare", "exact/original.onnx", "exact/converted.onnx", *DATA, "--runs", "3",
                            "--baseline", file, "--update-baseline")  # fmt: skip
                elif file in PROFILES:
                    if "exact/converted.onnx" in PROFILES[file]:
                        result("exact/report.json")
                    command("profile", *PROFILES[file], "--out", file)
                else:
                    name = file.partition("/")[0]
                    command(*COMMANDS[name], "--out", name)
        return read(folder / file)

    return result


def command(*words: str) -> None:
    cli.main([*words, "--threads", "1", "--quiet"], prog_name="sepconvert", standalone_mode=False)


FILES = {
    **{f"{name}/report.json": "report" for name in COMMANDS},
    **{f"{name}/plan.json": "plan" for name in COMMANDS},
    **dict.fromkeys(PROFILES, "profile"),
    HISTORY: "baseline",
}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_published_schemas_are_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sepconvert.report.schema", str(tmp_path)])
    runpy.run_module("sepconvert.report.schema", run_name="__main__")
    published = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "schemas").iterdir()}
    assert published == {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        pytest.param(file, kind, id=file, marks=() if file.startswith("exact/") else pytest.mark.slow)
        for file, kind in FILES.items()
    ],
)
def test_files_of_commands_conform(results, file, kind):
    document = results(file)
    assert_conforms(document, DOCUMENTS[kind], read(DOCS / f"schemas/{kind}.schema.json"))


@pytest.mark.slow
def test_the_commands_show_most_of_what_there_is(results):
    exact, auto, untimed = (results(f"{name}/report.json") for name in COMMANDS)
    assert {layer["reason_code"] for layer in exact["layers"]} > {"separates"}
    assert exact["delta"]["latency_speedup"]
    assert exact["execution"]
    assert any(layer["execution"] for layer in exact["layers"])
    assert auto["approximation"]["finetune"]["history"]
    kinds = {step["kind"] for step in auto["approximation"]["steps"]}
    assert kinds == {"weights", "data", "batchnorm", "finetune"}
    assert [merge["decision"] for merge in auto["approximation"]["merges"]] == ["merged"]
    assert {layer["reason_code"] for layer in auto["layers"]} >= {"merged", "fitted"}
    assert "by the model of times" in untimed["approximation"]["merges"][0]["reason"]
    modelled = [layer["name"] for layer in untimed["layers"] if "by the model of times" in layer["reason"]]
    assert modelled or untimed["approximation"]["modelled"]
    assert untimed["approximation"]["calibration"] is None
    assert "anatomy" in results("profile.json")
    assert "anatomy" not in results("plain.json")
