"""Reports of conversions to int8, by hand: the four forms with numbers that are easy to recognise."""

NAMES = "float", "int8", "converted", "converted_int8"


def ratio(median, significant=True):
    """A speed-up of a tenth more or less."""
    return {
        "median": median, "ci95": [0.9 * median, 1.1 * median], "significant": significant,
        "noise_floor": [0.98, 1.02],
    }  # fmt: skip


def latency(milliseconds):
    return {
        "median": milliseconds, "ci95": [0.9 * milliseconds, 1.1 * milliseconds], "p90": 1.1 * milliseconds,
        "quantiles": [milliseconds] * 21, "runs": 50, "threads": 2, "batch": 1,
    }  # fmt: skip


def scored(original, value, *, name="top1", unit="pp", higher_is_better=True, count=2000):
    """The value of a form, and what it loses against the original in floating point."""
    what = {"name": name, "unit": unit, "higher_is_better": higher_is_better, "n": count}
    drop = original - value if higher_is_better else value - original
    change = {"original": original, "converted": value, "drop": drop, "ci95": [drop - 0.2, drop + 0.2]}
    return {**what, "value": value}, {**what, **change}


def form(size, macs, milliseconds=None, over_float=None, over_int8=None, metric=None, change=None):
    """An entry of `forms`."""
    top1 = metric is not None and metric["name"] == "top1"
    return {
        "params": 4000, "macs": macs, "flops": 2 * macs, "onnx_bytes": size, "weight_bytes": size // 2,
        "latency_ms": None if milliseconds is None else latency(milliseconds),
        "accuracy": {"top1": metric["value"] / 100, "top5": None, "n": metric["n"]} if top1 else None,
        "metric": metric, "uncounted_ops": {},
        "delta": {
            "latency_speedup": over_float, "latency_speedup_over_int8": over_int8, "metric": change,
            "accuracy_drop_pp": {"value": change["drop"], "ci95": change["ci95"], "mcnemar_p": 0.5,
                                 "n": change["n"]} if change and top1 else None,
            "agreement": 0.98 if change and top1 else None,
        },
    }  # fmt: skip


def deployed(
    document, int8=2.0, converted=1.5, both=3.0, *, over=None, float_noise=False, int8_noise=False,
    values=(96.75, 96.5, 96.6, 96.25), timed=True, deviation=0.03125, **metric,
):  # fmt: skip
    """Add the forms to a report.

    Args:
        document: of the fixtures.
        int8: times as fast as the original, in int8.
        converted: the converted model, in floating point.
        both: the converted model in int8, against floating point.
        over: the same against int8; by default what follows.
        float_noise: whether noise may explain the speed-up of int8.
        int8_noise: whether noise may explain that of the converted model over it.
        values: of the metric, by form; None without data.
        timed: whether there are times.
        deviation: of the original's outputs in int8 from those in floating point.
        metric: see `scored`.
    """
    over = both / int8 if over is None else over
    by_float = [None, ratio(int8, not float_noise), ratio(converted), ratio(both)]
    by_int8 = [None, None, ratio(converted / int8), ratio(over, not int8_noise)]
    times = [3.0, 3.0 / int8, 3.0 / converted, 3.0 / both]
    scores = [(None, None)] * 4 if values is None else [scored(values[0], each, **metric) for each in values]
    document["forms"] = {
        "quantization": {
            "method": "percentile", "images": 1256, "activations": "uint8", "weights": "int8", "opset": 20,
            "ir_version": 10,
            "files": {
                "original-int8.onnx": {"deviation": deviation, "rounding": 0.0},
                "converted-int8.onnx": {"deviation": 0.0625, "rounding": 0.125},
            },
        },
        **{
            name: form(
                size, macs, time if timed else None, one if timed else None, other if timed else None, value,
                change if name != "float" else None,
            )
            for name, size, macs, time, one, other, (value, change) in zip(
                NAMES, (20_000, 1_500_000, 5_000, 2_000), (2_012_345,) * 2 + (1_006_172,) * 2, times,
                by_float, by_int8, scores, strict=True,
            )
        },
    }  # fmt: skip
    document["delta"]["metric"] = scores[3][1]
    return document
