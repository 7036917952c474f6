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
from sepconvert.measure.metrics import TOP1, Predictions, accuracy_delta, changes, evaluate
from sepconvert.network.copies import evaluation_mode

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
    predictions = evaluate(Echo(), batches)
    assert predictions.ranked.shape == (50, 5)
    assert predictions.ranked.dtype == predictions.labels.dtype == np.int64
    found = predictions.accuracy()
    rows = zip(x.tolist(), y.tolist(), strict=True)
    ranks = [sum(logit > logits[label] for logit in logits) for logits, label in rows]
    assert found.top1 == pytest.approx(sum(rank < 1 for rank in ranks) / 50)
    assert found.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / 50)
    assert found.to_dict() == {"top1": found.top1, "top5": found.top5, "n": 50}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_top5_of_five_classes_says_nothing(classes: int) -> None:
    predictions = evaluate(Echo(), data(9, classes)[2])
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
    expected = evaluate(Echo(), batches)
    np.testing.assert_array_equal(evaluate(Echo(pack), batches).ranked, expected.ranked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    seen = []

    def spy(logits: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return logits

    x, _, batches = data(20, 6)
    predictions = evaluate(Echo(spy).to(dtype), batches)
    assert set(seen) == {dtype}
    np.testing.assert_array_equal(predictions.ranked[:, 0], x.to(dtype).argmax(1))


def test_a_model_without_parameters_gets_the_inputs_as_they_are() -> None:
    x, _, batches = data(8, 6)
    doubled = [(each.double(), y) for each, y in batches]
    np.testing.assert_array_equal(evaluate(nn.Identity(), doubled).ranked[:, 0], x.argmax(1))


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
    predictions = evaluate(model, batches)
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
    predictions = evaluate(nn.Sequential(exported, head), [(x, y)])
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

    shown: list[torch.Tensor] = []
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    predictions = evaluate(Echo(), loader, progress, on_images=shown.append)
    assert seen == [8, 8, 4]
    assert torch.equal(torch.cat(shown), x)
    np.testing.assert_array_equal(predictions.ranked, evaluate(Echo(), batches).ranked)
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
        (Echo(), X, r"data: expected batches of two tensors \(x, y\), got Tensor"),
        (Echo(), (X, Y, Y), r"got tuple"),
        (Echo(lambda t: t / 0), (X, Y), r"finite logits, got NaN for 3 of 3 samples"),
        (Echo(lambda t: t[:, 0]), (X, Y), r"logits of shape \(3, classes\), got shape \(3,\)"),
        (Echo(lambda t: t[:1]), (X, Y), r"got shape \(1, 6\)"),
        (Echo(lambda t: None), (X, Y), r"got NoneType"),
        (nn.Linear(5, 6), (X, Y), r"takes inputs of shape \(3, 6\), got RuntimeError: .*mat1 and mat2"),
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


def of_classes(predicted: list[int], labels: list[int]) -> Predictions:
    return Predictions(np.array(predicted)[:, None], np.array(labels), 3)


def test_the_drop_by_hand() -> None:
    labels = [0, 0, 1, 1, 2, 2, 0, 1]
    original = of_classes([0, 0, 1, 1, 2, 0, 1, 1], labels)  # right: all but the 6th and the 7th
    converted = of_classes([0, 1, 2, 1, 0, 1, 0, 1], labels)  # loses the 2nd, 3rd, 5th; wins the 7th
    found = accuracy_delta(original, converted)
    assert found.drop == pytest.approx(100 * 2 / 8)
    assert found.agreement == pytest.approx(3 / 8)
    assert (found.metric, found.metric.unit, found.metric.higher_is_better) == (TOP1, "pp", True)
    # (3 + 1)/10 - (1 + 1)/10 = 0.2, half-width 1.95996 · sqrt((0.6 - 0.04)/10) = 0.46381
    assert found.to_dict() == {
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
    delta, back = accuracy_delta(original, converted), accuracy_delta(converted, original)
    assert delta.drop == pytest.approx(100 * (original.accuracy().top1 - converted.accuracy().top1))
    assert delta.ci95.lo <= delta.drop <= delta.ci95.hi
    assert back.drop == -delta.drop
    assert back.agreement == delta.agreement


def test_changes_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    before = Predictions(np.array([[0], [1], [1], [0], [2], [1]]), labels, 3)
    after = Predictions(np.array([[0], [0], [2], [2], [2], [0]]), labels, 3)
    found = changes(before, after, most=3)
    assert (found.count, found.lost, found.won) == (4, 1, 1)
    shown = [(each.index, each.label, each.original, each.converted) for each in found.shown]
    assert shown == [(1, 0, 1, 0), (3, 1, 0, 2), (5, 2, 1, 0)]  # the first, one between, the last
    assert len(changes(before, after, most=10).shown) == 4
    assert changes(before, before, most=3).to_dict() == {"count": 0, "lost": 0, "won": 0, "shown": ()}


def test_the_drop_needs_the_same_samples() -> None:
    with pytest.raises(SepconvertError, match=r"same samples in the same order.*shuffle=False"):
        accuracy_delta(of_classes([0, 1], [0, 1]), of_classes([0, 1], [1, 0]))
    with pytest.raises(SepconvertError, match="2 and 1 of them"):
        accuracy_delta(of_classes([0, 1], [0, 1]), of_classes([0], [0]))
