"""Training and held-out samples: their order, their augmentation and their positions in a data set."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.checkpoint import digest_of
from sepconvert.files.data import Batch

Positions = npt.NDArray[np.int64]
"""Of samples in `_Samples.indices`."""


USES = 3
"""Epochs that see a picture shifted and mirrored in the same way, if the teacher's answer to it is kept.

With 2, two ResNets end within 0.6 points of what they do with 3, now above, now below, a fifth later.
"""


# Samples -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """The samples that a loader yields, to be batched anew."""

    loader: DataLoader[Batch]
    indices: tuple[Any, ...]
    batch_size: int

    @classmethod
    def of(cls, loader: DataLoader[Batch], name: str, processes: int) -> "Samples":
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise SepconvertError(
                f"{name}: expected a DataLoader that makes batches from a map-style dataset, got one of"
                f" {type(loader.dataset).__name__}; give the dataset __len__ and __getitem__"
            )
        batches = [list(batch) for batch in loader.batch_sampler]
        # In every process the same order, if the loader shuffles.
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
        """Batches to an epoch."""
        return math.ceil(len(self.indices) / self.batch_size)

    def shuffled(self, seed: int, epoch: int) -> list[Positions]:
        """Batches of sizes that differ by one at most: BatchNorm makes little of a small remainder."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.indices))
        return np.array_split(order, self.steps)

    def ordered(self) -> list[Positions]:
        """Batches in a fixed order."""
        count, size = len(self.indices), self.batch_size
        return np.split(np.arange(count), range(size, count, size))

    def load(self, batches: Iterable[Positions]) -> DataLoader[Batch]:
        return DataLoader(
            self.loader.dataset,
            batch_sampler=[[self.indices[i] for i in batch] for batch in batches],
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers,
            worker_init_fn=self.loader.worker_init_fn,
            generator=torch.Generator(),  # else it would draw from the user's
        )

    def fingerprint(self) -> str:
        """Hash of the number of samples, and of the first, the middle and the last one."""
        (batch,) = self.load([np.array([0, len(self.indices) // 2, -1])])
        return digest_of([torch.tensor(len(self.indices)), *batch])


def augmented(x: Tensor, draws: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Pictures shifted by up to an eighth and mirrored at random, and which of them are mirrored.

    `draws` are 3×N random numbers from 0 to 1. What is no batch of pictures stays as it is.
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
