"""How long `sepconvert` takes to start: mistakes, which are told without torch, and imports.

    python benchmarks/startup.py [--times 5]

Each command runs in a process of its own, after one run that is not counted. The table, in Markdown, holds
the medians of wall time and CPU time; the latter depends less on what else runs.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import click
from tabulate import tabulate

COMMANDS = {
    "sepconvert --help": ["-m", "sepconvert", "--help"],
    "a missing model": ["-m", "sepconvert", "missing.pt"],
    "an unknown mode": ["-m", "sepconvert", "model.pt", "--mode", "exakt"],
    "options that exclude each other": ["-m", "sepconvert", "model.pt", "--max-drop", "1"],
    "missing data": ["-m", "sepconvert", "model.pt", "--data", "missing.npz"],
    "a result that exists": ["-m", "sepconvert", "model.pt", "--out", "full"],
    "import sepconvert": ["-c", "import sepconvert"],
    "import torch": ["-c", "import torch"],
    "import sepconvert.cli.commands.measuring": ["-c", "import sepconvert.cli.commands.measuring"],
    "import sepconvert.cli.commands.converting": ["-c", "import sepconvert.cli.commands.converting"],
}


def seconds(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Return the wall time and the CPU time of Python with arguments."""
    begun, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)  # noqa: S603
    wall, after = time.perf_counter() - begun, os.times()
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
    return wall, cpu


@click.command(help=__doc__)
@click.option("--times", default=5, type=click.IntRange(1), help="Runs of each command.")
def main(times: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(folder / "model.pt", "w") as archive:  # all that is seen of a model before torch
            archive.writestr("model/data.pkl", b"")
        (folder / "full").mkdir()
        rows = []
        for command, arguments in COMMANDS.items():
            seconds(arguments, folder)
            found = [seconds(arguments, folder) for _ in range(times)]
            rows.append([command, *map(statistics.median, zip(*found, strict=True))])
    headers = ["command", "wall s", "CPU s"]
    click.echo(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
