"""Approximate mode: how time and peak memory grow with images, layers and width.

    python benchmarks/growth.py                                                  a plain network that grows
    python benchmarks/growth.py vgg16 wide_resnet50_2 --images 256 --memory 5    torchvision's, at 224×224

A plain network of 3×3 convolutions at 32×32, with BatchNorm and ReLU, is converted with `--rank 1` from
noise; images, layers and width are doubled in turn. Networks of torchvision have random weights. Every run is
a process of its own; what its imports take is in the memory, not in the time.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.calibrate import reestimate_batchnorm

BASE = {"images": 512, "layers": 8, "width": 64}


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
    reestimate_batchnorm(model.eval(), x[:16].split(8))
    return model, x


def convert(build: Callable[..., tuple[nn.Module, torch.Tensor]], memory: float | None, results: Any,
            **sizes: Any) -> None:  # fmt: skip
    """Seconds and the most bytes that the process held."""
    torch.manual_seed(0)
    model, x = build(**sizes)
    images = len(x)
    loader = DataLoader(TensorDataset(x, torch.full((images,), -1)), batch_size=64)
    start = time.perf_counter()
    sepconvert.convert(
        model, x[:1], mode="approx", rank=1, gate="none", calib=loader, calib_images=images, runs=0,
        memory=memory,
    )  # fmt: skip
    results.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measured(build: Callable[..., Any], memory: float | None, sizes: Mapping[str, Any]) -> list[Any]:
    """A row: sizes, seconds, GB."""
    processes = multiprocessing.get_context("spawn")
    results = processes.Queue()
    process = processes.Process(
        target=convert, args=(build, memory and memory * 1e9, results), kwargs=dict(sizes)
    )
    process.start()
    seconds, held = results.get()
    process.join()
    row = [*sizes.values(), f"{seconds:.1f}", f"{held / 1e9:.2f}"]
    print(tabulate([row], tablefmt="plain"), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="networks of torchvision; none for the plain one")
    parser.add_argument("--images", type=int, nargs="+", default=[256])
    parser.add_argument("--memory", type=float, help="of the process, in GB")
    options = parser.parse_args()
    if options.names:
        runs = [{"name": name, "images": count} for name in options.names for count in options.images]
        build: Callable[..., Any] = named
    else:
        runs = [BASE, *({**BASE, name: factor * BASE[name]} for name in BASE for factor in (2, 4))]
        build = grown
    rows = [measured(build, options.memory, each) for each in runs]
    print(tabulate(rows, headers=[*runs[0], "seconds", "GB"], tablefmt="github"))


if __name__ == "__main__":
    main()
