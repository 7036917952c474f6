"""Fit of the coefficients of `sepconvert.planning.timing.model` to measured layers, in yardsticks.

    python benchmarks/cost_model.py [--threads 1] [--runs 10]

Layers of common networks are timed in all kinds of forms, each together with the yardstick. Printed are the
coefficients by least squares of logarithms, the spread of measured over modelled times by
kind of kernel, and how well the model ranks the forms of a layer.
"""

import math

import click
import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from tabulate import tabulate

from sepconvert.base.environment import Runtime, environment
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.factors import branches
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.files.onnx.layer import layer_onnx
from sepconvert.measure.latency import Deployed, time_all
from sepconvert.planning.forms import all_forms
from sepconvert.planning.timing.clock import YARDSTICK, YARDSTICK_SHAPE
from sepconvert.planning.timing.model import RATES, path_of

# Input channels, output channels, height and width.
SHAPES = [(3, 16, 32), (16, 16, 32), (32, 32, 16), (64, 64, 32), (64, 64, 56), (128, 128, 28), (96, 192, 16)]
KINDS = [*RATES]


def layers() -> list[tuple[ConvSpec, tuple[int, ...]]]:
    """Return geometries and input shapes: 3×3, some 5×5 and strided ones, depthwise and pointwise."""
    found = []
    for inputs, outputs, size in SHAPES:
        for kernel, stride, groups in ((3, 1, 1), (5, 1, 1), (3, 2, 1), (3, 1, inputs), (3, 1, 4), (1, 1, 1)):
            if groups > 1 and (inputs != outputs or inputs % groups):
                continue
            pads = ((kernel // 2, kernel // 2),) * 2
            spec = ConvSpec(
                inputs, outputs, (kernel, kernel), (stride, stride), pads, groups=groups, bias=True
            )
            found.append((spec, (1, inputs, size, size)))
    return found


def features(chains, shape) -> np.ndarray:
    """Return multiply-adds by kind of kernel, floats moved, and calls."""
    row = np.zeros(len(KINDS) + 2)
    for chain in chains:
        size = shape[2:]
        for spec in chain:
            output = spec.output_size(size)
            row[KINDS.index(path_of(spec))] += spec.macs(size) / 1e9
            row[-2] += (spec.in_channels * math.prod(size) + spec.out_channels * math.prod(output)) / 1e9
            row[-1] += 1
            size = output
    # The poolings before and after.
    row[-2] += 2 * (math.prod(shape) + chains[0][-1].out_channels * math.prod(size)) / 1e9
    return row


def coefficients(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return positive coefficients by least squares of the logarithms, robust against outliers."""
    start = np.log(np.array([50.0] * len(KINDS) + [300.0, 0.003]))
    found = least_squares(lambda logs: np.log(rows @ np.exp(logs)) - np.log(times), start, loss="soft_l1")
    return np.exp(found.x)


def measured(
    forms: list[tuple[tuple[ConvSpec, ...], ...]], shape: tuple[int, ...], runtime: Runtime, runs: int
):
    """Return the times of forms of a layer in yardsticks."""
    rng = np.random.default_rng(0)
    models = [(layer_onnx(chains, shape), shape) for chains in forms]
    models.append((layer_onnx([[YARDSTICK]], YARDSTICK_SHAPE), YARDSTICK_SHAPE))
    deployed = [
        (Deployed(model, runtime), {"input": rng.standard_normal(size, np.float32)}) for model, size in models
    ]
    *times, unit = time_all(deployed, runs=runs, seed=0)
    return [float(np.median(each / unit)) for each in times]


@click.command(help=__doc__)
@click.option("--threads", default=1, show_default=True)
@click.option("--runs", default=10, show_default=True, help="Timed rounds of each layer.")
def main(threads: int, runs: int) -> None:
    """Print the coefficients."""
    runtime = Runtime(threads)
    rows, times, groups, kinds = [], [], [], []
    for number, (spec, shape) in enumerate(layers()):
        forms = [((spec,),), *(branches(spec, *form, Border()) for form in all_forms(spec)[::4])]
        for chains, seconds in zip(forms, measured(forms, shape, runtime, runs), strict=True):
            rows.append(features(chains, shape))
            times.append(seconds)
            groups.append(number)
            kinds.append(
                path_of(max((each for chain in chains for each in chain), key=lambda each: each.params))
            )
    fitted = coefficients(np.array(rows), np.array(times))
    click.echo(f"{environment(runtime)['cpu']}, {threads} threads, {len(times)} forms; yardsticks per 10⁹:")
    click.echo(dict(zip([*KINDS, "moved", "call (each)"], fitted.round(4).tolist(), strict=True)))
    modelled = np.array(rows) @ fitted
    ratios = np.array(times) / modelled
    table = []
    for kind in KINDS:
        some = ratios[[each == kind for each in kinds]]
        if len(some):
            table.append([kind, len(some), *np.quantile(some, [0.05, 0.5, 0.95])])
    click.echo(tabulate(table, ["largest part", "forms", "5 %", "median", "95 %"], floatfmt=".2f"))
    ranks = []
    for number in set(groups):
        own = [each == number for each in groups]
        if sum(own) > 3:
            ranks.append(spearmanr(np.array(times)[own], modelled[own]).statistic)
    click.echo(f"rank correlation within a layer: median {np.median(ranks):.2f}, least {min(ranks):.2f}")


if __name__ == "__main__":
    main()
