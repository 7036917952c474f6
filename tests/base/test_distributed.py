"""Several processes against one, as a launcher starts them."""

import json
import subprocess
import sys

import pytest
import small_net
import torch
from safetensors.torch import load_file

from sepconvert.base.distributed import gather, once, processes, rank


def test_one_process_needs_no_others():
    assert (rank(), processes()) == (0, 1)
    assert gather(3) == [3]
    assert once(lambda: 4) == 4


@pytest.mark.slow
def test_two_processes_fit_what_one_fits_and_train(tmp_path):
    small_net.write(tmp_path)
    common = [
        "-m", "sepconvert", "net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1",
        "--calib", "x.npz", "--calib-images", "120", "--runs", "0", "--quiet",
    ]  # fmt: skip
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    for command in (
        [sys.executable, *common, "--out", "one"],
        [*two, *common, "--out", "two"],
        [*two, *common, "--out", "trained", "--finetune", "1"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)  # noqa: S603
    one, both, trained = (
        load_file(tmp_path / name / "converted.safetensors") for name in ("one", "two", "trained")
    )
    assert one.keys() == both.keys() == trained.keys()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-5)
    # On noise the start may well be the best; that it was trained is in the report.
    report = json.loads((tmp_path / "trained" / "report.json").read_text())
    history = report["approximation"]["finetune"]["history"]
    assert [epoch["epoch"] for epoch in history] == [0, 1]
    assert history[1]["step"] >= 1
    assert history[1]["loss"] >= 0
