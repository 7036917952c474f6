"""Thousands of damaged and hostile files: `python tests/fuzz.py --cases 10000`.

Every case is a mutated file of some kind. Its reader must return, or raise SepconvertError with one or two
lines, within 10 seconds and with less than 2 GB of additional memory, and must not run code of the file: an
audit hook of the interpreter watches for programs, sockets, and files opened for writing. (Readers of models
fork, to read pickles within limits.) Cases run in a process of their own, which is restarted if a case ends
it; kind and number identify a case.
"""

import functools
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sepconvert
from sepconvert.base.documents import sealed
from sepconvert.base.errors import SepconvertError
from sepconvert.files.data import Preprocess, load_data
from sepconvert.files.models.loading import load_model
from sepconvert.files.onnx.export import export_program, save_archive, save_onnx
from sepconvert.files.onnx.facts import read_onnx
from sepconvert.measure.profiling import read_profile

SECONDS, BYTES = 10, 2e9

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def small() -> nn.Module:
    """Build a model of which every kind of file can be made in a moment."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )
    return layers.eval()


IMAGE = torch.linspace(-1, 1, 3 * 36).reshape(1, 3, 6, 6)


class Payload:
    """Object whose pickle asks the unpickler to call something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        function, *arguments = self.call
        return function, tuple(arguments)


# Good files ----------------------------------------------------------------------------------------


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Return files of each kind to begin with; some are hostile already."""
    model = small()
    found: dict[str, list[bytes]] = {"pt": []}

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    for content in (model, {"state_dict": model.state_dict(), "epoch": 3}):
        found["pt"] += [saved(content), saved(content, _use_new_zipfile_serialization=False)]
    for payload in (
        Payload(os.system, "touch pwned"), Payload(eval, "open('pwned', 'w')"), Payload(print, "ran"),
        Payload(__import__, "antigravity"), Payload(nn.Conv2d, 30_000, 30_000, 3),
        Payload(bytearray, 9 * 10**9), Payload(partial, bytearray, 9 * 10**9), doubled(40),
    ):  # fmt: skip
        found["pt"] += [saved({"weight": payload}), pickle.dumps(payload)]
    repeating = nn.Sequential(nn.Conv2d(3, 4, 3))
    repeating[0].weight = nn.Parameter(torch.zeros(1).expand(20_000, 20_000, 3, 3))
    found["pt"].append(saved(repeating))
    save_file(model.state_dict(), folder / "m.safetensors")
    found["safetensors"] = [(folder / "m.safetensors").read_bytes()]
    save_archive(export_program(model, (IMAGE,)), folder / "m.pt2")
    found["pt2"] = [(folder / "m.pt2").read_bytes()]
    save_onnx(export_program(model, (IMAGE,)), folder / "m.onnx")
    found["onnx"] = [(folder / "m.onnx").read_bytes()]
    found["plan"] = [(converted() / "plan.json").read_bytes()]
    report = json.loads((converted() / "report.json").read_bytes())
    profile = {"schema": "sepconvert.profile/1", "model": {"path": "m", "sha256": "0"}, "environment": {}}
    found["profile"] = [json.dumps({**profile, **report["original"]}).encode()]
    rng = np.random.default_rng(0)
    arrays = {"x": rng.integers(0, 255, (4, 6, 6, 3), dtype=np.uint8), "y": np.arange(4)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    found["npz"] = [buffer.getvalue()]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=arrays["x"].transpose(0, 3, 1, 2).astype(np.float32), y=arrays["y"])
    found["npz"] += [buffer.getvalue(), bomb(), hostile_npz(), huge_npz()]
    for y in (arrays["x"][..., 0], arrays["x"], arrays["x"] / 255, np.array(["a", "bc", "", "d"])):
        buffer = io.BytesIO()
        np.savez(buffer, x=arrays["x"], y=y)
        found["npz"].append(buffer.getvalue())
    found["target"] = []
    for mode in ("P", "L", "RGB", "1"):
        buffer = io.BytesIO()
        Image.fromarray(arrays["x"][0]).convert(mode).save(buffer, "PNG")
        found["target"].append(buffer.getvalue())
    found["image"] = []
    for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(arrays["x"][0]).save(buffer, form)
        found["image"].append(buffer.getvalue())
    found["image"].append(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n%%EOF\n"
    )
    return found


def doubled(times: int) -> tuple[Any, ...]:
    """Return a tuple that holds one tuple twice, and so on: a few bytes that are walked for ever."""
    found: tuple[Any, ...] = ()
    for _ in range(times):
        found = (found, found)
    return found


def bomb() -> bytes:
    """Return an archive of some kilobytes that unpacks to gigabytes."""
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3000, 1000, 1000, 3), }"
    text += b" " * (118 - len(text) - 1) + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as member:
            member.write(header + struct.pack("<H", len(text)) + text)
            for _ in range(64):
                member.write(bytes(2**20))
        archive.writestr("y.npy", b"")
    return buffer.getvalue()


def hostile_npz() -> bytes:
    """Return an archive with arrays of pickled objects."""
    buffer = io.BytesIO()
    objects = np.array([Payload(os.system, "touch pwned")] * 4, dtype=object)
    np.savez(buffer, x=objects, y=objects)
    return buffer.getvalue()


def huge_npz() -> bytes:
    """Return an archive whose header claims more than any memory holds."""
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (900000000000, 1000, 1000, 3), }"
    text += b" " * (118 - len(text) - 1) + b"\n"
    content = np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("y.npy", content)
    return buffer.getvalue()


# Mutations -----------------------------------------------------------------------------------------


def mutated(kind: str, content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Mutate a file: its content, if it has a structure, or its bytes."""
    if rng.random() < 0.02:
        return content
    if kind in ("plan", "profile") and rng.random() < 0.8:
        document = json.loads(content)
        for _ in range(rng.randint(1, 3)):
            document = mutated_json(document, rng)
        # Mostly with a valid checksum, so that the code behind the check is reached.
        if kind == "plan" and isinstance(document, dict) and rng.random() < 0.8:
            document = sealed(document)
        return json.dumps(document).encode()
    if content.startswith(b"PK") and rng.random() < 0.6:
        return mutated_archive(content, rng)
    return mutated_bytes(content, others, rng)


