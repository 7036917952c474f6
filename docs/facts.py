"""The facts that the figures of the documentation show, computed and measured by the code that they describe.

Facts are values that can be stored as JSON: numbers, texts, tuples and mappings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sepconvert
from sepconvert.base.environment import Runtime, environment
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER, Finding, analyse
from sepconvert.factorize.exact.factors import branches, factorize
from sepconvert.factorize.geometry import ConvSpec, chain_macs
from sepconvert.factorize.structures import FORMS
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import Deployed, speedup, time_all
from sepconvert.report.text.tables import layer_table, structure_table

ROOT = Path(__file__).parent.parent
RUNS = 30  # timed rounds: the interval of a median is narrow enough to be drawn
IMAGES = 64
SPATIAL, PER_CHANNEL = "spatial-vh", "channelwise-spatial-vh"
DEPTHWISE = "depthwise-pointwise"
DIGITS = 6  # significant ones of a stored number

Matrix = tuple[tuple[float, ...], ...]
Estimate = tuple[float, float, float]  # with the bounds of its 95 % interval


def images(count: int) -> Tensor:
    """Return images of the demo network's evaluation data, as it takes them."""
    return to_input(evaluation_data(count).x)


def _spec(layer: nn.Conv2d) -> ConvSpec:
    """Return the geometry of a layer with equal padding on all sides."""
    pad = int(layer.padding[0])
    return ConvSpec(
        layer.in_channels, layer.out_channels, tuple(layer.kernel_size), padding=((pad, pad), (pad, pad)),
        bias=layer.bias is not None,
    )  # fmt: skip


def _number(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _matrix(values: Tensor) -> Matrix:
    return tuple(tuple(_number(each) for each in row) for row in values.tolist())


# One kernel as a column times a row -----------------------------------------------------------------


@dataclass(frozen=True)
class RankOne:
    """A 3×3 kernel, its nearest column times row, and the error of that product."""

    name: str
    kernel: Matrix
    column: Matrix
    row: Matrix
    error: float
    values: tuple[float, ...]  # singular values; their squares sum up to 1

    @classmethod
    def of(cls, name: str, kernel: Tensor) -> "RankOne":
        """Factor a kernel: exactly where that is possible, which keeps small integers."""
        spec, weight = ConvSpec(1, 1, (3, 3)), kernel[None, None]
        analysis = analyse(spec, weight, [(8, 8)])
        finding = next(each for each in analysis.findings if each.scheme == PER_CHANNEL)
        if finding.holds:
            column, row = factorize(analysis, finding, weight).weights
        else:
            fit = Problem(spec, weight, Moments.of_weights(spec, weight)).fit(PER_CHANNEL, 1)
            column, row = fit.weights
            balance = (row.norm() / column.norm()).sqrt() * column.sum().sign()
            column, row = column * balance, row / balance
        return cls(
            name, _matrix(kernel), _matrix(column[0, 0]), _matrix(row[0, 0]), _number(finding.best_error),
            tuple(map(_number, finding.spectrum)),
        )  # fmt: skip


def three_kernels() -> list[RankOne]:
    """Return Sobel's, Laplace's, and the slice of a trained layer with the median rank-1 error."""
    slices = load().head.conv.weight.detach().flatten(0, 1)
    values = torch.linalg.svdvals(slices)
    errors = values[:, 1:].norm(dim=1) / values.norm(dim=1)
    typical = slices[errors.argsort()[len(errors) // 2]]
    return [
        RankOne.of("Sobel", torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])),
        RankOne.of("Laplacian", torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])),
        RankOne.of("trained", typical),
    ]


# Spectra of whole layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """Singular values of a layer's kernel, of norm 1 together, and what they say of its rank."""

    values: tuple[float, ...]
    rank: int
    full_rank: int
    holds: bool  # whether the kernel separates at that rank
    tolerance: float  # what rounding explains

    @classmethod
    def of(cls, finding: Finding) -> "Values":
        """Take what is drawn of a finding."""
        spectrum = tuple(map(_number, finding.spectrum))
        return cls(spectrum, finding.rank, finding.full_rank, finding.holds, _number(finding.tolerance))


