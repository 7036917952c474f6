"""Reconstruction: the factors of a plan tuned together, on the calibration images and without labels."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from sepconvert.base.distributed import once
from sepconvert.base.modules import named_modules, unshadowed
from sepconvert.base.options.values import Task
from sepconvert.calibration.footprint import footprint
from sepconvert.calibration.split import TrainingSet
from sepconvert.distillation.results import FinetuneResult
from sepconvert.files.data import split
from sepconvert.network.copies import duplicate, quick_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import InputBatch

MOST_EPOCHS = 10
"""Largest number of epochs, however much time there is."""


_LEARNING_RATE, _TEMPERATURE, _FEATURES = 1.5e-3, 2.0, 5.0


_SHOWN = 8  # images by which the time of a step is estimated


_STUDENT_PASSES = 4  # times of a forward pass of the student that its part of a step takes


_MEMORY = 2**31  # bytes of activations of a step


class Extent(NamedTuple):
    """Number of images, of passes over them, and of images in a step."""

    images: int
    epochs: int
    batch: int


def extent_within(
    seconds: float, model: nn.Module, teacher: nn.Module, images: Sequence[InputBatch]
) -> Extent:
    """Return how many of some images, and how many epochs, fit into some seconds; at least one of each.

    Estimated by the time of forward passes, so that it may be another one in another run.
    """
    number, shown = sum(map(len, images)), images[0].on(teacher)[:_SHOWN]
    passes = once(lambda: _seconds(teacher, shown) + _STUDENT_PASSES * _seconds(model, shown))
    affordable = max(1, int(seconds * len(shown) / passes))
    activations = footprint(model, shown[:1].inputs).total
    return Extent(
        min(number, affordable),
        max(1, min(MOST_EPOCHS, affordable // number)),
        max(1, _MEMORY // max(activations, 1)),
    )


def reconstruct(
    model: nn.Module, teacher: nn.Module, data: TrainingSet, extent: Extent, task: Task, seed: int
) -> FinetuneResult:
    """Tune a converted model to compute what the original does, inside as well as at its outputs.

    All parameters are tuned together, or those that are not frozen if only some are; BatchNorms keep the
    statistics that they have. Next to the divergence of the outputs, the loss has the relative error of the
    outputs of replaced layers: on a thousand images, outputs alone lead astray. The result has the weights
    with the smallest divergence on held-out images, or those of the start if none have a smaller one.

    Args:
        model: the converted model, which stays as it is.
        teacher: the original, likewise.
        data: images to tune on and others to choose weights by; labels are not used.
        extent: how long it may take.
        task: what the outputs are for.
        seed: of the choice of images, their order and augmentation.

    Raises:
        SepconvertError: the model computes without gradients.
    """
    from sepconvert.distillation.training import finetune  # with accelerate, which takes long to import

    part = split(data.train, [extent.images], seed)[0]
    loader = DataLoader(
        part.dataset,
        batch_size=min(part.batch_size or 1, extent.batch),
        collate_fn=part.collate_fn,
        num_workers=part.num_workers,
    )
    ours = {name for name, module in named_modules(model) if isinstance(module, FactorizedConv2d)}
    frozen = not any(parameter.requires_grad for parameter in unshadowed(model).parameters())
    result = finetune(
        _trainable(model) if frozen else model,
        teacher,
        loader,
        data.judge,
        epochs=extent.epochs,
        labelled=False,
        task=replace(task, loss=None),
        learning_rate=_LEARNING_RATE,
        temperature=_TEMPERATURE,
        feature_weight=_FEATURES if ours & dict(named_modules(teacher)).keys() else 0.0,
        renew_statistics=False,
        seed=seed,
    )
    if frozen:
        unshadowed(result.model).requires_grad_(False)
    return result


def _trainable(model: nn.Module) -> nn.Module:
    """Return a copy of a frozen model in which every parameter is tuned."""
    copied = duplicate(model)
    unshadowed(copied).requires_grad_(True)
    return copied


def _seconds(model: nn.Module, images: InputBatch) -> float:
    """Return the seconds of the faster of two forward passes after a first one."""
    private, times = quick_copy(model, images), list[float]()
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            images.run(private)
            times.append(time.perf_counter() - start)
    return min(times[1:])
