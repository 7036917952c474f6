"""Training and held-out samples: their order, their augmentation and each process's share of a batch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.checkpoint import digest_of
from sepconvert.files.data import Batch
from sepconvert.measure.metrics import checked_batch

Positions = npt.NDArray[np.int64]
"""Positions of samples in `Samples.indices`."""


@dataclass(frozen=True)
class Samples:
    """The samples that a loader yields, to be batched anew."""

    loader: DataLoader[Batch]
    indices: tuple[Any, ...]
    batch_size: int

    @classmethod
    def of(cls, loader: DataLoader[Batch], name: str, processes: int) -> "Samples":
        """Return the samples of a loader that errors call `name`.

        Raises:
            SepconvertError: its data set is not map-style, or has too few samples for so many processes.
        """
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise SepconvertError(
                f"{name}: expected a DataLoader that makes batches from a map-style dataset, got one of"
                f" {type(loader.dataset).__name__}; give the dataset __len__ and __getitem__"
            )
        batches = [list(batch) for batch in loader.batch_sampler]
        # In the same order in every process, even if the loader shuffles.
        indices = tuple(sorted(index for batch in batches for index in batch))
        size = max(map(len, batches), default=0)
        samples = cls(loader, indices, size)
        if not indices or len(indices) // samples.steps < processes:
            raise SepconvertError(
                f"{name}: expected a sample for each of {processes} processes in every batch, got"
                f" {len(indices)} samples in batches of {size}; check the data path and the batch size"
            )
        return samples

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return math.ceil(len(self.indices) / self.batch_size)

    def shuffled(self, seed: int, epoch: int) -> list[Positions]:
        """Return shuffled batches whose sizes differ by at most one: BatchNorm suffers from a small one."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.indices))
        return np.array_split(order, self.steps)

    def ordered(self) -> list[Positions]:
        """Return batches in a fixed order."""
        count, size = len(self.indices), self.batch_size
        return np.split(np.arange(count), range(size, count, size))

    def load(self, batches: Iterable[Positions]) -> DataLoader[Batch]:
        """Return a loader of these batches that leaves the user's random generators alone."""
        return DataLoader(
            self.loader.dataset,
            batch_sampler=[[self.indices[i] for i in batch] for batch in batches],
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers,
            worker_init_fn=self.loader.worker_init_fn,
            generator=torch.Generator(),  # otherwise it would draw from the user's
        )

    def first(self) -> Tensor:
        """Return a batch of the first sample alone."""
        x, _ = checked_batch(next(iter(self.load([np.array([0])]))))
        return x

    def fingerprint(self) -> str:
        """Return a hash of the number of samples and of the first, the middle and the last one."""
        (batch,) = self.load([np.array([0, len(self.indices) // 2, -1])])
        return digest_of([torch.tensor(len(self.indices)), *batch])


class Share(NamedTuple):
    """One process's part of a batch of `whole` samples; `mirrored` says which pictures are mirrored."""

    positions: Tensor
    x: Tensor
    y: Tensor
    mirrored: Tensor
    whole: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Share":
        """Return the share on a device, its inputs in the dtype of the model."""
        return Share(
            self.positions.to(device),
            as_input(self.x, device, dtype),
            self.y.to(device),
            self.mirrored.to(device),
            self.whole,
        )


def as_input(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return inputs on a device, in the dtype of the model unless they are integers."""
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def shares(
    samples: Samples, seed: int, epoch: int, view: int, *, done: int, rank: int, processes: int
) -> Iterator[Share]:
    """Yield one process's shares of an epoch's batches after the first `done`, augmented as in `view`.

    The pictures of a view depend neither on the order of the samples nor on the number of processes.
    """
    draws = np.random.default_rng([seed, view, 1]).random((3, len(samples.indices)))
    batches = samples.shuffled(seed, epoch)[done:]
    own = [batch[rank::processes] for batch in batches]
    for batch, positions, pair in zip(batches, own, samples.load(own), strict=True):
        x, y = checked_batch(pair)
        x, mirrored = augmented(x, draws[:, positions])
        yield Share(torch.from_numpy(positions), x, y, mirrored, len(batch))


def augmented(x: Tensor, draws: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Return pictures shifted by up to an eighth and mirrored at random, and which of them are mirrored.

    `draws` are 3×N random numbers from 0 to 1. Inputs that are no batch of pictures stay as they are.
    """
    if x.ndim != 4 or not x.is_floating_point():
        return x, torch.zeros(len(x), dtype=torch.bool)
    height, width = x.shape[2:]
    down, right = height // 8, width // 8
    tops, lefts = ((draws[i] * (2 * room + 1)).astype(int) for i, room in enumerate((down, right)))
    mirrored = torch.from_numpy(draws[2] < 0.5)
    padded = F.pad(x, (right, right, down, down), mode="reflect")
    shifted = torch.stack(
        [
            picture[:, top : top + height, left : left + width]
            for picture, top, left in zip(padded, tops, lefts, strict=True)
        ]
    )
    return torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted), mirrored
