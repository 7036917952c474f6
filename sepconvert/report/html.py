"""Reports and comparisons as self-contained HTML pages."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from sepconvert.base.notes import Note, NoteLevel
from sepconvert.measure.comparison import Comparison, short_names
from sepconvert.measure.metrics.metric import written_interval
from sepconvert.report.page import heading, layers
from sepconvert.report.page.tiles import legend, report_tiles, tiles
from sepconvert.report.pictures import curve, plots
from sepconvert.report.pictures.drawing import STAGE_COLOURS
from sepconvert.report.pictures.exhibits import Exhibits
from sepconvert.report.pictures.images import picture
from sepconvert.report.pictures.panels import gallery
from sepconvert.report.pictures.samples import ChangedSample
from sepconvert.report.text import forms, glossary
from sepconvert.report.text.numbers import (
    Document,
    Quality,
    by_time,
    divergence_text,
    drop_text,
    duration_text,
    measured_drop,
    peak_memory,
    percent_text,
    ratio_text,
    speedup_text,
    three_digits,
    total_time,
    written_size,
)
from sepconvert.report.text.sentences import causes, sentences
from sepconvert.report.text.tables import coded, cost_rows


def render_html(document: Document, exhibits: Exhibits | None = None) -> str:
    """Return a report as a page that loads nothing from elsewhere and can be read without scripts."""
    exhibits = exhibits or Exhibits()
    verdict, *notes = sentences(document)
    found = report_tiles(document)
    return _template("report.html.jinja").render(
        report=document,
        heading=heading,
        verdict=verdict,
        warnings=[note for note in notes if note.level is NoteLevel.WARNING],
        notes=[note for note in notes if note.level is not NoteLevel.WARNING],
        tiles=found,
        legend=legend(found),
        costs=cost_rows(document),
        causes=causes(document),
        quality=Quality.of(document),
        drop=measured_drop(document),
        compared=exhibits.changed,
        gallery=gallery(exhibits.changed),
        pictures=_pictures(document, exhibits),
        signs=curve,
        marked=_marked(document),
        time=_time(document.get("stages", ())),
        forms=forms,
        glossary=glossary,
        layers=layers,
    )


def render_comparison(
    comparison: Comparison, notes: Sequence[Note], environment: Document | None = None
) -> str:
    """Return a comparison as a page, with the distributions of the latencies.

    Args:
        comparison: of any number of models.
        notes: how the models were measured.
        environment: where they were measured, if that was now and here.
    """
    profiles = [profile.to_json() for profile in comparison.profiles]
    names = comparison.names or tuple(f"#{index}" for index in range(1, len(profiles) + 1))
    short = short_names(names)
    latencies = [
        (name, profile["latency_ms"])
        for name, profile in zip(short, profiles, strict=True)
        if profile["latency_ms"] is not None
    ]
    found = []
    if len(profiles) > 1:
        delta = comparison.to_json()["deltas"][comparison.fastest - 1]
        found = tiles(profiles[0], profiles[comparison.fastest], delta)
    return _template("comparison.html.jinja").render(
        title=heading.against(short),
        names=names,
        date=datetime.now(timezone.utc).date().isoformat(),
        machine=None if environment is None else heading.machine(environment),
        verdict=comparison.verdict,
        tiles=found,
        legend=legend(found),
        rows=comparison.rows(),
        warnings=[note for note in notes if note.level is NoteLevel.WARNING],
        notes=[note for note in notes if note.level is not NoteLevel.WARNING],
        latencies=latencies,
        distributions=_drawn(plots.distributions, latencies) if latencies else None,
    )


def _template(name: str) -> Template:
    pages = Environment(
        loader=PackageLoader("sepconvert", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        divergence=divergence_text,
        ratio=ratio_text,
        speedup=speedup_text,
        percent=percent_text,
        duration=duration_text,
        three_digits=three_digits,
        size=written_size,
        drop_text=drop_text,
        drop_interval=written_interval,
        outliers=plots.outliers,
        change=_change,
        code=lambda text: Markup(coded(text)),  # noqa: S704
        fact=_fact,
    )
    return pages.get_template(name)


def _fact(value: Any) -> str:
    """Return an entry of the environment: a text, a number, a list, a mapping, or None."""
    if isinstance(value, Mapping):
        value = [f"{key}={each}" for key, each in value.items()]
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "unknown" if value is None else str(value)


def _pictures(document: Document, exhibits: Exhibits) -> Mapping[str, Any]:
    before, after = (document[side]["latency_ms"] for side in ("original", "converted"))
    latencies = [("original", before), ("converted", after)]
    errors = {layer["name"]: layer["weight_error"] for layer in document["layers"]}
    return {
        "trade_off": _drawn(curve.trade_off, document) if _has_plans(document) else None,
        "forms": _drawn(plots.four_forms, document) if _are_drawn(document) else None,
        "distributions": before and _drawn(plots.distributions, latencies),
        "latencies": latencies,
        "spectra": {
            layer["name"]: _svg(plots.spectrum(layer["spectrum"]))
            for layer in document["layers"]
            if layer["spectrum"] is not None
        },
        "kernels": [
            {"layer": pair.layer, "weight_error": errors[pair.layer], **plots.kernels(pair)}
            for pair in exhibits.kernels
        ],
        "images": {index: picture(image) for index, image in exhibits.images.items() if image.ndim == 3},
    }


def _drawn(draw: Callable[..., str], *content: Any) -> SimpleNamespace:
    """Return a picture for wide screens and paper, and one for narrow screens."""
    return SimpleNamespace(wide=_svg(draw(*content)), slim=_svg(draw(*content, slim=True)))


def _has_plans(document: Document) -> bool:
    """Return whether there are plans to draw beside the original."""
    return document["approximation"] is not None and len(curve.marks(document)[0]) > 1


def _marked(document: Document) -> Mapping[str, Any]:
    """Return which signs occur on the curve, and how many samples decided about plans."""
    approximation = document["approximation"]
    points = () if approximation is None else approximation["curve"]
    drops = [point["drop"]["n"] for point in points if point["drop"]]
    most = max(drops, default=0)
    speedups = [point["latency_speedup"] for point in points if point["latency_speedup"]]
    return {
        "most": most,
        "fewer": sorted({number for number in drops if number < most}),
        "noise": any(not speedup["significant"] for speedup in speedups),
        "far": approximation is not None and bool(curve.far_off(document)),
    }


def _time(stages: Sequence[Document]) -> Mapping[str, Any] | None:
    """Return the bar of the stages, and a row for each; None for a report that does not know them."""
    if not stages:
        return None
    ordered, total = by_time(stages), total_time(stages)
    last = len(STAGE_COLOURS) - 1
    rows = [
        {
            **stage,
            "name": "other work" if stage["stage"] == "rest" else stage["stage"],
            "colour": STAGE_COLOURS[min(number, last)],
            "share": stage["wall_s"] / total,
            "parts": sorted(stage["parts"].items(), key=lambda part: -part[1]),
        }
        for number, stage in enumerate(ordered)
    ]
    bar = _svg(plots.time_bar([stage["wall_s"] for stage in ordered]))
    return {"bar": bar, "rows": rows, "seconds": total, "peak": peak_memory(stages)}


def _are_drawn(document: Document) -> bool:
    """Return whether there are forms that were timed and scored."""
    found = document.get("forms")
    return (
        found is not None
        and found["float"]["metric"] is not None
        and found["float"]["latency_ms"] is not None
    )


def _change(sample: ChangedSample, quality: Quality) -> str:
    """Return which sample it is, and its scores."""
    if sample.scores is None:
        return f"sample {sample.index}"
    before, after = (quality.value(score) for score in sample.scores)
    return f"sample {sample.index}: {quality.name} {before} → {after}"


def _svg(text: str) -> Markup:
    return Markup(text)  # noqa: S704  (made by matplotlib, which escapes names)
