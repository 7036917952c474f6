"""A model of the time of a convolution, for forms that there is no time to measure.

The time is a sum over the convolutions of a form: multiply-adds at the rate of the kernel that the runtime
takes for their geometry, floats that are read and written, and a call. It is counted in yardsticks (the time
of a common convolution on this machine, see `clock`), and corrected for each kind of kernel by what was
measured of other layers.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from sepconvert.factorize.geometry import ConvSpec, Pair

Path = Literal["dense", "few channels", "pointwise", "depthwise", "grouped"]
"""Kinds of kernels that ONNX Runtime has for convolutions on CPUs."""


_BLOCK = 8  # channels that a kernel computes at once


RATES: dict[Path, float] = {
    "dense": 45.0,
    "few channels": 104.0,
    "pointwise": 36.0,
    "depthwise": 14.0,
    "grouped": 42.0,
}
"""Yardsticks for 10⁹ multiply-adds, fitted by benchmarks/cost_model.py: on a CPU with AVX2, one thread."""


_MOVED = 411.0  # yardsticks for 10⁹ floats that are read or written


_CALL = 0.0075  # yardsticks for each convolution


_PRIOR = 1.0  # measurements that the coefficients above count as


def path_of(spec: ConvSpec) -> Path:
    """Return the kind of kernel that the runtime takes for a convolution."""
    per_group = spec.in_channels // spec.groups
    if spec.groups > 1:
        return "depthwise" if per_group == 1 and spec.out_channels == spec.groups else "grouped"
    if per_group < _BLOCK:
        return "few channels"
    return "pointwise" if max(spec.kernel_size) == 1 else "dense"


Chains = Sequence[Sequence[ConvSpec]]
"""Convolutions in a row, for each branch whose outputs are summed."""


class TimeModel:
    """Times of convolutions in yardsticks, corrected by what is measured of each kind of kernel."""

    def __init__(self) -> None:
        self._logs: dict[Path, list[float]] = defaultdict(list)  # of measured over expected times

    def time(self, chains: Chains, shape: Sequence[int]) -> float:
        """Return the time of a form on an input N × C × H × W."""
        return sum(self._correction(path) * time for path, time in _parts(chains, shape))

    def learn(self, chains: Chains, shape: Sequence[int], measured: float) -> None:
        """Correct the kind of kernel that takes most of the time by the time of a form.

        `measured` is in yardsticks and includes what `layer_onnx` puts around the form.
        """
        parts = list(_parts(chains, shape))
        path, _ = max(parts, key=lambda part: part[1])
        expected = sum(time for _, time in parts) + _surroundings(chains, shape)
        self._logs[path].append(math.log(measured / expected))

    def _correction(self, path: Path) -> float:
        """Return the geometric mean of measured over expected times, drawn towards 1."""
        logs = self._logs.get(path, [])
        return math.exp(sum(logs) / (len(logs) + _PRIOR))


def _parts(chains: Chains, shape: Sequence[int]) -> Iterator[tuple[Path, float]]:
    """Yield the kind of kernel and the uncorrected time of each convolution."""
    batch, _, height, width = shape
    for chain in chains:
        size: Pair = height, width
        for spec in chain:
            output = spec.output_size(size)
            moved = spec.in_channels * math.prod(size) + spec.out_channels * math.prod(output)
            work = RATES[path_of(spec)] * spec.macs(size) + _MOVED * moved
            yield path_of(spec), _CALL + batch * work / 1e9
            size = output


def _surroundings(chains: Chains, shape: Sequence[int]) -> float:
    """Return the time of the poolings before and after a form in `layer_onnx`."""
    batch, channels, height, width = shape
    size: Pair = height, width
    for spec in chains[0]:
        size = spec.output_size(size)
    moved = channels * height * width + chains[0][-1].out_channels * math.prod(size)
    return 2 * batch * _MOVED * moved / 1e9
