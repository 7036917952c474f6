"""Original and converted model → converted model with trained weights: distillation.

Built on Hugging Face Accelerate: the same call runs on one CPU, one GPU, and, started by `accelerate launch`
or `torchrun`, on many GPUs or machines. What is random (order, augmentation) is drawn from the seed, the
epoch and the step alone, so that a run that was killed resumes where it was.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from sepconvert.base.determinism import reproducible
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.distillation.checkpoint import FORMAT, digest_of, read_checkpoint, write_checkpoint
from sepconvert.distillation.losses import EMBEDDING_WEIGHT, checked_batch, class_logits, label_loss
from sepconvert.distillation.results import Epoch, FinetuneResult, Precision, Step
from sepconvert.distillation.samples import USES, Samples, augmented
from sepconvert.files.data import UNLABELLED, Batch
from sepconvert.measure.divergence import divergence, outputs, relative_error
from sepconvert.network.copies import duplicate, quick_copy
from sepconvert.network.layers import FactorizedConv2d

__all__ = ["Epoch", "FinetuneResult", "Precision", "Step", "finetune"]


WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


MAX_GRADIENT = 1.0
"""Norm to which gradients are clipped: nearly all are, at the temperature 4, which AdamW does not mind."""


FAR = 0.3
"""Divergence of a student that learns at the full rate; a nearer one would be led away first.

