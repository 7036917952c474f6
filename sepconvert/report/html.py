"""The report as one self-contained HTML page, from the same document as the JSON."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sepconvert.report.plots import trade_off
from sepconvert.report.terminal import sentences


def render_html(document: Mapping[str, Any]) -> str:
    """The page, as text. It needs no network and no script."""
    environment = Environment(
        loader=PackageLoader("sepconvert", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    approximation = document["approximation"]
    curve = () if approximation is None else approximation["curve"]
    carried_out = sum(point["heldout"] is not None for point in curve)
    return environment.get_template("report.html.jinja").render(
        report=document,
        sentences=sentences(document),
        picture=Markup(trade_off(curve)) if carried_out > 2 else None,  # noqa: S704  (matplotlib's own SVG)
    )
