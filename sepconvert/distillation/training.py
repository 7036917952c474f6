"""Distillation: train a converted model to compute what the original computes.

Built on Hugging Face Accelerate: the same call runs on one CPU, one GPU, and, started by `accelerate launch`
or `torchrun`, on many GPUs or machines. All random numbers (order, augmentation) are drawn from the seed, the
epoch and the step alone, so that a run that was killed resumes where it was.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.determinism import reproducible
from sepconvert.base.errors import SepconvertError, check_number, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.values import Precision, Task
from sepconvert.base.progress import Stage, stage
from sepconvert.distillation.checkpoint import Checkpoint, State, digest_of, read_checkpoint, write_checkpoint
from sepconvert.distillation.judge import Judge
from sepconvert.distillation.losses import (
    TaskLoss,
    check_labels,
    embedding_loss,
    feature_loss,
    holding_labels,
    label_loss,
)
from sepconvert.distillation.results import Epoch, FinetuneResult, TrainingStep
from sepconvert.distillation.samples import Samples, Share, as_input, shares
from sepconvert.distillation.settings import Settings
from sepconvert.distillation.student import Student, prepared
from sepconvert.distillation.teacher import Tap, Target, Teacher, classifier_of, replaced_layers
from sepconvert.files.data import UNLABELLED, Batch, class_labels
from sepconvert.measure.divergence import floating_outputs, yardstick_of
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.network.copies import duplicate

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


FAR = 0.3
"""Divergence, without a unit, of a student that learns at the full rate; a nearer one would be led away.

