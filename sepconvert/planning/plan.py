"""The plan of a conversion: what becomes of each convolution and why, and the JSON that it is stored as."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from sepconvert.base.documents import CHECKSUM, is_intact, read_file, sealed, structured
from sepconvert.base.errors import MAX_SEED, SepconvertError, first_line, quoted, shortened
from sepconvert.base.notes import Reason, ReasonCode
from sepconvert.base.options.values import Gate, Mode
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Analysis, Finding
from sepconvert.factorize.exact.factors import Factorization, factorize
from sepconvert.factorize.geometry import ConvSpec, chain_params
from sepconvert.factorize.structures import FORMS
from sepconvert.network.trace import ConvSite

SCHEMA = "sepconvert.plan/1"


_MOST_ELEMENTS = 2**28  # of an input: a gigabyte of float32; a larger shape is a damaged plan


MERGED = "merged"
"""The scheme of both convolutions of a pair that became one."""


Size = Annotated[int, Meta(ge=1)]
Error = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True)
class LayerPlan:
    """The decision on one convolution. MACs are those of one sample over all its calls."""

    name: str
    kind: str
    decision: Literal["converted", "kept"]
    reason: Reason
    spec: ConvSpec | None  # of the dense layer
    scheme: str | None  # this and the rank only if converted
    rank: int | None
    border: Border
    bias: bool  # of the replacement
    macs: tuple[int, int]  # before, after
    params: tuple[int, int]
    tolerance: Error | None  # relative error that the certificate permits in the kernel of an output channel

    def __post_init__(self) -> None:
        """Raise `ValueError` for a structure that the dense layer cannot have."""
        if self.is_replaced:
            _check_structure(self)

    @property
    def is_replaced(self) -> bool:
        """Whether factors take the layer's place."""
        return self.decision == "converted" and self.scheme != MERGED


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is needed to repeat a conversion, apart from the weights."""

    mode: Mode
    gate: Gate
    tol: Error | None
    seed: Annotated[int, Meta(ge=-(2**63), le=MAX_SEED)]
    model_sha256: str | None
    weights_sha256: str | None  # of the tensors beside the plan
    input_shapes: tuple[tuple[Size, ...], ...]  # with batch dimension
    layers: tuple[LayerPlan, ...]
    merges: tuple[tuple[str, str], ...]  # done before any layer is replaced, the second into the first

    def __post_init__(self) -> None:
        """Raise `ValueError` for a layer that occurs twice, or for an input that no machine holds."""
        for name, count in Counter(layer.name for layer in self.layers).items():
            if count > 1:
                raise ValueError(f"layer {shortened(name)} occurs {count} times")
        if max(map(math.prod, self.input_shapes), default=0) > _MOST_ELEMENTS:
            raise ValueError(f"an input shape is out of range (at most {_MOST_ELEMENTS:,} elements)")

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        """The layers that change."""
        return tuple(layer for layer in self.layers if layer.decision == "converted")

    @property
    def replaced(self) -> tuple[LayerPlan, ...]:
        """The layers that are replaced by factors."""
        return tuple(layer for layer in self.layers if layer.is_replaced)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`, with its checksum."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        layers = [{**layer, **reason_json(self.layers[i].reason)} for i, layer in enumerate(plain["layers"])]
        return sealed({"schema": SCHEMA, **plain, "layers": layers})


def reason_json(reason: Reason) -> dict[str, str]:
    """Return the entries of a JSON object that hold a reason: its text and its code."""
    return {"reason": reason.text, "reason_code": reason.code.value}


def read_plan(source: Path | Mapping[str, Any]) -> ConversionPlan:
    """Read the document that `ConversionPlan.to_json` returned, or the file that holds it.

    Raises:
        SepconvertError: it is no plan (the message names the key), one of another version, or damaged.
    """
    where = str(source) if isinstance(source, Path) else "plan"
    document = _parsed(source) if isinstance(source, Path) else source
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise SepconvertError(f"{where}: expected schema {SCHEMA!r}, got {quoted(found)}; make the plan anew")
    if CHECKSUM in document and not is_intact(document):
        raise SepconvertError(
            f"{where}: is not as it was written (its checksum differs); copy it again, or, if you have "
            f"changed it yourself, remove the line {CHECKSUM!r}"
        )
    where = f"{where}: not a valid plan"
    plan = structured(_with_nested_reasons(document), ConversionPlan, where)
    for key in _odd_keys({CHECKSUM: None, **document}, plan.to_json()):
        raise SepconvertError(f"{where}: {key} is missing, or is no key of a plan; make it anew")
    return plan


def _parsed(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise SepconvertError(
            f"{path}: expected a plan.json that sepconvert wrote, got no JSON: {first_line(error)}"
        ) from error


def _with_nested_reasons(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's document with text and code of each reason in one object, as `LayerPlan` has them."""

    def nested(layer: Any) -> Any:
        if not isinstance(layer, Mapping):
            return layer
        keys = {"reason": "text", "reason_code": "code"}
        reason = {short: layer[key] for key, short in keys.items() if key in layer}
        return {**{key: value for key, value in layer.items() if key not in keys}, "reason": reason}

    layers = document.get("layers")
    return (
        {**document, "layers": [nested(each) for each in layers]}
        if isinstance(layers, list)
        else {**document}
    )


