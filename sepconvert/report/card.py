"""The model card: what a reader of the converted model has to know, gathered from the report."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sepconvert.files.models.names import stem_of
from sepconvert.report.text.numbers import Document, Quality, estimate_text, ratio_text
from sepconvert.report.text.risks import doubts, risks, unseen

_VERSIONS = ("sepconvert", "torch", "onnxruntime", "onnx", "onnxscript")


def model_card(document: Document, files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return the model card of a report, as plain values; `sepconvert.report.schema.card.Card` describes it.

    Args:
        document: the report.
        files: what the command line names as `data` and `calib`: `source`, and `sha256` where it is a file.
    """
    before, after = document["original"], document["converted"]
    latencies = before["latency_ms"], after["latency_ms"]
    sizes = before["onnx_bytes"], after["onnx_bytes"]
    return {
        "model": _model(document["model"]),
        "made": _made(document),
        "data": list(_data(document, files)),
        "results": {
            "metric": document["delta"]["metric"],
            "latency_ms": None if None in latencies else [each["median"] for each in latencies],
            "speedup": document["delta"]["latency_speedup"],
            "macs": [before["macs"], after["macs"]],
            "params": [before["params"], after["params"]],
            "onnx_bytes": None if None in sizes else list(sizes),
            "max_abs_diff": document["verification"]["torch_max_abs_diff"],
        },
        "intended_use": list(_uses(document)),
        "limits": list(_limits(document)),
    }


def _model(source: Document | None) -> dict[str, Any]:
    if source is None:
        return {"name": None, "source": None, "sha256": None}
    named = {} if "weights" not in source else {"weights": source["weights"]}
    return {
        "name": stem_of(Path(source["path"])),
        "source": source["path"],
        "sha256": source["sha256"],
        **named,
    }


def _made(document: Document) -> dict[str, Any]:
    approximation, layers = document["approximation"] or {}, document["layers"]
    training = approximation.get("finetune")
    return {
        "mode": document["mode"],
        "budget": {
            name: value for name, value in approximation.get("budget", {}).items() if value is not None
        },
        "form": "int8" if "forms" in document else document["export"]["onnx_dtype"],
        "converted": sum(layer["decision"] == "converted" for layer in layers),
        "convolutions": len(layers),
        "finetuned_epochs": 0 if training is None else training["delivered"]["epoch"],
        "command": document["command"],
        "seed": document["seed"],
        "versions": {name: document["environment"][name] for name in _VERSIONS},
    }


def _data(document: Document, files: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the samples of each use; where none were named to fit to, they are a part of the others."""
    metric, calibration = document["delta"]["metric"], (document["approximation"] or {}).get("calibration")
    data = files.get("data", {})
    calib = files.get("calib", data)
    if metric is not None:
        yield {"use": "evaluation", "samples": metric["n"], **data}
    if calibration is not None:
        yield {"use": "calibration", "samples": calibration["images"], **calib}
        if calibration["heldout"]:
            yield {"use": "held-out calibration", "samples": calibration["heldout"], **calib}
    if "forms" in document:
        yield {"use": "int8 ranges", "samples": document["forms"]["quantization"]["images"], **calib}


def _uses(document: Document) -> Iterator[str]:
    name = _model(document["model"])["name"] or "the original"
    verification = document["verification"]
    if document["mode"] == "exact":
        yield (
            f"In the place of {name}, for any input: outputs are the same but for rounding, which was "
            f"{verification['torch_max_abs_diff']:.1e} on the inputs of the verification."
        )
    else:
        like = "the calibration images" if _is_fitted(document) else "those that it was trained on"
        yield f"In the place of {name}, for inputs like {like}: outputs are approximations."
    speedup, environment = document["delta"]["latency_speedup"], document["environment"]
    if speedup is not None and speedup["significant"] and speedup["median"] > 1:
        threads = environment["threads"]
        yield (
            f"{ratio_text(speedup['median'])} as fast in ONNX Runtime {environment['onnxruntime']}, "
            f"provider {environment['provider']}, {threads} thread{'s' * (threads != 1)}, batch "
            f"{document['converted']['latency_ms']['batch']}."
        )


def _is_fitted(document: Document) -> bool:
    return document["approximation"]["calibration"] is not None


def _limits(document: Document) -> Iterator[str]:
    """Yield what must not be concluded from the results: of weights, data, machine and files."""
    if (document["model"] or {}).get("weights") == "random":
        yield "The original's weights are random: its outputs and its metric mean nothing."
    quality, approximation = Quality.of(document), document["approximation"]
    metric = document["delta"]["metric"]
    if approximation is not None:
        if metric is None:
            yield "What the conversion costs on the task was not measured: there were no data with targets."
        yield from (_plain(note.text) for note in unseen(document))
        yield from (_plain(note.text) for note in risks(document))
    yield from (_plain(note.text) for note in doubts(document))
    if metric is not None and metric["ci95"][0] <= 0 <= metric["ci95"][1] and metric["drop"]:
        yield f"The difference in {quality.noun} may be chance: its 95 % interval includes 0."
    yield _limit_of_latency(document)
    yield from (f"{name} is missing: {why}" for name, why in document["export"]["missing"].items())
    if document["verification"]["onnx_reason"] is not None:
        yield f"The ONNX files were not verified: {document['verification']['onnx_reason']}."


def _limit_of_latency(document: Document) -> str:
    speedup, environment = document["delta"]["latency_speedup"], document["environment"]
    if speedup is None:
        return "Latency was not measured."
    found = f"Latency is that of one machine ({environment['cpu']}); measure it where you deploy."
    if not speedup["significant"]:
        measured = estimate_text(speedup["median"], speedup["ci95"], "×")
        found = f"The difference in latency, {measured}, is within noise. {found}"
    return found


def _plain(text: str) -> str:
    """Return a sentence that may follow "Warning: " as one that stands alone, and without backticks."""
    text = text.replace("`", "")
    return text[:1].upper() + text[1:]
