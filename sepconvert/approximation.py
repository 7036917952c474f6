"""Approximate conversion: survey the layers, then carry out a plan and keep the steps that help."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.allocate import Candidate, Choice
from sepconvert.calibrate import Answers, Kernel, calibrate, reestimate_batchnorm, substitute
from sepconvert.data import UNLABELLED
from sepconvert.distributed import once, processes, rank
from sepconvert.errors import SepconvertError
from sepconvert.factorize.approximate import (
    DEPTHWISE_POINTWISE,
    POINTWISE_DEPTHWISE,
    Approximation,
    Moments,
    Problem,
    nearest,
    output_error,
)
from sepconvert.factorize.border import Border
from sepconvert.factorize.structures import BY_NAME, FORMS, Form
from sepconvert.measure.divergence import divergence, is_logits, outputs
from sepconvert.progress import Progress
from sepconvert.rewrite import Replacement, rewrite
from sepconvert.spec import ConvSpec, chain_macs, chain_params
from sepconvert.trace import ConvSite, duplicate, placed, quick_copy, shared_parameters

# Below this a depthwise layer has fewer channels than the smallest block of the runtime's kernels, and the
# stem, which is such a layer as a rule, is where an error is carried furthest.
FEWEST_CHANNELS = 8

# To order candidates; the fit of a plan goes on until it settles.
_SURVEY_SWEEPS = 2
_HOPE = 1.2
_LARGEST_RANK = 6
# Each sensitivity takes a pass of the whole network: with more layers, each is judged on fewer images.
_SENSITIVITY_IMAGES, _LEAST_SENSITIVITY_IMAGES, _SENSITIVITY_PASSES = 128, 16, 2560
_MODERATE = 0.15  # output error, of 1

# Pointwise-depthwise fits multiply all of W by all of S again and again; beyond this many multiply-adds
# (256 to 512 channels, 3×3) that takes minutes, and the form is left out.
_QUICK_PRODUCT = 4e9

# Inner channels of pairs, as shares of full rank: of a 3×3 pair C → C with full rank 3 C, C/8 to C.
_RANK_SHARES = (1 / 24, 1 / 16, 1 / 12, 1 / 9, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 2 / 3)
_BLOCK = 8


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the original on the images held out, and from their labels if they have some.

    All but the divergence are None where the outputs are no logits, and the last two without labels.
    """

    divergence: float  # `sepconvert.measure.divergence`
    agreement: float | None  # share of equal predictions
    accuracy: float | None = None  # of top-1, a fraction
    label_loss: float | None = None  # cross-entropy

    @property
    def loss(self) -> float:
        """By which models are ranked: what fine-tuning lowers, at the temperature 1."""
        return self.divergence + (self.label_loss or 0.0)


@dataclass(frozen=True)
class Step:
    """What one step of the pipeline brought; `kept` is whether the next builds on it."""

    name: str
    reached: Divergence
    kept: bool


@dataclass(frozen=True)
class Offer:
    """A form, fitted with the original before and behind it."""

    fitted: Approximation
    macs: int  # over all calls of one forward pass of one sample
    cost: float  # in the unit of the plan: MACs, or milliseconds

    @property
    def error(self) -> float:
        """Divergence of the model, to second order; a squared output error where that is not known."""
        weighted = self.fitted.weighted_error
        return self.fitted.output_error**2 if weighted is None else weighted / 2


