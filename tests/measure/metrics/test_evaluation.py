from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.metrics.classes import Predictions
from sepconvert.measure.metrics.evaluation import TOP1, Evaluation, Scoring, evaluate, metric_delta, one_of
from sepconvert.measure.metrics.metric import Metric, means
from sepconvert.network.copies import evaluation_mode
from sepconvert.network.tensors import InputBatch

Batches = list[tuple[Tensor, Tensor]]


class Echo(nn.Module):
    """Returns its input as logits, in whatever packing is asked for; its dtype is that of the parameter."""

    def __init__(self, pack: Any = lambda logits: logits) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x * self.one)


@dataclass
class Output:
    hidden: None
    logits: Tensor


def data(samples: int, classes: int, batch: int = 7) -> tuple[Tensor, Tensor, Batches]:
    generator = torch.Generator().manual_seed(samples * classes)
    x = torch.randn(samples, classes, generator=generator)
    y = torch.randint(classes, (samples,), generator=generator)
    return x, y, list(zip(torch.split(x, batch), torch.split(y, batch), strict=True))


@pytest.mark.parametrize("classes", [6, 10, 40])
def test_top1_and_top5_against_a_plain_count(classes: int) -> None:
    x, y, batches = data(50, classes)
    predictions = evaluate(Echo(), batches).predictions
    assert predictions.ranked.shape == (50, 5)
    assert predictions.ranked.dtype == predictions.labels.dtype == np.int64
    found = predictions.accuracy()
    rows = zip(x.tolist(), y.tolist(), strict=True)
    ranks = [sum(logit > logits[label] for logit in logits) for logits, label in rows]
    assert found.top1 == pytest.approx(sum(rank < 1 for rank in ranks) / 50)
    assert found.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / 50)
    assert found.to_dict() == {"top1": found.top1, "top5": found.top5, "n": 50}


@pytest.mark.parametrize("classes", [2, 5])
def test_top5_of_five_classes_says_nothing(classes: int) -> None:
    predictions = evaluate(Echo(), data(9, classes)[2]).predictions
    assert predictions.ranked.shape == (9, classes)
    assert predictions.accuracy().top5 is None