def mutated_bytes(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = rng.randbytes(size)
        elif kind == 4:
            data[place : place + size] = rng.choice((b"\xff", b"\x00", b"\x7f")) * size
        elif kind == 5:
            data[place:place] = data[place : place + size]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[place : place + size] = other[start : start + size]
    return bytes(data)


def mutated_archive(content: bytes, rng: random.Random) -> bytes:
    """Mutate one member of an archive with valid checksums, so that the code behind the check is reached."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as copy:
        members = archive.namelist()
        chosen = rng.choice(members)
        for name in members:
            data = archive.read(name) if archive.getinfo(name).file_size < 2**26 else b""
            if name == chosen:
                action = rng.randrange(5)
                if action == 0:
                    continue
                if action == 1:
                    name = rng.choice(("../../pwned", "/pwned", "x" * 300, name + "\x01", "archive/../pwned"))
                elif name.endswith(".json") and rng.random() < 0.7:
                    data = json.dumps(mutated_json(json.loads(data), rng)).encode()
                else:
                    data = mutated_bytes(data, [data or b"\0"], rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copy.writestr(name, data)
    return buffer.getvalue()


_STRANGE = (None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, -0.0, "", "x" * 5000, "../../pwned",
            "__import__('os')", "torch.ops.aten.from_file", [], {}, [[]], "\x00", [1] * 1000)  # fmt: skip


def mutated_json(document: Any, rng: random.Random) -> Any:
    """Replace, remove or repeat one value somewhere in a document."""
    if isinstance(document, dict) and document and rng.random() < 0.9:
        key = rng.choice(list(document))
        changed = dict(document)
        if rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = mutated_json(changed[key], rng)
        return changed
    if isinstance(document, list) and document and rng.random() < 0.9:
        place = rng.randrange(len(document))
        return [
            *document[:place],
            mutated_json(document[place], rng),
            *document[place + rng.randrange(2) :],
        ]
    return rng.choice(_STRANGE)


# Readers -------------------------------------------------------------------------------------------


def _load(path: Path) -> None:
    load_model(path, factory=f"{__file__}:small" if zlib.crc32(path.read_bytes()) % 2 else None)


def _read_all(path: Path) -> None:
    # Half of the archives with targets of any form, which are read as masks, pictures, numbers or texts.
    kind = ("any", "pictures", "classes", None)[zlib.crc32(path.read_bytes()) % 4] if path.is_file() else None
    for labelled in (True, False):
        for _ in load_data(str(path), Preprocess(), labelled=labelled, kind=kind):
            pass


def _read_folder(path: Path) -> None:
    folder = path.parent / "images" / "class"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path.rename(folder / "image.png")
    _read_all(folder.parent)


def _read_target(path: Path) -> None:
    images, targets = path.parent / "pairs", path.parent / "targets"
    for folder in (images, targets):
        folder.mkdir(exist_ok=True)
    Image.new("RGB", (6, 6)).save(images / "image.png")
    kind = ("any", "pictures", "classes", None)[zlib.crc32(path.read_bytes()) % 4]
    path.rename(targets / "image.png")
    for _ in load_data(str(images), targets=str(targets), kind=kind):
        pass


@functools.cache
def conversion() -> tempfile.TemporaryDirectory[str]:
    """Convert the model once in each process; the files are the same in all of them."""
    folder = tempfile.TemporaryDirectory()
    sepconvert.convert(
        small(), IMAGE, gate="none", tol=0.9, timing=sepconvert.Timing(runs=0), out=folder.name
    )
    return folder


def converted() -> Path:
    return Path(conversion().name)


def _replay(path: Path) -> None:
    weights = path.with_name("converted.safetensors")
    if not weights.exists():
        shutil.copy(converted() / weights.name, weights)
    sepconvert.apply(small(), path)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pt": ("model.pt", _load),
    "safetensors": ("model.safetensors", _load),
    "pt2": ("model.pt2", _load),
    "onnx": ("model.onnx", read_onnx),
    "plan": ("plan.json", _replay),
    "profile": ("profile.json", read_profile),
    "npz": ("data.npz", _read_all),
    "image": ("image.png", _read_folder),
    "target": ("image.png", _read_target),
}


# Running -------------------------------------------------------------------------------------------


def outcome_of(reader: Callable[[Path], object], path: Path) -> str:
    """Return "read", "refused", or a description of an outcome that must not be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader(path)
    except SepconvertError as error:
        if len(str(error).splitlines()) > 2 or len(str(error)) > 3000:
            return f"a message of {len(str(error))} characters: {str(error)[:200]!r}"
        return "refused"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:120]!r} at {Path(last.filename).name}:{last.lineno}"
    return "read"


