"""The command line, called in a process of its own, and what the tests of it share."""

import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMMANDS = ["convert", "inspect", "profile", "compare", "apply", "demo", "env"]

RESULTS = [
    "converted.onnx", "converted.pt2", "converted.safetensors",
    "original.onnx", "plan.json", "report.html", "report.json",
]  # fmt: skip

WRITTEN = sorted([*RESULTS, "run.toml"])  # by a command

SHAPE = ("--input-shape", "3x8x8")

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return 2 * self.conv(x)

def build():
    print("the user's own words")
    return Scaled().eval()

def trained(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Scaled().eval()

def another():
    return trained(1)

def fail():
    raise RuntimeError("two\\nlines")

def number():
    return 7

def late_stranger():
    y = torch.zeros(12, dtype=torch.int64)
    y[-1] = 4
    return DataLoader(TensorDataset(torch.zeros(12, 3, 8, 8), y), batch_size=4)

class Failing(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 9:
            raise OSError(5, "Input/output error", "9.png")
        return torch.zeros(3, 8, 8), 0

def failing(workers=0):
    return DataLoader(Failing(), batch_size=4, num_workers=workers)

def failing_in_a_worker():
    return failing(1)

class Short(Failing):
    def __getitem__(self, index):
        if index == 9:
            raise StopIteration
        return torch.zeros(3, 8, 8), 0

def short():
    return DataLoader(Short(), batch_size=4)

class Leaving(Failing):
    def __getitem__(self, index):
        raise SystemExit(0)

def leaving():
    return DataLoader(Leaving(), batch_size=4)
"""


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def network() -> nn.Module:
    """Two convolutions of random kernels, the second (`mix`) the product of a spatial pair of rank 2."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1),
            act=nn.ReLU(),
            mix=nn.Conv2d(8, 8, 3, padding=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(8, 4),
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        vertical = torch.randn(2, 8, 3, dtype=torch.float64, generator=generator)
        horizontal = torch.randn(8, 2, 3, dtype=torch.float64, generator=generator)
        model.mix.weight.copy_(torch.einsum("rci,orj->ocij", vertical, horizontal) / 8)
    return model


def listing(folder: Path) -> list[str]:
    """Every path below `folder`, hidden ones too, but for the byte code of the user's modules."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts)


def listing_of(out: str) -> list[str]:
    """Paths that a conversion to `out` leaves."""
    return [out, *(f"{out}/{name}" for name in WRITTEN)]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def start(*arguments: str | Path, **keywords: Any) -> subprocess.Popen[bytes]:
    """`sepconvert` with arguments, in a process of its own."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "sepconvert", *map(str, arguments)]
    return subprocess.Popen(command, **{**streams, **keywords})  # noqa: S603
