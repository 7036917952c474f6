"""Description of where numbers are measured: runtime settings, versions, processor."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from sepconvert.base.errors import SepconvertError, check_choice, check_number

GRAPH_OPTIMIZATIONS = ("all", "extended", "basic", "none")
"""Optimization levels of ONNX Runtime, its default first; blocked layouts of convolutions come with "all"."""


MAX_THREADS = 1024  # more is a typing error, for which ONNX Runtime would allocate gigabytes


@dataclass(frozen=True)
class Runtime:
    """Settings of ONNX Runtime for what is timed.

    Raises:
        SepconvertError: a value is out of range.
    """

    threads: int  # within one operator
    graph_optimization: str = GRAPH_OPTIMIZATIONS[0]
    provider: str = "cpu"  # execution provider in lower case: cuda, tensorrt, openvino, coreml, …

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number("threads", self.threads, 1, MAX_THREADS, whole=True)
        check_choice("graph_optimization", self.graph_optimization, GRAPH_OPTIMIZATIONS)
        if self.provider not in _providers():
            raise SepconvertError(
                f"`provider`: expected one that the installed onnxruntime has ({', '.join(_providers())}), "
                f"got {self.provider!r}; install the onnxruntime package that brings it"
            )

    @property
    def execution_provider(self) -> str:
        """Name of the provider in ONNX Runtime."""
        return _providers()[self.provider]


def _providers() -> dict[str, str]:
    """Return ONNX Runtime's execution providers by their short names."""
    import onnxruntime as ort  # not loaded for --help

    return {each.removesuffix("ExecutionProvider").lower(): each for each in ort.get_available_providers()}


def environment(runtime: Runtime) -> dict[str, str | int]:
    """Return the `environment` object of reports and profiles."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        **asdict(runtime),
        **{
            name: version(name)
            for name in ("sepconvert", "torch", "onnx", "onnxruntime", "onnxscript", "fvcore", "numpy")
        },
    }


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
