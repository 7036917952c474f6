"""Scores on held-out data, against sums over all samples at once."""

import math

import pytest
import torch
from accelerate import Accelerator
from distillation_worker import disturbed, loader, network
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.judge import Judge
from sepconvert.distillation.losses import TaskLoss
from sepconvert.distillation.samples import Samples
from sepconvert.distillation.settings import Settings
from sepconvert.measure.divergence import Kind, Yardstick
from sepconvert.measure.metrics.evaluation import Scoring
from sepconvert.network.tensors import InputBatch

KL = Yardstick((Kind("kl"),))


def judge(heldout, *, labelled=True, temperature=4.0, yardstick=KL, task_loss=None):
    settings = Settings(1, labelled, 1e-2, temperature, 0.0, seed=0)
    accelerator = Accelerator(cpu=True)
    samples = Samples.of(heldout, lambda x: InputBatch((x,)), "held-out data", 1)
    return Judge(network(), samples, accelerator, settings, torch.float32, yardstick, task_loss)


@torch.no_grad()
def logits(model, heldout):
    return model(heldout.dataset.tensors[0]), heldout.dataset.tensors[1]


def kullback_leibler(expected, actual, temperature=1.0):
    a, b = (each.div(temperature).log_softmax(1) for each in (expected, actual))
    return float(F.kl_div(b, a, reduction="batchmean", log_target=True)) * temperature**2


def test_means_over_all_samples_though_the_last_batch_is_smaller():
    heldout = loader(21, seed=1)
    candidates = [disturbed(network(), seed=seed) for seed in (1, 2)]
    (expected, labels) = logits(network(), heldout)
    scores = judge(heldout).scores(candidates)
    for score, model in zip(scores, candidates, strict=True):
        actual, _ = logits(model, heldout)
        assert score.divergence == pytest.approx(kullback_leibler(expected, actual), rel=1e-4)
        assert score.accuracy == pytest.approx(float((actual.argmax(1) == labels).float().mean()))
    unlabelled = judge(heldout, labelled=False).scores(candidates)
    assert [score.divergence for score in unlabelled] == [score.divergence for score in scores]
    assert all(score.accuracy is None for score in unlabelled)
    for score, model in zip(unlabelled, candidates, strict=True):
        actual, _ = logits(model, heldout)
        assert score.loss == pytest.approx(kullback_leibler(expected, actual, 4.0), rel=1e-4)


def test_the_teacher_itself_diverges_by_nothing():
    (score,) = judge(loader(21, seed=1)).scores([network()])
    assert 0 <= score.divergence < 1e-6


def test_outputs_that_are_not_numbers_are_worst():
    broken = network()
    with torch.no_grad():
        broken[6].bias[0] = math.nan
    score, good = judge(loader(21, seed=1)).scores([broken, network()])
    assert score.loss == score.divergence == math.inf
    assert good.loss < math.inf


def test_labels_are_expected_where_they_count():
    with pytest.raises(SepconvertError, match="held-out data: expected labels, got none"):
        judge(loader(8, labels=False)).scores([network()])


def test_squared_errors_are_relative_in_the_loss_alone():
    heldout = loader(21, seed=1)
    model = disturbed(network())
    found = judge(heldout, labelled=False, yardstick=Yardstick((Kind("squared"),)))
    (score,) = found.scores([model])
    (expected, _), (actual, _) = (logits(each, heldout) for each in (network(), model))
    squares = float((expected - actual).square().mean())
    assert score.divergence == pytest.approx(squares, rel=1e-5)
    assert found.yardstick.unit == pytest.approx(float(expected.var(correction=0)), rel=1e-5)
    assert score.loss == pytest.approx(squares / found.yardstick.unit, rel=1e-5)


def test_the_users_loss_takes_the_place_of_cross_entropy():
    heldout, model = loader(21, seed=1), disturbed(network())
    own = TaskLoss(lambda outputs, y: 100 + F.cross_entropy(outputs, y), Scoring())
    (found,) = judge(heldout, task_loss=own).scores([model])
    (plain,), (unlabelled,) = (judge(heldout, labelled=each).scores([model]) for each in (True, False))
    actual, labels = logits(model, heldout)
    expected = 100 + float(F.cross_entropy(actual, labels))
    assert found.loss - unlabelled.loss == pytest.approx(expected, rel=1e-5)
    assert found.accuracy == plain.accuracy
