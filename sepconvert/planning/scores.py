"""Scores on the data, of as many samples as a decision needs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from sepconvert.base.distributed import once
from sepconvert.base.errors import SepconvertError
from sepconvert.base.progress import Progress
from sepconvert.files.data import Batch
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.measure.metrics.evaluation import (
    Evaluation,
    MetricDelta,
    Scoring,
    evaluate,
    joined,
    metric_delta,
)
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch

# Numbers of images after which a plan may be judged already: one that loses nothing, or ten points, needs no
# more. They are looked at only where at least as many are left.
_EARLY = (500, 2000)


# With so many images, plans are chosen on one half. On the other, the drop of the chosen plan has no part in
# the choice, and is free of its bias.
_LARGE = 4000


@dataclass(frozen=True, eq=False)
class _Part:
    """Some of the scored images, by their places in the data, and a loader of them."""

    places: npt.NDArray[np.int64]
    loader: Iterable[Batch]


@dataclass(frozen=True, eq=False)
class Deployment:
    """The way in which models are run to be scored.

    Attributes:
        form: that they are deployed in; None for floating point.
        drafts: of files that ONNX Runtime runs faster than torch does the models; None if it does not.
    """

    form: Int8Form | None = None
    drafts: Drafts | None = None

    def of(self, model: nn.Module) -> nn.Module:
        """Return a converted model as it is deployed."""
        return self.in_floating_point(model) if self.form is None else self.form.module(model)

    def in_floating_point(self, model: nn.Module) -> nn.Module:
        """Return a model in floating point, whatever form it is deployed in."""
        found = None if self.drafts is None else self.drafts.module(model)
        return private_copy(model) if found is None else found


class Scores:
    """Scores of the original on the data, and of converted models on growing parts of them.

    The parts are drawn at random, as data are often sorted by class. A loader whose samples cannot be indexed
    is one part.

    Attributes:
        original: evaluation of the original, on all images.
        scoring: how outputs are judged, with the metric filled in.
        sizes: numbers of images after which a model may be judged, rising; the last is all of them.
        choosing: the one of `sizes` that plans are chosen on, where they are chosen by their measured drop.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        scoring: Scoring,
        seed: int,
        progress: Progress,
        on_images: Callable[[InputBatch], None] | None = None,
        deployment: Deployment = Deployment(),
    ) -> None:
        """Take the original and the scored data.

        `on_images` is called with each batch of them, once. The original is scored in floating point, and
        converted models as they are deployed.
        """
        self._progress, self._deployment = progress, deployment
        running = deployment.in_floating_point(model)
        self.original = evaluate(running, data, scoring, progress, "accuracy, original", on_images)
        if not math.isfinite(self.original.value):
            raise SepconvertError(
                f"`metric` {self.original.metric.name}: is {self.original.value} for the original on "
                f"{len(self.original):,} samples, so that no drop can be measured; pass other `data`, or "
                "another metric"
            )
        self.scoring = replace(scoring, metric=self.original.metric)
        size = len(self.original)
        self.sizes, self.choosing = sizes_of(size) if _may_be_divided(data) else ((size,), size)
        self._parts = _parts(data, self.sizes, seed)
        self._known: dict[int, tuple[nn.Module, list[Evaluation]]] = {}  # by identity, which is kept alive

    def evaluation(self, model: nn.Module) -> Evaluation:
        """Return the evaluation of a converted model on all images, in the order of the data."""
        found = joined(self._evaluated(model, self.sizes[-1]))
        order = np.argsort(self._places(0, self.sizes[-1]))
        return found.at(order)

    def in_floating_point(self, model: nn.Module) -> Evaluation:
        """Return the evaluation of a converted model in floating point, whatever form it is deployed in."""
        parts = [once(partial(self._in_floating_point, model, part.loader)) for part in self._parts]
        return joined(parts).at(np.argsort(self._places(0, self.sizes[-1])))

    def delta(self, model: nn.Module, images: int) -> MetricDelta:
        """Return the drop of a converted model on the first `images` in the random order, one of `sizes`."""
        return self._delta(model, 0, images)

    def rest(self, model: nn.Module) -> MetricDelta | None:
        """Return the drop on the images that no plan is chosen on; None if there are none."""
        if self.choosing == self.sizes[-1]:
            return None
        return self._delta(model, self.choosing, self.sizes[-1])

    def share(self, model: nn.Module, copy: nn.Module) -> None:
        """Take the evaluation of a model for that of its copy, which need not be run."""
        if id(model) in self._known:
            self._known[id(copy)] = copy, self._known[id(model)][1]

    def _delta(self, model: nn.Module, start: int, stop: int) -> MetricDelta:
        found = joined(self._evaluated(model, stop)).at(np.arange(start, stop))
        return metric_delta(self.original.at(self._places(start, stop)), found)

    def _places(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.concatenate([part.places for part in self._parts])[start:stop]

    def _evaluated(self, model: nn.Module, images: int) -> Sequence[Evaluation]:
        """Return the evaluations of a model on the parts that make up the first `images`, each made once."""
        _, known = self._known.setdefault(id(model), (model, []))
        needed = self.sizes.index(images) + 1
        for part in self._parts[len(known) : needed]:
            known.append(once(partial(self._run, model, part.loader)))
        return known[:needed]

    def _run(self, model: nn.Module, loader: Iterable[Batch]) -> Evaluation:
        deployed = self._deployment.of(model)
        return evaluate(deployed, loader, self.scoring, self._progress, "accuracy, converted")

    def _in_floating_point(self, model: nn.Module, loader: Iterable[Batch]) -> Evaluation:
        running = self._deployment.in_floating_point(model)
        return evaluate(running, loader, self.scoring, self._progress)


def sizes_of(images: int) -> tuple[tuple[int, ...], int]:
    """Return the numbers of images to judge models after, and the one to choose on."""
    choosing = images // 2 if images >= _LARGE else images
    early = [size for size in _EARLY if 2 * size <= choosing]
    return tuple(dict.fromkeys((*early, choosing, images))), choosing


def _may_be_divided(data: object) -> bool:
    """Return whether single samples of a loader can be read, in the order in which it yields them."""
    return (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and isinstance(data.sampler, SequentialSampler)
        and data.batch_size is not None
        and not data.drop_last
    )


def _parts(data: Iterable[Batch], sizes: Sequence[int], seed: int) -> tuple[_Part, ...]:
    if len(sizes) == 1 or not isinstance(data, DataLoader):
        return (_Part(np.arange(sizes[-1]), data),)
    order = torch.randperm(sizes[-1], generator=torch.Generator().manual_seed(seed)).numpy()
    parts = []
    for start, stop in zip((0, *sizes), sizes, strict=False):
        places = np.sort(order[start:stop])
        loader = DataLoader(
            Subset(data.dataset, places.tolist()),
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
        )
        parts.append(_Part(places, loader))
    return tuple(parts)
