"""Approximate conversion: survey the layers, then carry out a plan and keep the steps that help."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sepconvert.allocate import Candidate, Choice
from sepconvert.calibrate import Kernel, calibrate, reestimate_batchnorm, substitute
from sepconvert.distributed import once, processes, rank
from sepconvert.errors import SepconvertError
from sepconvert.factorize.approximate import (
    DEPTHWISE_POINTWISE,
    POINTWISE_DEPTHWISE,
    Approximation,
    Moments,
    approximate,
    output_error,
)
from sepconvert.factorize.border import Border
from sepconvert.factorize.structures import BY_NAME, STRUCTURES
from sepconvert.measure.accuracy import evaluation_mode
from sepconvert.measure.divergence import divergence, is_logits, outputs, placed
from sepconvert.progress import Progress
from sepconvert.rewrite import Replacement, rewrite
from sepconvert.spec import ConvSpec, chain_macs, chain_params
from sepconvert.trace import ConvSite, duplicate, private_copy

# Below this a depthwise layer has fewer channels than the smallest block of the runtime's kernels, and the
# stem, which is such a layer as a rule, is where an error is carried furthest.
FEWEST_CHANNELS = 8

# To order candidates; the fit of a plan goes on until it settles.
_SURVEY_SWEEPS = 4
_LARGEST_RANK = 6
_SENSITIVITY_IMAGES = 128

# Pointwise-depthwise fits multiply all of W by all of S again and again; beyond this many multiply-adds
# (256 to 512 channels, 3×3) that takes minutes, and the form is left out.
_QUICK_PRODUCT = 4e9

_FAR_FEWER = 0.75

# Inner channels of pairs, as shares of full rank: of a 3×3 pair C → C with full rank 3 C, C/8 to C.
_RANK_SHARES = (1 / 24, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
_BLOCK = 8

Form = tuple[str, int]
"""Scheme and rank."""


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the original on the images held out."""

    divergence: float  # `sepconvert.measure.divergence`
    agreement: float | None  # share of equal predictions; None where the outputs are no logits


@dataclass(frozen=True)
class Step:
    """What one step of the pipeline brought; `kept` is whether the next builds on it."""

    name: str
    reached: Divergence
    kept: bool


@dataclass(frozen=True)
class LayerSurvey:
    """What can be had of one layer, replaced alone in the original."""

    dense_macs: int
    offered: tuple[Approximation, ...]  # by cost, none of them with another that costs less and errs less
    macs: tuple[int, ...]  # of `offered`
    separate_errors: tuple[float, ...]  # output errors of the same forms, fitted to the weights alone
    sensitivity: float | None  # divergence over squared output error, replaced alone in the cheapest form
    milliseconds: tuple[float, ...] | None = None  # of `offered`, as they run in a graph, ...
    dense_milliseconds: float | None = None  # ... and of the layer; where they are the cost

    @property
    def dense_cost(self) -> float:
        """Of the layer as it is."""
        return self.dense_macs if self.dense_milliseconds is None else self.dense_milliseconds

    @property
    def costs(self) -> Sequence[float]:
        """Of `offered`."""
        return self.macs if self.milliseconds is None else self.milliseconds

    @property
    def least_cost(self) -> float:
        """Of the cheapest there is."""
        return min(self.dense_cost, *self.costs)

    def candidates(self) -> list[Candidate]:
        """With the divergence expected of each."""
        weight = 1.0 if self.sensitivity is None else self.sensitivity
        return [
            Candidate(each.scheme, each.rank, cost, weight * each.output_error**2)
            for each, cost in zip(self.offered, self.costs, strict=True)
        ]

    def index(self, scheme: str, rank: int) -> int:
        """Of a form among those offered."""
        return [(each.scheme, each.rank) for each in self.offered].index((scheme, rank))

    def macs_saved(self, candidate: Candidate) -> int:
        """By one of `candidates`."""
        return self.dense_macs - self.macs[self.index(candidate.scheme, candidate.rank)]


@dataclass(frozen=True)
class Fitted:
    """A plan carried out."""

    choice: Choice
    model: nn.Module
    layers: Mapping[str, Approximation]
    batchnorm: bool  # statistics re-estimated, as that brought it nearer to the original
    steps: tuple[Step, ...] = ()  # on the images held out

    @property
    def heldout(self) -> Divergence | None:
        """After the last step that was kept; None without images held out."""
        return next((step.reached for step in reversed(self.steps) if step.kept), None)


