"""Description of where numbers are measured: runtime settings, versions, processor."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from sepconvert.base.errors import SepconvertError, check_choice, check_number, quoted

GRAPH_OPTIMIZATIONS = ("all", "extended", "basic", "none")
"""Optimization levels of ONNX Runtime, its default first; blocked layouts of convolutions come with "all"."""


SPINNING = ("off", "on")
"""Whether ONNX Runtime's worker threads keep their cores busy while they wait; its own default is "on"."""


TIMES_DEPEND_ON = (
    "cpu", "instruction_sets", "threads", "spinning", "graph_optimization", "provider", "provider_options",
    "onnxruntime",
)  # fmt: skip
"""Keys of `environment` without which times of two runs are not comparable."""


MAX_THREADS = 1024  # more is a typing error, for which ONNX Runtime would allocate gigabytes


# Providers that have threads of their own, and take their number by this option.
_THREADS = {"dnnl": "num_of_threads", "openvino": "num_of_threads", "xnnpack": "intra_op_num_threads"}


# The same within OpenVINO's option `load_config`, where it prevails.
_THREADS_IN_JSON = "INFERENCE_NUM_THREADS"


INT8_INSTRUCTIONS = ("AVX-VNNI", "AVX-512 VNNI", "AMX", "NEON dot product", "I8MM")
"""Instruction sets that multiply int8 numbers and add the products: without one, int8 gains little."""


# Flags of /proc/cpuinfo that the speed of convolutions depends on.
_OF_X86 = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_tile": "AMX",
}
_OF_AARCH64 = {"asimd": "NEON", "asimddp": "NEON dot product", "i8mm": "I8MM", "sve": "SVE"}
_CPUINFO = Path("/proc/cpuinfo")
_ARM = ("arm64", "aarch64")  # names of that architecture


@dataclass(frozen=True)
class Runtime:
    """Settings of ONNX Runtime for what is timed.

    Raises:
        SepconvertError: a value is out of range, or `provider_options` are for a provider that has none.
    """

    threads: int  # within one operator
    graph_optimization: str = GRAPH_OPTIMIZATIONS[0]
    provider: str = "cpu"  # execution provider in lower case: cuda, tensorrt, openvino, coreml, …
    provider_options: Mapping[str, str] = field(default_factory=dict)  # besides the number of threads
    spinning: str = SPINNING[0]

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_number("threads", self.threads, 1, MAX_THREADS, whole=True)
        check_choice("graph_optimization", self.graph_optimization, GRAPH_OPTIMIZATIONS)
        check_choice("spinning", self.spinning, SPINNING)
        # The CPU's is in every onnxruntime, which takes long to import.
        if self.provider != "cpu" and self.provider not in _providers():
            raise SepconvertError(
                f"`provider`: expected one that the installed onnxruntime has ({', '.join(_providers())}), "
                f"got {self.provider!r}; install the onnxruntime package that brings it"
            )
        if self.provider_options and self.provider == "cpu":
            raise SepconvertError(
                f"`provider_options`: the provider cpu has none, got {quoted(dict(self.provider_options))}; "
                "pass `provider`, too"
            )
        given = " ".join(map(" ".join, self.provider_options.items()))
        for name in (self._threads_option, _THREADS_IN_JSON):
            if name is not None and name in given:
                raise SepconvertError(
                    f"`provider_options`: {name} follows from `threads`; pass `threads` instead"
                )

    @property
    def execution_provider(self) -> str:
        """Name of the provider in ONNX Runtime."""
        return _providers()[self.provider]

    @property
    def execution_options(self) -> dict[str, str]:
        """Options of the provider, its number of threads among them if it takes one."""
        own = {} if self._threads_option is None else {self._threads_option: str(self.threads)}
        return own | dict(self.provider_options)

    @property
    def takes_threads(self) -> bool:
        """Whether the provider runs on `threads`; if not, these run only what it leaves to the CPU."""
        return self.provider == "cpu" or self._threads_option is not None

    @property
    def _threads_option(self) -> str | None:
        # Through OpenVINO, threads are those of the CPU alone, which is its default device.
        on_cpu = "CPU" in self.provider_options.get("device_type", "CPU")
        return _THREADS.get(self.provider) if on_cpu else None