@dataclass(frozen=True)
class LayerSurvey:
    """What can be had of one layer, replaced alone in the original."""

    macs: int
    cost: float
    offers: tuple[Offer, ...]  # by falling cost, none with another that costs no more and errs no more
    sensitivity: float  # measured divergence of the model over the `error` of an offer
    by_weights: dict[Form, Kernel] = field(default_factory=dict)  # kernels fitted to the weights, so far
    excess: Mapping[Form, float] = field(default_factory=dict)  # by which forms err more than others

    def fitted_to_weights(self, site: ConvSite, form: Form) -> Kernel:
        """In the metric of the weights, and the bias: the same whatever the plan."""
        if form not in self.by_weights:
            spec, weight, bias = site.dense.spec, site.dense.weight, site.dense.bias
            single = torch.promote_types(weight.dtype, torch.float32)
            kernel = nearest(spec, weight, *form).to(single)
            self.by_weights[form] = kernel, torch.zeros(spec.out_channels) if bias is None else bias
        return self.by_weights[form]

    @property
    def least_cost(self) -> float:
        """Of the cheapest there is."""
        return min(self.cost, self.offers[-1].cost)

    def at_gain(self, gain: float) -> "LayerSurvey":
        """With forms that save so many times as much."""
        offers = (replace(offer, cost=self.cost - gain * (self.cost - offer.cost)) for offer in self.offers)
        return replace(self, offers=tuple(offers))

    def candidates(self) -> list[Candidate]:
        """With the divergence expected of each."""
        return [
            Candidate(
                *_form(offer),
                offer.cost,
                self.sensitivity * offer.error * self.excess.get(_form(offer), 1.0),
            )
            for offer in self.offers
        ]

    def with_excess(self, form: Form, times: float) -> "LayerSurvey":
        """With errors of a form, and of lower ranks of its scheme, that are so many times as high."""
        scheme, rank = form
        found = {
            each: times * self.excess.get(each, 1.0)
            for each in map(_form, self.offers)
            if each[0] == scheme and each[1] <= rank
        }
        return replace(self, excess={**self.excess, **found})

    def offer(self, candidate: Candidate) -> Offer:
        """That one of `candidates` stands for."""
        return next(each for each in self.offers if _form(each) == candidate.form)


@dataclass(frozen=True)
class Prices:
    """Costs of a layer and of the forms that may take its place."""

    dense: float
    forms: Mapping[Form, float]

    def of(self, forms: Iterable[Form]) -> "Prices":
        """Only some of the forms."""
        return Prices(self.dense, {form: self.forms[form] for form in forms})


@dataclass(frozen=True)
class Fitted:
    """A plan carried out."""

    choice: Choice
    model: nn.Module  # on the memory of the original where nothing was replaced
    layers: Mapping[str, Approximation]
    by_weights: Mapping[str, float]  # output errors of the same forms, if fitted to the weights
    batchnorm: bool  # statistics re-estimated, as that brought it nearer to the original
    steps: tuple[Step, ...] = ()  # on the images held out

    @property
    def heldout(self) -> Divergence | None:
        """After the last step that was kept; None without images held out."""
        return next((step.reached for step in reversed(self.steps) if step.kept), None)


