"""Runs that are killed and resumed, and files that are no checkpoints of theirs."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from distillation_worker import assert_same, disturbed, loader, network, run_worker, tuned, untimed
from safetensors import safe_open
from safetensors.torch import save_file

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.training import finetune


def stored(checkpoint):
    """The JSON and the tensors of a checkpoint."""
    with safe_open(checkpoint, "pt") as file:
        document = json.loads(file.metadata()["sepconvert.checkpoint"])
        return document, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    checkpoint = tmp_path / "deep" / "checkpoint"
    for step, kept in ((11, 8), (39, 36)):  # in the middle of epochs
        killed = run_worker(tmp_path / "result", checkpoint, step)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert stored(checkpoint)[0]["state"]["step"] == kept
    steps = []
    resumed = tuned(checkpoint=checkpoint, resume=True, progress=steps.append)
    assert steps[0].step == 37
    uninterrupted = tuned(checkpoint=tmp_path / "whole")
    assert_same(resumed.model, uninterrupted.model)
    (_, a), (_, b) = (stored(path) for path in (checkpoint, tmp_path / "whole"))
    assert_same(a, b)
    assert {name.partition(".")[0] for name in a} == {"student", "average", "best", "optimizer"}
    assert not torch.equal(a["student.0.weight"], a["average.module.0.weight"])
    assert untimed(resumed.history) == untimed(uninterrupted.history)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    # Of the finished run nothing is left to do.
    again = tuned(checkpoint=checkpoint, resume=True, progress=steps.clear)
    assert_same(again.model, uninterrupted.model)
    assert steps


def test_answers_of_several_views_are_recalled(tmp_path):
    uninterrupted = tuned(epochs=4)
    for interrupted in (20, 50):  # while the second view is new, and when the first is met again

        def interrupt(step, at=interrupted):
            if step.step == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tuned(epochs=4, checkpoint=tmp_path / "checkpoint", resume=True, progress=interrupt)
    resumed = tuned(epochs=4, checkpoint=tmp_path / "checkpoint", resume=True)
    assert_same(resumed.model, uninterrupted.model)
    assert untimed(resumed.history) == untimed(uninterrupted.history)


def test_an_unfinished_checkpoint_does_no_harm(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    unfinished = tmp_path / "checkpoint.0.unfinished"  # of a run that was killed
    unfinished.write_bytes(b"half")
    assert_same(tuned(checkpoint=checkpoint, resume=True).model, tuned().model)
    assert {*tmp_path.iterdir()} == {checkpoint, unfinished}


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tuned(checkpoint=checkpoint, epochs=1)
    before = checkpoint.read_bytes()
    script = (
        "import resource, signal, sys, torch; from pathlib import Path;"
        "from sepconvert.distillation.checkpoint import State, write_checkpoint;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "state = State({}, 0, 0.0, 0.0, (), None);"
        "write_checkpoint(Path(sys.argv[1]), state, {'weights': torch.zeros(10000)})"
    )
    command = [sys.executable, "-c", script, checkpoint]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert "expected a place to write to" in found.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert checkpoint.read_bytes() == before


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tuned(checkpoint=checkpoint)
    with pytest.raises(SepconvertError, match="expected no file, got the checkpoint of an earlier run"):
        tuned(checkpoint=checkpoint)
    with pytest.raises(SepconvertError, match=r"with other options .*seed=0.*not .*seed=1"):
        tuned(checkpoint=checkpoint, resume=True, seed=1)
    options = {"epochs": 3, "labelled": True, "learning_rate": 1e-2, "checkpoint": checkpoint, "resume": True}
    teacher, student, heldout = network(), disturbed(network()), loader(21, seed=1)
    for part, models, data in (
        ("student", (disturbed(teacher, seed=9), teacher), (loader(), heldout)),
        ("teacher", (student, student), (loader(), heldout)),
        ("training data", (student, teacher), (loader(seed=5), heldout)),
        ("held-out data", (student, teacher), (loader(), loader(20, seed=1))),
    ):
        with pytest.raises(SepconvertError, match=f"got one with other {part} "):
            finetune(*models, *data, **options)


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_damaged_checkpoint_is_named(tmp_path, cut):
    checkpoint = tmp_path / "checkpoint"
    tuned(checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:cut])
    with pytest.raises(SepconvertError, match="damaged or foreign file"):
        tuned(checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("place", ["tensor", "metadata"])
def test_a_bit_that_flipped_in_a_checkpoint_is_found(tmp_path, place):
    checkpoint = tmp_path / "checkpoint"
    tuned(checkpoint=checkpoint)
    content = bytearray(checkpoint.read_bytes())
    content[-5 if place == "tensor" else content.index(b"learning_rate=0.01") + 17] ^= 1
    checkpoint.write_bytes(content)
    stored(checkpoint)  # safetensors sees nothing amiss
    with pytest.raises(SepconvertError, match=r"damaged or foreign file .*checksum"):
        tuned(checkpoint=checkpoint, resume=True)


def test_a_pickle_is_a_foreign_file_that_is_not_loaded(tmp_path):
    class Runs:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"format": 1, "then": Runs()}, tmp_path / "checkpoint")
    with pytest.raises(SepconvertError, match="damaged or foreign file"):
        tuned(checkpoint=tmp_path / "checkpoint", resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_format_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tuned(checkpoint=checkpoint, epochs=1)
    document, tensors = stored(checkpoint)
    save_file(tensors, checkpoint, {"sepconvert.checkpoint": json.dumps(document | {"format": 3})})
    with pytest.raises(SepconvertError, match="expected a checkpoint of format 2, got 3"):
        tuned(checkpoint=checkpoint, epochs=1, resume=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SepconvertError, match="expected a place to write to"):
        tuned(checkpoint=tmp_path / "file" / "checkpoint")
