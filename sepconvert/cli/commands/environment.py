"""Command `env`: versions and machine, for reports of bugs."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from sepconvert import __version__
from sepconvert.base.environment import (
    INT8_INSTRUCTIONS,
    available_cores,
    machine_facts,
    missing_instruction_sets,
)
from sepconvert.base.errors import first_line
from sepconvert.cli.outputs import show_page

SCHEMA = "sepconvert.environment/1"

# Distributions whose versions matter; those that are not required may be missing.
_REQUIRED = (
    "torch", "onnx", "onnx-ir", "onnxscript", "fvcore", "numpy", "scipy", "accelerate", "torchmetrics",
    "safetensors", "msgspec", "click",
)  # fmt: skip
_OPTIONAL = ("torchvision", "timm", "huggingface-hub", "onnx2pytorch", "mlxtend", "scikit-image")

_WIDTH = 18  # columns of the names


def env(**options: Any) -> None:
    """Run `sepconvert env`."""
    found = installation()
    show_page(options, found, "\n".join(f"{name:{_WIDTH}}{value}".rstrip() for name, value in _lines(found)))


def installation() -> dict[str, Any]:
    """Return the document of `sepconvert env --json`; what is not installed or not known is None or empty."""
    runtime, providers, failure = _runtime()
    memory = psutil.virtual_memory()
    return {
        "schema": SCHEMA,
        "sepconvert": __version__,
        **machine_facts(),
        "available_cores": available_cores(),
        "missing_instruction_sets": missing_instruction_sets(),
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "onnxruntime": runtime,
        "providers": providers,
        "onnxruntime_error": failure,
        "packages": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _runtime() -> tuple[str | None, list[str], str | None]:
    """Return the version of ONNX Runtime, its providers, and why it cannot be imported, if so."""
    try:
        import onnxruntime as ort  # its distribution has another name with other providers

        return ort.__version__, ort.get_available_providers(), None
    except Exception as error:  # a library that it needs may be missing, which is worth a report
        return None, [], first_line(error)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values for the terminal."""
    sets, missing = found["instruction_sets"], found["missing_instruction_sets"]
    clock, load = found["clock_mhz"], found["load_average"]
    int8 = [name for name in sets if name in INT8_INSTRUCTIONS]
    cores, available = found["cores"], found["available_cores"]
    facts = [
        f"{cores} core{'s' * (cores > 1)}" + f" ({available} for this process)" * (available != cores),
        *([] if clock is None else [f"{clock / 1000:.1f} GHz"]),
        *([] if load is None else [f"load {load:.1f}"]),
    ]
    total, free = (found[key] / 1e9 for key in ("memory_bytes", "free_memory_bytes"))
    return [
        ("sepconvert", found["sepconvert"]),
        ("Python", found["python"]),
        ("system", found["platform"]),
        ("processor", found["cpu"]),
        ("", ", ".join(facts)),
        ("instruction sets", ", ".join(sets) or "unknown"),
        *([("  missing", ", ".join(missing))] if missing else []),
        ("  for int8", ", ".join(int8) or ("none" if missing else "unknown")),
        ("memory", f"{total:.1f} GB, {free:.1f} GB free"),
        ("onnxruntime", found["onnxruntime"] or f"cannot be imported: {found['onnxruntime_error']}"),
        ("  providers", ", ".join(name.removesuffix("ExecutionProvider") for name in found["providers"])),
        *((name, installed or "not installed") for name, installed in found["packages"].items()),
    ]