class Heldout:
    """The original's answers on images that nothing is fitted to."""

    def __init__(
        self, original: nn.Module, batches: Sequence[Tensor], labels: Sequence[Tensor] | None = None
    ) -> None:
        """`labels`: integers for each batch, -1 where there is none."""
        self._original = quick_copy(original, batches[0])
        self.batches = [placed(batch, self._original) for batch in batches]
        self._labels = labels or [torch.full((len(batch),), UNLABELLED) for batch in batches]

    @functools.cached_property
    def expected(self) -> list[list[Tensor]]:
        """One list of outputs for every batch."""
        with torch.no_grad():
            found = [outputs(self._original, batch) for batch in self.batches]
        if not all(output.isfinite().all() for batch in found for output in batch):
            raise SepconvertError("calibration: the model answers NaN or Inf to images; check both")
        return found

    def first(self, most: int) -> "Heldout":
        """The same of no more than `most` images."""
        starts = itertools.accumulate((len(batch) for batch in self.batches), initial=0)
        shown = [
            (batch[: most - start], labels[: most - start])
            for batch, labels, start in zip(self.batches, self._labels, starts, strict=False)
            if start < most
        ]
        return Heldout(self._original, *zip(*shown, strict=True))

    def measure(
        self, model: nn.Module, kernels: Mapping[tuple[str, int], Kernel] | None = None
    ) -> Divergence:
        """Of `model`, in eval mode and with some kernels replaced."""
        return once(lambda: self._measure(quick_copy(model, self.batches[0]), kernels or {}))

    def _measure(self, private: nn.Module, kernels: Mapping[tuple[str, int], Kernel]) -> Divergence:
        total, equal, count, classified = 0.0, 0, 0, True
        loss, right, labelled = 0.0, 0, 0
        watching = substitute(private, kernels).watching() if kernels else contextlib.nullcontext()
        with torch.no_grad(), watching:
            for batch, labels, expected in zip(self.batches, self._labels, self.expected, strict=True):
                actual = outputs(private, batch)
                total += len(batch) * float(divergence(expected, actual))
                classified = len(expected) == 1 and expected[0].ndim == 2 and is_logits(expected[0])
                if classified:
                    equal += int((expected[0].argmax(1) == actual[0].argmax(1)).sum())
                    known = (labels >= 0) & (labels < expected[0].shape[1])
                    logits, truth = actual[0].cpu().double()[known], labels[known]
                    loss += float(F.cross_entropy(logits, truth, reduction="sum"))
                    right += int((logits.argmax(1) == truth).sum())
                    labelled += len(truth)
                count += len(batch)
        return Divergence(
            max(total / count, 0.0),  # which nothing but rounding falls below
            equal / count if classified else None,
            right / labelled if labelled else None,
            loss / labelled if labelled else None,
        )


@dataclass(frozen=True)
class Calibration:
    """Images to fit to and images to judge by; none of them is scored."""

    fit: tuple[Tensor, ...]
    heldout: tuple[Tensor, ...]
    origin: str
    answers: Answers | None = None  # of the original; see `calibrate.record`
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # of layers' outputs; see `importance`
    labels: tuple[Tensor, ...] = ()  # of those held out, -1 where there is none
    memory: float | None = None  # bytes that the process may have; None for half of what is free

    @property
    def share(self) -> dict[int, Tensor]:
        """This process's batches to fit to, by number."""
        if len(self.fit) < processes():
            raise SepconvertError(
                f"calibration: {len(self.fit)} batches for {processes()} processes; pass more images"
            )
        return {n: batch for n, batch in enumerate(self.fit) if n % processes() == rank()}


def depthwise_obstacle(site: ConvSite, named: bool) -> str | None:
    """Why depthwise and pointwise factors cannot, or should not, take the place of a convolution.

    `named` ones, by --include, are replaced even where that gains nothing.
    """
    if site.conv is None:
        return site.obstacle
    spec = site.conv.spec
    if max(spec.kernel_size) == 1:
        return "a 1×1 convolution is pointwise already"
    if not BY_NAME[DEPTHWISE_POINTWISE].applies(spec):
        return "it does not mix channels: it is depthwise already"
    channels = spec.in_channels // spec.groups
    if channels < FEWEST_CHANNELS and not named:
        return (
            f"{channels} input channels are fewer than a depthwise kernel of the runtime takes at once "
            f"({FEWEST_CHANNELS}); --include {site.name} converts it nonetheless"
        )
    return None