At the full rate a ResNet-9 that starts at a divergence of 0.09 is at 0.11 after two epochs."""


@reproducible()
@stage(Stage.TRAINING)
def finetune(
    student: nn.Module,
    teacher: nn.Module,
    data: DataLoader[Batch],
    heldout: DataLoader[Batch],
    *,
    epochs: int,
    labelled: bool,
    task: Task = Task(),
    learning_rate: float = 4e-3,
    temperature: float = 4.0,
    feature_weight: float = 0.0,
    renew_statistics: bool = True,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    seed: int = 0,
    progress: Callable[[TrainingStep], None] | None = None,
) -> FinetuneResult:
    """Train a copy of `student` to compute what `teacher` computes; both models are left as they are.

    The loss is the sum of

    - the divergence of the outputs, each by the kind that suits it (`sepconvert.measure.divergence.Kind`), at
      `temperature`, squared errors relative to the variance of the teacher's outputs,
    - the relative squared error of the embedding: the input of the `nn.Linear` at the end, if there is one
      (Chen et al., arXiv:2203.14001, use that alone),
    - `feature_weight` times the relative squared error of the outputs of replaced layers, of five at most,
    - the task's own `loss`, if it has one, of the outputs and the targets of the data, or else,
    - with `labelled`, the cross-entropy with those labels that are not -1.

    Both models see the same picture, shifted and mirrored at random (Beyer et al., arXiv:2106.05237); the
    label of a mirrored picture counts where the teacher predicts it too. Several inputs stay as they are, and
    so does everything if the task's loss takes other targets than class numbers of samples, which would not
    move along. The optimizer is AdamW with a linear warm-up, cosine decay and clipped gradients. Both models
    are in eval mode, without dropout that is, except that the student's BatchNorms use the statistics of the
    batch, unless told otherwise; those whose parameters are all frozen stay as they are, as does every frozen
    parameter. Models in half precision are trained in float32.

    The teacher, if it is a classifier, runs on each picture in every third epoch only. The other epochs show
    the picture shifted and mirrored as before, with the teacher's output, which was kept.

    After each epoch the trained weights and their exponential moving average are evaluated on `heldout`. The
    result has the weights with the lowest loss there (divergence and labels), or those of the start if none
    has a lower one. Accuracy on some hundred samples is too coarse to tell epochs apart, and labels lead away
    from the teacher. If the loss is no longer finite, training ends and the result has the best weights so
    far.

    Args:
        student: the model to train, such as the `model` of a `ConversionResult`.
        teacher: the original.
        data: batches `(x, y)` with a map-style dataset; every sample that it yields is used once an epoch, in
            an order of its own. Its batch size is the size of a step over all processes; with a batch size of
            1, which images of several sizes need, a step has `sepconvert.distillation.samples.ACCUMULATED`.
        heldout: held-out batches, from which the weights are chosen; nothing is trained on them.
        epochs: passes over `data`.
        labelled: use the labels; one of -1 means none.
        task: what the outputs are for: `batch_dim`, `divergence`, `loss`, and the `metric` and `output`, by
            which these are understood.
        learning_rate: largest learning rate of a student that is far from its teacher.
        temperature: softmax temperature. One epoch of a ResNet-20 on 10,000 pictures ends at 87.0 % with 4,
            at 86.0 % with 2 and with a divergence that is larger by 0.03.
        feature_weight: weight of the features' error.
        renew_statistics: whether BatchNorms use the statistics of the batch, and keep their mean.
        precision: Accelerate's mixed precision; None leaves it to `accelerate launch`.
        checkpoint: file in which the run is kept every `checkpoint_every` steps and at the end of each epoch.
        checkpoint_every: steps between two checkpoints.
        resume: continue from `checkpoint`, or start if there is none yet. On one CPU the result is, bit by
            bit, that of a run that was not interrupted.
        seed: of the order and the augmentation.
        progress: called after each step in the main process.

    Returns:
        The trained model and its history.

    Raises:
        SepconvertError: an option is out of range, data are empty or not map-style, the models cannot run on
            them or do not match, the task's loss is no finite number, or `checkpoint` is damaged, of another
            run, or in the way.
    """
    settings = Settings(epochs, labelled, learning_rate, temperature, feature_weight, seed, renew_statistics)
    check_number("checkpoint_every", checkpoint_every, 1, whole=True)
    if resume and checkpoint is None:
        raise SepconvertError("`resume`: expected a `checkpoint` to continue from, got none; pass its path")
    accelerator = _accelerator(precision)
    stored = None if checkpoint is None else read_checkpoint(checkpoint, resume, accelerator)
    batched = partial(scoring_of(replace(task, batch_dim=task.batch_dim or 0)).batched, teacher)
    training_data = Samples.of(data, batched, "training data", accelerator.num_processes)
    heldout_data = Samples.of(heldout, batched, "held-out data", 1)
    fingerprint = {
        "student": digest_of(unshadowed(student).state_dict().values()),
        "teacher": digest_of(unshadowed(teacher).state_dict().values()),
        "training data": training_data.fingerprint(),
        "held-out data": heldout_data.fingerprint(),
        "options": f"{settings} batch={training_data.batch_size} precision={accelerator.mixed_precision}"
        f"{_written(task)}",
    }
    training = _training(accelerator, settings, student, teacher, training_data, heldout_data, task)
    if checkpoint is not None and stored is not None:
        stored[0].check_run(checkpoint, fingerprint)
        training.restore(stored)
    else:
        training.evaluate()

    def save() -> None:
        if checkpoint is not None:
            state, tensors = training.checkpoint(fingerprint)
            if accelerator.is_main_process:
                write_checkpoint(checkpoint, state, tensors)

    training.run(save, checkpoint_every, progress)
    return training.result(student)


def _written(task: Task) -> str:
    """Return what training depends on of a task, as a checkpoint stores it; "" where nothing is said."""
    loss = getattr(task.loss, "__qualname__", task.loss)
    given = {"divergence": task.divergence, "loss": loss, "output": task.output}
    return "".join(f" {name}={value}" for name, value in given.items() if value is not None)


def _training(
    accelerator: Accelerator,
    settings: Settings,
    student: nn.Module,
    teacher: nn.Module,
    data: Samples,
    heldout: Samples,
    task: Task,
) -> "Training":
    """Return what trains a copy of `student` on copies of the rest."""
    device, (example, targets) = accelerator.device, data.first_pair()
    original = prepared(teacher, example, device)
    task_loss = TaskLoss.of(task)
    if task_loss is None and settings.labelled:
        check_labels(targets, len(example))
    if task_loss is not None:
        task_loss.check(student, example, targets)
        holds = bool((class_labels(targets, len(example)) != UNLABELLED).all())
        data = replace(data, augment=data.augment and holds)
    metric = scoring_of(replace(task, batch_dim=example.axis)).metric
    yardstick = yardstick_of(original, example, task.divergence, "any" if metric is None else metric.targets)
    learner = Student(
        student,
        example,
        accelerator,
        settings.learning_rate,
        settings.epochs * data.steps,
        renews_statistics=settings.renew_statistics and not data.accumulates,
    )
    classifier = classifier_of(original, learner.module, as_input(example, device, learner.dtype))
    layers = replaced_layers(student, teacher) if settings.feature_weight else []
    return Training(
        accelerator,
        settings,
        data,
        Teacher(original, Tap(original, classifier, layers), accelerator, settings.epochs, len(data.indices)),
        learner,
        Tap(learner.module, classifier, layers),
        Judge(original, heldout, accelerator, settings, learner.dtype, yardstick, task_loss),
    )


def _accelerator(precision: Precision | None) -> Accelerator:
    # Buffers are averaged before they are looked at; auxiliary heads are unused in eval mode.
    options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    # Without this, Accelerate lets several processes without GPUs train each on its own.
    cpu = not torch.accelerator.is_available()
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[options])
    except ValueError as error:  # fp16 without a GPU; another precision than before in this process
        raise SepconvertError(
            f"`precision`: expected one that this machine and process allow, got {precision}:"
            f" {first_line(error)}; leave it out, or start another process"
        ) from error


class Training:
    """The course of the training: what is done in each step and each epoch, and how far it is."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        data: Samples,
        teacher: Teacher,
        student: Student,
        tap: Tap,
        judge: Judge,
    ) -> None:
        """Take the parts; `tap` is on the student."""
        self.accelerator, self.settings, self.data = accelerator, settings, data
        self.teacher, self.student, self.tap, self.judge = teacher, student, tap, judge
        self.step = 0
        self.loss_sum = 0.0  # over this epoch's steps
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None  # None while it is the start
        self.stopped: str | None = None
        self.seconds = 0.0
        self._since = time.perf_counter()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.settings.epochs * self.data.steps

    @property
    def elapsed(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self.seconds + time.perf_counter() - self._since

    def run(
        self, save: Callable[[], None], every: int, progress: Callable[[TrainingStep], None] | None
    ) -> None:
        """Train to the end, or until the loss is no longer finite.

        `save` is called every so many steps and after each epoch.
        """
        with ExitStack() as stack:
            for tap in (self.teacher.tap, self.tap):
                stack.enter_context(tap.attached())
            if self.step < self.steps:
                self.teacher.recall(self.step, self.data.steps, self._shares)
            started, first = time.perf_counter(), self.step
            while self.step < self.steps and self.stopped is None:
                epoch, done = divmod(self.step, self.data.steps)
                for parts in self._shares(epoch, done):
                    loss = self._train(epoch, parts)
                    if not math.isfinite(loss):
                        self.stopped = f"the loss was {loss} at step {self.step + 1} of {self.steps}"
                        break
                    self.step += 1
                    self.loss_sum += loss
                    if self.step % self.data.steps == 0:
                        self.teacher.finish(epoch)
                        self.evaluate()
                        self.loss_sum = 0.0
                        save()
                    elif self.step % every == 0:
                        save()
                    if progress is not None and self.accelerator.is_main_process:
                        pace = (time.perf_counter() - started) / (self.step - first)
                        left = (self.steps - self.step) * pace
                        progress(TrainingStep(self.step, self.steps, epoch + 1, loss, left))

    def _shares(self, epoch: int, done: int = 0) -> Iterator[list[Share]]:
        """Yield this process's shares of the epoch's steps after the first `done`."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for parts in shares(
            self.data,
            self.settings.seed,
            epoch,
            self.teacher.view(epoch),
            done=done,
            rank=rank,
            processes=processes,
        ):
            yield [share.to(self.accelerator.device, self.student.dtype) for share in parts]

    def _train(self, epoch: int, parts: Sequence[Share]) -> float:
        """Do one step; return the mean loss of the whole step over all processes."""
        total = torch.zeros((), device=self.accelerator.device)
        for number, share in enumerate(parts, start=1):
            target = self.teacher.target(epoch, share)
            with self.student.accumulating(last=number == len(parts)):
                loss = self._loss(target, self.student.run(share.x), share)
                # Gradients are averaged over processes, whose shares may differ by a sample.
                loss = loss * (len(share.x) * self.accelerator.num_processes / share.whole)
                self.student.backward(loss)
            total = total + loss.detach()
        mean = float(self.accelerator.reduce(total, "mean"))
        if math.isfinite(mean):
            # A student that is close to its teacher learns more slowly.
            reach = min(1.0, math.sqrt(self.history[0].divergence / self.judge.yardstick.unit / FAR))
            self.student.step(self.settings.learning_rate * reach * _schedule(self.step, self.steps))
        return mean

    def _loss(self, target: Target, returned: Any, share: Share) -> Tensor:
        """Return the mean loss of a share."""
        actual, yardstick = floating_outputs(returned), self.judge.yardstick
        loss = yardstick.scaled(target.outputs, actual, self.settings.temperature)
        if target.embedding is not None and self.tap.embedding is not None:
            variance = self._variance(target.embedding, share.whole)
            loss = loss + embedding_loss(target.embedding, self.tap.embedding, variance)
        if self.tap.features:
            errors = feature_loss(self.teacher.tap.features, self.tap.features)
            loss = loss + self.settings.feature_weight * errors
        if self.judge.task_loss is not None:
            loss = loss + self.judge.task_loss(returned, share.y)
        elif self.settings.labelled:
            known = class_labels(share.y, len(share.x)).to(share.mirrored.device)
            labels = holding_labels(known, share.mirrored, target.outputs[0])
            loss = loss + label_loss(yardstick.kinds[0], actual, labels) / len(labels)
        return loss

    def _variance(self, embedding: Tensor, whole: int) -> Tensor:
        """Return the variance of the elements in all shares that run at once; 1 where they do not vary."""
        given = embedding.float()  # not every backend has double
        sums = torch.stack([given.sum(), given.square().sum()])
        if self.data.accumulates:  # processes may have different numbers of shares
            whole = len(given)
        else:
            sums = self.accelerator.reduce(sums, "sum")
        mean, square = sums / (whole * given.shape[1])
        variance = square - mean.square()
        return torch.where(variance > 0, variance, 1)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Append the score on held-out data to `history`, and keep the weights if they are the best so far.

        Raises:
            SepconvertError: the divergence at the start is not finite.
        """
        self.student.agree_on_buffers()
        candidates = [self.student.trained()]
        if self.step:
            candidates.append(self.student.average.module)
        scores = self.judge.scores(candidates)
        better = min(range(len(candidates)), key=lambda index: scores[index].loss)
        score = scores[better]
        if not self.step and score.divergence == math.inf:
            raise SepconvertError(
                "`student`: expected finite outputs on held-out data to start from, got NaN or Inf from it"
                " or from the teacher; check both models and the preprocessing of the inputs"
            )
        if self.step and score.loss < min(epoch.heldout_loss for epoch in self.history):
            state = unshadowed(candidates[better]).state_dict()
            self.best = {
                name: tensor.cpu().clone() for name, tensor in state.items() if isinstance(tensor, Tensor)
            }
        self.history.append(
            Epoch(
                epoch=self.step // self.data.steps,
                step=self.step,
                loss=self.loss_sum / self.data.steps if self.step else None,
                weights=("trained", "average")[better] if self.step else "start",
                heldout_loss=score.loss,
                divergence=score.divergence,
                accuracy=score.accuracy,
                seconds=self.elapsed,
            )
        )

    def checkpoint(self, fingerprint: dict[str, str]) -> Checkpoint:
        """Return all that `restore` needs; all processes must call it."""
        self.student.agree_on_buffers()
        scaler = self.accelerator.scaler
        state = State(
            fingerprint,
            self.step,
            self.loss_sum,
            self.elapsed,
            tuple(self.history),
            None if scaler is None else scaler.state_dict(),
        )
        best = {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        return state, self.student.tensors() | best

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from what `checkpoint` returned in an earlier run."""
        state, tensors = checkpoint
        self.step, self.loss_sum, self.seconds = state.step, state.loss_sum, state.seconds
        self.history = list(state.history)
        self.student.load(tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name[:5] == "best."}
        self.best = best or None

    def result(self, student: nn.Module) -> FinetuneResult:
        """Return a copy of `student` with the best weights, and the history."""
        model = duplicate(student)
        if self.best is not None:
            plain = unshadowed(model)
            plain.load_state_dict(plain.state_dict() | self.best)
        delivered = min(self.history, key=lambda epoch: epoch.heldout_loss)
        precision = self.accelerator.mixed_precision
        return FinetuneResult(model, tuple(self.history), delivered, precision, self.stopped)


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down to nothing.

    A function of the step alone, unlike torch's schedulers: there is no state to restore, and no step to be
    skipped when the gradient scaler skips one.
    """
    rising = WARM_UP * steps
    progress = max(0.0, step - rising) / (steps - rising)
    return min(1.0, (step + 1) / (rising + 1)) * 0.5 * (1 + math.cos(math.pi * progress))
