"""Forms that each layer may take, and their prices in MACs, parameters or milliseconds."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.base.options.values import Gate
from sepconvert.base.progress import Progress
from sepconvert.factorize.approximate.problem import Approximation
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE
from sepconvert.factorize.exact.analysis import analyse, may_separate
from sepconvert.factorize.geometry import ConvSpec, chain_macs, chain_params
from sepconvert.factorize.structures import BY_NAME, FORMS, Form
from sepconvert.network.trace import ConvSite
from sepconvert.planning.timing.clock import Clock, FormTimes

FEWEST_CHANNELS = 8
"""Input channels below which depthwise factors do not pay.

A runtime's depthwise kernels process this many channels at once. Moreover, a layer with so few is usually the
stem, whose error passes through all other layers.
"""


_LARGEST_RANK = 6  # largest depthwise multiplier that is tried


# Pointwise-depthwise fits multiply the kernel W by the moments S in every sweep. With more multiply-adds than
# this (256 to 512 channels, 3×3) a fit takes minutes, and the form is left out.
_QUICK_PRODUCT = 4e9


# Ranks that are tried, as shares of full rank: a 3×3 pair C → C has full rank 3 C, so that they begin at C/8.
_RANK_SHARES = (1 / 24, 1 / 16, 1 / 12, 1 / 9, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 2 / 3)


BLOCK = 8
"""Multiple that numbers of inner channels are rounded to: the block size of a runtime's kernels."""

Unit = Literal["macs", "params", "milliseconds"]
"""The unit in which costs of layers and forms are counted."""


@dataclass(frozen=True)
class Prices:
    """Costs of a layer and of the forms that may take its place.

    `exact` are the forms that its kernel has exactly; `modelled` tells whether a cost is no measured one.
    """

    dense: float
    forms: Mapping[Form, float]
    exact: frozenset[Form] = frozenset()
    modelled: bool = False

    def of(self, forms: Iterable[Form]) -> "Prices":
        """Return the prices of only some of the forms."""
        return replace(self, forms={form: self.forms[form] for form in forms})


def depthwise_obstacle(site: ConvSite, named: bool) -> str | None:
    """Return why depthwise and pointwise factors cannot or should not replace a layer; None if they may.

    Layers that the user has `named`, by `include`, are replaced even where that gains nothing.
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
            f"({FEWEST_CHANNELS}); including {site.name} by name converts it nonetheless"
        )
    return None


def depthwise_forms(spec: ConvSpec, rank: int | None) -> list[Form]:
    """Return the depthwise and pointwise forms of one `rank`, or of all ranks that may pay."""
    found = []
    for scheme in (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE):
        if scheme == POINTWISE_DEPTHWISE and not is_quick(spec):
            continue
        full = BY_NAME[scheme].full_rank(spec)
        ranks = range(1, min(full, _LARGEST_RANK) + 1) if rank is None else [min(rank, full)]
        found += [(scheme, each) for each in ranks]
    return found


def all_forms(spec: ConvSpec) -> list[Form]:
    """Return every structure that applies, in some ranks at which it has fewer weights than the layer.

    Numbers of inner channels are multiples of `BLOCK`.
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
            ranks = {round(share * full / BLOCK) * BLOCK for share in _RANK_SHARES}
        dense = chain_params((spec,))
        found += [
            (structure.name, rank)
            for rank in sorted(ranks)
            if 0 < rank < full and chain_params(structure.split(spec, rank)) < dense
        ]
    return found


def macs_of(site: ConvSite, form: Form) -> int:
    """Return the MACs of a layer in some form, of one sample over all its calls."""
    scheme, rank = form
    chain = FORMS[scheme].split(site.dense.spec, rank)
    return sum(chain_macs(chain, size) for size in site.sizes)


def params_of(site: ConvSite, form: Form) -> int:
    """Return the parameters of a layer in some form, with its bias; 0 for a layer of fixed filters."""
    if site.params == 0:
        return 0
    spec = site.dense.spec
    return chain_params(FORMS[form[0]].split(spec, form[1])) + (not spec.bias) * spec.out_channels


def is_quick(spec: ConvSpec) -> bool:
    """Return whether pointwise-depthwise factors of a convolution are fitted in reasonable time."""
    unknowns = spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    return spec.out_channels * unknowns**2 <= _QUICK_PRODUCT


def trimmed(fitted: Approximation, dtype: torch.dtype) -> Approximation:
    """Return a fit without its dense kernel, and with factors in float32 or the model's wider dtype.

    Many fits are kept at the same time.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return replace(fitted, weights=weights, kernel=torch.empty(0), basis=fitted.basis.to(dtype))


# Least ratio between the costs of two ranks that are both fitted. The second, coarser one is for layers with
# more weights than the third number: the survey spends most of its time on their fits.
_COST_STEP, _COARSE_COST_STEP, _MANY_WEIGHTS = 1.15, 1.3, 10**6


def candidate_forms(site: ConvSite, rank: int | None, exact: Sequence[Form] | None) -> Sequence[Form]:
    """Return the forms that may take a layer's place, whatever they cost.

    Args:
        site: the layer.
        rank: depthwise multiplier, or None for all that may pay.
        exact: forms that the layer has exactly, to choose from all structures; None for depthwise and
            pointwise factors alone.
    """
    spec = site.dense.spec
    if exact is None:
        return depthwise_forms(spec, rank)
    # Ranks at which the layer has a form exactly need not be among those of `_RANK_SHARES`.
    return exact if site.params == 0 else list(dict.fromkeys([*all_forms(spec), *exact]))


def exact_forms(site: ConvSite) -> list[Form]:
    """Return the forms that a layer's kernel has exactly."""
    spec, weight = site.dense.spec, site.dense.weight
    if not may_separate(spec, weight):
        return []
    held = analyse(spec, weight, site.sizes).holding()
    return [(each.scheme, each.rank) for each in held if each.scheme in FORMS and each.rank]


