"""Changes since earlier runs as a table, for the terminal and for pull requests."""

from collections.abc import Sequence

from tabulate import tabulate

from sepconvert.measure.comparison import short_names
from sepconvert.measure.metrics.metric import written, written_drop
from sepconvert.report.text.numbers import Document, Quality, count_text, fold, ratio_text

HEADERS = ("model", "", "then", "now", "change", "since")

_NAMES = {"params": "parameters", "macs": "MACs", "bytes": "ONNX bytes", "latency": "speed-up"}


def changes_text(models: Sequence[Document]) -> str:
    """Return the `baseline.models` of a comparison as a table, and why other quantities are not in it."""
    rows = change_rows(models)
    lines = [tabulate(rows, HEADERS, disable_numparse=True, maxcolwidths=[18, 12, None, None, 16, None])]
    return "\n".join([*lines * bool(rows), *map(fold, obstacles(models))])


def summary(models: Sequence[Document]) -> str:
    """Return what changed since the baseline, in one sentence; empty if nothing could be compared."""
    names = short_names([model["model"] for model in models])
    changed = [
        f"{name}: {', '.join(map(_change_text, found))}"
        for name, model in zip(names, models, strict=True)
        if (found := [each for each in model["changes"] if not _is_same(each)])
    ]
    if changed:
        return f"Since the baseline, {'; '.join(changed)}."
    return "Nothing changed since the baseline." if any(model["changes"] for model in models) else ""


def _change_text(change: Document) -> str:
    """Return a change with its quantity, which that of a latency names itself."""
    amount = amount_text(change)
    return amount if change["latency_speedup"] is not None else f"{_name(change)} {amount}"


def change_rows(models: Sequence[Document]) -> list[list[str]]:
    """Return a row for each change of each model, and one for all quantities that did not change."""
    rows = []
    for name, model in zip(short_names([model["model"] for model in models]), models, strict=True):
        rows += [
            [name, _name(change), *_values(change), amount_text(change), change["since"][:10]]
            for change in model["changes"]
            if not _is_same(change)
        ]
        same = [change for change in model["changes"] if _is_same(change)]
        for since in dict.fromkeys(change["since"][:10] for change in same):
            names = [_name(change) for change in same if change["since"].startswith(since)]
            rows.append([name, ", ".join(names), "", "", "none", since])
    return rows


def _is_same(change: Document) -> bool:
    return change["latency_speedup"] is None and bool(change["then"] == change["now"])


def obstacles(models: Sequence[Document]) -> list[str]:
    """Return a sentence for each reason why quantities cannot be compared with an earlier run."""
    found: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for quantity, reason in model["missing"].items():
            found.setdefault((model["model"], reason), []).append(_NAMES.get(quantity, quantity))
    return [f"{name}, {', '.join(names)}: not compared, {reason}." for (name, reason), names in found.items()]


def amount_text(change: Document) -> str:
    """Return a change with its unit, and its interval where it has one."""
    if (ratio := change["latency_speedup"]) is not None:
        low, high = (100 * (1 / end - 1) for end in reversed(ratio["ci95"]))
        noise = "" if ratio["significant"] else " ~ within noise"
        return f"latency {100 * (1 / ratio['median'] - 1):+.1f} % [{low:+.1f}, {high:+.1f}]{noise}"
    if change["quantity"] == "metric":
        verb = "lost" if change["change"] > 0 else "gained"
        return f"{verb} {written_drop(abs(change['change']), change['unit'])}"
    return f"{change['change']:+.3g} %"


def _name(change: Document) -> str:
    if change["quantity"] == "metric":
        return Quality(change["metric"], change["unit"], True).heading
    return _NAMES[change["quantity"]]


def _values(change: Document) -> tuple[str, str]:
    """Return the value then and the value now."""
    then, now = change["then"], change["now"]
    if change["quantity"] == "metric":
        return written(then, change["unit"]), written(now, change["unit"])
    if change["quantity"] == "latency":
        return ratio_text(then), ratio_text(now)
    return count_text(then), count_text(now)
