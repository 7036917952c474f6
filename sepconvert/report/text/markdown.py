"""Results in Markdown, short enough for the description of a pull request."""

import re
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from sepconvert.measure.comparison import short_names
from sepconvert.report.text import forms, history
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    count_text,
    drop_text,
    estimate_text,
    measured_drop,
    percent_text,
    speedup_text,
)
from sepconvert.report.text.sentences import machine, sentences, warnings_of

_METRIC = "metric"  # whose row has the metric's own name


def conversion(report: Document) -> str:
    """Return a conversion: its first sentence, a table of both models, warnings, and the machine."""
    first, *_ = sentences(report)
    profiles = report["original"], report["converted"]
    parts = [f"**{_plain(str(first))}**", _costs(("original", "converted"), profiles, [report["delta"]])]
    if "forms" in report:
        parts.append(_table(forms.rows(report), forms.headers(report)))
    parts += [f"- {_plain(str(note))}" for note in warnings_of(report) if note != first]
    timed = report["delta"]["latency_speedup"] is not None
    return _with_small_print(parts, report["environment"] if timed else None)


def comparison(document: Document, environment: Document | None, checks: Mapping[str, Sequence[str]]) -> str:
    """Return a comparison: a sentence for each model, which checks hold, tables, and the machine.

    Args:
        document: the JSON of a comparison, with `baseline` where there is one.
        environment: where the models were timed together; None if they were not.
        checks: conditions of `--fail-if`, each with a message for every model that meets it.
    """
    names = [f"`{name}`" for name in short_names(document["names"])]
    profiles, deltas = document["profiles"], document["deltas"]
    parts = [_verdict(names[0], name, delta) for name, delta in zip(names[1:], deltas, strict=True)]
    if failed := [message for messages in checks.values() for message in messages]:
        parts.append("\n".join(["Checks failed:", "", *(f"- {_plain(message)}" for message in failed)]))
    elif checks:
        parts.append(f"Checks passed: {', '.join(f'`{text.strip()}`' for text in checks)}.")
    parts.append(_costs(names, profiles, deltas))
    if (baseline := document.get("baseline")) is not None:
        rows = history.change_rows(baseline["models"])
        parts += ["Since the baseline:", _table(rows, history.HEADERS)] if rows else []
        parts += [f"- {_plain(text)}" for text in history.obstacles(baseline["models"])]
    return _with_small_print(parts, environment)


def _verdict(base: str, name: str, delta: Document) -> str:
    """Return how fast and how good a model is, or how small, against the first, in a sentence."""
    speedup, drop = delta["latency_speedup"], measured_drop({"delta": delta})
    if speedup is None:
        text = f"{name} has {_macs(delta['macs_ratio'] or 1.0)} {base}"
    else:
        amount = estimate_text(speedup["median"], speedup["ci95"], "×")
        noise = "" if speedup["significant"] else ", which is within noise"
        text = f"{name} is {amount} as fast as {base}{noise}"
    if drop is not None:
        quality, (low, high) = Quality.of({"delta": delta}), drop["ci95"]
        worse = drop["value"] > 0
        change = drop if worse else {**drop, "value": 0.0 - drop["value"], "ci95": (0.0 - high, 0.0 - low)}
        sure = "" if low > 0 or high < 0 else "; the interval includes 0"
        difference = f"{drop_text(change)} {'worse' if worse else 'better'}" if drop["value"] else "equal"
        text += f", and {difference} in {quality.heading} ({drop['n']:,} samples{sure})"
    return f"**{text}.**"


def _macs(ratio: float) -> str:
    """Return how many MACs a model has, given those of another over them; the other's name follows."""
    if ratio == 1:
        return "as many MACs as"
    return f"{100 * abs(1 / ratio - 1):.1f} % {'fewer' if ratio > 1 else 'more'} MACs than"


def _costs(names: Sequence[str], profiles: Sequence[Document], deltas: Sequence[Document]) -> str:
    """Return a row for each quantity that was measured: of the first model, and of others with the change."""
    against: list[Document | None] = [None, *deltas]
    columns = [_column(profiles[0], *each) for each in zip(profiles, against, strict=True)]
    scored = next((profile["metric"] for profile in profiles if profile["metric"] is not None), None)
    named = {_METRIC: "" if scored is None else _quality(scored).heading}
    rows = []
    for key in columns[0]:
        if any(cells := [column[key] for column in columns]):
            rows.append([named.get(key, key), *cells])
    return _table(rows, ["", *names])


def _column(base: Document, profile: Document, delta: Document | None) -> dict[str, str]:
    def cost(key: str) -> str:
        value, before = profile[key], base[key]
        if value is None or delta is None or not before or value == before:
            return "" if value is None else count_text(value)
        return f"{count_text(value)} ({100 * (value / before - 1):+.1f} %)"

    latency, metric = profile["latency_ms"], profile["metric"]
    column = {
        "latency, ms": "" if latency is None else estimate_text(latency["median"], latency["ci95"], digits=3),
        "speed-up": "",
        _METRIC: "" if metric is None else _quality(metric).value(metric["value"]),
        "worse by": "",
        "equal predictions, %": "",
        "MACs": cost("macs"),
        "parameters": cost("params"),
        "ONNX file, bytes": cost("onnx_bytes"),
        "largest difference of outputs": "",
    }
    if delta is not None:
        speedup, drop = delta["latency_speedup"], measured_drop({"delta": delta})
        column["speed-up"] = "" if speedup is None else speedup_text(speedup)
        column["worse by"] = "" if drop is None else drop_text(drop)
        agreement = delta["agreement"]
        column["equal predictions, %"] = "" if agreement is None else percent_text(agreement)
        column["largest difference of outputs"] = _difference(delta.get("outputs", ()))
    return column


def _quality(metric: Document) -> Quality:
    return Quality(metric["name"], metric["unit"], metric["higher_is_better"])


def _difference(outputs: Sequence[Document] | None) -> str:
    if outputs is None:
        return "other shapes"
    found = [output["max_abs"] for output in outputs]
    if not found:
        return ""
    return "not finite" if None in found else f"{max(found):.1e}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    table: str = tabulate(
        [[cell(text) for text in row] for row in rows],
        headers=[cell(text) for text in headers],
        tablefmt="github",
        disable_numparse=True,
    )
    return table


def _with_small_print(parts: Sequence[str], environment: Document | None) -> str:
    """Return paragraphs, followed by the machine and the meaning of brackets in small print."""
    text = "\n\n".join(parts)
    notes = ["Brackets are 95 % intervals."] if "[" in text else []
    if environment is not None:
        notes = [
            *map(_plain, map(str, machine(environment))),
            *notes,
            f"sepconvert {environment['sepconvert']}.",
        ]
    return f"{text}\n\n<sub>{' '.join(notes)}</sub>" if notes else text


def _plain(text: str) -> str:
    """Return a sentence in which signs of Markdown and of HTML mean themselves."""
    return re.sub(r"[\\*]|<(?=[A-Za-z/!])", r"\\\g<0>", text)
