"""Approximate mode: how time and peak memory grow with images, layers and width.

    python benchmarks/growth.py

A plain network of 3×3 convolutions at 32×32, with BatchNorm and ReLU, is converted with `--rank 1` from
noise; images, layers and width are doubled in turn. Every run is a process of its own;
what its imports take is in the memory, not in the time.
"""

import multiprocessing
import resource
import time
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert

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


def convert(images: int, layers: int, width: int, results: Any) -> None:
    """Seconds and the most bytes that the process held."""
    torch.manual_seed(0)
    model, x = network(layers, width), torch.randn(images, 16, 32, 32)
    loader = DataLoader(TensorDataset(x, torch.full((images,), -1)), batch_size=64)
    start = time.perf_counter()
    sepconvert.convert(
        model, x[:1], mode="approx", rank=1, gate="none", calib=loader, calib_images=images, runs=0
    )
    results.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> None:
    processes = multiprocessing.get_context("spawn")
    rows = []
    grown = [{**BASE, name: factor * BASE[name]} for name in BASE for factor in (2, 4)]
    for each in (BASE, *grown):
        results = processes.Queue()
        process = processes.Process(target=convert, kwargs={**each, "results": results})
        process.start()
        seconds, memory = results.get()
        process.join()
        rows.append([*each.values(), f"{seconds:.1f}", f"{memory / 2**30:.2f}"])
        print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
    print(tabulate(rows, headers=[*BASE, "seconds", "GiB"], tablefmt="github"))


if __name__ == "__main__":
    main()
