"""Settings of a conversion as one value: what is refused, and what is filled in."""

from pathlib import Path

import pytest
import torch
from torch import nn

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import (
    Budget,
    Calibration,
    Finetuning,
    Selection,
    Task,
    Timing,
)
from sepconvert.pipeline.job import Job


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "tucker"}, "`mode`: expected one of exact, approx, auto, got 'tucker'"),
        ({"gate": "flops"}, "`gate`: expected one of macs, latency, none, got 'flops'"),
        ({"tol": 1.0}, "`tol`: expected a relative error in [0, 1), got 1.0"),
        ({"seed": 0.5}, "`seed`: expected a whole number from 0"),
        ({"check": "jax"}, "`check`: expected onnx or torch, got 'jax'"),
        ({"check": "torch", "out": Path("out")}, "`check`: torch exports no files"),
        ({"budget": Budget(rank=1)}, "`mode`: budgets, calibration and fine-tuning are for the modes"),
        ({"finetuning": Finetuning(1)}, "`mode`: budgets, calibration and fine-tuning are for the modes"),
        ({"mode": "auto", "budget": Budget(rank=1)}, "`rank`: fixes the multiplier of approx mode"),
        (
            {"selection": "conv*"},
            "`selection`: expected a sepconvert.Selection, got 'conv*'; pass",
        ),
        (
            {"mode": "approx", "task": Task(loss=len)},
            "`loss`: only for fine-tuning; pass `finetune` too",
        ),
        ({"timing": 50}, "`timing`: expected a sepconvert.Timing, got 50"),
        ({"calibration": 64}, "`calibration`: expected a sepconvert.Calibration, got 64"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings, message):
    with pytest.raises(SepconvertError) as caught:
        Job(**settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("mode", "gate"), [("exact", "macs"), ("approx", "macs"), ("auto", "latency")])
def test_the_gate_is_that_of_the_mode_unless_it_is_given(mode, gate):
    assert Job(mode=mode).gate == gate
    assert Job(mode=mode, gate="none").gate == "none"


def test_files_alone_are_timed():
    assert Job(timing=Timing(runs=7)).runs == 7
    assert Job(timing=Timing(runs=7), check="torch").runs == 0


def test_a_budget_is_filled_in_where_the_mode_needs_one():
    assert Job().with_default_budget(unit="pp").budget == Budget()
    job = Job(mode="approx", timing=Timing(runs=0))
    assert job.with_default_budget(unit="pp").budget == Budget(max_drop=1.0)
    with pytest.raises(SepconvertError, match="need a budget"):
        job.with_default_budget(unit=None)


def test_a_demanded_speed_needs_times_of_files_or_of_layers():
    fast = {"budget": Budget(min_speedup=1.5), "timing": Timing(runs=0)}
    with pytest.raises(SepconvertError, match="`min_speedup`: needs timed runs"):
        Job(mode="approx", **fast).with_default_budget(unit=None)
    assert Job(mode="auto", **fast).with_default_budget(unit=None).budget == fast["budget"]


def test_arguments_of_convert_become_a_job():
    training = Finetuning(3, precision="no")
    for given, expected in ((2, Finetuning(2)), (training, training)):
        job = Job.of(
            metric=None, finetune=given, out="results", mode="approx", calibration=Calibration(images=9)
        )
        assert (job.finetuning, job.out, job.calibration.images) == (expected, Path("results"), 9)
    assert Job.of(metric=None, finetune=0, out=None, selection=Selection(include=["a"])).out is None


# Arguments of another type


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 5}, r"`data`: expected batches \(x, y\), got 5"),
        ({"progress": None}, "`progress`: expected True, False or a function, got None"),
        ({"finetune": -1, "mode": "approx"}, "`finetune`: expected a whole number from 0, got -1"),
        ({"finetune": True, "mode": "approx"}, "`finetune`: expected a whole number from 0, got True"),
        ({"dynamic_batch": "x"}, "`dynamic_batch`: expected True or False, got 'x'"),
        ({"seed": True}, "`seed`: expected a whole number from 0 .*, got True"),
        ({"mode": "auto", "min_speedup": 0}, "`min_speedup`: expected a number above 0, got 0"),
        ({"metric": "psnr"}, "`metric`: says how `data` are scored, and there are none; pass `data`"),
        ({"metric": Task(divergence="kl")}, "`divergence`: is what plans are ranked by .* leave it out"),
        ({"metric": "psnrr", "data": []}, "`metric` psnrr: expected one of top1, "),
        ({"mode": "auto", "max_drop": 1, "confidence": 1.5}, "`confidence`: expected a number from 0.5 to"),
        (
            {"mode": "auto", "rank": None, "target_macs": 0.5, "confidence": 0.9},
            "`confidence`: .* pass `max_drop`",
        ),
        (
            {"mode": "auto", "max_drop": 1, "confidence": 0.9, "finetune": 2},
            "`confidence`: .* leave `finetune`",
        ),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(options, message):
    with pytest.raises(SepconvertError, match=message):
        sepconvert.convert(nn.Conv2d(1, 1, 3), torch.rand(1, 1, 8, 8), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: sepconvert.apply(m, None),
            "`plan`: expected result.plan, or the content or the path of a plan.json",
        ),
        (lambda m, x: sepconvert.convert(m, x, out=3), "`out`: expected a path, got 3"),
        (lambda m, x: sepconvert.profile(m, x, data=3), r"`data`: expected batches \(x, y\), got 3"),
        (lambda m, x: sepconvert.compare(1), "compare: expected profiles, got 1"),
        (lambda m, x: sepconvert.compare(), "compare: expected profiles, got none"),
        (
            lambda m, x: sepconvert.profile(m, x, timing=None),
            "`timing`: expected a sepconvert.Timing, got None",
        ),
        (
            lambda m, x: sepconvert.profile(m, x, batches=[0]),
            "`batches`: expected a whole number from 1, got 0",
        ),
        (lambda m, x: sepconvert.Finetuning(1, resume="no"), "`resume`: expected True or False, got 'no'"),
        (lambda m, x: sepconvert.Finetuning(1, on_step=5), "`on_step`: expected a function, got 5"),
    ],
)
def test_so_do_the_other_public_functions(call, message):
    with pytest.raises(SepconvertError, match=message):
        call(nn.Conv2d(1, 1, 3), torch.rand(1, 1, 8, 8))
