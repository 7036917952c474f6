"""What is known of a model before any of its layers is replaced."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import (
    Budget,
    Finetuning,
    Selection,
    Task,
)
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.original import examine, trace_selected


class Counted(TensorDataset):
    """Remembers how many images were read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.fixture
def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_evaluation_of_a_model_is_computed_once(model, images):
    data = Counted(images, model.eval()(images).argmax(1))
    original = examine(model, images[:2], DataLoader(data, batch_size=4), None, Job())
    assert data.read == 12
    assert original.evaluation.accuracy().top1 == 1
    other = copy.deepcopy(model)
    nn.init.zeros_(other[-1].weight)
    nn.init.zeros_(other[-1].bias)  # says 0 whatever it is shown
    drop = original.delta(other)
    assert data.read == 24
    assert np.array_equal(original.evaluate(other).predictions.ranked[:, 0], np.zeros(12))
    assert original.delta(other) == drop
    assert data.read == 24
    labels = data.tensors[1]
    assert drop.drop == pytest.approx(100 * (labels != 0).float().mean().item())
    assert original.delta(model).drop == 0


def test_without_data_nothing_is_evaluated(model, images):
    original = examine(model, images[:2], None, None, Job())
    assert original.evaluation is original.evaluate(model) is original.delta(model) is None


def test_other_models_are_counted_as_the_original(model, images):
    original = examine(model, images[:2], None, None, Job())
    assert original.cost.params == original.count(model[0]).params + 4 * 3 + 3
    assert original.count(model[0]).macs == 6 * 6 * 4 * 27
    assert original.cost.macs - original.count(model[:4]).macs == 4 * 3
    assert [site.name for site in original.sites] == ["0"]


def test_globs_that_match_nothing(model, images):
    found = trace_selected(model, (images,), Selection(include=["0"]))
    assert [site.name for site in found.sites] == ["0"]
    for selection in (Selection(include=["0", "nosuch*"]), Selection(exclude=["nosuch*"])):
        with pytest.raises(SepconvertError, match=r"nosuch\*: matches none of the 1 convolutions"):
            trace_selected(model, (images,), selection)


class Renormalised(nn.Conv2d):
    """Limits its weight while it runs."""

    def forward(self, x):
        self.weight.data /= self.weight.data.norm()
        return super().forward(x)


def test_a_forward_that_writes_to_a_parameter_is_refused_and_undone(images):
    model = nn.Sequential(nn.ReLU(), Renormalised(3, 4, 3))
    before = model[1].weight.detach().clone()
    with pytest.raises(SepconvertError, match=r"writes to the parameter 1\.weight .*after the steps"):
        trace_selected(model, (images,), Selection())
    assert torch.equal(model[1].weight, before)


def test_a_parameter_that_is_nan_counts_as_unwritten(model, images):
    nn.init.constant_(model[-1].bias, float("nan"))
    assert len(trace_selected(model, (images,), Selection()).sites) == 1


def test_images_to_fit_to_are_for_modes_that_fit(model, images):
    loader = DataLoader(TensorDataset(images, torch.zeros(12).long()), batch_size=4)
    with pytest.raises(SepconvertError, match="`calib`: is for the modes approx and auto"):
        examine(model, images[:2], None, loader, Job())
    original = examine(model, images[:2], None, loader, Job(mode="approx", budget=Budget(rank=1)))
    assert (original.data.calibration.images, original.data.scored) == (9, None)


@pytest.mark.parametrize("kind", [list, DataLoader])
def test_images_that_are_fitted_to_and_scored_are_noticed_in_one_pass(model, images, kind):
    """Iterables may be slow; they are read once for each model."""
    x = torch.cat([images, torch.randn(88, 3, 8, 8)])
    scored = Counted(x[10:], torch.zeros(90, dtype=torch.long))
    data = DataLoader(scored, batch_size=30) if kind is DataLoader else Once(scored)
    calib = DataLoader(TensorDataset(images, torch.zeros(12).long()), batch_size=4)
    job = Job(mode="approx", budget=Budget(rank=1))
    found = examine(model, images[:2], data, calib, job).seen_twice
    assert (found.calib.compared, found.calib.scored, found.train) == (12, 2, None)
    assert scored.read == 90
    with pytest.raises(
        SepconvertError, match="`calib`: 12 of 12 images that were compared are in `data`, too"
    ):
        examine(model, images[:2], DataLoader(TensorDataset(x, torch.zeros(100).long()), 50), calib, job)


class Once:
    """Yields its batches a single time."""

    def __init__(self, dataset):
        self.batches = iter(DataLoader(dataset, batch_size=30))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("task", "channels", "names"),
    [
        (Task(), 4, ["kl"]),
        (Task(), 1, ["squared"]),
        (Task(metric="dice"), 1, ["bernoulli"]),
        (Task(metric="psnr"), 4, ["relative"]),
        (Task(divergence="relative"), 1, ["relative"]),
    ],
)
def test_outputs_are_compared_as_the_task_says(images, task, channels, names):
    job, model = Job(mode="approx", task=task, budget=Budget(rank=1)), nn.Conv2d(3, channels, 3)
    data = None
    if task.metric is not None:
        with torch.no_grad():
            found = model(images).sigmoid()
        data = DataLoader(
            TensorDataset(images, found if task.metric == "psnr" else (found[:, 0] > 0.5).long()), 4
        )
    original = examine(model, images[:2], data, None, job)
    assert original.yardstick.names == names
    assert original.task.batch_dim == 0


def test_a_loss_that_fails_is_found_before_any_long_work(images):
    def failing(outputs, targets):
        raise ValueError("of no use")

    loader = DataLoader(TensorDataset(images, images), 4)
    job = Job(mode="approx", task=Task(loss=failing), budget=Budget(rank=1), finetuning=Finetuning(1))
    with pytest.raises(SepconvertError, match=r"`loss`: failed with ValueError: of no use.*float32 of shape"):
        examine(nn.Conv2d(3, 3, 3), images[:2], None, loader, job)


def test_a_loss_needs_targets(images):
    job = Job(
        mode="approx", task=Task(loss=lambda outputs, targets: outputs.mean()), budget=Budget(rank=1),
        finetuning=Finetuning(1),
    )  # fmt: skip
    for loader in (
        DataLoader(images, 4),
        DataLoader(TensorDataset(images, torch.full((len(images),), -1)), 4),
    ):
        with pytest.raises(SepconvertError, match=r"`loss`: the images to train on have no targets"):
            examine(nn.Conv2d(3, 3, 3), images[:2], None, loader, job)