def two_spectra() -> dict[str, Values]:
    """Return the spectra of a layer that was trained as a pair and merged, and of an ordinary one."""
    net, found = load(), {}
    for name, layer in (("large.conv, 7×7", net.large.conv), ("head.conv, 3×3", net.head.conv)):
        analysis = analyse(_spec(layer), layer.weight.detach(), [(24, 24)])
        found[name] = Values.of(next(each for each in analysis.findings if each.scheme == SPATIAL))
    return found


# How data flow --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flow:
    """Multiplications of both layers, as `sepconvert.profile` counts them."""

    dense: int
    separable: int


def multiplications() -> Flow:
    """Count a 5×5 convolution from 3 to 256 channels on a 12×12 image, and its separable replacement."""
    image = torch.zeros(1, 3, 12, 12)
    dense = nn.Conv2d(3, 256, 5, bias=False)
    separable = nn.Sequential(nn.Conv2d(3, 3, 5, groups=3, bias=False), nn.Conv2d(3, 256, 1, bias=False))
    return Flow(
        *(
            sepconvert.profile(each, image, timing=sepconvert.Timing(runs=0)).macs
            for each in (dense, separable)
        )
    )


# One layer in two forms ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormOf:
    """A trained layer in one form at one rank."""

    rank: int
    macs: float  # share of the dense layer's
    weight_error: float
    output_error: float
    time: Estimate  # share of the dense layer's


@dataclass(frozen=True)
class TwoForms:
    """A trained layer in two forms, and the machine on which they were timed."""

    machine: str
    forms: dict[str, tuple[FormOf, ...]]


