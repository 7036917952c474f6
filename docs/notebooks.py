"""Jupyter notebooks as pages: cells and the outputs that are stored with them; none is executed."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx


class NotebookParser(MystParser):
    """Parser of notebooks, as the Markdown of their cells."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse a notebook of format 4."""
        super().parse(markdown(json.loads(inputstring)), document)


def markdown(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook, each followed by its outputs."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = _text(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        yield _shown(output)


def _shown(output: dict[str, Any]) -> str:
    """Return an output in the richest form that a page can show."""
    if output["output_type"] == "stream":
        return f"```text\n{_text(output['text']).rstrip()}\n```"
    data = output["data"]
    if "text/html" in data:
        return f'```{{raw}} html\n<div class="output">{_text(data["text/html"])}</div>\n```'
    if "image/png" in data:
        about, image = escape(_text(data["text/plain"])), _text(data["image/png"]).replace("\n", "")
        return f'```{{raw}} html\n<img alt="{about}" src="data:image/png;base64,{image}">\n```'
    return f"```text\n{_text(data['text/plain'])}\n```"


def _text(lines: str | Sequence[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the parser for files that end in `.ipynb`."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True}
