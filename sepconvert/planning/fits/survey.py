"""Survey of the layers: the forms that each could take, with their costs and errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from sepconvert.base.progress import Progress, Stage, stage
from sepconvert.calibration.evidence import Evidence
from sepconvert.calibration.heldout import Heldout
from sepconvert.factorize.approximate.int8 import with_rounding
from sepconvert.factorize.approximate.problem import Approximation
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.structures import Form
from sepconvert.files.onnx.int8.form import Int8Form
from sepconvert.network.trace import ConvSite
from sepconvert.planning.allocate import IN_FLOAT, Candidate
from sepconvert.planning.fits.fitting import fit_problem, for_each_layer, kernel_of
from sepconvert.planning.forms import Prices, macs_of, trimmed

# Sweeps suffice to rank the forms of a layer; when a plan is carried out, its fits run until they converge.
_SURVEY_SWEEPS = 2


# After one sweep, a form is fitted further if its error is at most this multiple of the least at its cost.
_PROMISING = 1.2


# Measuring a sensitivity takes one pass of the whole network, so that layers share a fixed number of images:
# at most the first number for each layer, at least the second, and about the third altogether.
_SENSITIVITY_IMAGES, _LEAST_SENSITIVITY_IMAGES, _SENSITIVITY_PASSES = 128, 16, 2560


# Relative output error of the form by which a layer's sensitivity is measured: large enough to stand out from
# rounding, small enough for the divergence to be quadratic in it.
_MODERATE = 0.15


_HARMFUL = 0.05  # share of int8's divergence that a layer must cause for its form to be in question


@dataclass(frozen=True)
class Offer:
    """A form of one layer, fitted while the rest of the model is the original."""

    fitted: Approximation
    macs: int  # over all calls of one forward pass of one sample
    cost: float  # in the unit of the plan: MACs, or milliseconds

    @property
    def error(self) -> float:
        """Divergence of the model's output, to second order; the squared output error where it is unknown."""
        weighted = self.fitted.weighted_error
        return self.fitted.output_error**2 if weighted is None else weighted / 2


@dataclass(frozen=True)
class LayerSurvey:
    """The offers of one layer, with the effect of each on the model where it alone is replaced."""

    macs: int
    cost: float
    # By falling cost, none with another that costs no more and errs no more; but for the exact form of the
    # fewest MACs, which is always there.
    offers: tuple[Offer, ...]
    sensitivity: float  # measured divergence of the model over the `error` of an offer
    excess: Mapping[Form, float] = field(default_factory=dict)  # factors on the errors of single forms
    exact: frozenset[Form] = frozenset()  # forms that its kernel has exactly
    modelled: bool = False  # whether a cost comes from a model of times
    in_float: Candidate | None = None  # the layer in floating point among others in int8; less than no error

    @property
    def least_cost(self) -> float:
        """Cost of the cheapest form, or of the layer as it is."""
        return min(self.cost, self.offers[-1].cost)

    def at_gain(self, gain: float) -> "LayerSurvey":
        """Return the survey with forms that save `gain` times as much."""
        offers = (replace(offer, cost=self.cost - gain * (self.cost - offer.cost)) for offer in self.offers)
        return replace(self, offers=tuple(offers))

    def candidates(self) -> list[Candidate]:
        """Return the offers as candidates of `allocate`, with the divergence that is expected of each."""
        return [
            Candidate(
                *form_of(offer),
                offer.cost,
                self.sensitivity * offer.error * self.excess.get(form_of(offer), 1.0),
            )
            for offer in self.offers
        ]

    def options(self) -> list[Candidate]:
        """Return all that may be chosen in the place of the layer as it is."""
        return [*self.candidates(), *([] if self.in_float is None else [self.in_float])]

    def lossless(self) -> Candidate | None:
        """Return the cheapest of the exact forms, if one is cheaper than the layer as it is."""
        free = [each for each in self.candidates() if each.form in self.exact and each.cost < self.cost]
        return min(free, key=lambda each: each.cost, default=None)

    def fewest_macs(self) -> Candidate | None:
        """Return the exact form of the fewest MACs, as exact mode does; None if there is no exact form."""
        exact = [each for each in self.candidates() if each.form in self.exact]
        return min(exact, key=lambda each: self.offer(each).macs, default=None)

    def is_free(self, candidate: Candidate) -> bool:
        """Return whether a candidate is an exact form that was measured to be faster."""
        return candidate.form in self.exact and not self.modelled

    def with_excess(self, form: Form, times: float) -> "LayerSurvey":
        """Return the survey with `times` the errors of a form, and of the lower ranks of its scheme."""
        scheme, rank = form
        found = {
            each: times * self.excess.get(each, 1.0)
            for each in map(form_of, self.offers)
            if each[0] == scheme and each[1] <= rank
        }
        return replace(self, excess={**self.excess, **found})

    def offer(self, candidate: Candidate) -> Offer:
        """Return the offer that one of `candidates` stands for."""
        return next(each for each in self.offers if form_of(each) == candidate.form)


