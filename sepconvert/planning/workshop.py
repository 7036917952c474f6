"""The workshop: carries out plans of one model, and measures the models that result."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from sepconvert.base.distributed import once
from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import unshadowed
from sepconvert.base.progress import Progress, Stage, stage
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.calibration.evidence import Evidence
from sepconvert.calibration.heldout import Divergence, Heldout
from sepconvert.factorize.approximate.problem import Approximation, nearest, output_error
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.structures import Form
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.measure.latency import Speedup
from sepconvert.network.calls import Kernel
from sepconvert.network.copies import duplicate, quick_copy, shared_parameters
from sepconvert.network.rewrite import rewrite
from sepconvert.network.trace import ConvSite, TracedModel
from sepconvert.planning.allocate import Choice, in_float, replaced
from sepconvert.planning.fits.fitting import bias_of, fit_problem, for_each_layer, kernel_of, replacement
from sepconvert.planning.fits.learnt import Learnt
from sepconvert.planning.fits.survey import LayerSurvey, form_of
from sepconvert.planning.scores import Scores
from sepconvert.planning.timing.clock import Clock


class StepKind(str, Enum):
    """The kind of a step from the original to the converted model."""

    WEIGHTS = "weights"  # factors fitted to the weights
    DATA = "data"  # factors fitted to the layer's outputs on the calibration images
    BATCHNORM = "batchnorm"  # statistics of BatchNorms re-estimated
    RECONSTRUCTION = "reconstruction"  # factors tuned together on the calibration images
    FINETUNE = "finetune"  # trained
    INT8 = "int8"  # quantized


@dataclass(frozen=True)
class Step:
    """One step from the original to the converted model, with the divergence that it leads to."""

    kind: StepKind
    name: str
    reached: Divergence
    kept: bool  # whether the next step builds on it

    def to_json(self) -> dict[str, Any]:
        """Return the step's entry in the report's `approximation.steps`."""
        return {"kind": self.kind.value, "name": self.name, **asdict(self.reached), "kept": self.kept}


@dataclass(frozen=True)
class Fitted:
    """A plan that has been carried out."""

    choice: Choice
    model: nn.Module  # shares the original's parameters where nothing was replaced
    layers: Mapping[str, Approximation]
    by_weights: Mapping[str, float]  # output errors of the same forms when fitted to the weights
    batchnorm: bool  # whether the statistics of BatchNorms were re-estimated
    steps: tuple[Step, ...] = ()  # measured on the held-out images

    @property
    def heldout(self) -> Divergence | None:
        """Divergence after the last step that was kept; None without held-out images."""
        return next((step.reached for step in reversed(self.steps) if step.kept), None)


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Times models against the original in ONNX Runtime."""

    clock: Clock
    drafts: Drafts
    runs: int
    progress: Progress

    def time(self, models: Sequence[nn.Module]) -> tuple[float, list[Speedup]]:
        """Return the milliseconds of the original, and the speed-up of each model, all timed together."""
        return once(lambda: self.clock.plans(self.drafts, models, self.runs, self.progress))


