"""The teacher: the original model, a cache of its outputs, and taps on the values inside a model."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import named_modules, submodule
from sepconvert.distillation.samples import Share
from sepconvert.measure.divergence import outputs
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import InputBatch

USES = 3
"""Epochs that see a picture shifted and mirrored in the same way, if the teacher's output for it is kept.

With 2, two ResNets end within 0.6 points of what they reach with 3, sometimes above and sometimes below, and
take a fifth longer.
"""


MOST_TAPPED = 5
"""Most layers whose outputs are followed, evenly spaced: all of them are in memory during a step."""


MOST_KEPT = 2**30
"""Most bytes of outputs that are kept."""


@torch.no_grad()
def classifier_of(teacher: nn.Module, student: nn.Module, x: InputBatch) -> str | None:
    """Return the path of the last `nn.Linear`, if both have it and it takes a vector for each sample.

    A model that returns no vectors has no classifier: its `nn.Linear`s weigh channels, perhaps.
    """
    given: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.extend((name, value) for value in inputs)

    with ExitStack() as stack:
        for name, module in named_modules(teacher):
            if isinstance(module, nn.Linear):
                hook = nn.Module.register_forward_pre_hook(module, partial(note, name))
                stack.callback(hook.remove)
        returned = outputs(teacher, x)
    if not given or given[-1][1].ndim != 2 or len(given[-1][1]) != len(x):
        return None
    if all(output.ndim != 2 for output in returned):
        return None
    name, embedding = given[-1]
    own = dict(named_modules(student)).get(name)
    return name if isinstance(own, nn.Linear) and own.in_features == embedding.shape[1] else None


def replaced_layers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Return the paths of some replaced layers that the teacher has too, the last one among them.

    A functional convolution has no path.

    Raises:
        SepconvertError: there are none.
    """
    paths = dict(named_modules(teacher))
    names = [name for name, module in named_modules(student) if isinstance(module, FactorizedConv2d)]
    if not (shared := [name for name in names if name in paths]):
        raise SepconvertError(
            f"`feature_weight`: expected replaced layers that are modules of the original, got none of"
            f" {len(names)}; leave it at 0"
        )
    return shared[:: -math.ceil(len(shared) / MOST_TAPPED)][::-1]


class Tap:
    """The last input of a model's classifier and the last outputs of some of its layers, seen by hooks."""

    def __init__(self, model: nn.Module, classifier: str | None, layers: Sequence[str]) -> None:
        """Take a path of an `nn.Linear`, or None, and paths of layers; nothing is seen before `attached`."""
        self._model, self._classifier = model, classifier
        self.embedding: Tensor | None = None
        self.features = {name: torch.empty(0) for name in layers}

    @property
    def width(self) -> int:
        """Length of the vector that the classifier takes; 0 if there is no classifier."""
        classifier = None if self._classifier is None else submodule(self._model, self._classifier)
        return classifier.in_features if isinstance(classifier, nn.Linear) else 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep the values for as long as the context lasts."""
        with ExitStack() as stack:
            if self._classifier is not None:
                classifier = submodule(self._model, self._classifier)
                handle = nn.Module.register_forward_pre_hook(classifier, self._keep_embedding)
                stack.callback(handle.remove)
            for name in self.features:
                hook = partial(self._keep_feature, name)
                handle = nn.Module.register_forward_hook(submodule(self._model, name), hook)
                stack.callback(handle.remove)
            yield

    def _keep_embedding(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.embedding = inputs[0]

    def _keep_feature(self, name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features[name] = output


class Target(NamedTuple):
    """The floating-point outputs of the teacher, and the input N×F of its classifier, if it has one."""

    outputs: list[Tensor]
    embedding: Tensor | None

    def packed(self) -> Tensor:
        """Return the embedding, if any, and the only output side by side."""
        parts = self.outputs if self.embedding is None else [self.embedding, *self.outputs]
        return torch.cat(parts, 1)


class Teacher:
    """The original model, and its outputs for the pictures that it has seen.

    A picture is seen in one of several views: shifted and mirrored in its own way. If the outputs of all
    views fit in `MOST_KEPT` bytes, the teacher runs on each view once, and later epochs take what was kept.
    """

    def __init__(
        self, model: nn.Module, tap: Tap, accelerator: Accelerator, epochs: int, samples: int
    ) -> None:
        """Take a model in eval mode, `tap` being on it, and the numbers of epochs and of training samples."""
        self.model, self.tap = model, tap
        self.views = math.ceil(epochs / USES)
        self._accelerator, self._epochs, self._samples = accelerator, epochs, samples
        self._kept: Tensor | None = None  # views×samples×(embedding + classes); None unless outputs are kept

    def view(self, epoch: int) -> int:
        """Return the number of the view that an epoch sees."""
        return epoch if self._kept is None else epoch % self.views

    @torch.no_grad()
    def target(self, epoch: int, share: Share) -> Target:
        """Return the outputs for a share, or those that were kept when the teacher first saw this view."""
        view = self.view(epoch)
        if self._kept is not None and view < epoch:
            return self._unpacked(self._kept[view, share.positions])
        with self._accelerator.autocast():
            expected = Target(outputs(self.model, share.x), self.tap.embedding)
        if not epoch and self._kept is None:
            self._kept = self._room(expected, len(share.x))
        if self._kept is not None:
            self._kept[view, share.positions] = expected.packed().to(self._kept.dtype)
        return expected

    def finish(self, epoch: int) -> None:
        """Exchange among the processes the outputs that were kept in an epoch."""
        if self._kept is not None and epoch < self.views and self._accelerator.num_processes > 1:
            self._kept[epoch] = self._accelerator.reduce(self._kept[epoch], "sum")

    def recall(self, step: int, steps: int, shares: Callable[[int], Iterator[list[Share]]]) -> None:
        """Run the teacher again for the outputs that a checkpoint does not hold.

        `step` is where training resumes, `steps` the number of steps in an epoch and `shares` yields those of
        the steps of an epoch. They are batched as they were the first time, since the batch size may change
        how outputs are rounded.
        """
        for epoch in range(min(self.views, math.ceil(step / steps))):
            done = min(step - epoch * steps, steps)
            for share in itertools.chain.from_iterable(itertools.islice(shares(epoch), done)):
                self.target(epoch, share)
                if self._kept is None:
                    return
            if done == steps:
                self.finish(epoch)

    def _room(self, expected: Target, samples: int) -> Tensor | None:
        """Return zeros for the outputs for all samples, if such as the first can be kept."""
        # Features are not kept: they are far larger.
        if self.tap.features or self.views == self._epochs or len(expected.outputs) != 1:
            return None
        if expected.outputs[0].ndim != 2 or len(expected.outputs[0]) != samples:
            return None
        packed = expected.packed()
        shape = self.views, self._samples, packed.shape[1]
        dtype = torch.promote_types(packed.dtype, torch.float32)  # which every backend can add
        if math.prod(shape) * dtype.itemsize > MOST_KEPT:
            return None
        return packed.new_zeros(shape, dtype=dtype)

    def _unpacked(self, kept: Tensor) -> Target:
        """Return the target that was packed."""
        width = self.tap.width
        return Target([kept[:, width:]], kept[:, :width] if width else None)