@pytest.mark.parametrize(
    "pack",
    [
        lambda t: (t, -t),
        lambda t: [None, [t]],
        lambda t: {"out": t, "features": -t},
        lambda t: OrderedDict(loss=t.sum(), logits=t),
        lambda t: Output(None, t),
        lambda t: SimpleNamespace(loss=t.sum(), logits=t),
    ],
)
def test_logits_are_found_in_the_output(pack: Any) -> None:
    _, _, batches = data(20, 6)
    expected = evaluate(Echo(), batches).predictions
    np.testing.assert_array_equal(evaluate(Echo(pack), batches).predictions.ranked, expected.ranked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    seen = []

    def spy(logits: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits

    x, _, batches = data(20, 6)
    predictions = evaluate(Echo(spy).to(dtype), batches).predictions
    assert set(seen) == {dtype}
    np.testing.assert_array_equal(predictions.ranked[:, 0], x.to(dtype).argmax(1))


def test_a_model_without_parameters_gets_the_inputs_as_they_are() -> None:
    x, _, batches = data(8, 6)
    doubled = [(each.double(), y) for each, y in batches]
    np.testing.assert_array_equal(evaluate(nn.Identity(), doubled).predictions.ranked[:, 0], x.argmax(1))


def test_eval_mode_without_gradients_and_everything_as_before() -> None:
    observed = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            observed.append((self.training, self.norm.training, torch.is_grad_enabled()))
            return torch.as_tensor(self.drop(self.norm(x)))

    model = Net().train()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, _, batches = data(12, 6)
    predictions = evaluate(model, batches).predictions
    assert set(observed) == {(False, False, False)}
    np.testing.assert_array_equal(predictions.ranked[:, 0], x.argmax(1))
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_mode_is_restored_after_an_error_and_by_the_model_s_own_switch() -> None:
    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            super().train(mode)
            return self

    model = Merging(2, 2)

    def fail_in_eval_mode() -> None:
        with evaluation_mode(model):
            assert model.merged
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_eval_mode()
    assert model.training
    assert not model.merged


def test_exported_models_that_refuse_eval() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    dynamic = ({0: torch.export.Dim("N", min=1)},)
    exported = torch.export.export(net, (torch.zeros(3, 4),), dynamic_shapes=dynamic).module()
    flag = exported.training
    head = nn.Dropout(0.99)
    x, y, _ = data(10, 4)
    predictions = evaluate(nn.Sequential(exported, head), [(x, y)]).predictions
    with torch.no_grad():
        np.testing.assert_array_equal(predictions.ranked[:, 0], net(x).argmax(1))
    assert (exported.training, head.training) == (flag, True)


def test_data_loaders_and_progress() -> None:
    x, y, batches = data(20, 6)
    seen = []

    def progress(loader: Any, description: str, /) -> Any:
        for batch in loader:
            seen.append(len(batch[0]))
            yield batch

    shown: list[InputBatch] = []
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    predictions = evaluate(Echo(), loader, progress=progress, on_images=shown.append).predictions
    assert seen == [8, 8, 4]
    assert torch.equal(InputBatch.joined(shown).inputs[0], x)
    np.testing.assert_array_equal(predictions.ranked, evaluate(Echo(), batches).predictions.ranked)
    np.testing.assert_array_equal(predictions.labels, y)


X, Y = torch.zeros(3, 6), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Echo(), (X, Y + 4), r"labels: expected 0 to 5, as the model has 6 classes, got 6; "),
        (Echo(), (X, Y - 1), r"got -1;"),
        (Echo(), (X, Y[:2]), r"labels: expected 3 integers, .* of shape \(2,\)"),
        (Echo(), (X, Y.float()), r"got torch.float32"),
        (Echo(), (X, torch.eye(6)[:3]), r"shape \(3, 6\)"),
        (Echo(), X, r"data: expected batches of two \(x, y\), got Tensor"),
        (Echo(), (X, Y, Y), r"got tuple of 3"),
        (Echo(lambda t: t / 0), (X, Y), r"finite logits, got NaN for 3 of 3 samples"),
        (Echo(lambda t: t[:, 0]), (X, Y), r"logits of shape \(3, classes\), got shape \(3,\)"),
        (Echo(lambda t: t[:1]), (X, Y), r"got shape \(1, 6\)"),
        (Echo(lambda t: None), (X, Y), r"got NoneType"),
        (
            nn.Linear(5, 6),
            (X, Y),
            r"got shape \(3, 6\), on which it fails with RuntimeError: .*mat1 and mat2",
        ),
    ],
)
def test_bad_data_is_named(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        evaluate(model, [batch])
    assert "\n" not in str(caught.value)


def test_no_data() -> None:
    with pytest.raises(SepconvertError, match="at least one labelled sample"):
        evaluate(Echo(), [])
    with pytest.raises(SepconvertError, match="at least one labelled sample"):
        evaluate(Echo(), [(X[:0], Y[:0])])


def of_classes(predicted: list[int], labels: list[int]) -> Evaluation:
    predictions = Predictions(np.array(predicted)[:, None], np.array(labels), 3)
    return Evaluation(TOP1, predictions.correct.astype(float), np.array(labels, np.uint32), predictions)


def test_the_drop_by_hand() -> None:
    labels = [0, 0, 1, 1, 2, 2, 0, 1]
    original = of_classes([0, 0, 1, 1, 2, 0, 1, 1], labels)  # right: all but the 6th and the 7th
    converted = of_classes([0, 1, 2, 1, 0, 1, 0, 1], labels)  # loses the 2nd, 3rd, 5th; wins the 7th
    found = metric_delta(original, converted)
    assert found.drop == pytest.approx(100 * 2 / 8)
    assert found.agreement == pytest.approx(3 / 8)
    assert (found.metric, found.metric.unit, found.metric.higher_is_better) == (TOP1, "pp", True)
    # (3 + 1)/10 - (1 + 1)/10 = 0.2, half-width 1.95996 · sqrt((0.6 - 0.04)/10) = 0.46381
    assert found.to_dict() == {
        "metric": {
            "name": "top1",
            "unit": "pp",
            "higher_is_better": True,
            "original": 75.0,
            "converted": 50.0,
            "drop": 25.0,
            "ci95": pytest.approx([-26.381, 66.381], abs=1e-3),
            "n": 8,
        },
        "accuracy_drop_pp": {
            "value": 25.0,
            "ci95": pytest.approx([-26.381, 66.381], abs=1e-3),
            "mcnemar_p": pytest.approx(0.625),  # 2 · (1 + 4) / 16
            "n": 8,
        },
        "agreement": 0.375,
    }


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=60))
def test_the_drop_is_the_difference_of_the_accuracies(rows: list[tuple[int, int, int]]) -> None:
    labels, first, second = (list(column) for column in zip(*rows, strict=True))
    original, converted = of_classes(first, labels), of_classes(second, labels)
    delta, back = metric_delta(original, converted), metric_delta(converted, original)
    assert delta.drop == pytest.approx(100 * (original.accuracy().top1 - converted.accuracy().top1))
    assert delta.ci95.lo <= delta.drop <= delta.ci95.hi
    assert back.drop == -delta.drop
    assert back.agreement == delta.agreement