class Heldout:
    """The original's answers on images that nothing is fitted to."""

    def __init__(self, original: nn.Module, batches: Sequence[Tensor]) -> None:
        self._original = private_copy(original)
        self.batches = [placed(batch, self._original) for batch in batches]

    @functools.cached_property
    def expected(self) -> list[list[Tensor]]:
        """One list of outputs for every batch."""
        with torch.no_grad():
            found = [outputs(self._original, batch) for batch in self.batches]
        if not all(output.isfinite().all() for batch in found for output in batch):
            raise SepconvertError("calibration: the model answers NaN or Inf to images; check both")
        return found

    def measure(self, model: nn.Module, most: int | None = None) -> Divergence:
        """Of `model`, in eval mode, on the first `most` images."""
        return once(lambda: self._measure(model, most))

    def _measure(self, model: nn.Module, most: int | None) -> Divergence:
        total, equal, count, classified = 0.0, 0, 0, True
        with torch.no_grad(), evaluation_mode(model):
            for batch, expected in zip(self.batches, self.expected, strict=True):
                actual = outputs(model, batch)
                total += len(batch) * float(divergence(expected, actual))
                classified = len(expected) == 1 and expected[0].ndim == 2 and is_logits(expected[0])
                if classified:
                    equal += int((expected[0].argmax(1) == actual[0].argmax(1)).sum())
                count += len(batch)
                if most is not None and count >= most:
                    break
        return Divergence(total / count, equal / count if classified else None)


@dataclass(frozen=True)
class Calibration:
    """Images to fit to and images to judge by; none of them is scored."""

    fit: tuple[Tensor, ...]
    heldout: tuple[Tensor, ...]
    origin: str

    @property
    def share(self) -> dict[int, Tensor]:
        """This process's batches to fit to, by number."""
        if len(self.fit) < processes():
            raise SepconvertError(
                f"calibration: {len(self.fit)} batches for {processes()} processes; pass more images"
            )
        return {n: batch for n, batch in enumerate(self.fit) if n % processes() == rank()}


def obstacle(site: ConvSite) -> str | None:
    """Why no form can take the place of a convolution."""
    if site.obstacle is not None or site.conv is None:
        return site.obstacle
    if site.params == 0:
        return "its filters are fixed, which --mode exact is for"
    return None


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
    forms: Callable[[ConvSite], Sequence[Form]],
    seed: int,
    progress: Progress,
) -> dict[str, LayerSurvey]:
    """Fit each layer by itself in every form, with the original before and behind it.

    Args:
        model: the original.
        sites: the layers.
        calibration: None to fit in the metric of the weights.
        heldout: for sensitivities.
        forms: what may take a layer's place; layers of which nothing may are left out.
        seed: of positions.
        progress: shows it.
    """
    found: dict[str, LayerSurvey] = {}

    def fit(site: ConvSite, moments: Moments) -> None:
        conv = site.conv
        if conv is None:
            return
        fits = [
            (
                macs_of(site, form),
                _trimmed(approximate(conv.spec, conv.weight, moments, *form, _SURVEY_SWEEPS)),
            )
            for form in forms(site)
        ]
        fits.sort(key=lambda each: (each[0], each[1].output_error))
        if not (worth := [each for each in fits if not any(_beats(other, each) for other in fits)]):
            return
        found[site.name] = LayerSurvey(
            dense_macs=site.macs,
            offered=tuple(each for _, each in worth),
            macs=tuple(macs for macs, _ in worth),
            separate_errors=tuple(
                output_error(conv.spec, conv.weight, _fit_to_weights(site, each).kernel, moments)
                for _, each in worth
            ),
            sensitivity=None,
        )

    _each(model, sites, calibration, fit, seed, progress, "surveying layers")
    if heldout is None:
        return found
    by_name = {site.name: site for site in sites}
    return {
        name: _with_sensitivity(model, by_name[name], each, heldout)
        for name, each in progress(list(found.items()), "sensitivities")
    }


def _beats(one: tuple[int, Approximation], other: tuple[int, Approximation]) -> bool:
    """Errs less at far fewer MACs, or less at the same: a runtime will not make up for that."""
    if one[0] == other[0]:
        return one[1].output_error < other[1].output_error
    return one[0] <= _FAR_FEWER * other[0] and one[1].output_error <= other[1].output_error


def carry_out(
    model: nn.Module,
    sites: Sequence[ConvSite],
    choice: Choice,
    surveyed: Mapping[str, LayerSurvey],
    calibration: Calibration | None,
    heldout: Heldout | None,
    seed: int,
    progress: Progress,
) -> Fitted:
    """Fit the layers chosen in step, rewrite the model, and re-estimate BatchNorms if that helps."""
    chosen = [site for site in sites if site.name in choice]
    fits: dict[str, Approximation] = {}

    def fit(site: ConvSite, moments: Moments) -> Kernel | None:
        conv, candidate = site.conv, choice[site.name]
        if conv is None:
            return None
        fits[site.name] = approximate(conv.spec, conv.weight, moments, candidate.scheme, candidate.rank)
        return fits[site.name].kernel, _bias(site, fits[site.name])

    _each(model, chosen, calibration, fit, seed, progress, "fitting layers")
    if missing := choice.keys() - fits.keys():
        raise SepconvertError(
            f"calibration: the images do not reach {', '.join(sorted(missing))}; leave it out with --exclude"
        )
    converted = rewrite(model, sites, {site.name: replacement(site, fits[site.name]) for site in chosen})
    if heldout is None or calibration is None:
        return Fitted(choice, converted, fits, False)
    steps = [
        Step(name, _substituted(model, kernels, heldout), kept=False)
        for name, kernels in _earlier_kernels(chosen, choice, surveyed).items()
    ]
    steps.append(Step("follow the drift, correct the bias", heldout.measure(converted), kept=True))
    candidate = duplicate(converted)
    with evaluation_mode(candidate):
        count = reestimate_batchnorm(candidate, [placed(batch, candidate) for batch in calibration.fit])
    if not count:
        return Fitted(choice, converted, fits, False, tuple(steps))
    reached = heldout.measure(candidate)
    kept = reached.divergence < steps[-1].reached.divergence
    steps.append(Step("re-estimate BatchNorm", reached, kept))
    return Fitted(choice, candidate if kept else converted, fits, kept, tuple(steps))


