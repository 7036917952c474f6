"""Samples that changed most are found by their scores, and run again."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.options.values import Task
from sepconvert.measure.metrics.evaluation import Scoring, evaluate
from sepconvert.measure.metrics.metric import Metric
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.network.tensors import InputBatch
from sepconvert.report.pictures.samples import ChangedSample, changed_samples, image_of, samples_at

IMAGES = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 4, 4)
DATA = TensorDataset(IMAGES, torch.arange(10))


class Counting(TensorDataset):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def at(data, indices):
    return samples_at(data, indices, lambda x: InputBatch((x,)))


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(DATA, batch_size=3),
        DataLoader(DATA, batch_size=4, sampler=[*range(10)]),
        [(IMAGES[:7], torch.arange(7)), (IMAGES[7:], torch.arange(7, 10))],
    ],
    ids=["loader", "sampler of its own", "list"],
)
def test_samples_are_those_of_their_index(data):
    found = at(data, [9, 2])
    assert sorted(found) == [2, 9]
    for index, (x, target) in found.items():
        assert torch.equal(image_of(x), IMAGES[index])
        assert target.tolist() == [index]
    assert at(data, []) == {}


def test_the_order_is_that_of_the_loader():
    backwards = DataLoader(DATA, batch_size=4, sampler=[*range(9, -1, -1)])
    x, target = at(backwards, [0])[0]
    assert float(image_of(x).max()) == float(target) == 9


def test_no_more_is_read_than_is_shown():
    data = Counting(*DATA.tensors)
    at(DataLoader(data, batch_size=5), [4, 8])
    assert data.reads == 2


def test_lists_of_targets_are_taken_apart():
    boxes = [{"boxes": torch.full((1, 4), float(index))} for index in range(4)]
    _, target = at([(IMAGES[:2], boxes[:2]), (IMAGES[2:4], boxes[2:])], [3])[3]
    assert len(target) == 1
    assert float(target[0]["boxes"][0, 0]) == 3


# Which changed most -------------------------------------------------------------------------------


class Shift(nn.Module):
    """Adds to each pixel a share of its square, so that brighter images change more."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x):
        return x + self.share * x.square()


def brightness(count: int) -> torch.Tensor:
    """Pictures whose brightness says their place: 7 is a stride that visits every place."""
    values = torch.arange(count) * 7 % count
    return (0.5 * values / count + 0.1).reshape(count, 1, 1, 1).expand(count, 1, 12, 12).contiguous()


def changed(scoring: Scoring, data, share=0.05):
    models = Shift(0.0), Shift(share)
    evaluations = tuple(evaluate(model, data, scoring) for model in models)
    return changed_samples(models, data, scoring, evaluations)


def test_the_samples_of_the_largest_change_come_first():
    x = brightness(20)
    found = changed(scoring_of(Task(metric="mae")), DataLoader(TensorDataset(x, x), 6))
    expected = sorted(range(20), key=lambda index: -float(x[index].max()))[:8]
    assert [each.index for each in found.shown] == expected
    assert (found.examined, found.kind, found.reason) == (20, "pictures", None)
    first = found.shown[0]
    level = float(x[expected[0]].max())
    assert first.scores == pytest.approx((0.0, 0.05 * level**2), rel=1e-5)
    assert torch.equal(first.before, first.target)
    assert torch.allclose(first.after, first.target + 0.05 * first.target**2)


def test_nothing_is_shown_of_what_did_not_change():
    x = brightness(5)
    found = changed(scoring_of(Task(metric="psnr")), DataLoader(TensorDataset(x, x), 5), share=0.0)
    assert found.shown == ()
    assert found.reason is None


def undefined(raises: bool) -> Metric:
    """A metric that a single sample does not have: NaN, or an error."""

    def values(statistics, weights):
        if statistics.shape[0] < 2:
            if raises:
                raise ValueError("two samples at least")
            return np.full(len(weights), np.nan)
        return weights @ statistics / weights.sum(1)

    return Metric("spread", "", True, lambda outputs, targets: outputs.mean((1, 2, 3)).numpy(), values)


@pytest.mark.parametrize("raises", [False, True])
def test_without_scores_the_outputs_decide(raises):
    x = brightness(20)
    found = changed(Scoring(undefined(raises)), DataLoader(TensorDataset(x, x), 5))
    expected = sorted(range(20), key=lambda index: -float(x[index].max()))[:8]
    assert [each.index for each in found.shown] == expected
    assert all(each.scores is None for each in found.shown)


def test_samples_of_a_costly_metric_are_spread_over_the_data():
    x = brightness(600)
    metric = undefined(False)
    values = lambda statistics, weights: weights @ statistics / weights.sum(1)  # noqa: E731
    costly = Metric("slow", "", True, metric.statistics, values, costly=True)
    found = changed(Scoring(costly), DataLoader(TensorDataset(x, x), 100))
    assert found.examined == 500
    assert len(found.shown) == 8


def test_models_that_take_no_single_sample_are_told_of():
    def joined(outputs):
        if len(outputs) < 2:
            raise ValueError("batches of two at least")
        return outputs

    x = brightness(6)
    scoring = scoring_of(Task(metric="psnr", postprocess=joined))
    found = changed(scoring, DataLoader(TensorDataset(x, x), 2))
    assert found.shown == ()
    assert "batches of two at least" in found.reason


@pytest.mark.parametrize(
    ("target", "made", "kind"),
    [
        (torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 3, 8, 8), "masks"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), "masks"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 3, 8, 8), None),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "pictures"),
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), "pictures"),
        (torch.zeros(1, 8), torch.zeros(1, 8), None),
        (["text"], ["texts"], None),
        (
            [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}],
            [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2), "scores": torch.zeros(2)}],
            "boxes",
        ),
        (
            [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}],
            [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)}],
            None,
        ),
    ],
)
def test_kinds_of_pictures(target, made, kind):
    assert ChangedSample(0, torch.zeros(1, 3, 8, 8), target, made, made, None).kind == kind


def test_inputs_that_are_no_images_are_not_shown():
    x = torch.rand(6, 8)
    assert image_of(InputBatch((x,))) is None
    scoring = scoring_of(Task(metric="mae"))
    assert changed(scoring, DataLoader(TensorDataset(x, x), 2)).shown == ()


def test_further_inputs_are_passed_on():
    class Blend(Shift):
        def forward(self, x, other):
            return super().forward(x) + 0 * other

    x = brightness(4)
    data = [((x, x.flip(0)), x)]
    models, scoring = (Blend(0.0), Blend(0.05)), scoring_of(Task(metric="mae"))
    evaluations = tuple(evaluate(model, data, scoring) for model in models)
    found = changed_samples(models, data, scoring, evaluations)
    assert len(found.shown) == 4
    assert partial(scoring.batched, models[0])(data[0][0]).inputs[1] is data[0][0][1]
