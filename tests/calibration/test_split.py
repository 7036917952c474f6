"""Which images are fitted to, which judge, and which are scored."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sepconvert import SepconvertError
from sepconvert.calibration.split import split_data


class Recorded(Dataset):
    """Remembers which samples were asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], self.y[index]


def test_what_is_calibrated_on_is_not_scored(samples):
    dataset = Recorded(samples[0][:300], samples[1][:300])
    parts = split_data(DataLoader(dataset, batch_size=32), None, None, 100, 0, seed=0)
    calibrated = set(dataset.asked)
    assert len(calibrated) == 100
    assert parts.calibration.origin == "split off --data, and not scored"
    dataset.asked.clear()
    assert sum(len(x) for x, _ in parts.scored) == 200
    assert calibrated.isdisjoint(dataset.asked)
    # What is held out is not trained on either.
    parts = split_data(None, DataLoader(dataset, batch_size=32), None, 100, 3, seed=0)
    dataset.asked.clear()
    heldout = [x for x, _ in parts.heldout] and set(dataset.asked)
    dataset.asked.clear()
    assert sum(len(x) for x, _ in parts.train) == 275
    assert heldout.isdisjoint(dataset.asked)


def test_batches_of_calibration_do_not_hang_on_those_of_the_loader(samples):
    parts = [
        split_data(None, DataLoader(TensorDataset(*samples), batch_size=size), None, 400, 0, 0)
        for size in (1, 200)
    ]
    one, many = (part.calibration.fit for part in parts)
    assert [len(batch) for batch in one] == [64, 64, 64, 64, 44]
    assert all(map(torch.equal, one, many))


@pytest.mark.parametrize(("count", "role"), [(1, "data"), (0, "data"), (0, "calib")])
def test_too_few_images_to_split(samples, count, role):
    loader = DataLoader(TensorDataset(samples[0][:count], samples[1][:count]))
    parts = {"data": None, "calib": None, role: loader}
    with pytest.raises(SepconvertError):
        split_data(parts["data"], parts["calib"], None, 8, 0, seed=0)


def test_training_images_of_their_own_are_held_out_from(samples):
    """Those to fit to may have no labels where those to train on have some."""
    calib = DataLoader(TensorDataset(samples[0][:40]), batch_size=8)
    train = Recorded(samples[0][100:200], samples[1][100:200])
    parts = split_data(None, calib, DataLoader(train, batch_size=8), 40, 1, seed=0)
    assert parts.labelled
    assert all((labels == -1).all() for labels in parts.calibration.labels)
    train.asked.clear()
    judged = [y for _, y in parts.heldout] and set(train.asked)
    train.asked.clear()
    assert sum(len(x) for x, _ in parts.train) == 75
    assert len(judged) == 25
    assert judged.isdisjoint(train.asked)
    with pytest.raises(SepconvertError, match="needs images to judge by too, got 3 in all"):
        split_data(None, calib, DataLoader(TensorDataset(samples[0][:3])), 40, 1, seed=0)


def test_images_need_no_labels(samples):
    loader = DataLoader(TensorDataset(samples[0][:8]), batch_size=4)
    parts = split_data(None, loader, None, 8, 0, seed=0)
    assert sum(map(len, parts.calibration.fit)) == 6
    assert not parts.labelled
