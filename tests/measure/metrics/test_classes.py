import numpy as np
import pytest
import torch

from sepconvert.measure.metrics.classes import (
    Labels,
    Predictions,
    are_classified,
    changes,
    joined_predictions,
)


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


def test_predictions_of_parts_are_those_of_the_whole() -> None:
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 7
    whole = Predictions.of(logits, labels)
    parts = [Predictions.of(logits[:4], labels[:4]), Predictions.of(logits[4:], labels[4:])]
    found = joined_predictions(parts)
    assert np.array_equal(found.ranked, whole.ranked)
    assert np.array_equal(found.labels, labels)
    assert found.agreement(whole) == 1
    other = Predictions.of(-logits, labels)
    assert whole.agreement(other) == float((logits.argmax(1) == (-logits).argmax(1)).double().mean())


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), True),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.uint8), True),
        (torch.zeros(3, 1), torch.zeros(3).long(), False),
        (torch.zeros(3, 4), torch.zeros(3), False),
        (torch.zeros(3, 4, 5), torch.zeros(3, 5).long(), False),
        ([torch.zeros(3, 4)], torch.zeros(3).long(), False),
        (torch.zeros(3, 4), ["a", "b", "c"], False),
    ],
)
def test_classifiers_are_told_by_logits_and_class_numbers(logits, labels, expected) -> None:
    assert are_classified(logits, labels) is expected


def test_of_equal_logits_the_first_counts():
    """As for argmax; a network in int8 has few values, and ties are common."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (500, 12), generator=random).float()
    found = Predictions.of(logits, torch.zeros(500, dtype=torch.int64))
    np.testing.assert_array_equal(found.ranked[:, 0], logits.numpy().argmax(1))
    np.testing.assert_array_equal(found.ranked, np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5])


def predictions(labels, classes=10):
    return Predictions(np.zeros((len(labels), 1), np.int64), np.array(labels), classes)


def test_labels():
    found = Labels.of(predictions([1, 1, 1, 2, 9] * 4))
    assert (found.classes, found.smallest, found.largest) == (10, 1, 9)
    assert (found.missing, found.missing_shown, found.chance) == (7, (0, 3, 4, 5, 6), 0.6)


def test_classes_missing_by_chance():
    random = np.random.default_rng(0)
    missing = [Labels.of(predictions(random.integers(0, 100, 200), 100)).missing for _ in range(200)]
    expected = Labels.of(predictions([0] * 200, 100)).missing_by_chance
    assert np.mean(missing) == pytest.approx(expected, abs=0.75)


def test_no_label_is_worse_than_guessing():
    assert Labels.of(predictions([0, 1], classes=2)).chance == 0.5
    assert Labels.of(predictions([*range(10)], classes=10)).chance == 0.1
