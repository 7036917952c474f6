"""The report as one self-contained HTML page, from the same document as the JSON."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
    return environment.get_template("report.html.jinja").render(
        report=document, sentences=sentences(document)
    )