def two_forms(runs: int = RUNS) -> TwoForms:
    """Fit the demo network's `head.conv` (3×3, 32 → 32) in depthwise and, at no lower cost, spatial form."""
    net, seen = load(), []
    layer = net.head.conv
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(images(IMAGES))
    handle.remove()
    spec, weight, size = _spec(layer), layer.weight.detach(), (seen[0].shape[2], seen[0].shape[3])
    problem = Problem(spec, weight, _moments(spec, weight, seen[0]))
    multipliers = range(1, 7)
    each, one = (chain_macs(FORMS[scheme].split(spec, 1), size) for scheme in (DEPTHWISE, SPATIAL))
    forms = [(SPATIAL, -(-m * each // one)) for m in multipliers] + [(DEPTHWISE, m) for m in multipliers]
    times = _times(spec, forms, (1, spec.in_channels, *size), runs)
    found: dict[str, tuple[FormOf, ...]] = {SPATIAL: (), DEPTHWISE: ()}
    for (scheme, rank), time in zip(forms, times, strict=True):
        fit = problem.fit(scheme, rank)
        macs = chain_macs(FORMS[scheme].split(spec, rank), size) / spec.macs(size)
        shares = _number(macs), _number(fit.weight_error), _number(fit.output_error)
        found[scheme] += (FormOf(rank, *shares, time),)
    machine = environment(Runtime(1))
    return TwoForms(", ".join([str(machine["cpu"]), *machine["instruction_sets"]]), found)


def _moments(spec: ConvSpec, weight: Tensor, inputs: Tensor) -> Moments:
    """Return moments of all patches, for a layer of one group whose targets are its own outputs."""
    (top, _), _ = spec.padding
    patches = F.unfold(inputs.double(), spec.kernel_size, padding=top).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    covariance = (patches - mean).mT @ (patches - mean) / len(patches)
    kernel = weight.double().flatten(1)
    nothing = torch.zeros(1, *kernel.shape, dtype=torch.float64)
    return Moments(
        count=len(patches),
        covariance=covariance[None],
        cross=nothing,
        mean=mean[None],
        residual_mean=nothing[0, :, 0],
        residual_covariance=nothing[:, :, :1] @ nothing[:, :, :1].mT,
        output_covariance=(kernel @ covariance @ kernel.mT)[None],
    )


def _times(
    spec: ConvSpec, forms: Sequence[tuple[str, int]], shape: Sequence[int], runs: int
) -> list[Estimate]:
    """Time each form against the dense layer, in rounds in which each of them runs once."""
    layouts = [branches(spec, *form, Border()) for form in ((ZERO_BORDER, 0), *forms)]
    feed = {"input": np.random.default_rng(0).standard_normal(shape, np.float32)}
    dense, *others = [(Deployed(layer_onnx(each, shape), Runtime(1)), feed) for each in layouts]
    first, again, *samples = time_all([dense, dense, *others], runs=runs, seed=0)
    ratios = [speedup(first, again, each) for each in samples]
    # The largest ratio is the least time.
    return [(_number(1 / r.median), _number(1 / r.ci95.hi), _number(1 / r.ci95.lo)) for r in ratios]


# Plans of three networks -----------------------------------------------------------------------------

_SPREAD = r"\[(-?[\d.]+), (-?[\d.]+)\]"  # an interval
_CELL = re.compile(rf"\*\*([\d.]+)× {_SPREAD}\*\* at (-?[\d.]+) {_SPREAD} pp")  # of README.md
_ROW = re.compile(rf"^\| [\d.]+ \| ([\d.]+) {_SPREAD} \| [\d.]+ \| ([\d.]+) {_SPREAD} \|$", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """A plan, by its measured speed-up and the percentage points of top-1 accuracy that it loses."""

    speedup: Estimate
    drop: Estimate


@dataclass(frozen=True)
class Curve:
    """The plans that one conversion measured, in the order of the benchmarks' table."""

    network: str
    data: str  # how many images of which data set
    top1: str
    milliseconds: float
    budget: float  # percentage points
    plans: tuple[Point, ...]
    delivered: int  # index of the plan
    finetuned: Point | None  # delivered by the same command with `--finetune 5`


def three_curves() -> list[Curve]:
    """Read the results of three networks from README.md, and their plans from benchmarks/README.md."""
    sections = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split("\n#### ")
    found = []
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| ResNet-"):
            continue
        about, budget, delivered, finetuned = line.strip("| ").split(" | ")
        network, data = about.split(", ", 1)
        data, top1 = data.rsplit(", ", 1)
        section = next(each for each in sections if f"\n{top1} on " in each)
        plans = [_point(*each[3:], *each[:3]) for each in _ROW.findall(section)]
        chosen, trained = ([_point(*each) for each in _CELL.findall(cell)] for cell in (delivered, finetuned))
        milliseconds = re.findall(r"images, ([\d.]+) ms\.", section)[0]
        index = [each.drop for each in plans].index(chosen[0].drop)
        found.append(
            Curve(
                network, data, top1, float(milliseconds), float(budget.split()[0]), tuple(plans), index,
                trained[0] if trained else None,
            )
        )  # fmt: skip
    return found


def _point(*numbers: str) -> Point:
    """Return a plan from its speed-up and its drop, each with the bounds of its interval."""
    speed, *spread = map(float, numbers[:3])
    drop, *bounds = map(float, numbers[3:])
    return Point((speed, *spread), (drop, *bounds))


# All of them -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """The facts of every figure, by its name."""

    kernels: list[RankOne]
    spectra: dict[str, Values]
    flow: Flow
    forms: TwoForms
    curves: list[Curve]

    @classmethod
    def gathered(cls, runs: int = RUNS) -> "Facts":
        """Compute, measure in a number of rounds, and read all facts."""
        return cls(three_kernels(), two_spectra(), multiplications(), two_forms(runs), three_curves())


def tables() -> dict[str, str]:
    """Return the tables that pages include, as they are printed: all layers, and structures of two."""
    layers = sepconvert.inspect(load(), images(1)).to_json()["layers"]
    shown = [layer for layer in layers if layer["name"] in ("large.conv", "head.conv")]
    return {"layers": layer_table(layers), "structures": structure_table(shown)}
