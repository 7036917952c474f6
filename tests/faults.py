"""Outcomes of a conversion under faults, each of which is really brought about.

    python tests/faults.py        prints the table as Markdown; exits with 1 if an outcome is wrong

The default tests cover the same faults at fewer points.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import small_net
from tabulate import tabulate

from sepconvert.files.results import FILES

NET = ("net.pth", "--factory", "net.py:make", "--mode", "approx", "--rank", "1", "--runs", "0")
DATA = ("--calib", "x.npz", "--calib-images", "120")
TRAINED = (*NET, *DATA, "--finetune", "60")
TIMED = (
    *(*NET[:3], "--mode", "auto", *DATA, "--min-speedup", "0.01"),
    *("--measure-seconds", "20", "--threads", "1", "--runs", "5"),
)
POINTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of the time of an uninterrupted run


def start(folder: Path, *arguments: str, **environment: str | None) -> subprocess.Popen[str]:
    """Start sepconvert in a process group of its own; None removes an environment variable."""
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "sepconvert", *arguments],
        cwd=folder,
        env={key: value for key, value in merged.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str, **environment: str | None) -> tuple[int, str]:
    """Run sepconvert; return its exit code and the last line of standard error that is not progress."""
    process = start(folder, *arguments, **environment)
    _, err = process.communicate(timeout=600)
    lines = [line for line in err.splitlines() if line.startswith(("sepconvert:", "Traceback"))]
    return process.returncode, lines[-1] if lines else ""


def weights(folder: Path, out: str) -> str:
    return hashlib.sha256((folder / out / "converted.safetensors").read_bytes()).hexdigest()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


def check(condition: bool, saying: str) -> str:
    """Return `saying`, marked if the condition does not hold."""
    return saying if condition else f"NOT SO: {saying}"


# Faults: each takes a folder with files of `small_net` and returns the outcome -----------------------


def killed(folder: Path, command: tuple[str, ...], resume: bool) -> str:
    """Kill a run by SIGKILL at several points, and run it again each time."""
    begun = time.monotonic()
    code, said = run(folder, *command, "--out", "whole")
    seconds = time.monotonic() - begun
    assert code == 0, said
    whole, equal = weights(folder, "whole"), 0
    for number, point in enumerate(POINTS):
        out = f"out{number}"
        while not stopped_after(point * seconds, folder, *command, "--out", out):
            seconds *= 0.8  # quicker than the first run was
            shutil.rmtree(folder / out, ignore_errors=True)
        if not (folder / out).exists():  # where it does, all was done but for the end of the process
            run(folder, *command, "--out", out, *(["--resume"] if resume else []))
        equal += left(folder / out) == left(folder / "whole") and weights(folder, out) == whole
    return check(
        equal == len(POINTS), f"killed at {len(POINTS)} points, run again: {equal} of them equal bit by bit"
    )


def stopped_after(seconds: float, folder: Path, *arguments: str) -> bool:
    """Kill a run by SIGKILL after some seconds; return whether it was still running."""
    process = start(folder, *arguments)
    time.sleep(seconds)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def spoilt(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 3] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)


def bad_checkpoint(folder: Path, kind: str) -> str:
    process = start(folder, *TRAINED, "--out", "out")
    checkpoint = folder / "out.checkpoint"
    while not checkpoint.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    spoilt(checkpoint, kind)
    return refused(*run(folder, *TRAINED, "--out", "out", "--resume"))


def refused(code: int, said: str) -> str:
    return check(code == 2 and said.startswith("sepconvert:"), f"exit code {code}: {said}")


def bad_plan(folder: Path, name: str, kind: str) -> str:
    run(folder, *NET, *DATA, "--out", "out")
    spoilt(folder / "out" / name, kind)
    return refused(*run(folder, "apply", *NET[:3], "out/plan.json", "--out", "again"))


def other_model(folder: Path) -> str:
    run(folder, *NET, *DATA, "--out", "out")
    source = (folder / "net.py").read_text()
    (folder / "net.py").write_text(source.replace("nn.Conv2d(8, 16, 3)", "nn.Conv2d(8, 24, 3)")
                                   .replace("nn.Conv2d(16, 16", "nn.Conv2d(24, 16"))  # fmt: skip
    saved = "import net, torch; torch.save(net.make().state_dict(), 'net.pth')"
    subprocess.run([sys.executable, "-c", saved], cwd=folder, check=True)  # noqa: S603
    return refused(*run(folder, "apply", *NET[:3], "out/plan.json", "--out", "again"))


def bad_cache(folder: Path, kind: str) -> str:
    command = (*TIMED, "--cache", "cache")
    code, said = run(folder, *command, "--out", "first")
    assert code == 0, said
    for path in (folder / "cache").iterdir():
        spoilt(path, kind)
    code, said = run(folder, *command, "--out", "second")
    whole = sum(_is_whole(path) for path in (folder / "cache").iterdir())
    count = len(list((folder / "cache").iterdir()))
    return check(code == 0 and whole > 0, f"exit code {code}: measured anew ({whole} of {count} files whole)")


def _is_whole(path: Path) -> bool:
    from sepconvert.base.documents import is_intact

    try:
        return is_intact(json.loads(path.read_text()))
    except ValueError:
        return False


def shared_cache(folder: Path) -> str:
    processes = [start(folder, *TIMED, "--cache", "cache", "--out", f"out{n}") for n in range(2)]
    codes = [process.wait(600) for process in processes]
    for process in processes:
        process.communicate()
    whole = all(_is_whole(path) for path in (folder / "cache").iterdir())
    return check(codes == [0, 0] and whole, f"exit codes {codes}, all files of the cache whole: {whole}")


def home(folder: Path, **environment: str | None) -> str:
    code, said = run(folder, *TIMED, "--out", "out", XDG_CACHE_HOME=None, **environment)
    return check(code == 0, f"exit code {code} {said}")


def odd_path(folder: Path) -> str:
    odd = folder / "ein Ordner — ünïcode 空間"
    odd.mkdir()
    for name in ("net.pth", "net.py", "x.npz"):
        shutil.copy(folder / name, odd / name)
    code, said = run(odd, *NET, *DATA, "--out", "Ergebnis ✓/neu")
    written = (odd / "Ergebnis ✓" / "neu" / "report.html").exists()
    return check(code == 0 and written, f"exit code {code}, written: {written} {said}")


def full_disk(folder: Path) -> str:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: S603
        return "not tried: mounting a small disk needs root"
    try:
        outcome = refused(*run(folder, *NET, *DATA, "--out", "disk/out"))
        return outcome + check(left(disk) == set(), "; nothing is left on it")
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607


def terminated(folder: Path, number: signal.Signals) -> str:
    before = left(folder)
    process = start(folder, *TRAINED, "--out", "out")
    while not any(name.startswith(".sepconvert") for name in left(folder)):
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate()
    gone = left(folder) - before
    return check(
        process.returncode == 130 and not gone - {"out.checkpoint"},
        f"exit code {process.returncode}: {err.strip().splitlines()[-1]}; "
        f"left: {', '.join(gone) or 'nothing'}",
    )


def raising_loader(folder: Path, option: str) -> str:
    (folder / "loaders.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Bad(Dataset):\n"
        "    def __len__(self): return 160\n"
        "    def __getitem__(self, i):\n"
        "        if i == 100: raise OSError(5, 'Input/output error', 'image 100.png')\n"
        "        return torch.randn(8, 12, 12), i % 5\n"
        "def make(): return DataLoader(Bad(), 16)\n"
    )
    command = [*NET, *DATA] if option == "--data" else [*NET]
    outcome = refused(*run(folder, *command, option, "loaders.py:make", "--out", "out"))
    return outcome + check(not (folder / "out").exists(), "; nothing is left")


def one_place(folder: Path) -> str:
    """Start two runs that write to one new directory."""
    command = (*NET[:3], "--input-shape", "8x12x12", "--runs", "0", "--out", "out")
    both = [start(folder, *command) for _ in range(2)]
    said = [process.communicate()[1].strip() for process in both]
    codes = sorted(process.returncode for process in both)
    whole = {path.name for path in (folder / "out").iterdir()} == set(FILES)
    refusal = next(each for each, process in zip(said, both, strict=True) if process.returncode)
    return check(codes == [0, 2] and whole, f"exit codes 0 and 2: {refusal}; all files whole")


FAULTS: dict[str, Callable[[Path], str]] = {
    "kill -9, exact": lambda f: killed(f, (*NET[:3], "--input-shape", "8x12x12", "--runs", "0"), False),
    "kill -9, auto (times in a cache)": lambda f: killed(f, (*TIMED, "--cache", "cache"), False),
    "kill -9, fine-tuning, --resume": lambda f: killed(f, TRAINED, True),
    "checkpoint truncated": lambda f: bad_checkpoint(f, "truncated"),
    "checkpoint with one bit changed": lambda f: bad_checkpoint(f, "flipped"),
    "plan truncated": lambda f: bad_plan(f, "plan.json", "truncated"),
    "plan with one bit changed": lambda f: bad_plan(f, "plan.json", "flipped"),
    "weights of the plan truncated": lambda f: bad_plan(f, "converted.safetensors", "truncated"),
    "weights of the plan with one bit changed": lambda f: bad_plan(f, "converted.safetensors", "flipped"),
    "plan for another model": other_model,
    "cache truncated": lambda f: bad_cache(f, "truncated"),
    "cache with one bit changed": lambda f: bad_cache(f, "flipped"),
    "cache shared by two processes at once": shared_cache,
    "two runs to one new directory": one_place,
    "home that cannot be written": lambda f: home(f, HOME="/proc/1"),
    "home that is not there": lambda f: home(f, HOME="/nowhere/at/all"),
    "no HOME": lambda f: home(f, HOME=None),
    "path with spaces and letters beyond ASCII": odd_path,
    "full disk": full_disk,
    "SIGTERM": lambda f: terminated(f, signal.SIGTERM),
    "Ctrl-C": lambda f: terminated(f, signal.SIGINT),
    "loader of --data raises in the middle": lambda f: raising_loader(f, "--data"),
    "loader of --calib raises in the middle": lambda f: raising_loader(f, "--calib"),
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Bring about every fault, or those whose names contain one of the arguments."""
    if unknown := [part for part in names if not any(part in name for name in FAULTS)]:
        raise click.UsageError(f"{unknown[0]}: expected parts of these names: {', '.join(FAULTS)}")
    rows: list[dict[str, Any]] = []
    for name, fault in FAULTS.items():
        if names and not any(part in name for part in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            small_net.write(Path(folder))
            try:
                outcome = fault(Path(folder))
            except Exception as error:
                outcome = f"NOT SO: {type(error).__name__}: {error}"
        outcome = outcome.replace(folder, "…")
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)
        rows.append({"fault": name, "outcome": outcome})
    print(tabulate(rows, headers="keys", tablefmt="github"))
    sys.exit(any("NOT SO" in row["outcome"] for row in rows))


if __name__ == "__main__":
    main()