def _odd_keys(given: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys that only one of two JSON documents has."""
    if isinstance(given, Mapping) and isinstance(expected, Mapping):
        yield from (f"{path}{key}" for key in sorted(given.keys() ^ expected.keys()))
        for key in given.keys() & expected.keys():
            yield from _odd_keys(given[key], expected[key], f"{path}{key}.")
    elif isinstance(given, list) and isinstance(expected, list):
        for index, pair in enumerate(zip(given, expected, strict=True)):
            yield from _odd_keys(*pair, f"{path.removesuffix('.')}[{index}].")


def _check_structure(layer: LayerPlan) -> None:
    """Raise `ValueError` unless the dense layer can have the structure that it is to be converted to."""
    if layer.spec is None or layer.scheme is None or layer.rank is None:
        raise ValueError(f"layer {layer.name} is to be converted but has no spec, scheme or rank")
    groups = layer.spec.groups
    if groups < 1 or layer.spec.in_channels % groups or layer.spec.out_channels % groups:
        raise ValueError(f"layer {layer.name} has channels that cannot be of {groups} groups")
    trimmed = layer.border.trim_spec(layer.spec)
    sizes = (*layer.spec.stride, *layer.spec.dilation, *layer.spec.weight_shape, *trimmed.kernel_size)
    if min(sizes) < 1 or min(astuple(layer.border)) < 0:
        raise ValueError(f"layer {layer.name} has no such kernel: {layer.spec}, {layer.border}")
    if layer.scheme != ZERO_BORDER:
        structure = FORMS.get(layer.scheme)
        if structure is None or not structure.applies(trimmed):
            raise ValueError(f"layer {layer.name} cannot have the structure {layer.scheme!r}")
        if not 1 <= layer.rank <= structure.full_rank(trimmed):
            raise ValueError(f"layer {layer.name} cannot have rank {layer.rank}")


def plan_layer(
    site: ConvSite,
    analysis: Analysis | None,
    obstacle: Callable[[], str | None],
    gate: Gate,
    tol: float | None,
    is_slower: Callable[[Factorization], str | None],
) -> tuple[LayerPlan, Factorization | None]:
    """Decide on one convolution: the cheapest structure that it has, if the gate lets it through.

    Args:
        site: the convolution.
        analysis: None if it was not analysed, the site then having an obstacle.
        obstacle: returns why the model cannot be rewritten here; called only where a structure holds.
        gate: "macs", "latency" or "none".
        tol: as given to the analysis.
        is_slower: under the gate "latency", returns why a factorization does not pay in the runtime, or None.
    """
    if analysis is None or site.conv is None:
        return kept(site, _not_analysed(site)), None
    held = analysis.holding()
    if not held:
        return kept(site, _nearest_structure(analysis)), None
    code, failures = ReasonCode.FULL_RANK, []
    for finding in held:
        structure = f"{finding.scheme} of rank {finding.rank}"
        if gate == "macs" and finding.macs >= analysis.dense_macs:
            cost = f"{finding.macs:,} MACs instead of {analysis.dense_macs:,}"
            code = ReasonCode.COSTS_MORE
            failures.append(f"{structure} holds but costs {cost} (gate none converts it)")
            break  # the others cost more
        reason = obstacle()
        if reason is not None:
            return kept(site, Reason(ReasonCode.OBSTACLE, f"{structure} holds, but {reason}")), None
        factorization = factorize(analysis, finding, site.conv.weight, tol)
        certificate = factorization.certificate
        if not certificate.holds:
            error = f"{certificate.worst_channel_error:.1e} > {certificate.channel_tolerance:.1e}"
            failures.append(f"{structure} fails its certificate ({error})")
            continue
        slower = is_slower(factorization) if gate == "latency" else None
        if slower is not None:
            code = ReasonCode.COSTS_MORE
            failures.append(f"{structure} holds but {slower}")
            continue
        return _converted(site, analysis, finding, factorization), factorization
    return kept(site, Reason(code, "; ".join(failures))), None


def kept(site: ConvSite, reason: Reason) -> LayerPlan:
    """Return the plan of a convolution that stays as it is."""
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="kept",
        reason=reason,
        spec=None if site.conv is None else site.conv.spec,
        scheme=None,
        rank=None,
        border=Border(),
        bias=site.conv is not None and site.conv.spec.bias,
        macs=(site.macs, site.macs),
        params=(site.params, site.params),
        tolerance=None,
    )


def _converted(
    site: ConvSite, analysis: Analysis, finding: Finding, factorization: Factorization
) -> LayerPlan:
    trimmed = "" if not analysis.border or finding.scheme == ZERO_BORDER else " after cutting its zero border"
    rank = f"{finding.rank} of {finding.full_rank}" + (" taps" if finding.scheme == ZERO_BORDER else "")
    inexact = "" if factorization.certificate.exact else ", within the tolerance only"
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=Reason(ReasonCode.SEPARATES, f"rank {rank}{trimmed}{inexact}"),
        spec=None if site.conv is None else site.conv.spec,
        scheme=factorization.scheme,
        rank=factorization.rank,
        border=factorization.border,
        bias=site.conv is not None and site.conv.spec.bias,
        macs=(site.macs, finding.macs),
        # Fixed filters are no parameters, nor are their factors.
        params=(site.params, chain_params(factorization.specs) if site.params else 0),
        tolerance=factorization.certificate.channel_tolerance,
    )


def _not_analysed(site: ConvSite) -> Reason:
    if site.obstacle is None:
        return Reason(ReasonCode.NOT_SELECTED, "not selected")
    return obstacle_reason(site, site.obstacle)


def obstacle_reason(site: ConvSite, text: str) -> Reason:
    """Return the reason not to replace a site that allows no replacement."""
    return Reason(ReasonCode.OBSTACLE if site.is_convolution else ReasonCode.UNFOLLOWED, text)


def _nearest_structure(analysis: Analysis) -> Reason:
    """Return why no structure holds, with the one that comes nearest."""
    if not analysis.findings:
        return Reason(ReasonCode.FULL_RANK, "a 1×1 convolution of one channel has no structure")
    nearest = min(analysis.findings, key=lambda finding: finding.best_error)
    if nearest.rank < nearest.full_rank and nearest.best_error <= nearest.tolerance:
        return Reason(
            ReasonCode.COSTS_MORE,
            f"{nearest.scheme} of rank {nearest.rank} (of {nearest.full_rank}) would need more weights",
        )
    return Reason(
        ReasonCode.FULL_RANK,
        f"no exact structure; nearest is {nearest.scheme}: relative error {nearest.best_error:.2g} "
        f"at rank {max(nearest.paying_rank, 1)} of {nearest.full_rank}",
    )