def work(folder: Path, kind: str, numbers: list[int], seed: int, state: Any) -> None:
    """Run cases one after another; `state` tells the parent which one, since when, and the outcomes."""
    os.chdir(folder)
    good = seeds(folder)
    watched = {"on": False, "found": ""}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watched["on"]:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        ours = event == "open" and str(arguments[0]).startswith((str(folder), tempfile.gettempdir()))
        if event in _FORBIDDEN or (writes and not ours):
            watched["found"] = f"{event} {arguments}"[:200]

    sys.addaudithook(hook)
    name, reader = READERS[kind]
    for number in numbers:
        rng = random.Random(f"{seed}/{kind}/{number}")  # noqa: S311
        content = mutated(kind, rng.choice(good[kind]), good[kind], rng)
        path = folder / name
        path.write_bytes(content)
        state["number"], state["since"] = number, time.monotonic()
        watched.update(on=True, found="")
        outcome = outcome_of(reader, path)
        watched["on"] = False
        if watched["found"] or (folder / "pwned").exists():
            outcome = f"it ran: {watched['found']}"
        state[number] = outcome, time.monotonic() - state["since"]
    state["number"] = None


def run(kind: str, cases: int, seed: int) -> dict[int, tuple[str, float]]:
    """Run all cases of a kind; return the outcome and the seconds of each, by number."""
    done: dict[int, tuple[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    while len(done) < cases:
        waiting = [number for number in range(cases) if number not in done]
        with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
            state = manager.dict(number=None, since=time.monotonic())
            process = context.Process(target=work, args=(Path(folder), kind, waiting, seed, state))
            process.start()
            ended = _watched(process, state)
            found = dict(state)
            done |= {key: value for key, value in found.items() if isinstance(key, int)}
            if found["number"] is not None and found["number"] not in done:
                done[found["number"]] = ended or f"ended the process ({process.exitcode})", SECONDS
            elif not done:
                raise RuntimeError(f"{kind}: the worker did not begin (exit code {process.exitcode})")
    return done


def _watched(process: Any, state: Any) -> str | None:
    """Wait for a process; kill it if a case takes too long or too much memory, and return which."""
    memory = None
    while process.is_alive():
        process.join(0.2)
        try:
            resident = psutil.Process(process.pid).memory_info().rss
        except psutil.Error:
            break
        if state["number"] is None:
            continue
        memory = memory or resident
        reason = None
        # On a busy machine a process gets its share of the cores only.
        busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        if time.monotonic() - state["since"] > SECONDS * busy:
            reason = f"took more than {SECONDS} s"
        elif resident - memory > BYTES:
            reason = f"took {(resident - memory) / 1e9:.1f} GB"
        if reason:
            process.kill()
            process.join()
            return reason
    process.join()
    return None


@click.command(help=__doc__)
@click.option("--cases", default=10_000, show_default=True, help="Of all kinds together.")
@click.option("--kind", type=click.Choice(list(READERS)), help="Only one.")
@click.option("--seed", default=0, show_default=True)
def main(cases: int, kind: str | None, seed: int) -> None:
    """Run all cases; exit with 1 if one has an outcome that must not be."""
    kinds = [kind] if kind else list(READERS)
    bad = 0
    for name in kinds:
        found = run(name, -(-cases // len(kinds)), seed)
        counts = Counter(outcome for outcome, _ in found.values())
        slowest = max(seconds for _, seconds in found.values())
        read, refused = (counts.pop(each, 0) for each in ("read", "refused"))
        print(
            f"{name}: {len(found)} cases, {read} read, {refused} refused, slowest {slowest:.1f} s", flush=True
        )
        for outcome, count in counts.most_common():
            number = next(number for number, (each, _) in found.items() if each == outcome)
            print(f"  {count}× (first {number}): {outcome}", flush=True)
        bad += sum(counts.values())
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
