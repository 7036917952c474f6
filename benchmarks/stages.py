"""What the time of a conversion goes to: the stages of report.json.

    stages.py run [OPTIONS OF sepconvert] MODEL        convert, and print the stages
    stages.py report DIR|report.json …                 print those of finished conversions side by side

`run` hands everything to `sepconvert` in a process of its own, and leaves no files unless `--out` is among
it. Stages exclude those within them, so that their times add up. CPU time is that of all threads, but not of
workers of a DataLoader. Tables are Markdown.
"""

import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

Report = Mapping[str, Any]

LAYERS = 20  # that have a row of their own


def table(report: Report) -> str:
    """Return the stages of a conversion by falling time, and below them the layers of each."""
    stages = sorted(report["stages"], key=lambda stage: -stage["wall_s"])
    wall, cpu = (sum(stage[key] for stage in stages) for key in ("wall_s", "cpu_s"))
    peak = max(stage["peak_bytes"] for stage in stages)
    total = {"stage": "total", "wall_s": wall, "cpu_s": cpu, "peak_bytes": peak}
    rows = [
        [
            each["stage"],
            f"{each['wall_s']:.1f}",
            f"{100 * each['wall_s'] / wall:.1f} %",
            f"{each['cpu_s']:.1f}",
            _ratio(each["cpu_s"], each["wall_s"]),
            f"{each['peak_bytes'] / 1e9:.2f}",
        ]
        for each in (*stages, total)
    ]
    texts = [_markdown(rows, ["stage", "wall s", "share", "CPU s", "CPU/wall", "peak GB"])]
    texts += [layer_table(each["stage"], each["parts"]) for each in stages if each["parts"]]
    return "\n\n".join(texts)


def layer_table(stage: str, parts: Mapping[str, float]) -> str:
    """Return the layers of a stage by falling time; the last of many are one row."""
    ordered, total = sorted(parts.items(), key=lambda part: -part[1]), sum(parts.values())
    rows = ordered[:LAYERS]
    if others := ordered[LAYERS:]:
        rows.append((f"{len(others)} others", sum(seconds for _, seconds in others)))
    cells = [[name, f"{seconds:.2f}", f"{100 * seconds / total:.1f} %"] for name, seconds in rows]
    return _markdown(cells, [f"layer, {stage}", "wall s", "share"])


def side_by_side(reports: Mapping[str, Report]) -> str:
    """Return wall seconds of each stage in several conversions, with their ratios to the first."""
    walls = {name: _walls(report) for name, report in reports.items()}
    sums = {
        name: {
            "total": sum(walls[name].values()),
            "total CPU": sum(stage["cpu_s"] for stage in report["stages"]),
            "peak GB": max(stage["peak_bytes"] for stage in report["stages"]) / 1e9,
        }
        for name, report in reports.items()
    }
    first, *others = reports
    stages = sorted(
        {stage for each in walls.values() for stage in each}, key=lambda s: -walls[first].get(s, 0.0)
    )
    rows = []
    for found, names in ((walls, stages), (sums, list(sums[first]))):
        for row in names:
            values = [found[name].get(row, 0.0) for name in reports]
            ratios = [_ratio(values[0], value) for value in values[1:]]
            rows.append([row, *(f"{value:.2f}" for value in values), *ratios])
    return _markdown(rows, ["wall s", *reports, *(f"{first} / {name}" for name in others)])


def _walls(report: Report) -> dict[str, float]:
    return {stage["stage"]: stage["wall_s"] for stage in report["stages"]}


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other else ""


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    columns = ["left", *["right"] * (len(headers) - 1)]
    text: str = tabulate(rows, headers=headers, tablefmt="github", colalign=columns, disable_numparse=True)
    return text


def measured_on(report: Report, command: str) -> str:
    """Return command, machine and versions of a conversion."""
    found = report["environment"]
    machine = f"{found['cpu']}, {found['cores']} cores, {found['threads']} of them for ONNX Runtime"
    versions = f"torch {found['torch']}, ONNX Runtime {found['onnxruntime']}"
    return f"`{command}`, {machine}, {versions}"


def read(path: Path) -> Report:
    """Return report.json, which a folder may hold.

    Raises:
        click.UsageError: there is none, or it is of a version that did not count stages.
    """
    place = path / "report.json" if path.is_dir() else path
    try:
        report: Report = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{place}: {error}") from error
    if not report.get("stages"):
        raise click.UsageError(f"{place}: has no stages; convert again")
    return report


@click.group(help=__doc__)
def cli() -> None:
    """Print what the time of conversions goes to."""


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Convert, and print the stages; ARGUMENTS are those of `sepconvert`."""
    with tempfile.TemporaryDirectory() as folder:
        # An --out among the arguments comes later, and holds.
        place = f"--out={Path(folder, 'converted')}"
        command = [sys.executable, "-m", "sepconvert", "convert", place, *arguments, "--json"]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
        seconds = time.perf_counter() - start
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)
    report = json.loads(done.stdout)
    shown = shlex.join(["sepconvert", *arguments])
    click.echo(f"{measured_on(report, shown)}:\n\n{table(report)}\n")
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    click.echo(
        f"The process, with the end that its report cannot know, took {seconds:.1f} s and {held:.2f} GB."
    )


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def report(paths: tuple[Path, ...]) -> None:
    """Print the stages of a finished conversion, or of several side by side."""
    found = {str(path): read(path) for path in paths}
    click.echo(
        "\n".join(f"{name}: {measured_on(each, each['command'])}" for name, each in found.items()) + "\n"
    )
    click.echo(table(next(iter(found.values()))) if len(found) == 1 else side_by_side(found))


if __name__ == "__main__":
    cli()
