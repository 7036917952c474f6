"""The student: the converted model in training, its moving average and its optimizer."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import modules, unshadowed
from sepconvert.measure.divergence import returned_by
from sepconvert.network.copies import duplicate, quick_copy
from sepconvert.network.tensors import InputBatch

MAX_GRADIENT = 1.0
"""Norm to which gradients are clipped: nearly all are, at the temperature 4, which AdamW does not mind."""


AVERAGING = 0.05
"""Share of the steps over which weights are averaged."""


def prepared(model: nn.Module, example: InputBatch, device: torch.device) -> nn.Module:
    """Return an `unshadowed` copy in eval mode and float32 (or 64 if it is), in the fastest memory layout."""
    double = any(tensor.dtype == torch.float64 for tensor in unshadowed(model).state_dict().values())
    copied = quick_copy(model, example, torch.float64 if double else torch.float32)
    return unshadowed(copied).to(device)


class Student:
    """The weights in training, their moving average, and the optimizer.

    Both are in eval mode, except that those BatchNorms of the student that are not frozen use the statistics
    of the batch, where batches have more than one sample.
    """

    def __init__(
        self,
        model: nn.Module,
        example: InputBatch,
        accelerator: Accelerator,
        learning_rate: float,
        steps: int,
        *,
        renews_statistics: bool = True,
    ) -> None:
        """Copy `model`; `example` are inputs that it runs on, and `steps` the length of the training.

        BatchNorms keep their statistics unless it `renews_statistics`.

        Raises:
            SepconvertError: no parameter requires a gradient.
        """
        self._accelerator = accelerator
        self.module = prepared(duplicate(model), example, accelerator.device)
        # Evaluated in place of `module`, whose forward `prepare` puts into mixed precision.
        self._copy = prepared(duplicate(model), example, accelerator.device)
        self.average = AveragedModel(
            self._copy,
            multi_avg_fn=partial(_move, horizon=max(AVERAGING * steps, 1)),
            use_buffers=True,
        )
        self.average.update_parameters(self.module)  # the start is the first of those that are averaged
        self._trainable = [
            parameter for parameter in unshadowed(self.module).parameters() if parameter.requires_grad
        ]
        if not self._trainable:
            raise SepconvertError(
                "`student`: expected parameters that require a gradient, got none; call"
                " requires_grad_() first"
            )
        # Five epochs of a ResNet-20 end at a divergence of 0.37 so, at 0.42 with fixed statistics.
        for module in modules(self.module):
            if renews_statistics and isinstance(module, _BatchNorm) and _trains(module):
                module.training = True
                if module.momentum is None:  # a mean over all time would hardly move any more
                    module.momentum = 0.1
        optimizer = torch.optim.AdamW(self._trainable, learning_rate, weight_decay=0)
        self._model, self._optimizer = accelerator.prepare(self.module, optimizer)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of the inputs."""
        return self._trainable[0].dtype

    def run(self, x: InputBatch) -> Any:
        """Return what the model returns for a batch, in mixed precision if that is on."""
        with self._accelerator.autocast():
            return returned_by(self._model, x)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context of one batch of a step: gradients are exchanged among processes after the last."""
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    def step(self, learning_rate: float) -> None:
        """Descend along the gradients of `backward`, then move the average."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._accelerator.clip_grad_norm_(self._trainable, MAX_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.average.update_parameters(self.module)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the step.

        Raises `SepconvertError` if the model computes without gradients.
        """
        if not loss.requires_grad:
            raise SepconvertError(
                "`student`: expected outputs that depend on its parameters by gradients, got none from its "
                "forward; leave out torch.no_grad and detach there"
            )
        self._accelerator.backward(loss)

    def trained(self) -> nn.Module:
        """Return a copy with the weights as they are now, for evaluation."""
        unshadowed(self._copy).load_state_dict(unshadowed(self.module).state_dict())
        return self._copy

    def agree_on_buffers(self) -> None:
        """Average the statistics of BatchNorm, which each process gathers on its own samples."""
        if self._accelerator.num_processes == 1:
            return
        for model in (self.module, self.average.module):
            for buffer in unshadowed(model).buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self._accelerator.reduce(buffer, "mean"))

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint has to hold, by dotted names: weights, average and optimizer."""
        parts = {
            "student": unshadowed(self.module).state_dict(),
            "average": unshadowed(self.average).state_dict(),
            "optimizer": {
                f"{index}.{name}": value
                for index, values in self._optimizer.state_dict()["state"].items()
                for name, value in values.items()
            },
        }
        return {
            f"{part}.{name}": value
            for part, values in parts.items()
            for name, value in values.items()
            if isinstance(value, Tensor)  # a module's extra state may be anything
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors that `tensors` returned in an earlier run."""
        for model, part in ((self.module, "student"), (self.average, "average")):
            plain = unshadowed(model)
            plain.load_state_dict(plain.state_dict() | _part(tensors, part))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer").items():
            index, _, key = name.partition(".")
            parameter = self._trainable[int(index)]
            # In the parameter's layout in memory, which a checkpoint does not hold: sums round as they did.
            moments.setdefault(int(index), {})[key] = (
                torch.empty_like(parameter).copy_(value) if value.ndim else value
            )
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")
    }


@torch.no_grad()
def _move(
    averages: Iterable[Tensor], currents: Iterable[Tensor], count: Tensor | int, horizon: float
) -> None:
    """Move averages towards the current values; `count` of these went before. Faster at first."""
    weight = min(max(1 / horizon, 9 / (9 + int(count))), 1.0)
    for average, current in zip(averages, currents, strict=True):
        if average.is_floating_point():
            # Equal values stay as they are: between two infinite ones, as masks hold, there is only NaN.
            average.copy_(average.lerp(current, weight).where(average != current, current))
        else:
            average.copy_(current)


def _trains(norm: _BatchNorm) -> bool:
    """Return whether a BatchNorm has no parameters, or one that is not frozen."""
    parameters = list(unshadowed(norm).parameters())
    return not parameters or any(parameter.requires_grad for parameter in parameters)