def test_the_drop_needs_the_same_samples() -> None:
    with pytest.raises(SepconvertError, match=r"same samples in the same order.*shuffle=False"):
        metric_delta(of_classes([0, 1], [0, 1]), of_classes([0, 1], [1, 0]))
    with pytest.raises(SepconvertError, match="2 and 1 of them"):
        metric_delta(of_classes([0, 1], [0, 1]), of_classes([0], [0]))


# Other metrics ---------------------------------------------------------------------------------------


def squares(outputs: Tensor, targets: Tensor) -> Any:
    return (outputs - targets).square().mean(1).double().numpy()


SQUARES = Metric("squares", "", False, squares, means, is_mean=True)


def test_a_mean_of_samples_where_less_is_better() -> None:
    x, _, _ = data(40, 6)
    y = x + 0.1 * torch.arange(40)[:, None]
    batches = list(zip(x.split(7), y.split(7), strict=True))
    found = [evaluate(model, batches, Scoring(SQUARES)) for model in (Echo(), Echo(lambda t: t + 0.5))]
    delta = metric_delta(*found)
    errors = [(x - y).square().mean(1).double(), (x + 0.5 - y).square().mean(1).double()]
    assert [each.value for each in found] == pytest.approx([float(each.mean()) for each in errors])
    drops = errors[1] - errors[0]
    assert delta.drop == pytest.approx(float(drops.mean()))
    assert delta.agreement is None
    assert delta.to_dict()["accuracy_drop_pp"] is None
    half = 2.0227 * float(drops.std()) / 40**0.5  # Student's t with 39 degrees of freedom
    assert delta.ci95.to_list() == pytest.approx([delta.drop - half, delta.drop + half], rel=1e-4)


def test_several_inputs_by_position_and_by_name() -> None:
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
            return (left + right) * scale

    x, y, _ = data(9, 6)
    expected = evaluate(Echo(), [(x, y)]).predictions.ranked
    for inputs in (
        (x - 1, torch.ones(9, 6)),
        [x - 1, torch.ones(9, 6)],
        {"right": x - 1, "left": torch.ones(9, 6)},
    ):
        assert np.array_equal(evaluate(Sum(), [(inputs, y)]).predictions.ranked, expected)


