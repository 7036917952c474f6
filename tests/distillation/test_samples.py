"""Batches of samples: which, in which order, and how they are augmented."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.samples import ACCUMULATED, Samples, augmented, shares
from sepconvert.network.tensors import InputBatch

COUNT = 22


def batched(x):
    return InputBatch((x,))


def samples(batch_size=4, *, shuffle=False, offset=0.0, processes=1):
    x = torch.arange(COUNT * 64, dtype=torch.float32).reshape(COUNT, 1, 8, 8) + offset
    loader = DataLoader(TensorDataset(x, torch.arange(COUNT)), batch_size, shuffle=shuffle)
    return Samples.of(loader, batched, "training data", processes)


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
    for (share,), *own in zip(whole, *parts, strict=True):
        own = [part for (part,) in own]
        assert {part.whole for part in own} == {share.whole} == {len(share.y)}
        order = torch.cat([part.positions for part in own]).argsort()
        expected = share.positions.argsort()
        for name in ("positions", "y", "mirrored"):
            joined = torch.cat([getattr(part, name) for part in own])
            assert torch.equal(joined[order], getattr(share, name)[expected]), name
        joined = InputBatch.joined([part.x for part in own])
        assert torch.equal(*(x.inputs[0] for x in (joined[order], share.x[expected])))


def test_pictures_are_shifted_by_up_to_an_eighth_and_mirrored():
    x = torch.rand(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    middle = np.full((3, 3), 0.5)
    still, mirrored = augmented(InputBatch((x,)), middle)
    assert torch.equal(*still.inputs, x)
    assert not mirrored.any()
    draws = np.array([[0.0, 0.5, 0.5], [0.5, 0.999, 0.5], [0.5, 0.5, 0.0]])
    shown, mirrored = augmented(batched(x), draws)
    (seen,) = shown.inputs
    assert torch.equal(seen[0, :, 2:], x[0, :, :-2])  # two of 16 rows down
    assert torch.equal(seen[1, :, :, :-1], x[1, :, :, 1:])  # one of 8 columns to the left
    assert torch.equal(seen[2], x[2].flip(2))
    assert mirrored.tolist() == [False, False, True]


PICTURES = torch.zeros(3, 2, 8, 8)


@pytest.mark.parametrize(
    "inputs",
    [
        InputBatch((torch.zeros(3, 5),)),
        InputBatch((PICTURES.byte(),)),
        InputBatch((PICTURES, PICTURES)),  # what is a pair may not be moved apart
        InputBatch((torch.zeros(8, 3, 4, 4),), axis=1),
    ],
)
def test_what_is_no_batch_of_pictures_stays(inputs):
    same, mirrored = augmented(inputs, np.zeros((3, 3)))
    assert same is inputs
    assert mirrored.tolist() == [False] * 3


def test_pictures_stay_where_targets_would_not_move_along():
    still = replace(samples(), augment=False)
    for share, *_ in shares(still, 0, 0, 0, done=0, rank=0, processes=1):
        expected = still.loader.dataset.tensors[0][share.positions]
        assert torch.equal(*share.x.inputs, expected)
        assert not share.mirrored.any()


class Sizes(Dataset):
    """Pictures of two sizes."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return torch.full((1, 8 + index % 2, 8), float(index)), index


def test_single_samples_are_gathered_in_steps():
    found = Samples.of(DataLoader(Sizes()), batched, "training data", 1)
    assert (found.batch_size, found.at_once, found.accumulates) == (ACCUMULATED, 1, True)
    steps = list(shares(found, 0, 0, 0, done=0, rank=0, processes=1))
    assert sorted(len(step) for step in steps) == [5, 6]
    for step in steps:
        assert {share.whole for share in step} == {len(step)}
        assert {len(share.x) for share in step} == {1}
        assert {share.x.inputs[0].shape[2] for share in step} == {8, 9}
    assert sorted(int(share.y) for step in steps for share in step) == list(range(11))
    own = [list(shares(found, 0, 0, 0, done=0, rank=rank, processes=2)) for rank in (0, 1)]
    assert [len(a) + len(b) for a, b in zip(*own, strict=True)] == [len(step) for step in steps]
    assert [len(batch) for batch in found.ordered()] == [1] * 11
    assert found.fingerprint() == Samples.of(DataLoader(Sizes()), batched, "", 1).fingerprint()
    assert not samples().accumulates


def test_several_sizes_in_a_batch():
    found = Samples.of(DataLoader(Sizes(), 4), batched, "training data", 1)
    with pytest.raises(SepconvertError, match="several sizes in a DataLoader of batch_size=1"):
        list(found.load(found.ordered()))


def test_too_few_samples_for_the_processes():
    with pytest.raises(SepconvertError, match="training data: expected a sample for each of 5 processes"):
        samples(processes=5)
