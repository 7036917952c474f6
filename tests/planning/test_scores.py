"""Predictions on growing parts of the data: each image once, in a random order, and those of whole runs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import silent
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.measure.metrics.evaluation import Scoring, evaluate, metric_delta
from sepconvert.measure.metrics.metric import Metric, means
from sepconvert.planning.scores import Deployment, Scores, sizes_of


class Counting(TensorDataset):
    """Remembers which samples were read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def samples(n):
    """Sorted by class, as folders of classes are."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) * 4 // n
    x = torch.randn(n, 6, generator=generator) + 0.8 * nn.functional.one_hot(y, 6)
    return x, y


def models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Linear(6, 4), nn.Linear(6, 4)
    for model, noise in ((first, 0.0), (second, 0.1)):
        model.weight.data = torch.eye(4, 6) + noise * model.weight.data
    return first, second


@pytest.mark.parametrize(
    ("images", "sizes", "choosing"),
    [
        (300, (300,), 300),
        (999, (999,), 999),
        (1000, (500, 1000), 1000),
        (3999, (500, 3999), 3999),
        (4000, (500, 2000, 4000), 2000),
        (5000, (500, 2500, 5000), 2500),
        (50_000, (500, 2000, 25_000, 50_000), 25_000),
    ],
)
def test_data_are_looked_at_in_steps(images, sizes, choosing):
    assert sizes_of(images) == (sizes, choosing)


def test_parts_are_those_of_whole_runs_and_each_image_is_read_once():
    x, y = samples(4200)
    data = Counting(x, y)
    original, converted = models()
    scores = Scores(original, DataLoader(data, 64), Scoring(), seed=3, progress=silent)
    assert sorted(data.read) == [*range(4200)]
    data.read.clear()
    first = scores.delta(converted, 500)
    assert len(data.read) == first.n == 500
    # Of a random order: not of the first class alone.
    assert len(np.unique(y.numpy()[data.read])) == 4
    second = scores.delta(converted, 2100)
    rest = scores.rest(converted)
    whole = scores.delta(converted, 4200)
    assert sorted(data.read) == [*range(4200)]
    assert (second.n, rest.n, whole.n) == (2100, 2100, 4200)
    counts, half, others = (each.uncertainty for each in (whole, second, rest))
    assert counts.lost == half.lost + others.lost
    assert counts.won == half.won + others.won
    # The oracle: one run over everything.
    plain = [evaluate(model, DataLoader(TensorDataset(x, y), 100)) for model in (original, converted)]
    assert whole == metric_delta(*plain)
    assert counts.lost > 0
    found = scores.evaluation(converted).predictions
    assert np.array_equal(found.ranked, plain[1].predictions.ranked)
    assert np.array_equal(found.labels, y)


def test_the_order_depends_on_the_seed_alone():
    x, y = samples(1200)
    original, converted = models()

    def first(seed):
        data = Counting(x, y)
        scores = Scores(original, DataLoader(data, 64), Scoring(), seed, silent)
        data.read.clear()
        scores.delta(converted, 500)
        return data.read

    assert first(1) == first(1)
    assert first(1) != first(2)


def batched(x, y):
    return DataLoader(TensorDataset(x, y), batch_sampler=[[*range(0, 600)], [*range(600, 1200)]])


def streamed(x, y):
    return DataLoader(Stream(x, y), 64)


def listed(x, y):
    return list(zip(x.split(100), y.split(100), strict=True))


def test_a_copy_has_the_predictions_of_its_model():
    x, y = samples(600)
    data = Counting(x, y)
    original, converted = models()
    scores = Scores(original, DataLoader(data, 64), Scoring(), 0, silent)
    found = scores.delta(converted, 600)
    data.read.clear()
    scores.share(converted, copied := copy.deepcopy(converted))
    assert scores.delta(copied, 600) == found
    assert data.read == []


@pytest.mark.parametrize("loader", [batched, streamed, listed])
def test_what_cannot_be_indexed_is_one_part(loader):
    x, y = samples(1200)
    original, converted = models()
    scores = Scores(original, loader(x, y), Scoring(), 0, silent)
    assert scores.sizes == (1200,)
    assert scores.rest(converted) is None
    plain = [evaluate(model, DataLoader(TensorDataset(x, y), 100)) for model in (original, converted)]
    assert scores.delta(converted, 1200) == metric_delta(*plain)
    assert np.array_equal(scores.evaluation(converted).predictions.ranked, plain[1].predictions.ranked)


def test_a_metric_without_a_value_is_found_before_any_plan():
    x, y = samples(20)
    undefined = Metric("kappa", "", True, lambda outputs, targets: np.full(len(targets), np.nan), means)
    with pytest.raises(SepconvertError, match=r"`metric` kappa: is nan for the original on 20 samples"):
        Scores(models()[0], DataLoader(TensorDataset(x, y), 8), Scoring(undefined), 0, silent)


def test_files_are_scored_in_the_place_of_models():
    original, converted = models()
    x, y = samples(1200)
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    drafts = Drafts(original, (x[:1],))
    ran = []
    plain, run = drafts.module, lambda model: ran.append(model) or plain(model)
    drafts.module = run
    scores = Scores(original, loader, Scoring(), 0, silent, deployment=Deployment(drafts=drafts))
    assert scores.original.value == evaluate(original, loader).value
    assert scores.evaluation(converted).value == evaluate(converted, loader).value
    assert ran[0] is original
    assert {id(each) for each in ran[1:]} == {id(converted)}
