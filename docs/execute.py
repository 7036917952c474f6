"""Execute the notebooks of the documentation, and store what they print and show.

    python docs/execute.py [FOLDER]

Each notebook runs in a process of its own, in an empty folder. Bars of progress, which standard error shows
and wipes out, are not stored, nor are numbers of executions and the version of the kernel.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
SECONDS = 900  # for each cell


def executed(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs that its cells have now."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "metadata" in output:
                    output.metadata = {}
    return notebook


def main(folder: Path) -> None:
    """Write every notebook with its outputs to a folder."""
    for path in NOTEBOOKS:
        nbformat.write(executed(path), folder / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
