"""Where numbers were measured: versions and processor."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from sepconvert import __version__
from sepconvert.errors import SepconvertError

GRAPH_OPTIMIZATIONS = ("all", "extended", "basic", "none")
"""Levels of ONNX Runtime, its default first. Blocked layouts of convolutions come with "all" alone."""


@dataclass(frozen=True)
class Runtime:
    """How ONNX Runtime runs what is timed.

    Raises:
        SepconvertError: a value is out of range.
    """

    threads: int  # of one operator
    graph_optimization: str = GRAPH_OPTIMIZATIONS[0]

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.threads < 1:
            raise SepconvertError(
                f"threads: expected at least 1, got {self.threads}; the number of cores is usual"
            )
        if self.graph_optimization not in GRAPH_OPTIMIZATIONS:
            raise SepconvertError(
                f"graph optimization: expected one of {', '.join(GRAPH_OPTIMIZATIONS)}, "
                f"got {self.graph_optimization!r}"
            )


def environment(runtime: Runtime) -> dict[str, str | int]:
    """The `environment` object of reports and profiles."""
    return {
        "sepconvert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        **asdict(runtime),
        **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript", "fvcore", "numpy")},
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
