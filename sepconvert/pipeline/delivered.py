"""Files of a conversion: models exported, run in ONNX Runtime, and the result directory."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sepconvert.base.documents import writing
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import DemandNotMetError, ExportError, SepconvertError
from sepconvert.base.progress import Progress
from sepconvert.files.onnx.export import ExportNote, onnx_feed, runtime_dtype, save_archive, save_onnx
from sepconvert.measure.execution import (
    Gain,
    ModelExecution,
    by_layer,
    layer_executions,
    model_execution,
    operator_times,
)
from sepconvert.measure.latency import Deployed, Speedup, session
from sepconvert.measure.profiling import batch_size
from sepconvert.measure.verification import OutputCheck, Outputs, Reference, compare_export, compare_runs
from sepconvert.network.tensors import Inputs, cast
from sepconvert.planning.conversion import LayerReport

_LOG = logging.getLogger(__name__)


def executed_layers(
    layers: tuple[LayerReport, ...],
    model: nn.Module,
    paths: tuple[Path, Path],
    inputs: Inputs,
    runs: int,
    runtime: Runtime,
) -> tuple[tuple[LayerReport, ...], ModelExecution]:
    """What the runtime made of both files, and of each converted layer that was timed."""
    feed = onnx_feed(cast(inputs, runtime_dtype(model)))
    before, after = (list(operator_times(Deployed(path, runtime), feed, runs=runs)) for path in paths)
    functional: dict[str, list[str]] = {}
    for each in sorted(layers, key=lambda each: each.site.place):
        if each.site.index is not None:
            functional.setdefault(each.site.owner, []).append(each.site.name)
    before = by_layer(before, functional)
    batch = batch_size(inputs)
    gains = {
        each.plan.name: Gain(
            (batch * each.plan.macs[0], batch * each.plan.macs[1]),
            _measured_gain(each.latency.speedup),
            (each.plan.spec, each.plan.macs, each.plan.scheme, each.plan.rank),
        )
        for each in layers
        if each.latency is not None
    }
    found = layer_executions(before, after, gains)
    converted = [each.plan.name for each in layers if each.plan.decision == "converted"]
    return (
        tuple(replace(each, execution=found.get(each.plan.name)) for each in layers),
        model_execution(before, after, converted),
    )


def _measured_gain(speedup: Speedup) -> float:
    """Return the measured speedup, at least 1 unless the layer is slower beyond noise."""
    return speedup.median if speedup.significant else max(speedup.median, 1.0)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def write_models(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    folder: Path,
    dynamic_batch: bool,
    progress: Progress,
) -> ExportNote:
    """`original.onnx`, `converted.onnx` and `converted.pt2`, if torch exports the model; its weights.

    What cannot be exported is a converted model all the same.
    """
    note = ExportNote(False, str(runtime_dtype(converted)).removeprefix("torch."), None)
    missing = {}
    files = {"original.onnx": model, "converted.onnx": converted, "converted.pt2": converted}
    for name, each in progress(files.items(), "exporting"):
        path = folder / name
        try:
            if path.suffix == ".onnx":
                note = save_onnx(each, inputs, path, dynamic_batch=dynamic_batch)
            else:
                save_archive(each, inputs, path, dynamic_batch=dynamic_batch)
        except ExportError as error:
            path.unlink(missing_ok=True)
            _LOG.debug("%s is not written", name, exc_info=error)
            missing[name] = str(error)
    weights = folder / "converted.safetensors"
    with writing(weights):
        # Each with memory of its own: safetensors writes none that share some.
        tensors = state_tensors(converted).items()
        save_file(
            {name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors}, str(weights)
        )
    return replace(note, missing=missing)


def check_onnx(
    model: nn.Module, expected: tuple[Reference, Reference | None], paths: tuple[Path, Path], runtime: Runtime
) -> tuple[OutputCheck | None, str | None]:
    """Both ONNX files in the runtime on the inputs of `expected`; or None and why it cannot run them.

    The converted file is held against the original's, or, if there is a reference of its own, against that.

    Raises:
        DemandNotMetError: the original's file computes something else than the original.
    """
    dtype = runtime_dtype(model)
    reference, own = expected
    try:
        original, converted = (_run_onnx(path, reference.inputs, dtype, runtime) for path in paths)
    except SepconvertError as error:
        return None, str(error)
    export = compare_export(reference, original, dtype)
    if not export.holds:
        raise DemandNotMetError(
            f"verification failed: original.onnx is off the PyTorch model by {export.max_abs_diff:.3g}, "
            f"tolerance {export.tolerance:.3g}; torch's exporter does not translate this model rightly"
        )
    if own is None:
        return compare_runs(reference, original, converted, dtype), None
    return compare_export(own, converted, dtype), None


def _run_onnx(path: Path, inputs: Sequence[Inputs], dtype: torch.dtype, runtime: Runtime) -> list[Outputs]:
    runner = session(Deployed(path, runtime))
    results = []
    for value in inputs:
        try:
            arrays = runner.run(None, onnx_feed(cast(value, dtype)))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise SepconvertError(f"{path.name}: ONNX Runtime cannot run it: {error}") from error
        results.append([torch.from_numpy(np.asarray(array)).double() for array in arrays])
    return results


def checked_place(out: str | os.PathLike[str] | None) -> Path | None:
    if out is None:
        return None
    place = Path(out)
    try:
        if place.exists() and any(place.iterdir()):
            raise SepconvertError(f"out: {place} is not empty; pass an empty directory or one to be made")
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SepconvertError(
            f"out: {place}: {error.strerror}; pass a directory that can be written"
        ) from error
    return place


@contextlib.contextmanager
def result_folder(place: Path | None) -> Iterator[Path]:
    if place is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    try:
        yield place
    except BaseException:
        for path in place.iterdir():
            path.unlink()
        raise
