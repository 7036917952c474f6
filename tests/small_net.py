"""A small network, as files that a user might have."""

from pathlib import Path

import numpy as np
import torch

_SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )
"""


def write(folder: Path) -> None:
    """`net.pth` with its factory `net.py:make`, and 160 images without labels, `x.npz`, to `folder`."""
    (folder / "net.py").write_text(_SOURCE)
    namespace = {}
    exec(_SOURCE, namespace)  # noqa: S102
    torch.save(namespace["make"]().state_dict(), folder / "net.pth")
    x = np.random.default_rng(0).standard_normal((160, 8, 12, 12)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
