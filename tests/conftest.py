import os

# Before torch is loaded. On processors with AMX, oneDNN's bfloat16 convolutions of a stride larger than the
# kernel are wrong (oneDNN pull request 5568).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

# Two workers on two cores: a thread for each, also for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from strategies import plant
from torch import nn

from sepconvert.factorize.exact.analysis import analyse
from sepconvert.factorize.exact.factors import factorize
from sepconvert.network.obstacles import Obstacles
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.trace import traced

# Few tests, of minutes: begun last, they would leave one of two workers without work.
LONG = ("test_examples", "test_benchmark_commands", "test_cli", "test_docs", "test_distributed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def planted():
    """A convolution whose kernel is a sum of `rank` vertical-then-horizontal pairs, made by numpy."""

    def conv(in_channels, out_channels, kernel_size=3, *, rank=2, seed=0, groups=1, **options):
        module = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, **options)
        axes = {
            "g": groups,
            "o": out_channels // groups,
            "c": in_channels // groups,
            "i": kernel_size,
            "j": kernel_size,
        }
        weight = plant("spatial-vh", axes, rank, np.random.default_rng(seed))
        module.weight.data = torch.from_numpy(weight / np.sqrt(weight[0].size)).float()
        return module

    return conv


@pytest.fixture(scope="session")
def binomial():
    """The 5×5 kernel of Gauss's filter with integers: rank 1. `channels` × 1 × 5 × 5."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return lambda channels: torch.outer(line, line).repeat(channels, 1, 1, 1)


@pytest.fixture(scope="session")
def separated():
    """Converts all that separates and can be rewritten, without export. Returns model, names, obstacles."""

    def convert(model, *inputs):
        found = traced(model, inputs)
        replacements, obstacles, in_the_way = {}, {}, Obstacles(found)
        for site in found.sites:
            if site.obstacle is not None:
                obstacles[site.name] = site.obstacle
                continue
            analysis = analyse(site.conv.spec, site.conv.weight, site.sizes)
            if not analysis.holding():
                continue
            obstacle = in_the_way.of(site)
            if obstacle is not None:
                obstacles[site.name] = obstacle
                continue
            factors = factorize(analysis, analysis.holding()[0], site.conv.weight)
            replacements[site.name] = Replacement(
                factors.scheme, factors.rank, factors.border, factors.weights, site.conv.bias
            )
        return rewrite(found, replacements), set(replacements), obstacles

    return convert
