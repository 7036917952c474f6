"""Findings + gate → plan: for every convolution, what becomes of it and why. JSON both ways."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sepconvert.base.documents import CHECKSUM, is_intact, read_file, sealed
from sepconvert.base.errors import SepconvertError, first_line, quoted, shortened
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Analysis, Finding
from sepconvert.factorize.exact.factors import Factorization, factorize
from sepconvert.factorize.geometry import ConvSpec, chain_params
from sepconvert.factorize.structures import FORMS
from sepconvert.network.trace import ConvSite

SCHEMA = "sepconvert.plan/1"


Gate = Literal["macs", "latency", "none"]


GATES: tuple[str, ...] = get_args(Gate)


_LARGEST = 2**28  # elements of an input, a gigabyte of float32: more is damage, not a model's input


MERGED = "merged"
"""The scheme of both convolutions of a pair that became one."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one convolution. MACs are those of one sample over all its calls."""

    name: str
    kind: str
    decision: Literal["converted", "kept"]
    reason: str
    spec: ConvSpec | None  # of the dense layer
    scheme: str | None  # the rest only if converted
    rank: int | None
    border: Border
    bias: bool  # of the replacement
    macs: tuple[int, int]  # before, after
    params: tuple[int, int]
    tolerance: float | None  # relative error of an output channel's kernel that its certificate permits


@dataclass(frozen=True)
class ConversionPlan:
    """Everything needed to repeat a conversion, but for the weights."""

    mode: str
    gate: str
    tol: float | None
    seed: int
    model_sha256: str | None
    weights_sha256: str | None  # of the tensors beside the plan
    input_shapes: tuple[tuple[int, ...], ...]  # with batch dimension
    layers: tuple[LayerPlan, ...]
    merges: tuple[tuple[str, str], ...] = ()  # before anything is replaced, the second into the first

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        """The layers that change."""
        return tuple(layer for layer in self.layers if layer.decision == "converted")

    @property
    def replaced(self) -> tuple[LayerPlan, ...]:
        """The layers to replace by factors."""
        return tuple(layer for layer in self.converted if layer.scheme != MERGED)

    def to_json(self) -> dict[str, Any]:
        """Return the document, with its checksum, in plain lists, numbers and strings."""
        return sealed(json.loads(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)})))


def read_plan(source: Path | Mapping[str, Any]) -> ConversionPlan:
    """Read what `ConversionPlan.to_json` made.

    Raises:
        SepconvertError: not a plan, or of another version, with the key at fault; or not as it was written.
    """
    where = str(source) if isinstance(source, Path) else "plan"
    if isinstance(source, Path):
        try:
            document = json.loads(read_file(source))
        except OSError as error:
            raise SepconvertError(f"{where}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SepconvertError(
                f"{where}: expected a plan.json that sepconvert wrote, got no JSON: {error}"
            ) from error
    else:
        document = source
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise SepconvertError(f"{where}: expected schema {SCHEMA!r}, got {quoted(found)}; make the plan anew")
    if CHECKSUM in document and not is_intact(document):
        raise SepconvertError(
            f"{where}: is not as it was written (its checksum differs); copy it again, or, if you have "
            f"changed it yourself, remove the line {CHECKSUM!r}"
        )
    content = {key: value for key, value in document.items() if key not in ("schema", CHECKSUM)}
    try:
        plan: ConversionPlan = _read(ConversionPlan, content)
        for name, count in Counter(layer.name for layer in plan.layers).items():
            if count > 1:
                raise ValueError(f"layer {shortened(name)} stands there {count} times")
        for layer in plan.replaced:
            _check(layer)
        sizes = [math.prod(shape) for shape in plan.input_shapes]
        if not all(n > 0 for shape in plan.input_shapes for n in shape) or max(sizes, default=0) > _LARGEST:
            raise ValueError(f"input shapes are out of range (at most {_LARGEST} elements)")
        if not -(2**63) <= plan.seed < 2**63:
            raise ValueError("the seed is out of range")
    except (TypeError, ValueError) as error:
        raise SepconvertError(
            f"{where}: not a valid plan: {first_line(error)}; make the plan anew"
        ) from error
    return plan


