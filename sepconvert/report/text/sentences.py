"""The report in sentences, made from the JSON document.

Sentences name parameters of the Python API in backticks; the command line shows them as its options.
"""

from collections.abc import Mapping, Sequence

from sepconvert.base.notes import Note, NoteLevel, info, warning
from sepconvert.measure.metrics.metric import drop_number
from sepconvert.report.text.forms import quantization
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    as_fast_text,
    compared_by,
    drop_text,
    estimate_text,
    fold,
    percent_text,
    ratio_text,
    speedup_text,
)
from sepconvert.report.text.risks import doubts, risks, unseen
from sepconvert.report.text.verdict import convolutions, verdict

_PLACES = ("converted", "kept", "layout", "other")  # keys of `execution` that partition the time


# Too few even for a 3×3 layer of 64 channels, which has 576 unknowns per filter, and sees 64 patches in an
# image of 8×8.
_FEW_IMAGES = 64


def sentences(document: Document) -> list[Note]:
    """Return what the numbers of a report mean: the verdict, verification, measurements and warnings."""
    layers = document["layers"]
    converted = [layer for layer in layers if layer["decision"] == "converted"]
    approximation, delta = document["approximation"], document["delta"]
    notes = [*verdict(document), *_others(document), *doubts(document), *quantization(document)]
    notes.append(_verification(document["verification"]))
    notes += _exporter(document["verification"])
    if approximation is not None:
        notes += _merges(approximation.get("merges", []))
        notes += _calibration(approximation, Quality.of(document))
        notes += unseen(document)
        notes += risks(document)
    notes += _export(document)
    notes += _latency(document)
    notes += machine(document["environment"]) if document["delta"]["latency_speedup"] else []
    notes += _slowdowns(document, converted)
    notes += [*_missed_speedup(document), *_modelled(approximation)]
    if delta["agreement"] is not None:
        images = document["original"]["accuracy"]["n"]
        notes.append(info(f"Predictions agree on {percent_text(delta['agreement'])} % of {images:,} images."))
    notes += [] if Quality.of(document).is_top1 else [info(_outcome(document, "The converted model"))]
    if uncounted := document["original"]["uncounted_ops"]:
        names = ", ".join(name.removeprefix("aten::") for name in sorted(uncounted))
        notes.append(info(f"Not counted in MACs: {names}."))
    return notes


def machine(environment: Document) -> list[Note]:
    """Return where and by which settings something was timed, and a warning of more threads than cores."""
    cores, load, clock = (environment[name] for name in ("cores", "load_average", "clock_mhz"))
    facts = [
        _number(cores, "core"),
        *environment["instruction_sets"],
        *([] if clock is None else [f"{clock / 1000:.1f} GHz"]),
        *([f"load {load:.1f}"] if load is not None and load > cores else []),
    ]
    options = [f"{key}={value}" for key, value in environment["provider_options"].items()]
    settings = [
        " ".join(["provider", environment["provider"], *([f"({', '.join(options)})"] if options else [])]),
        _threads(environment),
        f"{environment['execution_mode']} execution",
        f"graph optimization {environment['graph_optimization']}",
    ]
    notes = [
        info(
            f"Timed on {environment['cpu']} ({', '.join(facts)}) in ONNX Runtime "
            f"{environment['onnxruntime']}: {', '.join(settings)}."
        )
    ]
    if environment["threads"] > cores:
        notes.append(
            warning(
                f"{environment['threads']} threads share {_number(cores, 'core')} and wait for each other; "
                f"pass `threads` {cores} or fewer."
            )
        )
    return notes


def _threads(environment: Document) -> str:
    threads, provider = _number(environment["threads"], "thread"), environment["provider"]
    if not environment["provider_takes_threads"]:
        return f"{threads} for what it leaves to the CPU"
    return f"{threads}, spinning {environment['spinning']}" if provider == "cpu" else threads


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def warnings_of(document: Document) -> list[Note]:
    """Return the `sentences` that even a reader who wants no output must see."""
    return [note for note in sentences(document) if note.level is NoteLevel.WARNING]


def story(document: Document) -> list[str]:
    """Return the result in plain words, folded to 80 columns, for a reader who is new to conversions."""
    layers = [layer for layer in document["layers"] if layer["decision"] == "converted"]
    warnings, modelled = warnings_of(document), _modelled(document["approximation"])
    if not layers:
        return [fold(str(note)) for note in (*warnings, *modelled)]
    answer = verdict(document)
    warnings = [note for note in warnings if note not in answer]  # whose numbers are told below
    delta, schemes = document["delta"], sorted({layer["scheme"] for layer in layers})
    by = f" ({', '.join(schemes)})" if schemes else ""
    lines = [
        f"{len(layers)} of {convolutions(document)[0]} convolutions were replaced{by}.",
        f"An image takes {ratio_text(delta['macs_ratio'])} fewer multiplications, and the network has "
        f"{ratio_text(delta['params_ratio'])} fewer parameters.",
    ]
    if document["approximation"] is None:
        difference = document["verification"]["torch_max_abs_diff"]
        lines.append(f"Its outputs are the same: they differ by {difference:.0e}, which is rounding error.")
    if (speedup := delta["latency_speedup"]) is not None:
        lines.append(f"Its speed-up, measured in ONNX Runtime, is {speedup_text(speedup)}.")
    if delta["metric"] is not None:
        lines.append(_outcome(document, "It"))
    return [fold(line) for line in (*lines, *map(str, (*modelled, *warnings)))]


