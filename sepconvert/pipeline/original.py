"""The original: its convolutions, cost, data and scores, known before any layer is replaced."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.distributed import once
from sepconvert.base.environment import environment
from sepconvert.base.errors import SepconvertError, quoted
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.values import Selection, Task
from sepconvert.base.progress import Stage, stage
from sepconvert.calibration.footprint import images_at_once
from sepconvert.calibration.split import (
    MOST_AT_ONCE,
    DataSplit,
    Division,
    SeenTwice,
    check_shapes,
    find_seen_twice,
    image_hashes,
    split_data,
)
from sepconvert.distillation.losses import TaskLoss
from sepconvert.files.data import UNLABELLED, Batch
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.graph.gradients import add_gradients, demand_gradients
from sepconvert.files.onnx.graph.network import OnnxNetwork, open_network
from sepconvert.files.onnx.graph.protobuf import external_files
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.files.onnx.writing import checked_interface
from sepconvert.files.results import FILES, INT8_FILES
from sepconvert.measure.cost import Cost, count
from sepconvert.measure.divergence import Yardstick, yardstick_of
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import Evaluation, MetricDelta, Scoring, one_of
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.measure.profiling import as_inputs
from sepconvert.network.copies import checked, private_copy
from sepconvert.network.tensors import InputBatch, Inputs, state_tensors
from sepconvert.network.trace import ConvSite, TracedModel, traced
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.plausibility import DataFacts, ValueRange, find_facts
from sepconvert.planning.fits.learnt import Learnt
from sepconvert.planning.scores import Deployment, Scores
from sepconvert.planning.timing.clock import Clock
from sepconvert.planning.timing.pairs import time_int8

Subject = nn.Module | str | os.PathLike[str] | onnx.ModelProto
"""A model to convert: a module, or an ONNX file or model."""


@dataclass(frozen=True, eq=False)
class Original:
    """A model to convert, and what is known of it beforehand."""

    traced: TracedModel  # the user's own model, left as it is
    data: DataSplit
    cost: Cost
    scores: Scores | None  # None where there are no data to score
    seen_twice: SeenTwice | None  # None unless data are scored, and images fitted to
    facts: DataFacts | None  # None without data
    clock: Clock
    drafts: Drafts
    task: Task  # its batch dimension found, and its loss a function
    yardstick: Yardstick | None  # what outputs are compared by; None in exact mode
    no_gradients: str | None = None  # why it cannot be differentiated, as far as that is known beforehand
    form: Int8Form | None = None  # in which models are deployed; None for floating point
    int8_gain: Speedup | None = None  # of int8 over floating point, where that decided about the form

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.traced.model

    @property
    def inputs(self) -> Inputs:
        """Inputs that it is run, verified and timed on."""
        return self.traced.inputs

    @property
    def sites(self) -> tuple[ConvSite, ...]:
        """Its convolutions, in order of execution."""
        return self.traced.sites

    def count(self, model: nn.Module) -> Cost:
        """Return the cost of another model, counted as the original's: the two are compared."""
        return count(private_copy(model), self.inputs, self.cost.counter)

    @property
    def evaluation(self) -> Evaluation | None:
        """Its evaluation on the data that are scored; None where there are none."""
        return None if self.scores is None else self.scores.original

    def evaluate(self, model: nn.Module) -> Evaluation | None:
        """Return the evaluation of a converted model, computed once; None where there are no data."""
        return None if self.scores is None else self.scores.evaluation(model)

    def delta(self, model: nn.Module) -> MetricDelta | None:
        """Return the drop of the metric of a converted model; None where there are no data."""
        return None if self.scores is None else self.scores.delta(model, self.scores.sizes[-1])


def as_module(model: Subject) -> nn.Module:
    """Return what is to be converted as a module.

    Raises:
        SepconvertError: it is no model.
    """
    if isinstance(model, str | os.PathLike | onnx.ModelProto):
        return open_network(model)
    return checked(model)


def given_model(model: Subject, example_inputs: Tensor | Inputs | None) -> tuple[nn.Module, Inputs]:
    """Return what is to be converted as a module, and the inputs to run it on.

    Raises:
        SepconvertError: it is no model, or there are no inputs and it does not say what it takes.
    """
    model = as_module(model)
    if example_inputs is None and isinstance(model, OnnxNetwork):
        example_inputs = model.example()
    if example_inputs is None:
        known = "a module names none"
        if isinstance(model, OnnxNetwork):
            known = f"the file leaves sizes open ({model.described_inputs})"
        raise SepconvertError(
            f"`example_inputs`: are needed, as {known}; pass a batch of one sample, e.g. "
            "torch.rand(1, 3, 224, 224)"
        )
    inputs = as_inputs(model, example_inputs)
    if isinstance(model, OnnxNetwork):
        if taken := sorted({*FILES, *INT8_FILES} & {*external_files(model.graph.model)}):
            raise SepconvertError(
                f"the model's data are in {taken[0]}, which is the name of a result; save it with another one"
            )
        model.note_costs(inputs)
    return model, inputs


