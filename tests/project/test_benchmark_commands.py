"""Every command line of benchmarks/README.md runs, on small stand-ins for its data and networks."""

import gzip
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pages import BENCHMARKS, ROOT, blocks, exit_code, parsed

from sepconvert.cli import main as cli

sys.path.append(str(BENCHMARKS.parent))

pytestmark = pytest.mark.slow  # minutes, and of no part of the package

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FIT = ("--runs", "0", "--calib-images", "64", "--measure-seconds", "0")
# What makes them quick: of each program, by how its commands begin.
QUICKLY = {
    "benchmarks/growth.py": ("--images", "8", "--layers", "2", "--width", "16", "--memory", "5"),
    "benchmarks/stages.py run": FIT,
    "benchmarks/stages.py report": (),
    "benchmarks/startup.py": ("--times", "1"),
    "benchmarks/activations.py": (),
    "benchmarks/confidence.py": ("--repetitions", "2"),
    "benchmarks/cost_model.py": ("--runs", "1"),
    "benchmarks/divergences.py": ("--epochs", "1", "--plans", "3", "--case", "denoiser"),
    "benchmarks/zoo.py run": (
        "--results",
        "zoo.json",
        "squeezenet1_1",
        "--mode",
        "exact",
        "--mode",
        "approx",
    ),
    "benchmarks/zoo.py report": ("--results", "zoo.json"),
    "benchmarks/onnx_files.py export": ("--net", "crnn", "--opset", "13"),
    "benchmarks/onnx_files.py run": (),
    "benchmarks/onnx_files.py table": (),
    "benchmarks/real.py run": ("--results", "real"),
    "benchmarks/real.py report": ("--results", "real"),
    "tests/faults.py": ("full disk",),
    "tests/fuzz.py": ("--kind", "npz", "--cases", "8", "--seed", "3"),
    "benchmarks/compare_noise.py": ("--times", "1", "--runs", "3"),
    "benchmarks/fashion_mnist.py": ("--epochs", "1"),
    "benchmarks/peers.py convert results/fmnist": ("--tool", "fasterai spatial"),
    "benchmarks/peers.py convert results/resnet9": ("--tool", "plain SVD"),
    "benchmarks/peers.py convert results/resnet20": ("--tool", "tensorly-torch CP"),
    "benchmarks/peers.py time": ("--runs", "3"),
    "benchmarks/peers.py report": (),
    "sepconvert fmnist/fmnist.pt": (*FIT, "--exclude", "[34].*", "--exclude", "5.conv1"),
    "sepconvert resnet9.pt": FIT,
    "sepconvert resnet20.th": FIT,
}
PACKAGES = {"fasterai": "fasterai", "tensorly-torch": "tltorch", "plain": "sepconvert"}  # of peers
NETS = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

resnet9 = resnet20 = net
"""
CASE = """
[[case]]
name = "{name}"
model = "{folder}/resnet9.pt"
factory = "{folder}/nets.py:resnet9"
data = "{folder}/cifar10_val.npz"
metric = "top1"
options = ["--runs", "3"]
"""


# Installations are run by `.ci/run`.
BLOCKS = [
    rest
    for block in blocks(BENCHMARKS)
    if (rest := [words for words in block if words[:2] != ["pip", "install"]])
]
(ZOO,) = [block for block in BLOCKS if "benchmarks/zoo.py" in block[0]]
(ONNX_FILES,) = [block for block in BLOCKS if "benchmarks/onnx_files.py" in block[0]]
PLAIN = [block for block in BLOCKS if block is not ZOO and block is not ONNX_FILES]


def quickly(words: list[str]) -> tuple[str, ...]:
    """What `QUICKLY` holds for a command."""
    begins = " ".join(words[1:] if words[0] == "python" else words) + " "
    (found,) = [more for start, more in QUICKLY.items() if begins.startswith(f"{start} ")]
    return found


def call(words: list[str], more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command here, as its program would, with `more` options, when it has been read without them."""
    if words[0] == "python":
        _, *words = words
        module = importlib.import_module(Path(words[0]).stem)
        assert Path(module.__file__) == ROOT / words[0]
        main = module.cli if hasattr(module, "cli") else module.main
        parsed(main, words[1:])
    else:
        main = cli.cli
        parsed(main, ["convert", *words[1:]])
    monkeypatch.setattr(sys, "argv", [*words, *more])
    assert exit_code(main) == 0, words


def write_images(path: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x=x, y=random.integers(0, 10, count, dtype=np.uint8))


