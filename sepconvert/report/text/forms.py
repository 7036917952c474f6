"""The four forms of a conversion to int8 in sentences and as a table, made from the JSON document."""

from sepconvert.base.notes import Note, info, warning
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    as_fast_text,
    drop_text,
    estimate_text,
    percent_text,
    ratio_text,
    speedup_text,
    written_count,
    written_size,
)
from sepconvert.report.text.risks import NEAR_CHANCE, is_near_chance

_ORIGINAL = "original-int8.onnx"


_LARGE = 0.3  # deviation of outputs; a network of good accuracy in int8 is below 0.1


NAMES = {
    "float": "original, float",
    "int8": "original, int8",
    "converted": "converted, float",
    "converted_int8": "converted, int8",
}
"""The forms in words, by their names in the report."""


def verdict(document: Document) -> Note | None:
    """Return which form to deploy and what it buys; None of a conversion in floating point alone."""
    forms = document.get("forms")
    if forms is None:
        return None
    alone, both = forms["int8"]["delta"], forms["converted_int8"]["delta"]
    count = sum(layer["decision"] == "converted" for layer in document["layers"])
    if (over_int8 := both["latency_speedup_over_int8"]) is None:
        number = f"{count} convolution{'s' * (count != 1)}"
        return info(f"{number} converted and quantized to int8; nothing was timed.")
    quantized = f"{_fast(alone)} as fast as in floating point{_lost(document, 'int8', 'losing')}"
    if alone["latency_speedup"]["significant"] and alone["latency_speedup"]["median"] < 1:
        return warning(
            f"int8 is slower than floating point on this machine: the original is {quantized}; leave `int8` "
            "out, or pass `int8` auto, which plans for the faster of both."
        )
    gain = estimate_text(over_int8["median"], over_int8["ci95"], "×")
    if is_near_chance(document):
        return warning(
            f"not to be judged by these figures: converted-int8.onnx is {gain} as fast as int8 alone, "
            f"which is {quantized}. {NEAR_CHANCE}"
        )
    better = count and over_int8["significant"] and over_int8["median"] > 1
    in_float = forms["converted"]["delta"]
    if better and in_float["latency_speedup"]["ci95"][0] > both["latency_speedup"]["ci95"][1]:
        return warning(
            f"the converted model is faster in floating point than in int8. Deploy converted.onnx, "
            f"{_fast(in_float)} as fast as the original{_lost(document, 'converted', 'losing')}; "
            f"converted-int8.onnx is {_fast(both)} as fast."
        )
    if not better:
        found = "nothing could be converted" if not count else f"converting it as well gains nothing ({gain})"
        if not alone["latency_speedup"]["significant"]:
            return warning(
                f"int8 gains nothing on this machine: the original is {quantized}, which noise explains, and "
                f"{found}; leave `int8` out, or pass `int8` auto."
            )
        if forms["quantization"]["files"][_ORIGINAL]["deviation"] > _LARGE and alone["metric"] is None:
            return warning(
                f"{found}. original-int8.onnx is {quantized}, but its outputs are far from those in floating "
                "point: check it on labelled `data` before you deploy it."
            )
        return warning(f"int8 alone is the better choice: {found}. Deploy original-int8.onnx, {quantized}.")
    return info(
        f"Deploy converted-int8.onnx: {gain} as fast as int8 alone, {_fast(both)} as fast as floating "
        f"point{_lost(document, 'converted_int8', 'losing')}. int8 alone is {quantized}."
    )


def quantization(document: Document) -> list[Note]:
    """Return how the int8 files were made."""
    gain, forms = document.get("int8_gain"), document.get("forms")
    if forms is None and gain is not None:
        text = f"Deployed in floating point: in int8 the original is {as_fast_text(gain)} on this machine."
        return [info(text)]
    if forms is None:
        return []
    note = forms["quantization"]
    sets = ", ".join(document["environment"]["instruction_sets"]) or "an unknown processor"
    text = (
        f"int8 by ONNX Runtime's static quantizer (QDQ): weights {note['weights']}, symmetric, for each "
        f"output channel; activations {note['activations']}, ranges by {note['method']} on "
        f"{note['images']:,} images; for {sets}. Files: opset {note['opset']}, IR version "
        f"{note['ir_version']}."
    )
    alone = note["files"][_ORIGINAL]["deviation"]
    if alone <= _LARGE:
        return [info(text)]
    return [
        info(text),
        warning(
            f"int8 itself moves the original's outputs by {percent_text(alone, 0)} % of their standard "
            "deviation. Check it on labelled `data`; other calibration images or other `ranges` may help."
        ),
    ]


def rows(document: Document) -> list[list[str]]:
    """Return a row for each form: its name, and the values that `headers` names."""
    forms, found = document["forms"], []
    for key, name in NAMES.items():
        form = forms[key]
        delta, latency, metric = form["delta"], form["latency_ms"], form["metric"]
        drop = delta["metric"]
        found.append(
            [
                name,
                f"{written_count(form['macs'])},\n{written_size(form['onnx_bytes'])}",
                "-" if latency is None else f"{latency['median']:.3f}",
                *(
                    "-" if speedup is None else speedup_text(speedup)
                    for speedup in (delta["latency_speedup"], delta["latency_speedup_over_int8"])
                ),
                "-" if metric is None else _value(document, form),
                "-" if drop is None else drop_text({**drop, "value": drop["drop"]}, unit=False),
            ]
        )
    return found


def headers(document: Document) -> list[str]:
    """Return the headings of `rows`."""
    quality = Quality.of(document)
    return ["form", "MACs,\nfile", "ms", "× float", "× int8", quality.heading, quality.of_drops]


def _value(document: Document, form: Document) -> str:
    """Return the metric of a form, and, of a classifier, how many predictions are those of the original."""
    value, agreement = Quality.of(document).value(form["metric"]["value"]), form["delta"]["agreement"]
    return value if agreement is None else f"{value},\n{percent_text(agreement, 1)} % agree"


def _fast(delta: Document) -> str:
    return ratio_text(delta["latency_speedup"]["median"])


def _lost(document: Document, form: str, verb: str) -> str:
    """Return what a form loses of the metric; nothing where there are no data."""
    metric = document["forms"][form]["delta"]["metric"]
    if metric is None:
        return ""
    quality = Quality.of(document)
    if metric["drop"] <= 0:
        return f" at no loss of {quality.noun}"
    return f", {verb} {quality.drop(metric['drop'])}"