def _each(
    model: nn.Module,
    sites: Sequence[ConvSite],
    calibration: Calibration | None,
    fit: Callable[[ConvSite, Moments], Kernel | None],
    seed: int,
    progress: Progress,
    description: str,
) -> None:
    """Let `fit` see every layer with its moments: of data in the order of execution, or else of weights."""
    layers = [site for site in sites if site.conv is not None]
    if calibration is None:
        for site in progress(layers, description):
            if site.conv is not None:
                fit(site, Moments.of_weights(site.conv.spec, site.conv.weight))
        return
    share = {number: placed(batch, model) for number, batch in calibration.share.items()}
    stream = calibrate(model, share, layers, seed=seed)
    kernel: Kernel | None = None
    for _ in progress(layers, description):
        try:
            site, moments = stream.send(kernel)
        except StopIteration:  # a branch that the images do not take
            break
        kernel = fit(site, moments)
    stream.close()


def _with_sensitivity(
    model: nn.Module, site: ConvSite, surveyed: LayerSurvey, heldout: Heldout
) -> LayerSurvey:
    smallest = surveyed.offered[surveyed.macs.index(min(surveyed.macs))]
    moved = _substituted(model, {_place(site): _kernel(site, smallest)}, heldout, _SENSITIVITY_IMAGES)
    squared = smallest.output_error**2
    return replace(surveyed, sensitivity=max(moved.divergence, 0.0) / squared if squared else 0.0)


def _earlier_kernels(
    sites: Sequence[ConvSite], choice: Choice, surveyed: Mapping[str, LayerSurvey]
) -> dict[str, dict[tuple[str, int], Kernel]]:
    """Kernels of the steps that led here: each layer's own SVD, and its own fit to the original's data."""
    weights, data = {}, {}
    for site in sites:
        each = surveyed[site.name]
        candidate = choice[site.name]
        fitted = each.offered[each.index(candidate.scheme, candidate.rank)]
        weights[_place(site)] = _kernel(site, _fit_to_weights(site, fitted))
        data[_place(site)] = _kernel(site, fitted)
    return {"fit the weights": weights, "fit the outputs": data}


def _substituted(
    model: nn.Module,
    kernels: Mapping[tuple[str, int], Kernel],
    heldout: Heldout,
    most: int | None = None,
) -> Divergence:
    private = private_copy(model)
    with substitute(private, kernels).watching():
        return heldout.measure(private, most)


def _fit_to_weights(site: ConvSite, form: Approximation) -> Approximation:
    """The same form by the kernel's own SVD."""
    assert site.conv is not None  # noqa: S101  (only such layers are surveyed)
    spec, weight = site.conv.spec, site.conv.weight
    return approximate(spec, weight, Moments.of_weights(spec, weight), form.scheme, form.rank, 1)


def _place(site: ConvSite) -> tuple[str, int]:
    return site.owner, site.index or 0


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
    for structure in STRUCTURES:
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
    assert site.conv is not None  # noqa: S101  (only such layers are surveyed)
    scheme, rank = form
    chain = BY_NAME[scheme].split(site.conv.spec, rank)
    return sum(chain_macs(chain, size) for size in site.sizes)


def _quick(spec: ConvSpec) -> bool:
    unknowns = spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    return spec.out_channels * unknowns**2 <= _QUICK_PRODUCT


def _kernel(site: ConvSite, fitted: Approximation) -> Kernel:
    assert site.conv is not None  # noqa: S101
    first, second = (weight.double() for weight in fitted.weights)
    return BY_NAME[fitted.scheme].compose(site.conv.spec, first, second), _bias(site, fitted)


def _bias(site: ConvSite, fitted: Approximation) -> Tensor:
    assert site.conv is not None  # noqa: S101
    return fitted.bias_shift if site.conv.bias is None else site.conv.bias.double() + fitted.bias_shift


def replacement(site: ConvSite, fitted: Approximation) -> Replacement:
    """The factors in the dtype of the layer, and its new bias."""
    assert site.conv is not None  # noqa: S101
    dtype = site.conv.weight.dtype
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return Replacement(fitted.scheme, fitted.rank, Border(), weights, _bias(site, fitted).to(dtype))


def _trimmed(fitted: Approximation) -> Approximation:
    """Without the dense kernel, and with factors in single precision: many of them are kept."""
    first, second = (weight.float() for weight in fitted.weights)
    return replace(fitted, weights=(first, second), kernel=torch.empty(0))