@stage(Stage.CHECKS)
def examine(
    model: Subject,
    example_inputs: Tensor | Inputs | None,
    data: Iterable[Batch] | None,
    calib: DataLoader[Batch] | None,
    job: Job,
) -> Original:
    """Find the convolutions of a model, divide the data, and score and count the original.

    Raises:
        SepconvertError: the model cannot be run, or the data do not suit it.
    """
    for name, loader in (("calib", calib), ("train", job.finetuning.train)):
        if loader is not None and not isinstance(loader, DataLoader):
            raise SepconvertError(
                f"`{name}`: expected a torch.utils.data.DataLoader, got {type(loader).__name__}; make one, "
                "e.g. DataLoader(dataset, batch_size=64)"
            )
    if data is not None and not isinstance(data, Iterable):
        raise SepconvertError(
            f"`data`: expected batches (x, y), got {quoted(data)}; pass a DataLoader, or a list of batches"
        )
    if data is None and (unused := job.task.needs_data):
        raise SepconvertError(f"`{unused}`: says how `data` are scored, and there are none; pass `data`")
    if job.mode == "exact" and calib is not None and not job.int8:
        raise SepconvertError(
            "`calib`: is for the modes approx and auto, and for `int8`; pass one of them, or leave it out"
        )
    model, inputs = given_model(model, example_inputs)
    if isinstance(model, OnnxNetwork) and model.batch is None and not job.dynamic_batch:
        raise SepconvertError(
            "`dynamic_batch`: an ONNX file keeps the batch that it has, which is open; leave it as it is"
        )
    found = trace_selected(model, inputs, job.selection)
    parts, scoring = DataSplit(data), scoring_of(job.task, model, inputs)
    division = Division(job.calibration, job.finetuning.epochs, job.seed, partial(scoring.batched, model))
    example = InputBatch(inputs, scoring.axis)
    if job.mode != "exact" or job.int8:
        division = replace(division, at_once=images_at_once(model, example, MOST_AT_ONCE))
        parts = split_data(data, calib, job.finetuning.train, division)
        check_shapes(parts, example, division, dense=not scoring.classifies)
    task, yardstick, no_gradients = replace(job.task, batch_dim=scoring.axis), None, None
    if job.mode != "exact":
        if isinstance(model, OnnxNetwork) and parts.calibration is not None:
            no_gradients = add_gradients(model, parts.calibration.fit[0].on(model).inputs)
        _check_tuning(job, parts, no_gradients)
        task = _with_checked_loss(task, model, parts, division)
        yardstick = _yardstick(model, parts, example, scoring, job.task)
    # Before the long work, as this is where data that do not suit the model are found out.
    interface = checked_interface(model, inputs, job.export, batch_first=scoring.axis == 0)
    drafts = Drafts(model, inputs, interface)
    form, gain = (None, None) if not job.int8 else _int8_form(drafts, parts, job)
    scores, seen_twice, facts = _scored(found, parts, scoring, division, job, form, drafts)
    cost = count(private_copy(model), inputs)
    clock = Clock(job.timing.runtime, job.seed, job.timing.cache, job.timing.measure_seconds, form)
    return Original(
        found,
        parts,
        cost,
        scores,
        seen_twice,
        facts,
        clock,
        drafts,
        task,
        yardstick,
        no_gradients,
        form,
        gain,
    )


def _int8_form(drafts: Drafts, parts: DataSplit, job: Job) -> tuple[Int8Form | None, Speedup | None]:
    """Return the int8 form of a model, and its speed-up over floating point if that decides.

    The form is None if it is only wanted where it is faster, and it is not.

    Raises:
        SepconvertError: there are no calibration images, or the model cannot be quantized.
    """
    if parts.calibration is None:
        raise SepconvertError("`int8`: needs images to measure ranges on; pass `calib`, or labelled `data`")
    model, inputs = drafts.original, drafts.inputs
    form = Int8Form(job.int8, model, inputs, parts.calibration.fit, drafts.interface)
    form.model(model)  # before the long work, as this is where a model that cannot be quantized is found out
    if job.int8.form == "on":
        return form, None
    gain = once(lambda: time_int8(form, model, inputs, job.timing.runtime, job.seed))
    return form if gain.significant and gain.median > 1 else None, gain


def _yardstick(
    model: nn.Module, parts: DataSplit, example: InputBatch, scoring: Scoring, task: Task
) -> Yardstick:
    """Return what outputs are compared by, decided on an image to fit to if there is one."""
    shown = example if parts.calibration is None else parts.calibration.fit[0]
    targets = "any" if scoring.metric is None else scoring.metric.targets
    return yardstick_of(model, shown, task.divergence, targets)


