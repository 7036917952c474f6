"""Samples whose score a conversion changed most, with what both models make of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from sepconvert.base.errors import first_line
from sepconvert.files.data import Batch
from sepconvert.files.images import layout_of
from sepconvert.measure.metrics.evaluation import Evaluation, Scoring, one_of
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch, tensors_in

Kind = Literal["masks", "pictures", "boxes"]

_SHOWN = 8

# Samples that are looked at, evenly spread, where each takes long: the metric does, or both models have to
# run on all of them, as the metric of a single sample is not defined.
_COSTLY, _WITHOUT_SCORES = 500, 64


@dataclass(frozen=True, eq=False)
class ChangedSample:
    """A sample, and what the original and the converted model make of it, each as a batch of one.

    `image` is 1 × C × H × W, as the model takes it; `target`, `before` and `after` are as the metric takes
    them. `scores` are values of the metric before and after, None where it has none of a single sample.
    """

    index: int  # in the data set
    image: Tensor
    target: Any
    before: Any
    after: Any
    scores: tuple[float, float] | None

    @property
    def kind(self) -> Kind | None:
        """Kind of picture that outputs and target are; None if they are no pictures."""
        if all(_are_boxes(each, "scores") for each in (self.before, self.after)) and _are_boxes(self.target):
            return "boxes"
        made, target = self.before, self.target
        if not isinstance(made, Tensor) or not isinstance(target, Tensor) or made.ndim not in (3, 4):
            return None
        if made.is_floating_point() and target.is_floating_point() and made.shape == target.shape:
            return "pictures"
        size, masks = made.shape[2:], made.ndim == 4 and not target.is_floating_point()
        return "masks" if masks and target.shape in ((1, *size), (1, 1, *size)) else None


@dataclass(frozen=True, eq=False)
class ChangedSamples:
    """The samples of a data set that changed most, that of the largest change first.

    `examined` samples were looked at. `reason` says why none can be shown, where there should be some.
    """

    shown: tuple[ChangedSample, ...] = ()
    examined: int = 0
    reason: str | None = None

    @property
    def kind(self) -> Kind | None:
        """Kind of pictures that they are."""
        return self.shown[0].kind if self.shown else None


def changed_samples(
    models: tuple[nn.Module, nn.Module],
    data: Iterable[Batch],
    scoring: Scoring,
    evaluations: tuple[Evaluation, Evaluation],
) -> ChangedSamples:
    """Run two models again on the samples whose score changed most; none are shown if they are no pictures.

    Args:
        models: the original and the converted one.
        data: that both were evaluated on.
        scoring: by which they were.
        evaluations: of both.
    """
    size, metric = len(evaluations[0]), evaluations[0].metric
    places = _spread(size, _COSTLY if metric.costly else size)
    scores = np.stack([_scores(each, places) for each in evaluations], 1)
    changes = _changes(scores, *(each.statistics[places] for each in evaluations))
    known = np.flatnonzero(np.isfinite(changes))
    wanted: dict[int, tuple[float, float] | None]
    if len(known):
        order = known[np.argsort(-changes[known], kind="stable")]
        chosen = [int(each) for each in order if changes[each] > 0][:_SHOWN]
        wanted = {int(places[each]): (float(scores[each, 0]), float(scores[each, 1])) for each in chosen}
    else:
        places = _spread(size, _WITHOUT_SCORES)
        wanted = dict.fromkeys(places.tolist())
    try:
        made = _made(models, data, scoring, wanted)
    except Exception as error:  # the model's or the user's code, which need not take a single sample
        reason = f"the models do not run on single samples ({type(error).__name__}: {first_line(error)})"
        return ChangedSamples(reason=reason)
    if not len(known):
        made = sorted(made, key=_difference, reverse=True)[:_SHOWN]
    return ChangedSamples(tuple(made), len(places))


def _made(
    models: tuple[nn.Module, nn.Module],
    data: Iterable[Batch],
    scoring: Scoring,
    scores: Mapping[int, tuple[float, float] | None],
) -> list[ChangedSample]:
    """Return the samples that have these scores, by index, with the outputs of both models.

    There are none if they are no pictures.
    """
    original, converted = (private_copy(model) for model in models)
    found = samples_at(data, scores, partial(scoring.batched, original))
    made = []
    for index, pair in scores.items():
        x, target = found[index]
        if (image := image_of(x)) is None:
            return []
        before, after = (_judged(model, x, scoring) for model in (original, converted))
        made.append(ChangedSample(index, image[None], target, before, after, pair))
        if made[0].kind is None:
            return []
    return made


def _judged(model: nn.Module, x: InputBatch, scoring: Scoring) -> Any:
    with torch.no_grad():
        judged = scoring.judged(x.on(model).run(model), 1)
    return pytree.tree_map_only(Tensor, lambda value: value.detach().cpu(), judged)


def _scores(evaluation: Evaluation, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the metric of single samples; NaN where it has none."""
    metric, statistics = evaluation.metric, evaluation.statistics

    def score(index: int) -> float:
        try:
            return metric.value(statistics[index : index + 1])
        except Exception:  # the user's metric may need several samples
            return math.nan

    with np.errstate(all="ignore"):
        return np.array([score(index) for index in indices])


