"""Exact mode on a VGG-16 shape with a spatial rank planted in every layer: time and peak memory.

    python benchmarks/planted_vgg16.py [--size 224]

Checks that every layer is found with its rank, at the planned cost, and prints the time and peak
memory of `sepconvert vgg16.pt --mode exact --runs 0` in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torchvision.models import vgg16


def plant(model: nn.Module, seed: int) -> dict[str, int]:
    """Give every 3×3 kernel the form Σ_r H[o,r,j] V[r,c,i] with R = min(C, O) / 4, at least 1."""
    generator = torch.Generator().manual_seed(seed)
    ranks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            out_channels, in_channels, kh, kw = layer.weight.shape
            rank = max(min(in_channels, out_channels) // 4, 1)
            vertical = torch.randn(rank, in_channels, kh, generator=generator, dtype=torch.float64)
            horizontal = torch.randn(out_channels, rank, kw, generator=generator, dtype=torch.float64)
            kernel = torch.einsum("orj,rci->ocij", horizontal, vertical)
            layer.weight.data = (kernel * layer.weight.std().item() / kernel.std()).float()
            ranks[name] = rank
    return ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224)
    size = parser.parse_args().size
    torch.manual_seed(0)
    model = vgg16(weights=None).eval()
    ranks = plant(model, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "vgg16.pt", Path(folder) / "out"
        torch.save(model, path)
        del model
        command = [sys.executable, "-m", "sepconvert", str(path), "--input-shape", f"3x{size}x{size}"]
        start = time.perf_counter()
        subprocess.run([*command, "--out", str(out), "--runs", "0", "--quiet"], check=True)  # noqa: S603  (our own command)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((out / "report.json").read_text())
    found = {layer["name"]: layer["rank"] for layer in report["layers"]}
    assert found == ranks, f"planted {ranks}, found {found}"
    dense = report["original"]["macs"] - sum(layer["macs"][0] for layer in report["layers"])
    planned = dense + sum(layer["macs"][1] for layer in report["layers"])
    counted = report["converted"]["macs"]
    assert counted == planned, f"planned {planned}, fvcore counts {counted}"
    check = report["verification"]
    difference, tolerance = check["torch_max_abs_diff"], check["torch_tolerance"]
    print(f"all {len(ranks)} layers found with their ranks; MACs as planned: {planned:,}")
    print(f"float64 outputs differ by {difference:.1e} (tolerance {tolerance:.1e})")
    print(f"{seconds:.1f} s wall, {usage.ru_utime + usage.ru_stime:.1f} s of CPU")
    print(f"peak memory {usage.ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