def survey(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: Calibration | None,
    heldout: Heldout | None,
    prices: Mapping[str, Prices],
    progress: Progress,
) -> dict[str, LayerSurvey]:
    """Fit each layer by itself in every form, with the original before and behind it.

    Args:
        model: the original.
        sites: the layers.
        calibration: None to fit in the metric of the weights.
        heldout: for sensitivities.
        prices: what may take a layer's place; layers of which nothing may are left out.
        progress: shows it.
    """
    found: dict[str, LayerSurvey] = {}

    def fit(site: ConvSite, moments: Moments) -> None:
        costs = prices[site.name].forms
        problem = _problem(site, moments, calibration)
        first = [_offer(site, problem.fit(*form, 1), costs[form]) for form in costs]
        # What one sweep leaves far from the best at its cost does not get there in some more.
        promising = [each for each in first if each.error <= _HOPE * _least_error(first, each.cost)]
        offers = [
            each
            if problem.is_closed(each.fitted.scheme)
            else _offer(site, problem.fit(*_form(each), _SURVEY_SWEEPS, each.fitted.basis), each.cost)
            for each in promising
        ]
        if offers := _undominated(offers):
            found[site.name] = LayerSurvey(site.macs, prices[site.name].dense, tuple(offers), 1.0)

    wanted = [site for site in sites if site.name in prices and prices[site.name].forms]
    _each(model, wanted, calibration, fit, progress, "surveying layers")
    if heldout is None:
        return found
    by_name = {site.name: site for site in sites}
    each_layer = _SENSITIVITY_PASSES // max(len(found), 1)
    judges = heldout.first(max(_LEAST_SENSITIVITY_IMAGES, min(each_layer, _SENSITIVITY_IMAGES)))
    return {
        name: replace(each, sensitivity=_sensitivity(model, by_name[name], each, judges))
        for name, each in progress(list(found.items()), "sensitivities")
    }


def _problem(site: ConvSite, moments: Moments, calibration: Calibration | None) -> Problem:
    importance = None if calibration is None else calibration.importance.get(site.name)
    return Problem(site.dense.spec, site.dense.weight, moments, importance)


def _offer(site: ConvSite, fitted: Approximation, cost: float) -> Offer:
    return Offer(_trimmed(fitted, site.dense.weight.dtype), macs_of(site, (fitted.scheme, fitted.rank)), cost)


def _form(offer: Offer) -> Form:
    return offer.fitted.scheme, offer.fitted.rank


def _least_error(offers: Sequence[Offer], cost: float) -> float:
    """Of those that cost no more."""
    return min(offer.error for offer in offers if offer.cost <= cost)


def _undominated(offers: Sequence[Offer]) -> list[Offer]:
    """By falling cost, each erring more than the one before; of equals the one that errs less."""
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda each: (each.cost, each.error)):
        if not kept or offer.error < kept[-1].error:
            kept.append(offer)
    return kept[::-1]


def carry_out(
    model: nn.Module,
    sites: Sequence[ConvSite],
    choice: Choice,
    surveyed: Mapping[str, LayerSurvey],
    calibration: Calibration | None,
    heldout: Heldout | None,
    progress: Progress,
    earlier: Sequence[Fitted] = (),
) -> Fitted:
    """Fit the layers chosen in step, rewrite the model, and re-estimate BatchNorms if that helps.

    Layers behind which the same was done in one of the `earlier` plans are as they were fitted there.
    """
    chosen = [site for site in sites if site.name in choice]
    shared = [(_in_common(plan, choice, surveyed), plan.by_weights) for plan in earlier]
    fits, errors = max(shared, key=lambda each: len(each[0]), default=({}, {}))
    by_weights = {name: errors[name] for name in fits}
    known = {site.name: _kernel(site, fits[site.name]) for site in chosen if site.name in fits}

    def fit(site: ConvSite, moments: Moments) -> Kernel:
        offer = surveyed[site.name].offer(choice[site.name])
        before, problem = offer.fitted, _problem(site, moments, calibration)
        simple, _ = surveyed[site.name].fitted_to_weights(site, _form(offer))
        by_weights[site.name] = output_error(site.dense.spec, site.dense.weight, simple, moments)
        found = problem.fit(before.scheme, before.rank, basis=before.basis)
        # Plans are many: what follows from the factors is not kept.
        fits[site.name] = replace(found, kernel=torch.empty(0), basis=torch.empty(0))
        return found.kernel, _bias(site, found)

    _each(model, chosen, calibration, fit, progress, "fitting layers", known)
    if missing := choice.keys() - fits.keys():
        raise SepconvertError(
            f"calibration: the images do not reach {', '.join(sorted(missing))}; leave it out with --exclude"
        )
    converted = restored(model, sites, fits)
    if heldout is None or calibration is None:
        return Fitted(choice, converted, fits, by_weights, False)
    steps = [Step("follow the drift, correct the bias", heldout.measure(converted), kept=True)]
    running = quick_copy(converted, calibration.fit[0])
    if not reestimate_batchnorm(running, [placed(batch, running) for batch in calibration.fit]):
        return Fitted(choice, converted, fits, by_weights, False, tuple(steps))
    candidate = duplicate(converted, shared_parameters(converted))
    for buffer, found in zip(candidate.buffers(), running.buffers(), strict=True):
        buffer.copy_(found)
    reached = heldout.measure(candidate)
    before = steps[-1].reached
    # Labels may forbid the step, but not make up for answers that are further from the original's.
    kept = reached.divergence < before.divergence and reached.loss < before.loss
    steps.append(Step("re-estimate BatchNorm", reached, kept))
    return Fitted(choice, candidate if kept else converted, fits, by_weights, kept, tuple(steps))


