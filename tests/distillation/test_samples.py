"""Batches of samples: which, in which order, and how they are augmented."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.samples import Samples, augmented, shares

COUNT = 22


def samples(batch_size=4, *, shuffle=False, offset=0.0, processes=1):
    x = torch.arange(COUNT * 64, dtype=torch.float32).reshape(COUNT, 1, 8, 8) + offset
    loader = DataLoader(TensorDataset(x, torch.arange(COUNT)), batch_size, shuffle=shuffle)
    return Samples.of(loader, "training data", processes)


def test_batches_of_an_epoch_hold_each_sample_once_and_are_alike_in_size():
    found = samples(batch_size=5, shuffle=True)
    assert found.steps == 5
    for batches in (found.shuffled(0, 1), found.ordered()):
        assert sorted(np.concatenate(batches)) == list(range(COUNT))
    assert {len(batch) for batch in found.shuffled(0, 1)} == {4, 5}
    assert [len(batch) for batch in found.ordered()] == [5, 5, 5, 5, 2]


def test_seed_and_epoch_decide_the_order():
    found = samples()

    def order(seed, epoch):
        return np.concatenate(found.shuffled(seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) != order(1, 2)


def test_random_generators_of_the_user_are_left_alone():
    state = torch.get_rng_state()
    found = samples(shuffle=True)
    drawn = torch.get_rng_state()  # the user's own loader shuffles
    list(found.load(found.ordered()))
    found.first()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn)


def test_the_fingerprint_knows_the_data():
    assert samples().fingerprint() == samples(batch_size=7).fingerprint()
    assert samples().fingerprint() != samples(offset=1.0).fingerprint()


def test_processes_share_what_one_has():
    found = samples()
    (whole,) = (list(shares(found, 3, 1, 1, done=1, rank=0, processes=1)),)
    parts = [list(shares(found, 3, 1, 1, done=1, rank=rank, processes=2)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == found.steps - 1
    for share, *own in zip(whole, *parts, strict=True):
        assert {part.whole for part in own} == {share.whole} == {len(share.y)}
        order = torch.cat([part.positions for part in own]).argsort()
        expected = share.positions.argsort()
        for name in ("positions", "x", "y", "mirrored"):
            joined = torch.cat([getattr(part, name) for part in own])
            assert torch.equal(joined[order], getattr(share, name)[expected]), name


def test_pictures_are_shifted_by_up_to_an_eighth_and_mirrored():
    x = torch.rand(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    middle = np.full((3, 3), 0.5)
    still, mirrored = augmented(x, middle)
    assert torch.equal(still, x)
    assert not mirrored.any()
    draws = np.array([[0.0, 0.5, 0.5], [0.5, 0.999, 0.5], [0.5, 0.5, 0.0]])
    seen, mirrored = augmented(x, draws)
    assert torch.equal(seen[0, :, 2:], x[0, :, :-2])  # two of 16 rows down
    assert torch.equal(seen[1, :, :, :-1], x[1, :, :, 1:])  # one of 8 columns to the left
    assert torch.equal(seen[2], x[2].flip(2))
    assert mirrored.tolist() == [False, False, True]


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(3, 2, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_pictures_stays(x):
    same, mirrored = augmented(x, np.zeros((3, 3)))
    assert same is x
    assert not mirrored.any()


def test_too_few_samples_for_the_processes():
    with pytest.raises(SepconvertError, match="training data: expected a sample for each of 5 processes"):
        samples(processes=5)