def test_one_mapping_is_one_argument_where_the_forward_takes_no_such_names() -> None:
    class Mapped(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["image"] + batch["shift"]

    x, y, _ = data(9, 6)
    found = evaluate(Mapped(), [({"image": x - 1, "shift": torch.ones(9, 6)}, y)])
    assert np.array_equal(found.predictions.ranked, evaluate(Echo(), [(x, y)]).predictions.ranked)


def test_outputs_are_chosen_by_name_and_by_number_and_processed() -> None:
    batches = data(20, 6)[2]
    model = Echo(lambda t: {"boxes": -t, "classes": t})
    expected = evaluate(Echo(), batches).predictions.ranked
    for scoring in (
        Scoring(output="classes"),
        Scoring(output=1),
        Scoring(postprocess=lambda outputs: outputs["classes"]),
        Scoring(output="boxes", postprocess=torch.neg),
    ):
        assert np.array_equal(evaluate(model, batches, scoring).predictions.ranked, expected)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (Scoring(output="masks"), r"`output` masks: the model returns a dict named boxes, classes;"),
        (Scoring(output=2), r"`output` 2: the model returns 2 tensors; pass one from 0"),
        (
            Scoring(postprocess=lambda outputs: outputs[7]),
            r"`postprocess`: failed on .* 7 samples with KeyError",
        ),
        (
            Scoring(Metric("m", "", True, lambda o, t: np.ones(3), means)),
            r"a score for each of 7 samples, got 3",
        ),
    ],
)
def test_outputs_that_cannot_be_judged(scoring: Scoring, message: str) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        evaluate(Echo(lambda t: {"boxes": -t, "classes": t}), data(7, 6)[2], scoring)
    assert "\n" not in str(caught.value)


def test_masks_without_a_metric_name_the_option() -> None:
    with pytest.raises(SepconvertError, match=r"logits of shape \(2, classes\), .*say by `metric`"):
        evaluate(nn.Identity(), [(torch.zeros(2, 5, 4, 4), torch.zeros(2, 4, 4).long())])
    with pytest.raises(SepconvertError, match=r"labels: expected 2 integers, .*say by `metric`"):
        evaluate(nn.Identity(), [(torch.zeros(2, 5), torch.zeros(2, 5))])


def test_time_major_outputs_are_seen_with_samples_first() -> None:
    seen = []

    def shape(outputs: Tensor, targets: Tensor) -> Any:
        seen.append(tuple(outputs.shape))
        return np.zeros(len(outputs))

    batches = [(torch.randn(3, 6), torch.zeros(3)), (torch.randn(2, 6), torch.zeros(2))]
    scoring = Scoring(Metric("shape", "", True, shape, means, is_mean=True))
    # 3 steps, as many as samples: sizes alone could not tell.
    evaluate(Echo(lambda t: torch.stack([t, 2 * t, 3 * t])), batches, scoring)
    assert seen == [(3, 3, 6), (2, 3, 6)]


def test_samples_along_another_dimension() -> None:
    x, y, _ = data(5, 6)
    model = Echo(lambda t: t.mean(0))  # T × N × K
    found = evaluate(model, [(torch.stack([x, x]), y)], Scoring(axis=1))
    assert np.array_equal(found.predictions.ranked, evaluate(Echo(), [(x, y)]).predictions.ranked)


def test_targets_of_any_form_are_paired() -> None:
    metric = Metric("m", "", True, lambda outputs, targets: np.zeros(len(targets)), means, is_mean=True)
    x = torch.zeros(3, 2)

    def found(targets: Any) -> Evaluation:
        return evaluate(nn.Identity(), [(x, targets)], Scoring(metric))

    boxes = [{"boxes": torch.eye(4)[:n]} for n in (1, 2, 3)]
    metric_delta(found(boxes), found(boxes))
    for one, other in ((boxes, boxes[::-1]), (["a", "b", "c"], ["a", "b", "d"])):
        with pytest.raises(SepconvertError, match="same samples in the same order"):
            metric_delta(found(one), found(other))


def test_the_part_of_one_sample() -> None:
    x = torch.arange(6).reshape(3, 2)
    assert torch.equal(one_of(x, 1, 3), x[1:2])
    assert one_of(["a", "b", "c"], 2, 3) == ["c"]
    found = one_of({"x": x, "texts": ("a", "b", "c"), "scale": 2}, 0, 3)
    assert torch.equal(found.pop("x"), x[:1])
    assert found == {"texts": ["a"], "scale": 2}
    assert [each.tolist() for each in one_of([x, x + 1], 2, 3)] == [[[4, 5]], [[5, 6]]]