At the full rate a ResNet-9 that starts at a divergence of 0.09 is at 0.11 after two epochs."""


AVERAGING = 0.05
"""Share of the steps over which weights are averaged."""


MOST_KEPT = 2**30
"""Bytes of answers that are kept at most."""


@reproducible()
def finetune(
    student: nn.Module,
    teacher: nn.Module,
    data: DataLoader[Batch],
    heldout: DataLoader[Batch],
    *,
    epochs: int,
    labelled: bool,
    learning_rate: float = 4e-3,
    temperature: float = 4.0,
    feature_weight: float = 0.0,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    seed: int = 0,
    progress: Callable[[Step], None] | None = None,
) -> FinetuneResult:
    """Train a copy of `student` to answer what `teacher` answers; both models are left as they are.

    The loss is `divergence` at `temperature`, plus the `relative_error` of the embedding, which is what the
    `nn.Linear` at the end is given if there is one (Chen et al., arXiv:2203.14001, follow that alone), plus
    `feature_weight` times that of the outputs of the replaced layers, plus, with `labelled`, the
    cross-entropy of those labels that are not -1. Both
    models see the same picture, shifted and mirrored at random (Beyer et al., arXiv:2106.05237); the label of
    a mirrored one counts where the teacher gives it too. AdamW, warm-up then cosine, clipped gradients. Both
    models are in eval mode, without dropout that is, except that the student's BatchNorms train by the
    statistics of the batch; those whose parameters are all frozen stay as they are, as does every frozen
    parameter. Models in half precision are trained in float32.

    A classifier is asked about each picture in every third epoch only; in the others it is met
    again, shifted and mirrored as before, with the teacher's answer, which has been kept.

    After each epoch the trained weights and their exponential moving average are tried on `heldout`. What is
    delivered loses least there by divergence and labels, and is the start if nothing loses less: accuracy
    on some hundred samples is too coarse to tell epochs apart, and labels lead away from the teacher. If the
    loss is no longer finite, training ends and the best so far is delivered.

    Args:
        data: batches `(x, y)` with a map-style dataset; every sample that it yields is used once an epoch, in
            an order of its own. Its batch size is the size of a step over all processes.
        heldout: the same, for the choice of weights; nothing is trained on it.
        temperature: one epoch of a ResNet-20 on 10,000 pictures ends at 87.0 % with 4, at 86.0 % with 2, and
            with a divergence that is larger by 0.03.
        precision: Accelerate's mixed precision; None leaves it to `accelerate launch`.
        checkpoint: file in which the run is kept every `checkpoint_every` steps and at the end of each epoch.
        resume: go on from `checkpoint`, or start if there is none yet. On one CPU the result is, bit by bit,
            that of a run that was not interrupted.
        progress: called after each step in the main process.

    Raises:
        SepconvertError: an option is out of range, data are empty or not map-style, the models do not take
            them or do not match, or `checkpoint` is damaged, of another run, or in the way.
    """
    _check(epochs, learning_rate, temperature, feature_weight, checkpoint_every)
    if resume and checkpoint is None:
        raise SepconvertError("resume: expected a checkpoint to go on from, got none; pass its path")
    accelerator = _accelerator(precision)
    stored = None if checkpoint is None else read_checkpoint(checkpoint, resume, accelerator)
    run = _Run(
        accelerator,
        student,
        teacher,
        Samples.of(data, "data", accelerator.num_processes),
        Samples.of(heldout, "held-out data", 1),
        epochs=epochs,
        labelled=labelled,
        learning_rate=learning_rate,
        temperature=temperature,
        feature_weight=feature_weight,
        seed=seed,
    )
    if checkpoint is not None and stored is not None:
        run.restore(checkpoint, stored)
    else:
        run.evaluate()
    with run.watched():
        run.train(checkpoint, checkpoint_every, progress)
    return run.result(student)


def _check(
    epochs: int, learning_rate: float, temperature: float, feature_weight: float, checkpoint_every: int
) -> None:
    for name, value, allowed, expected in (
        ("epochs", epochs, epochs >= 1, "at least 1"),
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "a number above 0"),
        ("temperature", temperature, 0 < temperature < math.inf, "a number above 0, about 1 to 4"),
        ("feature_weight", feature_weight, 0 <= feature_weight < math.inf, "0 or a number above"),
        ("checkpoint_every", checkpoint_every, checkpoint_every >= 1, "at least 1 step"),
    ):
        if not allowed:
            raise SepconvertError(f"{name}: expected {expected}, got {value}; pass another value")


def _accelerator(precision: Precision | None) -> Accelerator:
    # Buffers are averaged before they are looked at; auxiliary heads are unused in eval mode.
    options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    # Unless it is told, Accelerate takes several processes without GPUs for strangers that each train alone.
    cpu = not torch.accelerator.is_available()
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[options])
    except ValueError as error:  # fp16 without a GPU; another precision than before in this process
        raise SepconvertError(
            f"precision: expected one that this machine and process allow, got {precision}:"
            f" {first_line(error)}; leave it out, or start another process"
        ) from error


class _Answer(NamedTuple):
    """The floating-point outputs of a model, and the input N×F of its classifier, if it has one."""

    outputs: list[Tensor]
    embedding: Tensor | None


class _Share(NamedTuple):
    """What one process has of a batch of `whole` samples; `mirrored` says which are."""

    positions: Tensor
    x: Tensor
    y: Tensor
    mirrored: Tensor
    whole: int


# Training ------------------------------------------------------------------------------------------


class _Run:
    """Training in progress: what a checkpoint holds, and what computes it."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module,
        data: Samples,
        heldout: Samples,
        *,
        epochs: int,
        labelled: bool,
        learning_rate: float,
        temperature: float,
        feature_weight: float,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.data, self.heldout = data, heldout
        self.epochs, self.labelled, self.learning_rate = epochs, labelled, learning_rate
        self.temperature, self.feature_weight, self.seed = temperature, feature_weight, seed
        self.fingerprint = {
            "student": digest_of(student.state_dict().values()),
            "teacher": digest_of(teacher.state_dict().values()),
            "data": data.fingerprint(),
            "held-out data": heldout.fingerprint(),
            "options": f"{epochs=} {labelled=} {learning_rate=} {temperature=} {feature_weight=} {seed=}"
            f" batch={data.batch_size} precision={accelerator.mixed_precision}",
        }

        example, _ = checked_batch(next(iter(data.load([np.array([0])]))))
        self.teacher = self._placed(teacher, example)
        self.student = self._placed(duplicate(student), example)
        self.average = self._placed(duplicate(student), example)
        # Evaluated in the student's stead, whose forward `prepare` puts into mixed precision.
        self.candidate = self._placed(duplicate(student), example)
        self.trainable = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        if not self.trainable:
            raise SepconvertError(
                "student: expected parameters that require a gradient, got none; call requires_grad_() first"
            )
        # Five epochs of a ResNet-20 end at a divergence of 0.37 so, at 0.42 with fixed statistics.
        for module in self.student.modules():
            if isinstance(module, _BatchNorm) and _trains(module):
                module.training = True
                if module.momentum is None:  # a mean over all time would hardly move any more
                    module.momentum = 0.1
        optimizer = torch.optim.AdamW(self.trainable, learning_rate, weight_decay=0)
        self.model, self.optimizer = accelerator.prepare(self.student, optimizer)
        # The teacher's, views×samples×(classes + embedding); None unless they are kept.
        self.answers: Tensor | None = None
        self.classifier = _classifier(self.teacher, self.student, self._input(example))
        # What the teacher's and the student's were last given.
        self.embeddings: list[Tensor | None] = [None, None]
        # Name of a replaced layer → what the teacher's and the student's last answered.
        self.features: dict[str, list[Tensor]] = {}
        if feature_weight:
            self.features = {name: [torch.empty(0)] * 2 for name in _replaced(student, teacher)}

        self.step = 0
        self.losses = 0.0  # of this epoch's steps
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None  # None while it is the start
        self.stopped: str | None = None
        self.seconds = 0.0
        self._since = time.perf_counter()

    @property
    def steps(self) -> int:
        return self.epochs * self.data.steps

    @property
    def reach(self) -> float:
        """Share of the learning rate for a student that has not far to go."""
        return min(1.0, math.sqrt(self.history[0].divergence / FAR))

    @property
    def views(self) -> int:
        """Ways in which a picture is shifted and mirrored."""
        return math.ceil(self.epochs / USES)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def train(
        self, checkpoint: Path | None, checkpoint_every: int, progress: Callable[[Step], None] | None
    ) -> None:
        """Train to the end, or until the loss is no longer finite."""
        if self.step < self.steps:
            self._recall()
        started, first = time.perf_counter(), self.step
        while self.step < self.steps and self.stopped is None:
            epoch, done = divmod(self.step, self.data.steps)
            for share in self._shares(epoch, done):
                loss = self._train_step(epoch, share)
                if not math.isfinite(loss):
                    self.stopped = f"the loss was {loss} at step {self.step + 1} of {self.steps}"
                    break
                self.step += 1
                self.losses += loss
                if self.step % self.data.steps == 0:
                    self._agree_on_answers(epoch)
                    self.evaluate()
                    self.losses = 0.0
                    self._save(checkpoint)
                elif self.step % checkpoint_every == 0:
                    self._save(checkpoint)
                if progress is not None and self.accelerator.is_main_process:
                    pace = (time.perf_counter() - started) / (self.step - first)
                    left = (self.steps - self.step) * pace
                    progress(Step(self.step, self.steps, epoch + 1, loss, left))

    def _shares(self, epoch: int, done: int) -> Iterator[_Share]:
        """This process's shares of the epoch's batches after the first `done`."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # For all samples of the view: neither the order nor the number of processes changes a picture.
        rng = np.random.default_rng([self.seed, self._view(epoch), 1])
        draws = rng.random((3, len(self.data.indices)))
        batches = self.data.shuffled(self.seed, epoch)[done:]
        shares = [batch[rank::processes] for batch in batches]
        for batch, share, pair in zip(batches, shares, self.data.load(shares), strict=True):
            x, y = checked_batch(pair)
            x, mirrored = augmented(x, draws[:, share])
            device = self.accelerator.device
            positions = torch.from_numpy(share).to(device)
            yield _Share(positions, self._input(x), y.to(device), mirrored.to(device), len(batch))

    def _view(self, epoch: int) -> int:
        """Number of the way in which each picture is shifted and mirrored."""
        return epoch if self.answers is None else epoch % self.views

    @torch.no_grad()
    def _expected(self, epoch: int, share: _Share) -> _Answer:
        """What the teacher answers, or has answered when it first saw this view."""
        view = self._view(epoch)
        if self.answers is not None and view < epoch:
            return self._unpacked(self.answers[view, share.positions])
        with self.accelerator.autocast():
            expected = _Answer(outputs(self.teacher, share.x), self.embeddings[0])
        if not epoch and self.answers is None:
            self.answers = self._room(expected, len(share.x))
        if self.answers is not None:
            self.answers[view, share.positions] = _packed(expected).to(self.answers.dtype)
        return expected

    def _room(self, expected: _Answer, samples: int) -> Tensor | None:
        """Zeros for answers such as these to the first `samples`, if those to all can be kept."""
        # Features are not kept: they are far larger.
        if self.features or self.views == self.epochs or len(expected.outputs) != 1:
            return None
        if expected.outputs[0].ndim != 2 or len(expected.outputs[0]) != samples:
            return None
        packed = _packed(expected)
        shape = self.views, len(self.data.indices), packed.shape[1]
        dtype = torch.promote_types(packed.dtype, torch.float32)  # which every backend adds up
        if math.prod(shape) * dtype.itemsize > MOST_KEPT:
            return None
        return packed.new_zeros(shape, dtype=dtype)

    def _unpacked(self, kept: Tensor) -> _Answer:
        """Of what `_packed` made."""
        if self.classifier is None:
            return _Answer([kept], None)
        width = self.teacher.get_submodule(self.classifier).in_features
        return _Answer([kept[:, width:]], kept[:, :width])

    def _agree_on_answers(self, epoch: int) -> None:
        """After an epoch of answers, let each process know those that the others were given."""
        if self.answers is not None and epoch < self.views and self.accelerator.num_processes > 1:
            self.answers[epoch] = self.accelerator.reduce(self.answers[epoch], "sum")

    def _recall(self) -> None:
        """Ask the teacher again for the answers that a checkpoint does not hold.

        In the batches of the first time, since the size of a batch may change how answers are rounded.
        """
        for epoch in range(min(self.views, math.ceil(self.step / self.data.steps))):
            done = min(self.step - epoch * self.data.steps, self.data.steps)
            for share in itertools.islice(self._shares(epoch, 0), done):
                self._expected(epoch, share)
                if self.answers is None:
                    return
            if done == self.data.steps:
                self._agree_on_answers(epoch)

    def _train_step(self, epoch: int, share: _Share) -> float:
        """One step; returns the mean loss of the whole batch over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.reach * _schedule(self.step, self.steps)
        expected = self._expected(epoch, share)
        with self.accelerator.autocast():
            actual = outputs(self.model, share.x)
        loss = divergence(expected.outputs, actual, self.temperature)
        if expected.embedding is not None and self.embeddings[1] is not None:
            squares = (self.embeddings[1] - expected.embedding).float().square().mean()
            loss = loss + EMBEDDING_WEIGHT * squares / self._variance(expected.embedding, share.whole)
        if self.features:
            errors = [relative_error(wanted, given) for wanted, given in self.features.values()]
            loss = loss + self.feature_weight * torch.stack(errors).mean()
        if self.labelled:
            # A mirrored cat is a cat, a mirrored 3 is no 3: the teacher, which saw it, tells them apart.
            holds = ~share.mirrored | (expected.outputs[0].argmax(1) == share.y)
            labels = share.y.where(holds, UNLABELLED)
            loss = loss + label_loss(actual, labels) / len(labels)
        # Gradients are averaged over processes, whose shares may differ by a sample.
        loss = loss * (len(share.x) * self.accelerator.num_processes / share.whole)
        mean = float(self.accelerator.reduce(loss.detach(), "mean"))
        if math.isfinite(mean):
            self.optimizer.zero_grad()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.trainable, MAX_GRADIENT)
            self.optimizer.step()
            self._average()
        return mean

    def _variance(self, embedding: Tensor, whole: int) -> Tensor:
        """Of the elements in all processes' shares of a batch; 1 where they do not vary."""
        given = embedding.float()  # not every backend has double
        sums = self.accelerator.reduce(torch.stack([given.sum(), given.square().sum()]), "sum")
        mean, square = sums / (whole * given.shape[1])
        variance = square - mean.square()
        return torch.where(variance > 0, variance, 1)

    def _average(self) -> None:
        """Move the averaged weights and buffers towards those of the student; sooner at first."""
        horizon = max(AVERAGING * self.steps, 1)
        weight = max(1 / horizon, 9 / (10 + self.step))
        current = self.student.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[name], min(weight, 1.0))
            else:
                value.copy_(current[name])

    @torch.no_grad()
    def evaluate(self) -> None:
        """Append to `history`, and keep the weights if they are the best so far."""
        self._agree_on_buffers()
        self.candidate.load_state_dict(self.student.state_dict())
        candidates = [self.candidate, self.average] if self.step else [self.candidate]
        measured = self._measure(candidates)
        better = min(range(len(candidates)), key=lambda index: measured[index][0])
        heldout_loss, value, accuracy = measured[better]
        if not self.step and value == math.inf:
            raise SepconvertError(
                "student: expected finite outputs on held-out data to start from, got NaN or Inf from it"
                " or from the teacher; check both models and the preprocessing of the inputs"
            )
        if self.step and heldout_loss < min(epoch.heldout_loss for epoch in self.history):
            state = candidates[better].state_dict()
            self.best = {name: tensor.cpu().clone() for name, tensor in state.items()}
        self.history.append(
            Epoch(
                epoch=self.step // self.data.steps,
                step=self.step,
                loss=self.losses / self.data.steps if self.step else None,
                weights=("trained", "average")[better] if self.step else "start",
                heldout_loss=heldout_loss,
                divergence=value,
                accuracy=accuracy,
                seconds=self.elapsed(),
            )
        )

    def _measure(self, candidates: Sequence[nn.Module]) -> list[tuple[float, float, float | None]]:
        """The loss, Inf where it is NaN, divergence and accuracy of each on all held-out data."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        losses, divergences, correct = ([0.0] * len(candidates) for _ in range(3))
        labels = 0.0
        for pair in self.heldout.load(self.heldout.ordered()[rank::processes]):
            x, y = checked_batch(pair)
            x, y = self._input(x), y.to(self.accelerator.device)
            expected = outputs(self.teacher, x)
            labels += float((y != UNLABELLED).sum())
            for index, model in enumerate(candidates):
                actual = outputs(model, x)
                # Of equal answers rounding makes it a little less than nothing.
                divergences[index] += len(x) * max(float(divergence(expected, actual)), 0.0)
                losses[index] += len(x) * float(divergence(expected, actual, self.temperature))
                if self.labelled:
                    losses[index] += float(label_loss(actual, y))
                    correct[index] += float((class_logits(actual, y).argmax(1) == y).sum())
        *sums, labels = self._summed([*losses, *divergences, *correct, labels])
        if self.labelled and not labels:
            raise SepconvertError(
                "held-out data: expected labels, got none; give some, or leave them out of all data (in"
                " Python: labelled=False)"
            )
        count, size = len(candidates), len(self.heldout.indices)
        return [
            (
                math.inf if math.isnan(loss) else loss / size,
                math.inf if math.isnan(value) else value / size,
                hits / labels if self.labelled else None,
            )
            for loss, value, hits in zip(
                sums[:count], sums[count : 2 * count], sums[2 * count :], strict=True
            )
        ]

    def _summed(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        if self.accelerator.num_processes == 1:
            return values
        totals = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        result: list[float] = self.accelerator.reduce(totals, "sum").tolist()
        return result

    def _agree_on_buffers(self) -> None:
        """Average what each process has gathered of its own samples: the statistics of BatchNorm."""
        if self.accelerator.num_processes == 1:
            return
        for model in (self.student, self.average):
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _placed(self, model: nn.Module, example: Tensor) -> nn.Module:
        """In eval mode, in float32 (or 64 if it is), on the device, in the layout that is fastest."""
        double = any(tensor.dtype == torch.float64 for tensor in model.state_dict().values())
        copied = quick_copy(model, example, torch.float64 if double else torch.float32)
        return copied.to(self.accelerator.device)

    def _input(self, x: Tensor) -> Tensor:
        dtype = self.trainable[0].dtype if x.is_floating_point() else x.dtype
        return x.to(self.accelerator.device, dtype)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep what the two classifiers are given, and what the replaced layers answer."""
        with ExitStack() as stack:
            for index, model in enumerate((self.teacher, self.student)):
                if self.classifier is not None:
                    hook = partial(self._keep_embedding, index)
                    classifier = model.get_submodule(self.classifier)
                    stack.callback(classifier.register_forward_pre_hook(hook).remove)
                for name in self.features:
                    hook = partial(self._keep, name, index)
                    stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def _keep_embedding(self, index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.embeddings[index] = inputs[0]

    def _keep(self, name: str, index: int, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.features[name][index] = output

    # Checkpoints

    def _save(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        self._agree_on_buffers()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        write_checkpoint(
            checkpoint,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "step": self.step,
                "losses": self.losses,
                "student": self.student.state_dict(),
                "average": self.average.state_dict(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "history": [asdict(epoch) for epoch in self.history],
                "seconds": self.elapsed(),
            },
        )

    def restore(self, checkpoint: Path, stored: dict[str, Any]) -> None:
        """Go on from what `_save` has written."""
        for part, value in self.fingerprint.items():
            if stored["fingerprint"][part] != value:
                raise SepconvertError(
                    f"{checkpoint}: expected a checkpoint of this run, got one with other {part}"
                    f" ({stored['fingerprint'][part]}, not {value}); repeat that run, or pass another path"
                )
        self.step, self.losses, self.seconds = stored["step"], stored["losses"], stored["seconds"]
        self.student.load_state_dict(stored["student"])
        self.average.load_state_dict(stored["average"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(stored["scaler"])
        self.best = stored["best"]
        self.history = [Epoch(**epoch) for epoch in stored["history"]]

    def result(self, student: nn.Module) -> FinetuneResult:
        """A copy of `student` with the best weights."""
        model = duplicate(student)
        if self.best is not None:
            model.load_state_dict(self.best)
        delivered = min(self.history, key=lambda epoch: epoch.heldout_loss)
        precision = self.accelerator.mixed_precision
        return FinetuneResult(model, tuple(self.history), delivered, precision, self.stopped)


def _replaced(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Paths of replaced layers that the teacher has too: a functional convolution has none."""
    paths = dict(teacher.named_modules())
    names = [name for name, module in student.named_modules() if isinstance(module, FactorizedConv2d)]
    if not (shared := [name for name in names if name in paths]):
        raise SepconvertError(
            f"feature_weight: expected replaced layers that are modules of the original, got none of"
            f" {len(names)}; leave it at 0"
        )
    return shared


@torch.no_grad()
def _classifier(teacher: nn.Module, student: nn.Module, x: Tensor) -> str | None:
    """Path of the `nn.Linear` that runs last, if both have it and it is given one vector for each sample."""
    given: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.extend((name, each) for each in inputs)

    with ExitStack() as stack:
        for name, module in teacher.named_modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(partial(note, name)).remove)
        outputs(teacher, x)
    if not given or given[-1][1].ndim != 2 or len(given[-1][1]) != len(x):
        return None
    name, embedding = given[-1]
    own = dict(student.named_modules()).get(name)
    return name if isinstance(own, nn.Linear) and own.in_features == embedding.shape[1] else None


def _packed(answer: _Answer) -> Tensor:
    """Side by side: embedding, if any, and the one output."""
    parts = answer.outputs if answer.embedding is None else [answer.embedding, *answer.outputs]
    return torch.cat(parts, 1)


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to nothing."""
    rising = WARM_UP * steps
    progress = max(0.0, step - rising) / (steps - rising)
    return min(1.0, (step + 1) / (rising + 1)) * 0.5 * (1 + math.cos(math.pi * progress))


def _trains(norm: _BatchNorm) -> bool:
    """Not if it is frozen, parameter by parameter."""
    parameters = list(norm.parameters())
    return not parameters or any(parameter.requires_grad for parameter in parameters)