def _with_checked_loss(task: Task, model: nn.Module, parts: DataSplit, division: Division) -> Task:
    """Return the task with its loss as a function.

    Raises:
        SepconvertError: it cannot be found, or fails on the original and the first sample to train on.
    """
    loss = TaskLoss.of(task)
    if loss is None:
        return task
    if parts.training is not None:
        x, y = next(iter(parts.training.train))
        samples = division.batched(x)
        if not _has_targets(y):
            raise SepconvertError(
                "`loss`: the images to train on have no targets; pass some that have as `train`, or leave "
                "it out"
            )
        loss.check(model, samples[:1], one_of(y, 0, len(samples)))
    return replace(task, loss=loss.function)


def _check_tuning(job: Job, parts: DataSplit, no_gradients: str | None) -> None:
    """Raise `SepconvertError` if factors are to be tuned, and cannot be."""
    if job.finetuning or job.calibration.reconstruct:
        demand_gradients(no_gradients, "finetune" if job.finetuning else "reconstruct")
    judged = parts.calibration is not None and bool(parts.calibration.heldout)
    if job.calibration.reconstruct and not judged:
        raise SepconvertError(
            "`reconstruct`: needs images to tune on, and others to judge by; pass more of them as `calib`"
        )


def _has_targets(y: Any) -> bool:
    """Return whether there is a target in a batch: labels of -1 stand for none."""
    return bool((y != UNLABELLED).any()) if isinstance(y, Tensor) else y is not None


def _scored(
    traced: TracedModel,
    parts: DataSplit,
    scoring: Scoring,
    division: Division,
    job: Job,
    form: Int8Form | None,
    drafts: Drafts,
) -> tuple[Scores | None, SeenTwice | None, DataFacts | None]:
    """Return the original's scores, the images that are seen twice, and whether the data are plausible."""
    if parts.scored is None and parts.calibration is None:
        return None, None, None
    values, hashes = ValueRange(), list[bytes]()

    def watch(samples: InputBatch) -> None:
        for value in samples.floating:
            values.add(value)
        hashes.extend(image_hashes(samples))

    scores = seen_twice = None
    if parts.scored is not None:
        # Where many models are scored, it pays to look for the faster way to run them.
        exports = job.mode != "exact" and job.check == "onnx"
        faster = exports and once(lambda: _are_faster(drafts, scoring, division, job))
        deployment = Deployment(form, drafts if faster else None)
        scores = Scores(traced.model, parts.scored, scoring, job.seed, job.progress, watch, deployment)
        seen_twice = find_seen_twice(parts, hashes, division)
    predictions = None if scores is None else scores.original.predictions
    facts = find_facts(traced, predictions, values, parts.calibration, scoring)
    return scores, seen_twice, replace(facts, repeated=len(hashes) - len(set(hashes)))


def _are_faster(drafts: Drafts, scoring: Scoring, division: Division, job: Job) -> bool:
    """Return whether models are scored by files; a measurement, so that what it said once is kept."""
    kept = Learnt(job.learnt, (state_tensors(drafts.original), environment(job.timing.runtime)["cpu"]))
    known: bool | None = kept.recall("files are faster")
    if known is None:
        known = drafts.are_faster_than_torch(scoring.axis, division.at_once)
        kept.keep("files are faster", known)
    return known


@stage(Stage.TRACE)
def trace_selected(model: nn.Module, inputs: Inputs, selection: Selection) -> TracedModel:
    """Find every convolution of a model, and check the globs that select some of them.

    Raises:
        SepconvertError: a glob matches no convolution, or the forward pass writes to a parameter.
    """
    shared = {name: each for name, each in unshadowed(model).named_parameters() if type(each) is nn.Parameter}
    before = {name: parameter.detach().clone() for name, parameter in shared.items()}
    found = traced(model, inputs)
    for name, parameter in shared.items():
        _check_unwritten(name, parameter, before[name])
    for glob in (*selection.include, *selection.exclude):
        if not any(Selection(include=(glob,)).admits(*site.names) for site in found.sites):
            name = "include" if glob in selection.include else "exclude"
            raise SepconvertError(
                f"`{name}` {glob}: matches none of the {len(found.sites)} convolutions; inspect lists them"
            )
    return found


def _check_unwritten(name: str, parameter: Tensor, before: Tensor) -> None:
    """Raise `SepconvertError` if a forward pass changed a parameter, having put the old values back.

    Copies of the model share the memory of its parameters.
    """
    now = parameter.detach()
    if bool(((now == before) | (now.isnan() & before.isnan())).all()):
        return
    now.copy_(before)
    raise SepconvertError(
        f"the forward pass writes to the parameter {name} (to limit its norm, perhaps), which a converted "
        "model would not do; do so after the steps of training instead"
    )