def _read(hint: Any, value: Any, key: str = "plan") -> Any:
    """What `asdict` and JSON made of a value of type `hint`, turned back."""
    origin, options = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        fields = get_type_hints(hint)
        if set(value) != set(fields):
            raise ValueError(f"{key}: expected {', '.join(fields)}, got {', '.join(map(str, value))}")
        return hint(**{name: _read(each, value[name], f"{key}.{name}") for name, each in fields.items()})
    if origin is tuple and isinstance(value, list):
        items = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(items) == len(value):
            return tuple(_read(each, item, key) for each, item in zip(items, value, strict=True))
    if origin is Literal and value in options:
        return value
    if NoneType in options:
        return None if value is None else _read(options[0], value, key)
    # Not isinstance: True is an int.
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise TypeError(f"{key}: expected {name}, got {json.dumps(value):.40}")


def _check(layer: LayerPlan) -> None:
    """Is the structure to convert to one that the dense layer can have?"""
    if layer.spec is None or layer.scheme is None or layer.rank is None:
        raise ValueError(f"layer {layer.name} is to be converted but has no spec, scheme or rank")
    groups = layer.spec.groups
    if groups < 1 or layer.spec.in_channels % groups or layer.spec.out_channels % groups:
        raise ValueError(f"layer {layer.name} has channels that cannot be of {groups} groups")
    trimmed = layer.border.trim_spec(layer.spec)
    sizes = (*layer.spec.stride, *layer.spec.dilation, *layer.spec.weight_shape, *trimmed.kernel_size)
    if min(sizes) < 1 or min(dataclasses.astuple(layer.border)) < 0:
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
    gate: str,
    tol: float | None,
    is_faster: Callable[[Factorization], str | None],
) -> tuple[LayerPlan, Factorization | None]:
    """Decide on one convolution: the cheapest structure that it has, if the gate lets it through.

    Args:
        site: the convolution.
        analysis: None if it was not analysed, the site then having an obstacle.
        obstacle: why the model cannot be rewritten here; asked only if there is something to rewrite.
        gate: "macs", "latency" or "none".
        tol: as given to the analysis.
        is_faster: under the gate "latency", why a factorisation does not pay in the runtime, or None.
    """
    if analysis is None or site.conv is None:
        return kept(site, site.obstacle or "not selected"), None
    held = analysis.holding()
    if not held:
        return kept(site, _how_near(analysis)), None
    reasons = []
    for finding in held:
        if gate == "macs" and finding.macs >= analysis.dense_macs:
            cost = f"{finding.macs:,} MACs instead of {analysis.dense_macs:,}"
            reasons.append(
                f"{finding.scheme} of rank {finding.rank} holds but costs {cost} (--gate none converts it)"
            )
            break  # the others cost more
        reason = obstacle()
        if reason is not None:
            return kept(site, f"{finding.scheme} of rank {finding.rank} holds, but {reason}"), None
        factorization = factorize(analysis, finding, site.conv.weight, tol)
        certificate = factorization.certificate
        if not certificate.holds:
            error = f"{certificate.worst_channel_error:.1e} > {certificate.channel_tolerance:.1e}"
            reasons.append(f"{finding.scheme} of rank {finding.rank} fails its certificate ({error})")
            continue
        slower = is_faster(factorization) if gate == "latency" else None
        if slower is not None:
            reasons.append(f"{finding.scheme} of rank {finding.rank} holds but {slower}")
            continue
        return _convert(site, analysis, finding, factorization), factorization
    return kept(site, "; ".join(reasons)), None


def kept(site: ConvSite, reason: str) -> LayerPlan:
    """The plan of a convolution that stays as it is."""
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


def _convert(site: ConvSite, analysis: Analysis, finding: Finding, factorization: Factorization) -> LayerPlan:
    trimmed = (
        "" if not analysis.border or finding.scheme == "zero-border" else " after cutting its zero border"
    )
    rank = f"{finding.rank} of {finding.full_rank}" + (" taps" if finding.scheme == "zero-border" else "")
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        decision="converted",
        reason=f"rank {rank}{trimmed}{'' if factorization.certificate.exact else ', within --tol only'}",
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


def _how_near(analysis: Analysis) -> str:
    if not analysis.findings:
        return "a 1×1 convolution of one channel has no structure"
    nearest = min(analysis.findings, key=lambda finding: finding.best_error)
    if nearest.rank < nearest.full_rank and nearest.best_error <= nearest.tolerance:
        return f"{nearest.scheme} of rank {nearest.rank} (of {nearest.full_rank}) would need more weights"
    return (
        f"no exact structure; nearest is {nearest.scheme}: relative error {nearest.best_error:.2g} "
        f"at rank {max(nearest.paying_rank, 1)} of {nearest.full_rank}"
    )