def _providers() -> dict[str, str]:
    """Return ONNX Runtime's execution providers by their short names."""
    import onnxruntime as ort  # not loaded for --help

    return {each.removesuffix("ExecutionProvider").lower(): each for each in ort.get_available_providers()}


def environment(runtime: Runtime) -> dict[str, Any]:
    """Return the `environment` object of reports and profiles; clock and load are those of this moment."""
    import onnxruntime as ort  # not loaded for --help

    return {
        **machine_facts(),
        "threads": runtime.threads,
        "spinning": runtime.spinning,
        "execution_mode": "sequential",
        "inter_op_threads": 1,
        "graph_optimization": runtime.graph_optimization,
        "provider": runtime.provider,
        "provider_options": runtime.execution_options,
        "provider_takes_threads": runtime.takes_threads,
        "onnxruntime": ort.__version__,  # its distribution has another name with other providers
        **{name: version(name) for name in ("sepconvert", "torch", "onnx", "onnxscript", "fvcore", "numpy")},
    }


def machine_facts() -> dict[str, Any]:
    """Return Python, the system and the processor; clock and load are those of this moment."""
    cpu, instruction_sets = _processor()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "instruction_sets": instruction_sets,
        "cores": os.cpu_count() or 1,
        "clock_mhz": _clock_mhz(),
        "load_average": _load_average(),
    }


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor(cpuinfo: str) -> tuple[str, list[str]]:
    """Return the name and the instruction sets of the first processor in a text like /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    found = [name for flag, name in (_OF_X86 | _OF_AARCH64).items() if flag in flags]
    return facts.get("model name", platform.machine()), found


def instruction_sets() -> list[str]:
    """Return the instruction sets of this machine's processor that the speed of convolutions depends on."""
    return _processor()[1]


def missing_instruction_sets() -> list[str]:
    """Return those of its architecture that this machine's processor lacks; none where nothing is known."""
    if not _CPUINFO.exists():
        return []
    known = _OF_AARCH64 if platform.machine().lower() in _ARM else _OF_X86
    return [name for name in known.values() if name not in instruction_sets()]


def _processor() -> tuple[str, list[str]]:
    try:
        return processor(_CPUINFO.read_text(encoding="utf-8"))
    except OSError:  # not Linux: all 64-bit ARM processors have NEON, of others nothing is known
        sets = ["NEON"] if platform.machine().lower() in _ARM else []
        return platform.processor() or platform.machine(), sets


def _clock_mhz() -> int | None:
    """Return the mean clock of the cores; None where the system does not tell."""
    with contextlib.suppress(AttributeError, NotImplementedError, OSError, RuntimeError):
        clock = psutil.cpu_freq()
        return (round(clock.current) or None) if clock is not None else None
    return None


def _load_average() -> float | None:
    """Return the mean number of busy processes in the last minute; None where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError):
        return round(psutil.getloadavg()[0], 2)
    return None


# Of glibc's mallopt: parameters, and the size of blocks up to which freed memory is kept.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Let the process keep the memory that tensors free, for the next ones, as far as the C library can.

    By default glibc gives each large block back to the system, which clears its pages before they are used
    again: a conversion of a ResNet-9 spent a tenth of its processor time on that, and a forward pass of 256
    images in torch half of its own. One arena for all threads needs less memory than one for each (1.7 GB
    instead of 2.6).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, or none by that name
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_MMAP_THRESHOLD, _KEPT_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_ARENA_MAX, 1),
        ):  # fmt: skip
            mallopt(parameter, value)