def _in_common(plan: Fitted, choice: Choice, order: Iterable[str]) -> dict[str, Approximation]:
    """Layers of a plan up to the first, in the `order` of execution, that has another form in `choice`."""

    def form(each: Choice, name: str) -> Form | None:
        return (each[name].scheme, each[name].rank) if name in each else None

    alike = itertools.takewhile(lambda name: form(plan.choice, name) == form(choice, name), order)
    return {name: plan.layers[name] for name in alike if name in choice}


def restored(
    model: nn.Module,
    sites: Sequence[ConvSite],
    fits: Mapping[str, Approximation],
    left_out: str | None = None,
) -> nn.Module:
    """The model with layers replaced as they were fitted, but for one; BatchNorms are as they were.

    Its other parameters are on the memory of the model's: plans are many.
    """
    chosen = [site for site in sites if site.name in fits and site.name != left_out]
    layers = {site.name: replacement(site, fits[site.name]) for site in chosen}
    return rewrite(model, sites, layers, old_memory=True)


def explain(
    model: nn.Module,
    sites: Sequence[ConvSite],
    fitted: Fitted,
    surveyed: Mapping[str, LayerSurvey],
    heldout: Heldout | None,
) -> tuple[Step, ...]:
    """The steps of a plan after those that it would have been simpler to take."""
    if heldout is None:
        return fitted.steps
    chosen = [site for site in sites if site.name in fitted.choice]
    by_weights: dict[tuple[str, int], Kernel] = {}
    by_outputs: dict[tuple[str, int], Kernel] = {}
    for site in chosen:
        offer = surveyed[site.name].offer(fitted.choice[site.name])
        by_weights[site.place] = surveyed[site.name].fitted_to_weights(site, _form(offer))
        by_outputs[site.place] = _kernel(site, offer.fitted)
    simpler = (("fit the weights", by_weights), ("fit the outputs", by_outputs))
    steps = [Step(name, heldout.measure(model, kernels), kept=False) for name, kernels in simpler]
    return (*steps, *fitted.steps)


def _each(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: Calibration | None,
    fit: Callable[[ConvSite, Moments], Kernel | None],
    progress: Progress,
    description: str,
    known: Mapping[str, Kernel] | None = None,
) -> None:
    """Let `fit` see every layer with its moments: of data in the order of execution, or else of weights.

    Those with a `known` kernel are not seen.
    """
    everyone = [site for site in sites if site.conv is not None]
    layers = [site for site in everyone if not known or site.name not in known]
    if calibration is None:
        for site in progress(layers, description):
            if site.conv is not None:
                fit(site, Moments.of_weights(site.conv.spec, site.conv.weight))
        return
    assert calibration.answers is not None  # noqa: S101  (`convert_approximately` recorded them)
    share = {number: placed(batch, model) for number, batch in calibration.share.items()}
    stream = calibrate(model, share, everyone, calibration.answers, known, calibration.memory)
    kernel: Kernel | None = None
    for _ in progress(layers, description):
        try:
            site, moments = stream.send(kernel)
        except StopIteration:  # a branch that the images do not take
            break
        kernel = fit(site, moments)
    stream.close()


