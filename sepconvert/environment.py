"""Where numbers were measured: versions and processor."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from sepconvert import __version__


def environment(threads: int) -> dict[str, str | int]:
    """The `environment` object of reports and profiles; `threads` are the runtime's intra-op threads."""
    return {
        "sepconvert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
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
