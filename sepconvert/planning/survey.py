"""Survey of the layers: what each could be replaced by, at what cost and what error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sepconvert.base.progress import Progress
from sepconvert.calibration.evidence import Evidence
from sepconvert.calibration.heldout import Heldout
from sepconvert.factorize.approximate.problem import Approximation, nearest
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.structures import Form
from sepconvert.network.calls import Kernel
from sepconvert.network.trace import ConvSite
from sepconvert.planning.allocate import Candidate
from sepconvert.planning.fitting import fit_problem, for_each_layer, kernel_of
from sepconvert.planning.forms import Prices, macs_of, trimmed

# To order candidates; the fit of a plan goes on until it settles.
_SURVEY_SWEEPS = 2


_HOPE = 1.2


# Each sensitivity takes a pass of the whole network: with more layers, each is judged on fewer images.
_SENSITIVITY_IMAGES, _LEAST_SENSITIVITY_IMAGES, _SENSITIVITY_PASSES = 128, 16, 2560


_MODERATE = 0.15  # output error, of 1


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
                *form_of(offer),
                offer.cost,
                self.sensitivity * offer.error * self.excess.get(form_of(offer), 1.0),
            )
            for offer in self.offers
        ]

    def with_excess(self, form: Form, times: float) -> "LayerSurvey":
        """With errors of a form, and of lower ranks of its scheme, that are so many times as high."""
        scheme, rank = form
        found = {
            each: times * self.excess.get(each, 1.0)
            for each in map(form_of, self.offers)
            if each[0] == scheme and each[1] <= rank
        }
        return replace(self, excess={**self.excess, **found})

    def offer(self, candidate: Candidate) -> Offer:
        """That one of `candidates` stands for."""
        return next(each for each in self.offers if form_of(each) == candidate.form)


def survey(
    model: nn.Module,
    sites: Sequence[ConvSite],
    evidence: Evidence | None,
    heldout: Heldout | None,
    prices: Mapping[str, Prices],
    progress: Progress,
) -> dict[str, LayerSurvey]:
    """Fit each layer by itself in every form, with the original before and behind it.

    Args:
        model: the original.
        sites: the layers.
        evidence: None to fit in the metric of the weights.
        heldout: for sensitivities.
        prices: what may take a layer's place; layers of which nothing may are left out.
        progress: shows it.
    """
    found: dict[str, LayerSurvey] = {}

    def fit(site: ConvSite, moments: Moments) -> None:
        costs = prices[site.name].forms
        problem = fit_problem(site, moments, evidence)
        first = [_offer(site, problem.fit(*form, 1), costs[form]) for form in costs]
        # What one sweep leaves far from the best at its cost does not get there in some more.
        promising = [each for each in first if each.error <= _HOPE * _least_error(first, each.cost)]
        offers = [
            each
            if problem.is_closed(each.fitted.scheme)
            else _offer(site, problem.fit(*form_of(each), _SURVEY_SWEEPS, each.fitted.basis), each.cost)
            for each in promising
        ]
        if offers := _undominated(offers):
            found[site.name] = LayerSurvey(site.macs, prices[site.name].dense, tuple(offers), 1.0)

    wanted = [site for site in sites if site.name in prices and prices[site.name].forms]
    for_each_layer(model, wanted, evidence, fit, progress, "surveying layers")
    if heldout is None:
        return found
    by_name = {site.name: site for site in sites}
    each_layer = _SENSITIVITY_PASSES // max(len(found), 1)
    judges = heldout.first(max(_LEAST_SENSITIVITY_IMAGES, min(each_layer, _SENSITIVITY_IMAGES)))
    return {
        name: replace(each, sensitivity=_sensitivity(model, by_name[name], each, judges))
        for name, each in progress(list(found.items()), "sensitivities")
    }


def _offer(site: ConvSite, fitted: Approximation, cost: float) -> Offer:
    return Offer(trimmed(fitted, site.dense.weight.dtype), macs_of(site, (fitted.scheme, fitted.rank)), cost)


def form_of(offer: Offer) -> Form:
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


def _sensitivity(model: nn.Module, site: ConvSite, surveyed: LayerSurvey, heldout: Heldout) -> float:
    """By the form of a moderate error: one that is neither lost in rounding nor past all bounds."""
    offer = min(surveyed.offers, key=lambda each: abs(each.fitted.output_error - _MODERATE))
    moved = heldout.measure(model, {site.place: kernel_of(site, offer.fitted)})
    return max(moved.divergence, 0.0) / offer.error if offer.error else 0.0
