"""Training and held-out samples: their order, their augmentation and each process's share of a batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.distillation.checkpoint import digest_of
from sepconvert.files.data import Batch
from sepconvert.measure.metrics.evaluation import pair_of
from sepconvert.network.tensors import InputBatch, cast

ACCUMULATED = 8
"""Samples of a step where the loader makes batches of one, as it must where images have several sizes."""


Positions = npt.NDArray[np.int64]
"""Positions of samples in `Samples.indices`."""


@dataclass(frozen=True)
class Samples:
    """The samples that a loader yields, to be batched anew.

    A step is made of `batch_size` samples, of which the models are run on `at_once` together.
    """

    loader: DataLoader[Batch]
    batched: Callable[[Any], InputBatch]  # makes inputs of what the loader yields as x
    indices: tuple[Any, ...]
    batch_size: int
    at_once: int
    augment: bool = True  # whether pictures are shifted and mirrored

    @classmethod
    def of(
        cls, loader: DataLoader[Batch], batched: Callable[[Any], InputBatch], name: str, processes: int
    ) -> "Samples":
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
        samples = cls(loader, batched, indices, ACCUMULATED if size == 1 else size, size)
        if not indices or len(indices) // samples.steps < processes:
            raise SepconvertError(
                f"{name}: expected a sample for each of {processes} processes in every batch, got"
                f" {len(indices)} samples in steps of {samples.batch_size}; check the data path and the batch"
                " size"
            )
        return samples

    @property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return math.ceil(len(self.indices) / self.batch_size)

    @property
    def accumulates(self) -> bool:
        """Whether the gradients of several batches are those of a step."""
        return self.at_once < self.batch_size

    def shuffled(self, seed: int, epoch: int) -> list[Positions]:
        """Return shuffled batches whose sizes differ by at most one: BatchNorm suffers from a small one."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.indices))
        return np.array_split(order, self.steps)

    def ordered(self) -> list[Positions]:
        """Return batches to run at once, in a fixed order."""
        return self.run_at_once(np.arange(len(self.indices)))

    def run_at_once(self, positions: Positions) -> list[Positions]:
        """Return some samples in batches of `at_once`."""
        return np.split(positions, range(self.at_once, len(positions), self.at_once))

    def load(self, batches: Iterable[Positions]) -> Iterator[Batch]:
        """Yield these batches; the user's random generators are left alone.

        Raises:
            SepconvertError: the images of a batch have several sizes.
        """
        loader = DataLoader(
            self.loader.dataset,
            batch_sampler=[[self.indices[i] for i in batch] for batch in batches],
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers,
            worker_init_fn=self.loader.worker_init_fn,
            generator=torch.Generator(),  # otherwise it would draw from the user's
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "equal size" not in str(error):  # as torch.stack puts it
                raise
            raise SepconvertError(
                "data: expected samples of one shape in a batch, got several; pass images of several sizes "
                "in a DataLoader of batch_size=1"
            ) from error

    def pair(self, batch: object) -> tuple[InputBatch, Any]:
        """Return the inputs and the targets of a batch that the loader yields.

        Raises:
            SepconvertError: it is no pair.
        """
        x, y = pair_of(batch)
        return self.batched(x), y

    def first(self) -> InputBatch:
        """Return a batch of the first sample alone."""
        return self.first_pair()[0]

    def first_pair(self) -> tuple[InputBatch, Any]:
        """Return the inputs and the targets of the first sample alone."""
        return self.pair(next(self.load([np.array([0])])))

    def fingerprint(self) -> str:
        """Return a hash of the number of samples and of the first, the middle and the last one."""
        shown = np.array([0, len(self.indices) // 2, -1])
        batches = list(self.load(np.split(shown, 3) if self.accumulates else [shown]))
        return digest_of([torch.tensor(len(self.indices)), *pytree.tree_leaves(batches)])


class Share(NamedTuple):
    """One process's part of a batch of `whole` samples; `mirrored` says which pictures are mirrored."""

    positions: Tensor
    x: InputBatch
    y: Any
    mirrored: Tensor
    whole: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "Share":
        """Return the share on a device, its inputs in the dtype of the model."""
        return Share(
            self.positions.to(device),
            as_input(self.x, device, dtype),
            on_device(self.y, device),
            self.mirrored.to(device),
            self.whole,
        )


def as_input(samples: InputBatch, device: torch.device, dtype: torch.dtype) -> InputBatch:
    """Return inputs on a device, in the dtype of the model unless they are integers."""
    return replace(samples, inputs=on_device(cast(samples.inputs, dtype), device))


def on_device(values: Any, device: torch.device) -> Any:
    """Return nested values with their tensors on a device."""
    return pytree.tree_map_only(Tensor, lambda value: value.to(device), values)


def shares(
    samples: Samples, seed: int, epoch: int, view: int, *, done: int, rank: int, processes: int
) -> Iterator[list[Share]]:
    """Yield one process's shares of an epoch's steps after the first `done`, augmented as in `view`.

    A step has one share, unless fewer samples are run at once than it has. The pictures of a view depend
    neither on the order of the samples nor on the number of processes.
    """
    draws = np.random.default_rng([seed, view, 1]).random((3, len(samples.indices)))
    steps = samples.shuffled(seed, epoch)[done:]
    own = [samples.run_at_once(step[rank::processes]) for step in steps]
    loaded = samples.load(positions for parts in own for positions in parts)
    for step, parts in zip(steps, own, strict=True):
        found = []
        for positions in parts:
            x, y = samples.pair(next(loaded))
            still = torch.zeros(len(x), dtype=torch.bool)
            x, mirrored = augmented(x, draws[:, positions]) if samples.augment else (x, still)
            found.append(Share(torch.from_numpy(positions), x, y, mirrored, len(step)))
        yield found


def augmented(samples: InputBatch, draws: npt.NDArray[np.float64]) -> tuple[InputBatch, Tensor]:
    """Return pictures shifted by up to an eighth and mirrored at random, and which of them are mirrored.

    `draws` are 3×N random numbers from 0 to 1. Inputs that are no single batch of pictures stay as they are.
    """
    (x, *others) = samples.inputs
    if others or not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or samples.axis:
        return samples, torch.zeros(len(samples), dtype=torch.bool)
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
    pictures = torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted)
    return InputBatch((pictures,)), mirrored