def write_onnx(path: Path) -> None:
    """Write a file whose sizes are open, with a kernel in an initializer and one in a Constant."""
    random = np.random.default_rng(3)
    first, second = (
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("first", (16, 3, 3, 3)), ("second", (16, 16, 5, 5)))
    )
    make = onnx.helper.make_node
    nodes = [
        make("Constant", [], ["second"], value=second), make("Conv", ["x", "first"], ["a"], strides=[2, 2]),
        make("Relu", ["a"], ["b"]), make("Conv", ["b", "pointwise"], ["c"]),
        make("Conv", ["c", "second"], ["y"]),
    ]  # fmt: skip
    point = onnx.numpy_helper.from_array(np.eye(16, dtype=np.float32)[..., None, None], "pointwise")
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [onnx.helper.make_tensor_value_info("x", floats, ["n", 3, "height", "width"])],
        [onnx.helper.make_tensor_value_info("y", floats, ["n", 16, "rows", "columns"])],
        [first, point],
    )
    path.parent.mkdir()
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands name."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS.parent / "fashion_mnist.py", tmp_path / "benchmarks")
    (tmp_path / "nets.py").write_text(NETS)
    namespace = {}
    exec(NETS, namespace)  # noqa: S102
    torch.manual_seed(0)
    for name in ("resnet9.pt", "resnet20.th"):
        torch.save(namespace["net"]().state_dict(), tmp_path / name)
    write_images(tmp_path / "cifar10_train.npz", 128, seed=0)
    write_images(tmp_path / "cifar10_val.npz", 64, seed=1)
    write_onnx(tmp_path / "models/tiny.onnx")
    for path in ("nets.toml", "benchmarks/real_nets.toml"):
        (tmp_path / path).write_text(CASE.format(name=Path(path).stem, folder=tmp_path))
    random = np.random.default_rng(2)
    (tmp_path / "fashion-mnist").mkdir()
    for prefix, count in (("train", 256), ("t10k", 64)):
        path = tmp_path / "fashion-mnist" / prefix
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(path.with_name(f"{prefix}-images-idx3-ubyte.gz"), images)
        write_idx(
            path.with_name(f"{prefix}-labels-idx1-ubyte.gz"), random.integers(0, 10, count, dtype=np.uint8)
        )
    return tmp_path


def stand_in(word: str, folder: Path) -> list[str]:
    """What a shell makes of a word, in a place where the data set is another."""
    if word == FASHION_MNIST:
        return [str(folder / "fashion-mnist")]
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def run(block: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands of a block, one after the other; none may fail."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for words in block:
        here = [each for word in words for each in stand_in(word, folder)]
        call(here, quickly(words), monkeypatch)


@pytest.mark.filterwarnings("default")  # what peers warn of is theirs
@pytest.mark.parametrize("block", PLAIN, ids=lambda block: " ".join(block[-1][:2]))
def test_commands_run(block, folder, monkeypatch, capsys):
    run(block, folder, monkeypatch)
    assert capsys.readouterr().out
    # Of ours, no plan of so small a network may be as fast as is asked for.
    points = [json.loads(path.read_text()) for path in (folder / "results").rglob("points/*.json")]
    installed = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None}
    peers = {each["tool"] for each in points if each["tool"].split()[0] in installed}
    assert peers <= {each["tool"] for each in points if "error" not in each}


def test_the_zoo_is_run_in_parts(folder, monkeypatch, capsys):
    """Results in the file are kept; the others are made, each in a process of its own, and judged."""
    kept = {
        "name": "torchvision squeezenet1_1", "family": "SqueezeNet", "mode": "approx", "outcome": "passed",
        "error": None, "seconds": 2.4, "peak_gb": 1.25, "converted": 3, "convolutions": 7, "macs_ratio": 1.5,
    }  # fmt: skip
    (folder / "zoo.json").write_text(json.dumps([kept]))
    run(ZOO, folder, monkeypatch)
    before, found = json.loads((folder / "zoo.json").read_text())
    assert before == kept
    assert (found["mode"], found["outcome"]) == ("exact", "passed")
    assert found["peak_gb"] > 0
    assert found["planted"] > 0
    assert found["not_found"] == []
    assert found["converted"] >= found["planted"]
    assert set(found["difference"]) == {"model", "ONNX", "pt2"}
    assert "| torchvision squeezenet1_1" in capsys.readouterr().out


def test_onnx_files_are_run_in_parts(folder, monkeypatch, capsys):
    """Every file is converted with planted kernels in a process of its own, once."""
    run(ONNX_FILES, folder, monkeypatch)
    found = json.loads((folder / "onnx.json").read_text())
    assert {each["name"]: each["error"] for each in found} == {"crnn-opset13": None, "tiny": None}
    for each in found:
        planted = each["planted"]
        assert planted["planted"] == planted["converted"] - each["own"]["converted"] > 0
        assert planted["missed"] == {}
        assert each["shapes"]
    assert found[-1]["guessed"] == {"x": [1, 3, 224, 224]}
    assert "| tiny " in capsys.readouterr().out
    run(ONNX_FILES[1:2], folder, monkeypatch)
    assert capsys.readouterr().out == ""
