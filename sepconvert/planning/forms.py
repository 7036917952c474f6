"""Forms that each layer may take, and their prices in MACs, parameters or milliseconds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sepconvert.base.progress import Progress
from sepconvert.factorize.approximate.problem import Approximation
from sepconvert.factorize.approximate.weighted import DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE
from sepconvert.factorize.exact.analysis import analyse, may_separate
from sepconvert.factorize.geometry import ConvSpec, chain_macs, chain_params
from sepconvert.factorize.structures import BY_NAME, FORMS, Form
from sepconvert.network.trace import ConvSite
from sepconvert.planning.timing import Clock

# Below this a depthwise layer has fewer channels than the smallest block of the runtime's kernels, and the
# stem, which is such a layer as a rule, is where an error is carried furthest.
FEWEST_CHANNELS = 8


_LARGEST_RANK = 6


# Pointwise-depthwise fits multiply all of W by all of S again and again; beyond this many multiply-adds
# (256 to 512 channels, 3×3) that takes minutes, and the form is left out.
_QUICK_PRODUCT = 4e9


# Inner channels of pairs, as shares of full rank: of a 3×3 pair C → C with full rank 3 C, C/8 to C.
_RANK_SHARES = (1 / 24, 1 / 16, 1 / 12, 1 / 9, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 2 / 3)


BLOCK = 8


@dataclass(frozen=True)
class Prices:
    """Costs of a layer and of the forms that may take its place."""

    dense: float
    forms: Mapping[Form, float]

    def of(self, forms: Iterable[Form]) -> "Prices":
        """Only some of the forms."""
        return Prices(self.dense, {form: self.forms[form] for form in forms})


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


def depthwise_forms(spec: ConvSpec, rank: int | None) -> list[Form]:
    """Depthwise and pointwise factors of `rank`, or of all that may pay."""
    found = []
    for scheme in (DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE):
        if scheme == POINTWISE_DEPTHWISE and not is_quick(spec):
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
            ranks = {round(share * full / BLOCK) * BLOCK for share in _RANK_SHARES}
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


def is_quick(spec: ConvSpec) -> bool:
    unknowns = spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    return spec.out_channels * unknowns**2 <= _QUICK_PRODUCT


def trimmed(fitted: Approximation, dtype: torch.dtype) -> Approximation:
    """Without the dense kernel, and with factors in single precision, or the model's: many are kept."""
    dtype = torch.promote_types(dtype, torch.float32)
    weights = tuple(weight.to(dtype) for weight in fitted.weights)
    return replace(fitted, weights=weights, kernel=torch.empty(0), basis=fitted.basis.to(dtype))


# Ratio between costs of ranks that are worth telling apart: fits are what the survey spends its time on, and
# those of layers of more than a million weights above all.
_COST_STEP, _COARSE_COST_STEP, _MANY_WEIGHTS = 1.15, 1.3, 10**6


def candidate_forms(site: ConvSite, rank: int | None, exact: Sequence[Form] | None) -> Sequence[Form]:
    """What may take a layer's place, whatever it costs: depthwise and pointwise, or all with the `exact`."""
    spec = site.dense.spec
    if exact is None:
        return depthwise_forms(spec, rank)
    # Ranks at which it has a form exactly are as good as any that are on the grid.
    return exact if site.params == 0 else list(dict.fromkeys([*all_forms(spec), *exact]))


def exact_forms(site: ConvSite) -> list[Form]:
    """Those that a kernel has, whatever the data."""
    spec, weight = site.dense.spec, site.dense.weight
    if not may_separate(spec, weight):
        return []
    held = analyse(spec, weight, site.sizes).holding()
    return [(each.scheme, each.rank) for each in held if each.scheme in FORMS and each.rank]


def counted_prices(site: ConvSite, forms: Sequence[Form], gate: str, unit: str) -> Prices:
    """Prices in MACs or parameters, of the forms that pass the gate."""
    macs = {form: macs_of(site, form) for form in forms}
    passed = [form for form in forms if gate == "none" or macs[form] < site.macs]
    if unit == "macs":
        return Prices(site.macs, {form: macs[form] for form in passed})
    return Prices(site.params, {form: params_of(site, form) for form in passed})


def measured_prices(
    sites: Sequence[ConvSite],
    counted: Mapping[str, Prices],
    exact: Mapping[str, Sequence[Form]],
    clock: Clock,
    progress: Progress,
) -> tuple[dict[str, Prices], dict[str, str]]:
    """Prices in milliseconds, and why layers are no longer there.

    Time may be up before all are measured. What has the most MACs for each form to be timed comes first, and
    the forms that a layer has exactly by themselves: they are few, and cost no accuracy.
    """
    prices, reasons = dict[str, Prices](), dict[str, str]()
    queue = []
    for site in sites:
        forms = list(counted[site.name].forms)
        held = [form for form in exact.get(site.name, ()) if form in forms]
        queue += [(site, some) for some in (held, forms) if some]
    queue.sort(key=lambda each: -each[0].macs / len(each[1]))
    for site, forms in progress(queue, "timing forms"):
        times = clock.forms(site, forms)
        if times is None:
            if site.name not in prices:
                reasons[site.name] = "was not timed within --measure-seconds, least MACs for each form last"
            continue
        faster = {form: each.milliseconds for form, each in times.forms.items() if each.faster}
        if not faster:
            reasons[site.name] = (
                f"no form is measured to be faster in ONNX Runtime (best {times.best_ratio:.2f}×)"
            )
            continue
        reasons.pop(site.name, None)
        many = math.prod(site.dense.spec.weight_shape) > _MANY_WEIGHTS
        step = _COARSE_COST_STEP if many else _COST_STEP
        prices[site.name] = Prices(times.dense_milliseconds, _worth_fitting(faster, step))
    return prices, reasons


def _worth_fitting(costs: Mapping[Form, float], step: float) -> dict[Form, float]:
    """Of each scheme ranks of costs that are a `step` apart, and none that a higher rank undercuts.

    A higher rank errs less, whatever the data.
    """
    found: dict[Form, float] = {}
    last: dict[str, float] = {}
    for (scheme, rank), cost in sorted(costs.items(), key=lambda each: -each[0][1]):
        if cost <= last.get(scheme, math.inf) / step:
            last[scheme] = found[scheme, rank] = cost
    return {form: found[form] for form in costs if form in found}
