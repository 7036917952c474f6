import os

# Before torch is loaded. On processors with AMX, oneDNN's bfloat16 convolutions of a stride larger than the
# kernel are wrong (oneDNN pull request 5568).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

# Two workers on two cores: a thread for each, also for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import importlib
import pickle
import shutil
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import CODE, Evil, Outcome, network, start
from hypothesis import settings
from strategies import plant
from torch import nn

from sepconvert.cli import main as cli
from sepconvert.cli import progress
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import to_input
from sepconvert.factorize.exact.analysis import analyse
from sepconvert.factorize.exact.factors import factorize
from sepconvert.network.obstacles import Obstacles
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.trace import traced

# The same examples in every run. `.ci/run` takes the profile thorough, and `HYPOTHESIS_PROFILE=ci pytest -m
# hypothesis` tries ten times as many.
settings.register_profile("default", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=50)
settings.register_profile("ci", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def exporter_of_one_table():
    """The exporter's table of operators, built once; torch builds it anew for each file, in half a second."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
            once = staticmethod(functools.cache(registry.from_torchlib))
            patch.setattr(registry, "from_torchlib", once)
        except (ImportError, AttributeError):
            pass  # a torch whose exporter is made otherwise
        yield


@pytest.fixture(scope="session")
def planted():
    """A convolution whose kernel is a sum of `rank` vertical-then-horizontal pairs, made by numpy."""

    def conv(in_channels, out_channels, kernel_size=3, *, rank=2, seed=0, groups=1, **options):
        module = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, **options)
        axes = {
            "g": groups,
            "o": out_channels // groups,
            "c": in_channels // groups,
            "i": kernel_size,
            "j": kernel_size,
        }
        weight = plant("spatial-vh", axes, rank, np.random.default_rng(seed))
        module.weight.data = torch.from_numpy(weight / np.sqrt(weight[0].size)).float()
        return module

    return conv


@pytest.fixture(scope="session")
def samples():
    """Images of the demonstration's network and their labels: N × 1 × 28 × 28 and N."""
    images = evaluation_data()
    return to_input(images.x), torch.from_numpy(images.y)


@pytest.fixture(scope="session")
def binomial():
    """The 5×5 kernel of Gauss's filter with integers: rank 1. `channels` × 1 × 5 × 5."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return lambda channels: torch.outer(line, line).repeat(channels, 1, 1, 1)


@pytest.fixture(scope="session")
def separated():
    """Converts all that separates and can be rewritten, without export. Returns model, names, obstacles."""

    def convert(model, *inputs):
        found = traced(model, inputs)
        replacements, obstacles, in_the_way = {}, {}, Obstacles(found)
        for site in found.sites:
            if site.obstacle is not None:
                obstacles[site.name] = site.obstacle
                continue
            analysis = analyse(site.conv.spec, site.conv.weight, site.sizes)
            if not analysis.holding():
                continue
            obstacle = in_the_way.of(site)
            if obstacle is not None:
                obstacles[site.name] = obstacle
                continue
            factors = factorize(analysis, analysis.holding()[0], site.conv.weight)
            replacements[site.name] = Replacement(
                factors.scheme, factors.rank, factors.border, factors.weights, site.conv.bias
            )
        return rewrite(found, replacements), set(replacements), obstacles

    return convert


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Models and data, good and bad, by name."""
    folder = tmp_path_factory.mktemp("files")
    model = network()
    torch.save(model, folder / "net.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), folder / "linear.pt")
    stem = nn.Conv2d(3, 8, 5, padding=2)
    torch.save(nn.Sequential(OrderedDict({**model._modules, "stem": stem})), folder / "wider.pt")
    mix = nn.Conv2d(8, 8, 5, padding=2)
    torch.save(nn.Sequential(OrderedDict({**model._modules, "mix": mix})), folder / "other.pt")
    torch.save(Evil(), folder / "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (folder / "truncated.pt").write_bytes((folder / "net.pt").read_bytes()[:2000])
    (folder / "text.pt").write_text("not a model\nat all\n")
    (folder / "empty.pt").touch()
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "no model")

    (folder / "cli_test_code.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        scaled = importlib.import_module("cli_test_code").Scaled().eval()
        torch.save(scaled, folder / "scaled.pt")
        torch.save(scaled.state_dict(), folder / "scaled-weights.pt")
    del sys.modules["cli_test_code"]

    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 3, 8, 8)).astype(np.float32), random.integers(0, 4, 20)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "channels.npz", x=x[:, :2], y=y)
    np.savez(folder / "labels.npz", x=x, y=y + 1)
    np.savez(folder / "none.npz", x=x[:0], y=y[:0])
    np.savez(folder / "unlabelled.npz", x=x)
    np.savez(folder / "images.npz", x=random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), y=y)
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """A working directory with a copy of all files."""
    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(capsys, monkeypatch):
    """`sepconvert` with arguments, in this process."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    # A slow machine would print more lines of progress than a fast one.
    monkeypatch.setattr(progress, "_LINE_EVERY", 1e6)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sepconvert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    yield call
    sys.modules.pop("cli_test_code", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def converted(files, tmp_path_factory) -> SimpleNamespace:
    """A conversion in its own process, as a program would call it."""
    folder, begun = tmp_path_factory.mktemp("converted"), time.perf_counter()
    process = start(
        files / "net.pt", "--data", files / "data.npz", "--runs", "3", "--out", folder / "out", "--json",
        "--quiet",
        preexec_fn=lambda: os.umask(0o027),
    )  # fmt: skip
    out, err = process.communicate()
    return SimpleNamespace(
        code=process.returncode, out=out.decode(), err=err.decode(), folder=folder / "out",
        seconds=time.perf_counter() - begun,
    )  # fmt: skip
