"""Approximate mode: how time and peak memory grow with images, layers and width.

    growth.py                                                        a plain network that grows
    growth.py vgg16 wide_resnet50_2 --images 256 --memory 5          torchvision's, at 224×224

A plain network of 3×3 convolutions at 32×32, with BatchNorm and ReLU, is converted with `--rank 1` from
noise; of images, layers and width each grows in turn, while the others are the first of their list. Networks
of torchvision have random weights. Every run is a process of its own; what its imports take is in the memory,
not in the time. The tables are Markdown, with the command above them; the second holds the seconds of each
stage that takes a fiftieth of the time in some run.
"""

import multiprocessing
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
import torchvision
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.environment import Runtime, available_cores, environment
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.network.tensors import InputBatch

LEAST = 0.02  # share of the time of a stage that has a column

Measured = tuple[float, float, dict[str, float]]
"""Seconds, the most GB that the process held, and the seconds of each stage."""


def network(layers: int, width: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for index in range(layers):
        blocks += [
            nn.Conv2d(width if index else 16, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def grown(images: int, layers: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    """A plain network and its images."""
    return network(layers, width), torch.randn(images, 16, 32, 32)


def named(name: str, images: int) -> tuple[nn.Module, torch.Tensor]:
    """A network of torchvision whose BatchNorms suit the images, as a trained one's do."""
    model, x = torchvision.models.get_model(name), torch.randn(images, 3, 224, 224)
    reestimate_batchnorm(model.eval(), InputBatch((x[:16],)).split(8))
    return model, x


def convert(
    build: Callable[..., tuple[nn.Module, torch.Tensor]], memory: float | None, sizes: Mapping[str, Any]
) -> Measured:
    """Convert a network of some size."""
    torch.manual_seed(0)
    model, x = build(**sizes)
    images = len(x)
    loader = DataLoader(TensorDataset(x, torch.full((images,), -1)), batch_size=64)
    start = time.perf_counter()
    result = sepconvert.convert(
        model, x[:1], mode="approx", rank=1, gate="none", calib=loader,
        calibration=sepconvert.Calibration(images=images, memory=memory and memory * 1e9),
        timing=sepconvert.Timing(runs=0),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return seconds, held, {stage["stage"]: stage["wall_s"] for stage in result.report["stages"]}


def measured(build: Callable[..., Any], memory: float | None, sizes: Mapping[str, Any]) -> Measured:
    """Convert in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(convert, build, memory, sizes).result()


def table(runs: Sequence[Mapping[str, Any]], found: Sequence[Measured]) -> str:
    """A row for each run: sizes, seconds, GB."""
    rows = [
        [*sizes.values(), f"{seconds:.1f}", f"{held:.2f}"]
        for sizes, (seconds, held, _) in zip(runs, found, strict=True)
    ]
    return tabulate(rows, headers=[*runs[0], "seconds", "GB"], tablefmt="github")


def stage_table(runs: Sequence[Mapping[str, Any]], found: Sequence[Measured]) -> str:
    """A row for each run: sizes, and the seconds of stages, the longest of all runs first."""
    sums: dict[str, float] = {}
    for _, _, walls in found:
        for stage, seconds in walls.items():
            sums[stage] = sums.get(stage, 0.0) + seconds
    ordered = sorted(sums, key=lambda stage: -sums[stage])
    stages = [
        stage
        for stage in ordered
        if any(walls.get(stage, 0.0) >= LEAST * sum(walls.values()) for *_, walls in found)
    ]
    rows = [
        [*sizes.values(), *(f"{walls.get(stage, 0.0):.1f}" for stage in stages)]
        for sizes, (*_, walls) in zip(runs, found, strict=True)
    ]
    return tabulate(rows, headers=[*runs[0], *stages], tablefmt="github")


def _counts(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--images", default="512,1024,2048", show_default=True, callback=_counts)
@click.option("--layers", default="8,16,32", show_default=True, callback=_counts)
@click.option("--width", default="64,128,256", show_default=True, callback=_counts)
@click.option("--memory", type=float, help="Of the process, in GB.")
def main(
    names: tuple[str, ...], images: list[int], layers: list[int], width: list[int], memory: float | None
) -> None:
    runs: list[dict[str, Any]]
    if names:
        build: Callable[..., Any] = named
        runs = [{"name": name, "images": count} for name in names for count in images]
    else:
        build = grown
        sizes = {"images": images, "layers": layers, "width": width}
        base = {name: counts[0] for name, counts in sizes.items()}
        runs = [base, *({**base, name: count} for name, counts in sizes.items() for count in counts[1:])]
    found = []
    for each in runs:
        found.append(measured(build, memory, each))
        click.echo(
            f"{', '.join(map(str, each.values()))}: {found[-1][0]:.1f} s, {found[-1][1]:.2f} GB", err=True
        )
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    here = environment(Runtime(available_cores()))
    versions = f"torch {here['torch']}, ONNX Runtime {here['onnxruntime']}"
    click.echo(f"`{command}`, {here['cpu']}, {here['threads']} threads, {versions}:\n")
    click.echo(f"{table(runs, found)}\n\n{stage_table(runs, found)}\n")


if __name__ == "__main__":
    main()
