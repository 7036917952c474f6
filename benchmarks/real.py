"""Convert trained networks that a TOML file lists, by the command line, and tabulate what came out.

    real.py run CASES.toml [--results DIR]      one process per case; existing results are kept
    real.py report CASES.toml [--results DIR]   print the table

README.md beside this file explains the keys of a case, and `real.example.toml` is a file to begin with.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from msgspec import Meta, Struct
from tabulate import tabulate

import sepconvert
from sepconvert.base.environment import Runtime, available_cores, environment
from sepconvert.base.errors import first_line, shortened
from sepconvert.files.data import load_data
from sepconvert.files.images import Preprocess

RESULTS = Path(__file__).parent / "results"
SECONDS = 7200  # time limit of a conversion
LONGEST = 300  # characters of a failure in the table

Sides = tuple[int, ...]
Channels = tuple[float, ...]
Arrays = list[npt.NDArray[np.float32]]


# Cases ---------------------------------------------------------------------------------------------


class Case(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One conversion; paths are relative to the folder of the TOML file."""

    name: Annotated[str, Meta(pattern=r"^\w[\w.+-]*$")]
    model: str
    factory: str | None = None
    mode: Literal["exact", "approx", "auto"] = "exact"
    calib: str | None = None
    data: str | None = None
    metric: Literal["top1", "psnr"] | None = None
    input_shape: Sides | None = None
    mean: Channels | None = None
    std: Channels | None = None
    resize: int | tuple[int, int] | None = None
    batch: int = 1
    threads: int | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a metric of nothing."""
        if self.metric is not None and self.data is None:
            raise ValueError(f"the metric {self.metric} needs `data`")

    def arguments(self) -> Iterator[str]:
        """Yield the arguments of `sepconvert convert`; data without classes are not for it."""
        given = {
            "factory": self.factory,
            "mode": self.mode,
            "calib": self.calib,
            "data": self.data if self.metric == "top1" else None,
            "input-shape": _joined("x", self.input_shape),
            "mean": _joined(",", self.mean),
            "std": _joined(",", self.std),
            "resize": _joined("x", self.resize),
            "batch": self.batch,
            "threads": self.threads,
        }
        yield self.model
        yield from (f"--{flag}={value}" for flag, value in given.items() if value is not None)
        yield from self.options


class Cases(Struct, frozen=True, forbid_unknown_fields=True):
    """Content of the TOML file."""

    case: Annotated[tuple[Case, ...], Meta(min_length=1)]


def _joined(sign: str, values: float | Sequence[float] | None) -> str | None:
    if values is None:
        return None
    return sign.join(map(str, values if isinstance(values, Sequence) else [values]))


def read_cases(path: Path) -> dict[str, Case]:
    """Return the cases by name.

    Raises:
        click.UsageError: the file has another form, or two cases have the same name.
    """
    try:
        cases = msgspec.toml.decode(path.read_bytes(), type=Cases).case
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise click.UsageError(f"{path}: {first_line(error)}; README.md lists the keys") from error
    name, count = Counter(case.name for case in cases).most_common(1)[0]
    if count > 1:
        raise click.UsageError(f"{path}: {count} cases are named {name}; names are those of their results")
    return {case.name: case for case in cases}


# One case ------------------------------------------------------------------------------------------


def attempt(case: Case, folder: Path) -> dict[str, Any]:
    """Convert by the command line, and score what it wrote to `folder`; a failure is part of the result."""
    out, log = folder / case.name, folder / f"{case.name}.log"
    command = [sys.executable, "-m", "sepconvert", "convert", *case.arguments(), f"--out={out}", "--force"]
    found = _about(case) | {"environment": environment(Runtime(case.threads or available_cores()))}
    error = None
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(  # noqa: S603  (our own program)
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            error = f"not done within {SECONDS} s"
    found["seconds"] = time.perf_counter() - start
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    if error is None and code:
        error = _failure(code, log.read_text(encoding="utf-8", errors="replace"))
    if error is None:
        found |= figures(json.loads((out / "report.json").read_text(encoding="utf-8")))
        try:
            found |= score(case, out)
        except Exception as failed:  # any failure is a result of the benchmark
            error = f"{type(failed).__name__}: {first_line(failed)}"
    return found | {"error": error}


def _about(case: Case) -> dict[str, Any]:
    return {"name": case.name, "case": msgspec.json.decode(msgspec.json.encode(case))}


def _failure(code: int, text: str) -> str:
    """Describe the end of a process by its last line."""
    return f"exit code {code}: {(text.strip() or 'no message').splitlines()[-1]}"


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table shows of report.json, and the reasons of all decisions."""
    layers, delta, accuracy = report["layers"], report["delta"], report["original"]["accuracy"]
    converted = [layer for layer in layers if layer["decision"] == "converted"]
    return {
        "convolutions": len(layers),
        "converted": len(converted),
        "schemes": Counter(layer["scheme"] for layer in converted),
        "kept": Counter(layer["reason_code"] for layer in layers if layer["decision"] == "kept"),
        "macs_ratio": delta["macs_ratio"],
        "speedup": delta["latency_speedup"],
        "drop": delta["accuracy_drop_pp"],
        "top1": None if accuracy is None else accuracy["top1"],
    }


