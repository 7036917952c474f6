"""Metrics of the user's own, as functions and as metrics of torchmetrics, and how tasks are resolved."""

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Task
from sepconvert.measure.metrics.evaluation import evaluate, metric_delta
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.own import metric_of, scoring_of

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 5
BATCHES = list(zip(X.split(11), Y.split(11), strict=True))


def margin(outputs, targets):
    """How far the right class is ahead of the mean."""
    return outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)


margin.unit = "nats"


def error(outputs, targets):
    return (outputs.argmax(1) != targets).float().tolist()


error.higher_is_better = False


def test_a_function_scores_samples() -> None:
    metric = metric_of(margin)
    assert (metric.name, metric.unit, metric.higher_is_better) == ("margin", "nats", True)
    found = evaluate(nn.Identity(), BATCHES, scoring_of(Task(metric=margin)))
    assert found.value == pytest.approx(float(margin(X, Y).mean()))
    assert metric_of(error).higher_is_better is False
    assert evaluate(nn.Identity(), BATCHES, scoring_of(Task.of(error))).value == pytest.approx(
        float((X.argmax(1) != Y).double().mean())
    )


def test_a_function_of_a_file_and_of_a_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text("def score(outputs, targets):\n    return outputs[:, 0]\n")
    monkeypatch.chdir(tmp_path)
    for spec in (f"{tmp_path}/mine.py:score", "mine:score"):
        metric = metric_of(spec)
        assert metric.name == "score"
        assert metric.value(metric.statistics(X, Y)) == pytest.approx(float(X[:, 0].mean()))


def made() -> torchmetrics.Metric:
    return torchmetrics.classification.MulticlassCohenKappa(5)


@pytest.mark.parametrize(
    "given",
    [
        torchmetrics.classification.MulticlassJaccardIndex(5),
        torchmetrics.classification.MulticlassMatthewsCorrCoef(5),
        torchmetrics.classification.MulticlassAUROC(5),  # lists of samples
        torchmetrics.classification.MulticlassCalibrationError(5),
        made,
    ],
)
def test_metrics_of_torchmetrics(given) -> None:
    probabilities = X.softmax(1)
    task = Task(metric=given, postprocess=lambda outputs: outputs.softmax(1))
    if not isinstance(given, torchmetrics.Metric):
        task = Task(metric=given)
    scoring = scoring_of(task)
    found = evaluate(nn.Identity(), BATCHES, scoring)
    oracle = given if isinstance(given, torchmetrics.Metric) else given()
    oracle.reset()
    oracle.update(probabilities, Y)
    assert found.value == pytest.approx(float(oracle.compute()), abs=1e-5)
    assert scoring.metric.higher_is_better is oracle.higher_is_better
    # A data set in which samples occur several times, against the same samples fed again.
    times = np.arange(40) % 3
    weighted = scoring.metric.values(found.statistics, times[None].astype(float))[0]
    oracle.reset()
    places = torch.from_numpy(np.repeat(np.arange(40), times))
    oracle.update(probabilities[places], Y[places])
    assert weighted == pytest.approx(float(oracle.compute()), abs=1e-5)
    delta = metric_delta(found, evaluate(nn.Identity(), [(X + 0.3 * X.flip(0), Y)], scoring))
    assert delta.uncertainty.error > 0
    assert delta.drop in delta.ci95


def test_a_class_and_what_is_one_already() -> None:
    metric = metric_of(torchmetrics.MeanSquaredError)
    assert (metric.name, metric.higher_is_better) == ("MeanSquaredError", False)
    assert metric_of(metric) is metric
    assert metric_of(None) is None
    assert metric_of("psnr").name == "psnr"


class Unreduced(torchmetrics.Metric):
    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("last", torch.zeros(()), dist_reduce_fx=None)

    def update(self, outputs, targets):
        self.last = outputs.mean()

    def compute(self):
        return self.last


def test_states_that_are_means_or_extremes() -> None:
    pictures = torch.rand(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    oracle = torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0)
    found = evaluate(nn.Identity(), [tuple(pictures)], scoring_of(Task(metric=oracle)))
    oracle.update(*pictures)
    assert found.value == pytest.approx(float(oracle.compute()))


def both(outputs, targets, more):
    return outputs


def of_batch(outputs, targets):
    return outputs.mean()


def failing(outputs, targets):
    raise KeyError("sought")


def bad():
    raise ValueError("no")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("iou", r"`metric` iou: expected one of top1, .*cer, or file.py:callable"),
        ("nowhere.py:score", r"`metric` nowhere.py:score: there is no file"),
        (3, r"`metric` int: expected a function of \(outputs, targets\)"),
        (both, r"`metric` both: expected a function of \(outputs, targets\)"),
        (
            torchmetrics.classification.MulticlassJaccardIndex,
            r"a class that takes arguments, pass a function",
        ),
        (bad, r"`metric` bad: failed \(no\)"),
        (torchmetrics.CatMetric(), r"does not say whether higher is better"),
        (Unreduced(), r"`metric` Unreduced: its states are neither sums"),
    ],
)
def test_what_is_no_metric(given, message) -> None:
    with pytest.raises(SepconvertError, match=message):
        metric_of(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (of_batch, r"`metric` of_batch: expected a finite number for each sample, got shape \(\)"),
        (failing, r"`metric` failing: failed with KeyError: .*sought"),
        (lambda outputs, targets: outputs[:, 0] / 0, r"got NaN or Inf"),
        (lambda outputs, targets: outputs[:3, 0], r"a score for each of 11 samples, got 3"),
        (torchmetrics.classification.MulticlassJaccardIndex(2), r"cannot take outputs and targets"),
        (
            torchmetrics.classification.MulticlassAccuracy(5, average=None),
            r"a value that is one number, got a Tensor",
        ),
    ],
)
def test_metrics_that_fail_on_the_data(given, message) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        _ = evaluate(nn.Identity(), BATCHES, scoring_of(Task(metric=given))).value
    assert "\n" not in str(caught.value)


def test_a_task_says_all_of_the_scoring(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def half(outputs):\n    return outputs / 2\n")
    task = Task(metric="miou", postprocess=f"{tmp_path}/mine.py:half", output="1", ignore_index=255)
    found = scoring_of(task)
    assert (found.metric.name, found.output, found.axis) == ("miou", 1, 0)
    assert found.postprocess(4) == 2
    with pytest.raises(
        SepconvertError, match=r"`ignore_index`: is for metrics that have a name, not for margin"
    ):
        scoring_of(Task(metric=margin, ignore_index=255))
    assert scoring_of(Task(metric=named("psnr"), batch_dim=1)).axis == 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x)[0]


def test_the_dimension_of_samples_is_found_by_running_two() -> None:
    x = torch.randn(6, 1, 3)
    assert scoring_of(Task(), Recurrent(), (x,)).axis == 1  # time first
    assert scoring_of(Task(), nn.Linear(3, 2), (x,)).axis == 0
    assert scoring_of(Task(batch_dim=0), Recurrent(), (x,)).axis == 0
    with pytest.raises(SepconvertError, match=r"`batch_dim` 3: the inputs have 3 dimensions"):
        scoring_of(Task(batch_dim=3), Recurrent(), (x,))