def _changes(
    scores: npt.NDArray[np.float64], before: npt.NDArray[Any], after: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Return how much each sample changed: by the share of its pixels where their classes are counted.

    A mean over classes leaps where a single pixel is taken for a class that the sample does not hold.
    """
    if before.ndim != 3:
        return np.abs(scores[:, 1] - scores[:, 0])
    pixels = np.maximum(before[..., [0, 2]].sum((1, 2)), 1)
    found: npt.NDArray[np.float64] = np.abs(after - before).sum((1, 2)) / pixels
    return found


def _spread(size: int, most: int) -> npt.NDArray[np.int64]:
    """Return so many indices at most, evenly spread over the data."""
    return np.unique(np.linspace(0, size - 1, min(most, size)).round().astype(np.int64))


def _difference(sample: ChangedSample) -> float:
    """Return the mean difference of the outputs for a sample; infinity where they differ in shape."""
    found = []
    for one, other in zip(tensors_in(sample.before), tensors_in(sample.after), strict=True):
        if one.shape != other.shape:
            return math.inf
        found.append(float((one.double() - other.double()).abs().mean()) if one.numel() else 0.0)
    return sum(found)


def _are_boxes(value: Any, *more: str) -> bool:
    """Return whether a batch of one is boxes M × 4, with M labels and M of each of some more values."""
    if not isinstance(value, list | tuple) or len(value) != 1 or not isinstance(value[0], Mapping):
        return False
    boxes, *others = (value[0].get(key) for key in ("boxes", "labels", *more))
    if not isinstance(boxes, Tensor) or (boxes.shape[1:] != (4,) and boxes.numel()):
        return False
    return all(isinstance(each, Tensor) and each.shape == boxes.shape[:1] for each in others)


def image_of(x: InputBatch) -> Tensor | None:
    """Return the first image of a batch, C × H × W; None if its first tensor is none."""
    first = next(iter(x.floating), None)
    if first is None or first.ndim != 4 or not len(first):
        return None
    return first[0] if layout_of(first.shape) == "nchw" else first[0].movedim(-1, 0)


def samples_at(
    data: Iterable[Batch], indices: Iterable[int], batched: Callable[[Any], InputBatch]
) -> dict[int, tuple[InputBatch, Any]]:
    """Return samples of a data set by index, with their targets, as batches of one.

    If the data can be indexed, no others are read. `batched` makes a batch of what the data yield as x.
    """
    wanted, found, start = set(indices), dict[int, tuple[InputBatch, Any]](), 0
    if (
        isinstance(data, DataLoader)
        and type(data.sampler) is SequentialSampler
        and type(data.batch_sampler) is BatchSampler
    ):
        for index in sorted(wanted):
            x, y = data.collate_fn([data.dataset[index]])[:2]
            found[index] = batched(x), y
        return found
    for x, y in data if wanted else ():
        samples = batched(x)
        size = len(samples)
        for index in range(size):
            if start + index in wanted:
                found[start + index] = samples[index : index + 1], one_of(y, index, size)
        start += size
        if len(found) == len(wanted):
            break
    return found