def _outcome(document: Document, subject: str) -> str:
    """Return what the converted model reaches on the data, what the original does, and the drop."""
    metric, quality = document["delta"]["metric"], Quality.of(document)
    if quality.is_top1:
        before, after = (document[side]["accuracy"] for side in ("original", "converted"))
        reached = (
            f"{subject} classifies {percent_text(after['top1'])} % of {before['n']:,} images correctly, the "
            f"original {percent_text(before['top1'])} %"
        )
    else:
        reached = (
            f"{subject} reaches {quality.value(metric['converted'])} of {quality.name} on {metric['n']:,} "
            f"images, the original {quality.value(metric['original'])}"
        )
    # What rises to the worse does not drop.
    worse = "a drop of" if quality.higher_is_better else "worse by"
    return f"{reached}: {worse} {drop_text({**metric, 'value': metric['drop']})}."


def causes(document: Document) -> list[str]:
    """Return why the speed-up differs from the ratio of MACs, for the whole model and then for layers."""
    execution, delta = document["execution"], document["delta"]
    speedup = delta["latency_speedup"]
    if execution is None or speedup is None or delta["macs_ratio"] == 1:
        return []
    total = sum(execution[place][1] for place in _PLACES) or 1.0
    kept, layout = (100 * execution[place][1] / total for place in ("kept", "layout"))
    before, after = execution["operators"]
    lines = [
        f"The whole model: {ratio_text(delta['macs_ratio'] or 1.0)} fewer MACs, measured "
        f"{as_fast_text(speedup)}; {kept:.0f} % of the remaining time is in layers that were "
        f"not replaced, {layout:.0f} % in copies to other memory layouts; {after} operators instead of "
        f"{before}."
    ]
    for layer in document["layers"]:
        if layer["execution"] is not None and layer["execution"]["cause"] is not None:
            macs, gain = layer["macs"], layer["latency_speedup"]
            lines.append(
                f"{layer['name']}: {ratio_text(macs[0] / macs[1])} fewer MACs, measured alone "
                f"{as_fast_text(gain)}; {layer['execution']['cause']}."
            )
    return lines


def _others(document: Document) -> list[Note]:
    """Return how many operators may be part of a convolution, which are listed among the layers."""
    if not (others := convolutions(document)[1]):
        return []
    return [info(f"Other operators that may be part of a convolution: {others}; listed with the reason.")]


def _verification(check: Document) -> Note:
    onnx, exact = check["onnx_max_abs_diff"], check["torch_tolerance"] is not None
    moved = f"{check['torch_max_abs_diff']:.1e}"
    sentence = (
        f"Verified: PyTorch {check['torch_dtype']} outputs differ by {moved} (tolerance "
        f"{check['torch_tolerance']:.1e})"
        if exact
        else f"Approximate: outputs differ from the original's by up to {moved}"
    )
    if onnx is None:
        return info(f"{sentence}. Not verified in ONNX Runtime: {check['onnx_reason']}.")
    within = f"{onnx:.1e} (tolerance {check['onnx_tolerance']:.1e})"
    if exact:
        return info(f"{sentence}, ONNX Runtime {check['onnx_dtype']} outputs by {within}.")
    return info(
        f"{sentence}. Verified: converted.onnx in ONNX Runtime differs from the converted model in PyTorch "
        f"by {within}."
    )


def _exporter(check: Document) -> list[Note]:
    """Return a warning if the original's file differs from the original by more than rounding explains."""
    difference, tolerance = check["original_onnx_max_abs_diff"], check["original_onnx_tolerance"]
    if difference is None or difference <= tolerance:
        return []
    return [
        warning(
            f"original.onnx in ONNX Runtime differs from your model in PyTorch by {difference:.1e}, where "
            f"rounding explains {tolerance:.1e}. The export or the runtime causes that, not the conversion; "
            "check that your application tolerates it."
        )
    ]


def _merges(merges: Sequence[Document]) -> list[Note]:
    notes = [
        info(f"Merged: {merge['second']} into {merge['first']}; {merge['reason']}.")
        for merge in merges
        if merge["decision"] == "merged"
    ]
    if kept := len(merges) - len(notes):
        notes.append(
            info(f"Not merged: {kept} of {len(merges)} linear pairs of convolutions; report.json says why.")
        )
    return notes


