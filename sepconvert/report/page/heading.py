"""The head of a page: what it is about, when and where it was made, and what is deployed."""

from collections.abc import Sequence
from pathlib import PurePath

from sepconvert.report.text.numbers import Document, written_size


def title(document: Document) -> str:
    """Return the name of the model; reports of version 0.1.0 know it only if there was a file."""
    if "name" in document:
        return str(document["name"])
    return "Conversion" if document["model"] is None else PurePath(document["model"]["path"]).name


def facts(document: Document) -> list[str]:
    """Return mode, date, shapes of the inputs, dtype and machine, as far as they are known."""
    environment, shapes = document["environment"], document.get("input_shapes", ())
    known = ["×".join(map(str, shape)) for shape in shapes]
    return [
        f"{document['mode']} mode",
        *([document["created"][:10]] if "created" in document else []),
        *([f"input{'s' * (len(known) > 1)} {', '.join(known)}"] if known else []),
        document["dtype"] + (", deployed in int8" if "forms" in document else ""),
        machine(environment),
    ]


def machine(environment: Document) -> str:
    """Return processor, runtime and threads."""
    runtime = f"ONNX Runtime {environment['onnxruntime']}"
    return f"{environment['cpu']}, {runtime}, {_threads(environment['threads'])}"


def deployment(document: Document) -> str:
    """Return in which form the converted model is deployed, and in which runtime it was measured."""
    environment, export = document["environment"], document["export"]
    size = document["converted"]["onnx_bytes"]
    if size is None:
        reason = export["missing"].get("converted.onnx", "it was checked in PyTorch alone")
        return f"PyTorch, {document['dtype']}; there is no ONNX file: {reason}."
    file = (
        "`converted-int8.onnx`, int8" if "forms" in document else f"`converted.onnx`, {export['onnx_dtype']}"
    )
    batch = "any batch size" if export["dynamic_batch"] else "fixed batch size"
    where = f"provider {environment['provider']}, {_threads(environment['threads'])}"
    runtime = f"ONNX Runtime {environment['onnxruntime']}"
    verb = "run" if document["converted"]["latency_ms"] is None else "timed"
    return f"{file} ({written_size(size)}, {batch}), {verb} in {runtime}: {where}."


def against(names: Sequence[str]) -> str:
    """Return the title of a comparison with the first of some models."""
    first, *others = names
    return f"{', '.join(others)} against {first}" if others else first


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