def counted_prices(
    site: ConvSite, forms: Sequence[Form], exact: Iterable[Form], gate: Gate, unit: Unit
) -> Prices:
    """Return the prices, in MACs or parameters, of the forms that pass the gate; exact ones lose nothing."""
    macs = {form: macs_of(site, form) for form in forms}
    passed = [form for form in forms if gate == "none" or macs[form] < site.macs]
    lossless = frozenset(exact).intersection(passed)
    if unit == "macs":
        return Prices(site.macs, {form: macs[form] for form in passed}, lossless)
    return Prices(site.params, {form: params_of(site, form) for form in passed}, lossless)


_FREE = 0.99  # of a layer's time: what a modelled exact form costs at most


def measured_prices(
    sites: Sequence[ConvSite],
    counted: Mapping[str, Prices],
    clock: Clock,
    progress: Progress,
) -> tuple[dict[str, Prices], dict[str, Reason]]:
    """Time the forms of layers, as long as there is time left; after that, their times are modelled.

    The forms that layers have exactly come first: they are few, and cost no accuracy. Then come the layers
    with the most MACs for each form to be timed.

    Args:
        sites: the layers.
        counted: forms of each layer that pass the gate.
        clock: measures.
        progress: shows the progress.

    Returns:
        Prices in milliseconds by layer, and the reason for each layer without a faster form.
    """
    prices, reasons = dict[str, Prices](), dict[str, Reason]()
    queue = []
    for site in sites:
        forms = list(counted[site.name].forms)
        held = [form for form in forms if form in counted[site.name].exact]
        queue += [(site, some) for some in (held, forms) if some]
    queue.sort(
        key=lambda each: (len(each[1]) > len(counted[each[0].name].exact), -each[0].macs / len(each[1]))
    )
    for site, forms in progress(queue, "timing forms"):
        times = clock.forms(site, forms)
        faster = {form: each.milliseconds for form, each in times.forms.items() if each.faster}
        exact = counted[site.name].exact
        reasons.pop(site.name, None)
        fewest = min(exact, key=counted[site.name].forms.__getitem__, default=None)
        if fewest is not None and not times.forms[fewest].measured:
            # It costs no accuracy, and the model of times is too coarse to speak against it.
            faster[fewest] = min(times.forms[fewest].milliseconds, _FREE * times.dense_milliseconds)
        if not faster:
            reasons[site.name] = _not_faster(times)
        if not faster and fewest is None:
            continue
        many = math.prod(site.dense.spec.weight_shape) > _MANY_WEIGHTS
        step = _COARSE_COST_STEP if many else _COST_STEP
        worth = _worth_fitting(faster, step, exact)
        if fewest is not None:
            # What exact mode takes is there in any case: many small gains, each within noise, add up.
            worth[fewest] = faster.get(fewest, times.forms[fewest].milliseconds)
        modelled = not all(times.forms[form].measured for form in worth)
        prices[site.name] = Prices(times.dense_milliseconds, worth, exact, modelled)
    return prices, reasons


def _not_faster(times: FormTimes) -> Reason:
    """Return the reason to keep a layer none of whose forms is faster."""
    best = times.best
    if best is None or best.ci95 is None:
        ratio = f" (best {best.speedup:.2f}×)" if best is not None else ""
        text = f"no form is faster by the model of times{ratio}; there was no time to measure"
    else:
        text = (
            "no form is measured to be faster in ONNX Runtime beyond noise "
            f"(best {best.speedup:.2f}× [{best.ci95.lo:.2f}, {best.ci95.hi:.2f}]"
            + (
                ", and equal layers differ as much now: measure on an idle machine)"
                if best.ci95.lo > 1
                else ")"
            )
        )
    return Reason(ReasonCode.COSTS_MORE, text)


def _worth_fitting(costs: Mapping[Form, float], step: float, exact: Collection[Form]) -> dict[Form, float]:
    """Thin out the ranks of each scheme to costs at least a factor of `step` apart, but keep the exact ones.

    Ranks that cost more than a higher rank are dropped: the higher rank errs less, whatever the data.
    """
    found: dict[Form, float] = {}
    last: dict[str, float] = {}
    for (scheme, rank), cost in sorted(costs.items(), key=lambda each: -each[0][1]):
        if cost <= last.get(scheme, math.inf) / step:
            last[scheme] = found[scheme, rank] = cost
    return {form: costs[form] for form in costs if form in found or form in exact}
