"""Scores on held-out data, against sums over all samples at once."""

import math

import pytest
import torch
from accelerate import Accelerator
from distillation_worker import disturbed, loader, network
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.judge import Judge
from sepconvert.distillation.samples import Samples
from sepconvert.distillation.settings import Settings


def judge(heldout, *, labelled=True, temperature=4.0):
    settings = Settings(1, labelled, 1e-2, temperature, 0.0, seed=0)
    accelerator = Accelerator(cpu=True)
    return Judge(network(), Samples.of(heldout, "held-out data", 1), accelerator, settings, torch.float32)


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