def _sensitivity(model: nn.Module, site: ConvSite, surveyed: LayerSurvey, heldout: Heldout) -> float:
    """By the form of a moderate error: one that is neither lost in rounding nor past all bounds."""
    offer = min(surveyed.offers, key=lambda each: abs(each.fitted.output_error - _MODERATE))
    moved = heldout.measure(model, {site.place: _kernel(site, offer.fitted)})
    return max(moved.divergence, 0.0) / offer.error if offer.error else 0.0


def depthwise_forms(spec: ConvSpec, rank: int | None) -> list[Form]:
    """Depthwise and pointwise factors of `rank`, or of all that may pay."""
    found = []
    for scheme in (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE):
        if scheme == POINTWISE_DEPTHWISE and not _quick(spec):
            continue
        full = BY_NAME[scheme].full_rank(spec)
        ranks = range(1, min(full, _LARGEST_RANK) + 1) if rank is None else [min(rank, full)]
        found += [(scheme, each) for each in ranks]
    return found


def all_forms(spec: ConvSpec) -> list[Form]:
    """Every structure that applies, in some ranks at which it has fewer weights than the layer.

    Inner channels come in multiples of what a runtime's kernels take at once.
    """
    mixes = min(spec.weight_shape[0] // spec.groups, spec.weight_shape[1]) > 1
    found = depthwise_forms(spec, None) if mixes and max(spec.kernel_size) > 1 else []
    for structure in FORMS.values():
        if structure.parallel or not structure.applies(spec):
            continue
        full = structure.full_rank(spec)
        if spec.weight_shape[1] == 1:
            ranks = set(range(1, full))
        else:
            ranks = {round(share * full / _BLOCK) * _BLOCK for share in _RANK_SHARES}
        dense = chain_params((spec,))
        found += [
            (structure.name, rank)
            for rank in sorted(ranks)
            if 0 < rank < full and chain_params(structure.split(spec, rank)) < dense
        ]
    return found


def macs_of(site: ConvSite, form: Form) -> int:
    """Of a layer in a form, over all its calls."""
    scheme, rank = form
    chain = FORMS[scheme].split(site.dense.spec, rank)
    return sum(chain_macs(chain, size) for size in site.sizes)


def params_of(site: ConvSite, form: Form) -> int:
    """Of a layer in a form, with the bias that it then has; factors of fixed filters are as fixed."""
    if site.params == 0:
        return 0
    spec = site.dense.spec
    return chain_params(FORMS[form[0]].split(spec, form[1])) + (not spec.bias) * spec.out_channels


def _quick(spec: ConvSpec) -> bool:
    unknowns = spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    return spec.out_channels * unknowns**2 <= _QUICK_PRODUCT


def _kernel(site: ConvSite, fitted: Approximation) -> Kernel:
    weights = (weight.double() for weight in fitted.weights)
    return FORMS[fitted.scheme].compose(site.dense.spec, *weights), _bias(site, fitted)


def _bias(site: ConvSite, fitted: Approximation) -> Tensor:
    return fitted.bias_shift if site.dense.bias is None else site.dense.bias.double() + fitted.bias_shift


def replacement(site: ConvSite, fitted: Approximation) -> Replacement:
    """The factors in the dtype of the layer, and its new bias."""
    dtype = site.dense.weight.dtype
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return Replacement(fitted.scheme, fitted.rank, Border(), weights, _bias(site, fitted).to(dtype))


def _trimmed(fitted: Approximation, dtype: torch.dtype) -> Approximation:
    """Without the dense kernel, and with factors in single precision, or the model's: many are kept."""
    dtype = torch.promote_types(dtype, torch.float32)
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return replace(fitted, weights=weights, kernel=torch.empty(0), basis=fitted.basis.to(dtype))