def score(case: Case, out: Path) -> dict[str, Any]:
    """Compare the two ONNX files on the data, unless sepconvert has scored them."""
    if case.data is None or case.metric == "top1":
        return {}
    if case.metric == "psnr":
        before, after = mean_psnr(answers(case, out), targets(Path(case.data)))
        return {"psnr": {"original": before, "converted": after}}
    return {"relative_error": relative_error(answers(case, out))}


def answers(case: Case, out: Path) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield the outputs of both files, for one image at a time, or for batches of the size that is fixed."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = case.threads or available_cores()
    original, converted = (
        ort.InferenceSession(out / f"{name}.onnx", settings, providers=["CPUExecutionProvider"])
        for name in ("original", "converted")
    )
    (taken,) = converted.get_inputs()
    size = taken.shape[0] if isinstance(taken.shape[0], int) else 1
    assert case.data is not None
    for x, _ in load_data(case.data, Preprocess(case.mean, case.std, case.resize), labelled=False):
        for images in x.split(size):
            if len(images) == size:
                feed = {taken.name: images.numpy()}
                yield original.run(None, feed), converted.run(None, feed)


def relative_error(pairs: Iterator[tuple[Arrays, Arrays]]) -> float:
    """Return ‖converted − original‖ / ‖original‖ over all images, of the output where it is largest."""
    sums = sum(
        np.array([[np.square(a - b, dtype=np.float64).sum(), np.square(b, dtype=np.float64).sum()]
                  for b, a in zip(before, after, strict=True)])
        for before, after in pairs
    )  # fmt: skip
    differences, sizes = np.transpose(sums)
    return float(np.sqrt(differences / sizes).max())


def targets(path: Path) -> npt.NDArray[np.float32]:
    """Return the images `y` of an .npz file, N × C × H × W, 0…1."""
    y = np.load(path)["y"]
    return y.transpose(0, 3, 1, 2).astype(np.float32) / 255 if y.dtype == np.uint8 else y