@dataclass(eq=False)
class Workshop:
    """Carries out plans of one model, and measures the models that result.

    It keeps the plans that it has carried out: layers that two plans have in common are fitted once.
    """

    traced: TracedModel
    layers: Sequence[ConvSite]  # of its convolutions, those in the survey
    surveyed: Mapping[str, LayerSurvey]  # by layer, in the order of execution
    evidence: Evidence | None
    heldout: Heldout | None
    progress: Progress
    scores: Scores | None = None  # None if there are no data to score
    stopwatch: Stopwatch | None = None  # None if plans are not timed
    form: Int8Form | None = None  # in which models are deployed; None for floating point
    learnt: Learnt = field(default_factory=Learnt)  # by earlier conversions of the same model
    _earlier: list[Fitted] = field(default_factory=list, init=False)
    _weight_fits: dict[tuple[str, Form], Kernel] = field(default_factory=dict, init=False)

    @property
    def compares_outputs(self) -> bool:
        """Whether there are held-out images, to measure the divergence from the original on."""
        return self.heldout is not None

    @property
    def times_plans(self) -> bool:
        """Whether plans are timed."""
        return self.stopwatch is not None

    def divergence(self, model: nn.Module) -> float:
        """Return the divergence of a model from the original on the held-out images; NaN without any."""
        return math.nan if self.heldout is None else self.heldout.measure(model).divergence

    def speedups(self, models: Sequence[nn.Module]) -> list[Speedup]:
        """Return the speed-up of each model over the original, timed together; [] if plans are not timed."""
        return [] if self.stopwatch is None else self.stopwatch.time(models)[1]

    @stage(Stage.FITS)
    def carry_out(self, choice: Choice) -> Fitted:
        """Fit the chosen layers in order, rewrite the model, and re-estimate BatchNorms if that helps.

        Layers up to the first that has another form than in an earlier plan are taken from there, and plans
        of earlier conversions are taken as a whole.

        Raises:
            SepconvertError: the calibration images do not reach a layer.
        """
        name = "plan", {each: choice[each].form for each in self.surveyed if each in choice}
        kept = self.learnt.recall(name)
        if kept is None:
            fits, by_weights = self._fitted(choice)
            model, steps, statistics = self._improved(self._rewritten(fits))
        else:
            fits, by_weights, statistics, known = kept
            steps = tuple(Step(StepKind(kind), *rest) for kind, *rest in known)
            model = self._rewritten(fits)
            if statistics:
                model = _with_statistics(model, statistics)
        self._keep_in_float(model, choice)
        if kept is None:
            steps += self.deployed(model)
            known = tuple((step.kind.value, step.name, step.reached, step.kept) for step in steps)
            self.learnt.keep(name, (fits, by_weights, statistics, known))
        batchnorm = any(step.kind is StepKind.BATCHNORM and step.kept for step in steps)
        self._earlier.append(Fitted(choice, model, fits, by_weights, batchnorm, steps))
        return self._earlier[-1]

    def _fitted(self, choice: Choice) -> tuple[dict[str, Approximation], dict[str, float]]:
        """Return the fits of the chosen layers, and the errors of fits of the same forms to the weights."""
        wanted = replaced(choice)
        chosen = [site for site in self.layers if site.name in wanted]
        shared = [(self._in_common(plan, choice), plan.by_weights) for plan in self._earlier]
        fits, errors = max(shared, key=lambda pair: len(pair[0]), default=({}, {}))
        by_weights = {name: errors[name] for name in fits}
        known = {site.name: kernel_of(site, fits[site.name]) for site in chosen if site.name in fits}

        def fit(site: ConvSite, moments: Moments) -> Kernel:
            offer = self.surveyed[site.name].offer(choice[site.name])
            before, problem = offer.fitted, fit_problem(site, moments, self.evidence)
            simple, _ = self._fitted_to_weights(site, form_of(offer))
            by_weights[site.name] = output_error(site.dense.spec, site.dense.weight, simple, moments)
            found = problem.fit(before.scheme, before.rank, basis=before.basis)
            # Many plans are kept: what can be computed from the factors is dropped.
            fits[site.name] = replace(found, kernel=torch.empty(0), basis=torch.empty(0))
            return found.kernel, bias_of(site, found)

        for_each_layer(self.traced.model, chosen, self.evidence, fit, self.progress, "fitting layers", known)
        if missing := wanted.keys() - fits.keys():
            raise SepconvertError(
                f"`calib`: the images do not reach {', '.join(sorted(missing))}; leave it out with `exclude`"
            )
        return fits, by_weights

    def deployed(self, model: nn.Module) -> tuple[Step, ...]:
        """Return the step from a model to the form that it is deployed in; () for floating point."""
        if self.form is None or self.heldout is None:
            return ()
        reached = self.heldout.measure(self.form.module(model))
        return (Step(StepKind.INT8, "quantize to int8", reached, kept=True),)

    def sketched(self, choice: Choice) -> nn.Module:
        """Return a plan's model with the survey's factors: as fast as the plan, but not fitted for it."""
        offers = {name: self.surveyed[name].offer(each) for name, each in replaced(choice).items()}
        model = self._rewritten({name: offer.fitted for name, offer in offers.items()})
        return self._keep_in_float(model, choice)

    def restored(self, fitted: Fitted, name: str | None) -> nn.Module:
        """Return the model of a plan with one layer as it was; BatchNorms are as they were in any case."""
        return self._keep_in_float(self._rewritten(fitted.layers, name), fitted.choice)

    def _keep_in_float(self, model: nn.Module, choice: Choice) -> nn.Module:
        """Return a model whose form is told which layers stay in floating point."""
        if self.form is not None:
            self.form.keep(model, in_float(choice))
        return model

    def explain(self, fitted: Fitted) -> tuple[Step, ...]:
        """Return the steps of a plan, preceded by two simpler ways to fit its layers that were not taken."""
        if self.heldout is None:
            return fitted.steps
        by_weights: dict[tuple[str, int], Kernel] = {}
        by_outputs: dict[tuple[str, int], Kernel] = {}
        for site in self.layers:
            if site.name in fitted.layers:
                offer = self.surveyed[site.name].offer(fitted.choice[site.name])
                by_weights[site.place] = self._fitted_to_weights(site, form_of(offer))
                by_outputs[site.place] = kernel_of(site, offer.fitted)
        return (
            Step(
                StepKind.WEIGHTS,
                "fit the weights",
                self.heldout.measure(self.traced.model, by_weights),
                kept=False,
            ),
            Step(
                StepKind.DATA,
                "fit the outputs",
                self.heldout.measure(self.traced.model, by_outputs),
                kept=False,
            ),
            *fitted.steps,
        )

    def _rewritten(self, fits: Mapping[str, Approximation], left_out: str | None = None) -> nn.Module:
        """Return the model with its fitted layers replaced, apart from one; the rest shares its memory."""
        chosen = [site for site in self.layers if site.name in fits and site.name != left_out]
        replacements = {site.name: replacement(site, fits[site.name]) for site in chosen}
        return rewrite(self.traced, replacements, old_memory=True)

    def _improved(self, converted: nn.Module) -> tuple[nn.Module, tuple[Step, ...], tuple[Tensor, ...]]:
        """Return a model with its BatchNorms re-estimated, if that brings it nearer to the original.

        The last result are its buffers in that case, else ().
        """
        if self.heldout is None or self.evidence is None:
            return converted, (), ()
        fitted = Step(
            StepKind.DATA, "follow the drift, correct the bias", self.heldout.measure(converted), kept=True
        )
        images = self.evidence.calibration.fit
        running = quick_copy(converted, images[0])
        if not reestimate_batchnorm(running, [batch.on(running) for batch in images]):
            return converted, (fitted,), ()
        estimated = tuple(unshadowed(running).buffers())
        candidate = _with_statistics(converted, estimated)
        reached = self.heldout.measure(candidate)
        # Labels may speak against the step, but cannot outweigh outputs that are further from the original's.
        kept = reached.divergence < fitted.reached.divergence and reached.loss < fitted.reached.loss
        renewed = Step(StepKind.BATCHNORM, "re-estimate BatchNorm", reached, kept)
        return (candidate, (fitted, renewed), estimated) if kept else (converted, (fitted, renewed), ())

    def _fitted_to_weights(self, site: ConvSite, form: Form) -> Kernel:
        """Return a form of a layer fitted to its weights, which is the same in every plan, and its bias."""
        if (site.name, form) not in self._weight_fits:
            spec, weight, bias = site.dense.spec, site.dense.weight, site.dense.bias
            single = torch.promote_types(weight.dtype, torch.float32)
            kernel = nearest(spec, weight, *form).to(single)
            bias = torch.zeros(spec.out_channels) if bias is None else bias
            self._weight_fits[site.name, form] = kernel, bias
        return self._weight_fits[site.name, form]

    def _in_common(self, plan: Fitted, choice: Choice) -> dict[str, Approximation]:
        """Return the fits of a plan up to the first layer, in order, that has another form in `choice`."""

        def form(choice: Choice, name: str) -> Form | None:
            found = replaced(choice).get(name)
            return None if found is None else found.form

        alike = itertools.takewhile(lambda name: form(plan.choice, name) == form(choice, name), self.surveyed)
        return {name: plan.layers[name] for name in alike if name in plan.layers}


def _with_statistics(model: nn.Module, statistics: Sequence[Tensor]) -> nn.Module:
    """Return a copy of a model, on the memory of its parameters, with other values of its buffers."""
    found = duplicate(model, shared_parameters(model))
    for buffer, value in zip(unshadowed(found).buffers(), statistics, strict=True):
        buffer.copy_(value)
    return found