@stage(Stage.SURVEY)
def survey(
    model: nn.Module,
    sites: Sequence[ConvSite],
    evidence: Evidence | None,
    heldout: Heldout | None,
    prices: Mapping[str, Prices],
    progress: Progress,
    levels: int | None = None,
) -> dict[str, LayerSurvey]:
    """Fit every form of each layer, while the rest of the model is the original.

    Args:
        model: the original.
        sites: the layers.
        evidence: data to fit to; None to fit in the metric of the weights.
        heldout: images to measure sensitivities on; without them all are 1.
        prices: the forms that may take a layer's place; layers without any are left out.
        progress: shows the progress.
        levels: steps of a weight on either side of 0, where models are deployed in int8.
    """
    found: dict[str, LayerSurvey] = {}

    def fit(site: ConvSite, moments: Moments) -> None:
        with stage(Stage.SURVEY, site.name):
            fit_forms(site, moments)

    def fit_forms(site: ConvSite, moments: Moments) -> None:
        costs = prices[site.name].forms
        problem = fit_problem(site, moments, evidence)

        def offer(form: Form, sweeps: int, basis: Tensor | None = None) -> Offer:
            fitted = problem.fit(*form, sweeps, basis)
            if levels is not None:
                fitted = with_rounding(problem, fitted, levels)
            return _offer(site, fitted, costs[form])

        first = [offer(form, 1) for form in costs]
        # A form that is far from the best at its cost after one sweep does not catch up in the next.
        promising = [each for each in first if each.error <= _PROMISING * _least_error(first, each.cost)]
        offers = [
            each
            if problem.is_closed(each.fitted.scheme)
            else offer(form_of(each), _SURVEY_SWEEPS, each.fitted.basis)
            for each in promising
        ]
        fewest = min(
            (each for each in offers if form_of(each) in prices[site.name].exact),
            key=lambda each: each.macs,
            default=None,
        )
        if offers := _undominated(offers, fewest):
            price = prices[site.name]
            found[site.name] = LayerSurvey(
                site.macs, price.dense, tuple(offers), 1.0, exact=price.exact, modelled=price.modelled
            )

    wanted = [site for site in sites if site.name in prices and prices[site.name].forms]
    for_each_layer(model, wanted, evidence, fit, progress, "surveying layers")
    if heldout is None:
        return found
    by_name = {site.name: site for site in sites}
    images = _SENSITIVITY_PASSES // max(len(found), 1)
    judges = heldout.first(max(_LEAST_SENSITIVITY_IMAGES, min(images, _SENSITIVITY_IMAGES)))
    return {
        name: replace(each, sensitivity=_sensitivity(model, by_name[name], each, judges))
        for name, each in progress(list(found.items()), "sensitivities")
    }


@stage(Stage.SURVEY)
def with_float_options(
    model: nn.Module,
    surveyed: Mapping[str, LayerSurvey],
    heldout: Heldout,
    form: Int8Form,
    costs: Mapping[str, float],
    progress: Progress,
) -> dict[str, LayerSurvey]:
    """Return the survey with the option to leave layers in floating point, where int8 harms them.

    The harm is measured: the divergence of the model in int8, less that with this layer in floating point.

    Args:
        model: the original.
        surveyed: from `survey`.
        heldout: images to measure on.
        form: in which models are deployed.
        costs: milliseconds of layers in floating point among others in int8, where they are known.
        progress: shows the progress.
    """
    images = _SENSITIVITY_PASSES // max(len(costs), 1)
    judges = heldout.first(max(_LEAST_SENSITIVITY_IMAGES, min(images, _SENSITIVITY_IMAGES)))
    whole = judges.measure(form.module(model)).divergence
    found = dict(surveyed)
    for name, cost in progress(list(costs.items()), "harm of int8"):
        harm = whole - judges.measure(form.module(form.variant(model, frozenset({name})))).divergence
        if harm > _HARMFUL * whole and cost > surveyed[name].cost:
            found[name] = replace(surveyed[name], in_float=Candidate(IN_FLOAT, 0, cost, -harm))
    return found


def _offer(site: ConvSite, fitted: Approximation, cost: float) -> Offer:
    return Offer(trimmed(fitted, site.dense.weight.dtype), macs_of(site, (fitted.scheme, fitted.rank)), cost)


def form_of(offer: Offer) -> Form:
    """Return the form of an offer."""
    return offer.fitted.scheme, offer.fitted.rank


def _least_error(offers: Sequence[Offer], cost: float) -> float:
    """Return the least error of the offers that cost at most `cost`."""
    return min(offer.error for offer in offers if offer.cost <= cost)


def _undominated(offers: Sequence[Offer], always: Offer | None) -> list[Offer]:
    """Return the Pareto front of the offers and the one that is `always` there, by falling cost."""
    kept: list[Offer] = []
    least = math.inf
    for offer in sorted(offers, key=lambda each: (each.cost, each.error)):
        if offer is always or offer.error < least:
            kept.append(offer)
            least = min(least, offer.error)
    return kept[::-1]


def _sensitivity(model: nn.Module, site: ConvSite, surveyed: LayerSurvey, heldout: Heldout) -> float:
    """Measure the sensitivity of a layer on the form whose output error is closest to `_MODERATE`."""
    offer = min(surveyed.offers, key=lambda each: abs(each.fitted.output_error - _MODERATE))
    moved = heldout.measure(model, {site.place: kernel_of(site, offer.fitted)})
    return max(moved.divergence, 0.0) / offer.error if offer.error else 0.0