def _calibration(approximation: Document, quality: Quality) -> list[Note]:
    calibration = approximation["calibration"]
    if calibration is None:
        return [
            warning(
                "without calibration images, factors were fitted to the weights alone, which usually "
                "destroys a trained network; pass `calib` or `data`."
            )
        ]
    notes = [
        info(
            f"Calibrated on {calibration['images']:,} images ({calibration['origin']}); plans compared on "
            f"{calibration['heldout']:,} held-out images{compared_by(approximation['divergence'], quality)}."
        )
    ]
    if (reason := approximation["no_gradients"]) is not None:
        notes.append(info(f"Without gradients, layers are fitted to their own outputs alone: {reason}."))
    if calibration["images"] < _FEW_IMAGES:
        notes.append(
            warning(
                "factors fitted to so few images may not suit others; give a few hundred (`calib`, "
                "`calib_images`)."
            )
        )
    notes += _seen_twice(calibration["seen_twice"], quality)
    for key, name in (("finetune", "Fine-tuning"), ("reconstruction", "Reconstruction")):
        for attempt in (approximation.get(key) or {"attempts": ()})["attempts"]:
            outcome = "delivered" if attempt["delivered"] else "not delivered"
            before = drop_number(attempt["drop_before_pp"], quality.unit)
            after = quality.drop(attempt["drop_pp"])
            notes.append(info(f"{name} changed a plan's drop from {before} to {after}; it was {outcome}."))
    return notes


def _seen_twice(found: Document | None, quality: Quality) -> list[Note]:
    """Return a warning if images are scored that were trained on or fitted to."""
    sets = {} if found is None else {"training": found["train"], "calibration": found["calib"]}
    for purpose, overlap in sets.items():
        if overlap is not None and overlap["scored"]:
            scored = f"{overlap['scored']:,} scored image" + ("s are" if overlap["scored"] > 1 else " is")
            sample = f"{overlap['compared']:,} of " * (overlap["compared"] < overlap["images"])
            worse = "lower" if quality.is_top1 else "worse"
            return [
                warning(
                    f"{scored} also among {sample}{overlap['images']:,} {purpose} images, so the "
                    f"{quality.noun} on others may be {worse} than is reported; remove such images from one "
                    "of the two."
                )
            ]
    return []


def _export(document: Document) -> list[Note]:
    export, notes = document["export"], list[Note]()
    missing: Mapping[str, str] = export["missing"]
    if missing:
        reasons = "; ".join(dict.fromkeys(missing.values()))
        say = info if set(missing) == {"converted.pt2"} else warning  # the file to deploy is there
        notes.append(
            say(
                f"not written: {', '.join(missing)}. {reasons}. The converted model is in plan.json and "
                "converted.safetensors: sepconvert.apply(model, 'plan.json') restores it in Python."
            )
        )
    if export["onnx_dtype"] != document["dtype"]:
        notes.append(
            info(
                f"The ONNX files are {export['onnx_dtype']}, as ONNX Runtime has no {document['dtype']} "
                f"convolutions; converted.pt2 keeps {document['dtype']}."
            )
        )
    if export["reason"]:
        notes.append(info(f"The batch dimension of the ONNX files is fixed: {export['reason']}."))
    return notes


def _latency(document: Document) -> list[Note]:
    speedup = document["delta"]["latency_speedup"]
    if speedup is None:
        return []
    latency = document["converted"]["latency_ms"]
    low, high = speedup["noise_floor"]
    notes = [
        info(
            f"Latency: {latency['runs']} interleaved runs, batch {latency['batch']}, median and 95 % "
            f"interval; the original against itself: [{low:.3f}, {high:.3f}]."
        )
    ]
    if not low <= 1 <= high:
        notes.append(
            warning(
                "the original differs from itself by more than chance explains: the machine was busy or "
                "changed its clock speed; measure again (`runs`) while it is idle."
            )
        )
    return notes


def _slowdowns(document: Document, converted: Sequence[Document]) -> list[Note]:
    speedup, notes = document["delta"]["latency_speedup"], list[Note]()
    if speedup is None:
        return notes
    slower = [
        layer["name"]
        for layer in converted
        if layer["macs"][1] < layer["macs"][0] and _is_slower(layer["latency_speedup"])
    ]
    if slower:
        notes.append(
            warning(
                f"fewer MACs but slower when timed alone: {', '.join(slower)}. `gate` latency keeps such "
                "layers dense."
            )
        )
    return notes


def _is_slower(speedup: Document | None) -> bool:
    return speedup is not None and speedup["significant"] and speedup["median"] < 1


def _missed_speedup(document: Document) -> list[Note]:
    """Return a warning if the files measure slower than was demanded, though the plan was fast enough."""
    approximation, speedup = document["approximation"], document["delta"]["latency_speedup"]
    demand = None if approximation is None else approximation["budget"]["min_speedup"]
    if demand is None or speedup is None or speedup["median"] >= demand or "shortfall" in approximation:
        return []
    return [
        warning(
            f"{demand:g}× was demanded, and met when plans were timed, but the files are measured "
            f"{estimate_text(speedup['median'], speedup['ci95'], '×')} as fast, which leaves it open; "
            "measure on an idle machine with more `runs`."
        )
    ]


def _modelled(approximation: Document | None) -> list[Note]:
    """Return a note on the layers whose times were modelled."""
    names = [] if approximation is None else approximation["modelled"]
    if not names:
        return []
    return [
        info(
            f"Modelled, as no time was left to measure: the times of forms of {', '.join(names)}. More time "
            "(`measure_seconds`) may give a faster plan."
        )
    ]
