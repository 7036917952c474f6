"""Kernels and images are those of the model and of the data."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert import convert
from sepconvert.base.options import Timing
from sepconvert.report.pictures.exhibits import images_at

IMAGES = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 4, 4)
DATA = TensorDataset(IMAGES, torch.zeros(10, dtype=torch.int64))


class Counting(TensorDataset):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(DATA, batch_size=3),
        DataLoader(DATA, batch_size=4, sampler=[*range(10)]),
        [(IMAGES[:7], torch.zeros(7)), (IMAGES[7:], torch.zeros(3))],
    ],
    ids=["loader", "sampler of its own", "list"],
)
def test_images_are_those_of_their_index(data):
    found = images_at(data, [9, 2])
    assert sorted(found) == [2, 9]
    assert all(torch.equal(found[index], IMAGES[index]) for index in found)
    assert images_at(data, []) == {}


def test_the_order_is_that_of_the_loader():
    backwards = DataLoader(DATA, batch_size=4, sampler=[*range(9, -1, -1)])
    assert float(images_at(backwards, [0])[0].max()) == 9


def test_no_more_is_read_than_is_shown():
    data = Counting(*DATA.tensors)
    images_at(DataLoader(data, batch_size=5), [4, 8])
    assert data.reads == 2


def test_kernels_of_the_layers_that_moved_most():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1))
    result = convert(net, torch.randn(1, 8, 9, 9), "approx", rank=1, timing=Timing(runs=0))
    pairs = {pair.layer: pair for pair in result.exhibits.kernels}
    assert pairs.keys() == {"0", "1"}  # of 1×1 kernels there is nothing to see
    errors = {layer["name"]: layer["weight_error"] for layer in result.report["layers"]}
    assert [pair.layer for pair in result.exhibits.kernels] == sorted(pairs, key=lambda name: -errors[name])
    dense, after = net[1].weight.double(), result.model.get_submodule("1").weight.double()
    shown = pairs["1"]
    assert shown.before.shape == shown.after.shape == (12, 3, 3)
    for before, changed in zip(shown.before, shown.after, strict=True):
        place = (dense == before).all((2, 3)).nonzero()
        assert len(place) == 1
        assert torch.equal(after[tuple(place[0])], changed)