def mean_psnr(pairs: Iterator[tuple[Arrays, Arrays]], truth: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean PSNR in dB of both models' first outputs, clipped to 0…1."""
    seen, found = 0, []
    for outputs in pairs:
        expected = truth[seen : seen + len(outputs[0][0])]
        seen += len(expected)
        found.append([_psnr(each[0], expected) for each in outputs])
    before, after = np.concatenate(found, axis=1).mean(axis=1)
    return float(before), float(after)


def _psnr(images: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the PSNR of each image, in dB, at most 100."""
    if images.shape != expected.shape:
        raise ValueError(f"outputs have the shape {images.shape}, y {expected.shape}")
    errors = np.square(images.clip(0, 1) - expected, dtype=np.float64).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(errors, 1e-10))


# Commands ------------------------------------------------------------------------------------------


@click.group()
def cli() -> None:
    """Convert the networks of a TOML file; README.md beside this file explains it."""


cases_argument = click.argument("path", metavar="CASES", type=click.Path(path_type=Path))
results_option = click.option(
    "--results", "folder", type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results [default: results/ beside this file, and in it the name of the TOML file].",
)  # fmt: skip


@cli.command()
@cases_argument
@results_option
def run(path: Path, folder: Path | None) -> None:
    """Convert all networks, one after the other; those that have a result under the same keys are skipped."""
    cases, folder = read_cases(path), _folder_of(path, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases.values():
        if _read(folder, case) is None:
            found = _in_a_process(path.resolve(), case, folder)
            part = folder / f"{case.name}.part"
            part.write_text(json.dumps(found, indent=1), encoding="utf-8")
            part.replace(folder / f"{case.name}.json")
            click.echo(f"{case.name}: {found['error'] or 'converted'}, {found.get('seconds', 0):.0f} s")


def _folder_of(path: Path, folder: Path | None) -> Path:
    return (folder or RESULTS / path.stem).resolve()


def _read(folder: Path, case: Case) -> dict[str, Any] | None:
    """Return the result of a case, unless it was another then."""
    path = folder / f"{case.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["case"] == _about(case)["case"] else None


def _in_a_process(path: Path, case: Case, folder: Path) -> dict[str, Any]:
    """Run `one` where the paths of the TOML file begin, on the package that this process has imported."""
    paths = filter(None, [str(Path(sepconvert.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    done = subprocess.run(  # noqa: S603  (our own script)
        [sys.executable, Path(__file__).resolve(), "one", path, case.name, folder],
        capture_output=True, text=True, check=False, cwd=path.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    if done.returncode:
        return _about(case) | {"error": _failure(done.returncode, done.stderr)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@cli.command()
@cases_argument
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def one(path: Path, name: str, folder: Path) -> None:
    """Convert one network into a folder; the last line of the output is the result."""
    click.echo(json.dumps(attempt(read_cases(path)[name], folder)))


@cli.command()
@cases_argument
@results_option
def report(path: Path, folder: Path | None) -> None:
    """Print the table of all results."""
    folder = _folder_of(path, folder)
    found = [
        _read(folder, case) or _about(case) | {"error": "not run yet"} for case in read_cases(path).values()
    ]
    click.echo("\n".join(table(found)))


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield where the numbers were measured, and a table with a row for each case."""
    yield from dict.fromkeys(_measured_on(each["environment"]) for each in found if "environment" in each)
    yield ""
    rows = [
        {
            "case": each["name"],
            "mode": each["case"].get("mode", "exact"),
            "converted": f"{each['converted']} of {each['convolutions']}" if "converted" in each else "",
            "MACs": f"{each['macs_ratio']:.2f}×" if each.get("macs_ratio") else "",
            "speed-up": _speed(each.get("speedup")),
            "loss": _loss(each),
            "seconds": f"{each['seconds']:.0f}" if "seconds" in each else "",
            "GB": f"{each['peak_gb']:.1f}" if "peak_gb" in each else "",
            "failure": shortened(each["error"] or "", LONGEST).replace("|", r"\|"),
        }
        for each in found
    ]
    yield tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _measured_on(stated: Mapping[str, Any]) -> str:
    """Describe where a result was measured; not every environment names its instruction sets."""
    machine = [stated["cpu"], *stated.get("instruction_sets", ()), f"{stated['cores']} cores"]
    versions = [f"{name} {stated[name]}" for name in ("python", "sepconvert", "torch", "onnxruntime")]
    return f"{', '.join([*machine, stated['platform'], *versions])}; threads: {stated['threads']}."


def _speed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["ci95"]
    noise = "" if found["significant"] else ", within noise"
    return f"{found['median']:.2f}× [{low:.2f}, {high:.2f}]{noise}"


def _loss(each: Mapping[str, Any]) -> str:
    """Describe by how much the outputs are worse."""
    if each.get("drop"):
        low, high = each["drop"]["ci95"]
        return f"{each['drop']['value']:.2f} pp [{low:.2f}, {high:.2f}] of {each['top1']:.2%}"
    if "psnr" in each:
        before, after = each["psnr"]["original"], each["psnr"]["converted"]
        return f"{before - after:.3f} dB of {before:.2f}"
    return f"relative error {each['relative_error']:.2g}" if "relative_error" in each else ""


if __name__ == "__main__":
    cli()
