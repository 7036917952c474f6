"""Traces of models in ONNX Runtime, in the trace event format that Perfetto and Chrome show.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sepconvert.base.environment import Runtime, environment
from sepconvert.files.onnx.facts import read_onnx
from sepconvert.measure.execution.operators import Call, Graph, Run, profiled_runs
from sepconvert.measure.latency import Deployed

_RUNS = 20  # of each model; the one of median duration is shown

_THREAD = 1  # of each process: operators run one after the other


def trace_of(
    models: Iterable[tuple[str, Path]], inputs: Sequence[npt.NDArray[Any]], runtime: Runtime
) -> dict[str, Any]:
    """Return the trace of one run of each model: a process of its name, with an event for every operator.

    Runs begin at 0, so that models lie one above the other. Events are named by layers where these are known.

    Args:
        models: names and ONNX files.
        inputs: the arrays that every model is given, by position.
        runtime: settings of ONNX Runtime.

    Raises:
        SepconvertError: ONNX Runtime cannot load a model, or write its profile.
    """
    events: list[dict[str, Any]] = []
    for process, (name, path) in enumerate(models, start=1):
        file, deployed = read_onnx(path), Deployed(path, runtime)
        feeds = {
            argument: array.astype(dtype, copy=False)
            for argument, array, dtype in zip(file.names, inputs, file.dtypes, strict=True)
        }
        runs = sorted(profiled_runs(deployed, feeds, _RUNS), key=lambda run: run.duration)
        events += _events(process, name, runs[len(runs) // 2], Graph.of(deployed))
    return {
        "displayTimeUnit": "ms",
        "traceEvents": events,
        "otherData": environment(runtime),
    }


def _events(process: int, name: str, run: Run, graph: Graph) -> list[dict[str, Any]]:
    """Return the events of a model: its names, the run, and within it the operators."""
    place = {"pid": process, "tid": _THREAD}
    return [
        {"ph": "M", **place, "name": "process_name", "args": {"name": name}},
        {"ph": "M", **place, "name": "process_sort_index", "args": {"sort_index": process}},
        {"ph": "M", **place, "name": "thread_name", "args": {"name": "operators"}},
        {
            "ph": "X",
            **place,
            "name": "run",
            "cat": "run",
            "ts": 0,
            "dur": run.duration,
            "args": {"model": name},
        },
        *(_event(place, call, run.start, graph) for call in run.calls),
    ]


def _event(place: Mapping[str, int], call: Call, begun: float, graph: Graph) -> dict[str, Any]:
    """Return the event of an operator."""
    found = graph.timed(call.key, call.duration / 1000)
    about = {
        "layer": found.layer,
        "operator": found.operator,
        "kernel": found.kernel,
        "inputs": ", ".join("×".join(map(str, shape)) or "scalar" for shape in call.shapes),
        "bytes moved": found.bytes_moved,
        "node": found.name,
    }
    return {
        "ph": "X",
        **place,
        "name": found.layer or f"{found.operator} {found.name}".rstrip(),
        "cat": found.operator,
        "ts": call.start - begun,
        "dur": call.duration,
        "args": {key: value for key, value in about.items() if value is not None},
    }
