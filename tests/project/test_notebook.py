"""The notebook of the documentation runs, stores what it shows, and becomes a page."""

import sys
from typing import Any

import nbformat
import pytest
from pages import DOCS

sys.path.append(str(DOCS))
import execute


def shown(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """Return the kinds of the outputs of each cell with code."""
    return [
        [(each.output_type, *sorted(each.get("data", ()))) for each in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def kinds(cell: dict[str, Any]) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", ())}


@pytest.fixture(params=execute.NOTEBOOKS, ids=lambda path: path.stem)
def stored(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    """Return each notebook as it is stored."""
    return nbformat.read(request.param, as_version=4)


def test_there_is_one():
    assert [path.name for path in execute.NOTEBOOKS] == ["notebook.ipynb"]


def test_outputs_are_stored(stored):
    nbformat.validate(stored)
    assert not [each for cell in shown(stored) for each in cell if each[0] == "error"]
    by_source = {cell.source: kinds(cell) for cell in stored.cells if cell.cell_type == "code"}
    assert "text/html" in by_source["result"]


def test_it_shows_the_whole_interface(stored):
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    for call in (
        "sepconvert.inspect(", "progress=True", "result.summary()", "result.plot()", "result.to_html()",
        "result.save(", "sepconvert.apply(model, result.plan)",
    ):  # fmt: skip
        assert call in code


@pytest.mark.slow
def test_the_stored_outputs_have_the_form_of_those_that_it_has_now(stored, request):
    (path,) = [each for each in execute.NOTEBOOKS if each.stem in request.node.name]
    now = execute.executed(path)
    assert [cell.source for cell in now.cells] == [cell.source for cell in stored.cells]
    assert shown(now) == shown(stored)


def test_a_page_has_the_cells_and_their_outputs():
    pytest.importorskip("myst_parser", reason="the extra docs is not installed")
    from notebooks import markdown

    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["3.90×\n", "faster\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["<table>"], "text/html": "<b>4</b>"}},
        {"output_type": "execute_result", "data": {"text/plain": "<Figure>", "image/png": "iVBORw==\n"}},
        {"output_type": "execute_result", "data": {"text/plain": "42"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "text"]},
        {"cell_type": "code", "source": "convert()", "outputs": outputs},
    ]
    assert (
        markdown({"cells": cells})
        == """\
# A title
text

```python
convert()
```

```text
3.90×
faster
```

```{raw} html
<div class="output"><b>4</b></div>
```

```{raw} html
<img alt="&lt;Figure&gt;" src="data:image/png;base64,iVBORw==">
```

```text
42
```
"""
    )
