"""README and documentation are correct: commands parse, commands and Python blocks run, quotes match."""

import ast
import doctest
import functools
import importlib
import io
import json
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pages
import pytest
import test_examples
import torch
from pages import BENCHMARKS, DOCS, FENCE, PAGES, ROOT, canonical, commands, fences, inline
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import squeezenet1_1

import sepconvert
from sepconvert.cli import main as cli
from sepconvert.cli.conditions import UNITS, Demand
from sepconvert.cli.options import in_flags
from sepconvert.files.sources import parse_input_shape

SHORT = ("--runs", "3")
NONE = ("--runs", "0")

FIT = (*NONE, "--calib-images", "32", "--measure-seconds", "0")

# Commands that run here, with options that make them quick. `prepared` runs the first two.
RUN: dict[str, tuple[str, ...]] = {
    "sepconvert model.pt --input-shape 3x224x224": NONE,
    "sepconvert checkpoint.pth --factory mynets.py:resnet20 --data val.npz --mean .485,.456,.406 "
    "--std .229,.224,.225": NONE,
    "sepconvert checkpoint.pth --factory mynets.py:resnet20 --input-shape 3x224x224": NONE,
    "sepconvert squeezenet.pth --factory torchvision.models:squeezenet1_1 --factory-args "
    "'{\"num_classes\": 10}' --input-shape 3x224x224": NONE,
    "sepconvert inspect torchvision:squeezenet1_1": (),
    "sepconvert resnet.pt --allow mynets.ResNet --input-shape 3x224x224": NONE,
    "sepconvert resnet.pt --trust --input-shape 3x224x224": NONE,
    "sepconvert model.pt --input-shape 3x224x224 --debug": NONE,
    "sepconvert model.pt --input-shape 3x224x224 --input-names images --output-names logits --opset 20": NONE,
    "sepconvert model.pt --input-shape 3x224x224 --dry-run": (),
    "sepconvert model.pt --input-shape 3x224x224 --gate latency --threads 1 --runs 200": SHORT,
    "sepconvert model.pt --mode auto --calib images/ --data val.npz --max-drop 1.0 --threads 1": FIT,
    "sepconvert model.pt --mode auto --calib images/ --min-speedup 1.5": FIT,
    "sepconvert model.pt --mode auto --calib images/ --data val.npz --max-drop 1.0 --reconstruct 60": (
        *FIT,
        "--reconstruct",
        "1",
    ),
    "sepconvert model.pt --mode auto --calib train.npz --data val.npz --max-drop 1.0 --confidence 0.95": FIT,
    "sepconvert model.pt --mode approx --calib images/ --data val.npz --max-drop 1.0": FIT,
    "sepconvert model.pt --mode approx --calib train.npz --data val.npz --rank 2 --finetune 5": FIT,
    "sepconvert model.pt --mode approx --calib train.npz --data val.npz --max-drop 0.5 "
    "--exclude 'layer1.*' --finetune 5": FIT,
    "accelerate launch -m sepconvert model.pt --mode approx --calib train.npz --data val.npz --rank 2 "
    "--finetune 5": FIT,
    "sepconvert inspect model.pt --input-shape 3x224x224": (),
    "sepconvert inspect checkpoint.pth --factory mynets.py:resnet20 --data val.npz": (),
    "sepconvert profile model.pt --input-shape 3x224x224 --threads 1": SHORT,
    "sepconvert profile converted.onnx --batches 1,8,32 --out converted.json": SHORT,
    "sepconvert profile model-sepconvert/converted.onnx --threads 1": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --threads 1": SHORT,
    "sepconvert compare original.onnx converted.onnx other.pt --data val.npz --fail-if 'latency > +5%' "
    "--fail-if 'drop > 0.5'": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --fail-if 'latency > +5%' "
    "--fail-if 'drop > 0.5'": SHORT,
    "sepconvert compare original.onnx converted.onnx --format html": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --format markdown": SHORT,
    "sepconvert compare original.onnx converted.onnx --trace trace.json": SHORT,
    "sepconvert profile converted.onnx --trace trace.json": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --threads 1 --baseline history.json "
    "--update-baseline": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --threads 1 --baseline history.json "
    "--fail-if 'latency > +5%' --fail-if 'drop > 0.5'": SHORT,
    "sepconvert compare converted.onnx --data val.npz --baseline history.json --fail-if 'drop > 0.5' "
    "--fail-if 'macs > 0%'": SHORT,
    "sepconvert model.pt --input-shape 3x224x224 --format markdown": NONE,
    "sepconvert --config model-sepconvert/run.toml": NONE,
    "sepconvert env": (),
    "sepconvert compare original.onnx converted.onnx --graph-optimization none": SHORT,
    "sepconvert compare original.onnx converted.onnx --data val.npz --metric mynets.py:certainty "
    "--fail-if 'drop > 0.02'": SHORT,
    "sepconvert apply model.pt model-sepconvert/plan.json --out replayed": (),
    "sepconvert model.pt --int8 --mode auto --calib images/ --data val.npz --max-drop 1.0 --threads 1": FIT,
    "sepconvert compare original-int8.onnx converted-int8.onnx --data val.npz": SHORT,
    "sepconvert model.pt --int8 --calib images/ --out int8": FIT,
    "sepconvert net.onnx": NONE,
    "sepconvert net.onnx --mode auto --calib images/ --data val.npz --max-drop 1.0 --threads 1": FIT,
    "sepconvert inspect net.onnx": (),
    "sepconvert apply net.onnx net-sepconvert/plan.json --out replayed": (),
    "sepconvert model.pt --mode auto --metric mynets.py:certainty --max-drop 0.02 --data val.npz "
    "--calib images/": FIT,
    "sepconvert unet.pth --factory mynets.py:unet --mode auto --metric miou --max-drop 1.0 --data scenes/ "
    "--targets masks/ --ignore-index 255 --calib images/ --threads 1": FIT,
    "sepconvert unet.pth --factory mynets.py:unet --mode auto --metric miou --max-drop 1.0 --data scenes.npz "
    "--calib images/": FIT,
    "sepconvert superres.pth --factory mynets.py:superres --mode auto --metric psnr --max-drop 0.1 "
    "--data pictures.npz --threads 1": FIT,
    "sepconvert superres.pth --factory mynets.py:superres255 --mode auto --metric psnr --max-drop 0.1 "
    "--data pictures.npz --postprocess mynets.py:to_unit": FIT,
    "sepconvert detector.pth --factory mynets.py:detector --mode auto --metric map --postprocess "
    "mynets.py:boxes --max-drop 1.0 --data mynets.py:scenes --calib images/ --threads 1": FIT,
}

# Commands that other tests run, on fewer images.
ELSEWHERE = {"sepconvert demo": "cli/demo/test_command.py::test_demo"}

_PROGRAM = r"(?:sepconvert|python3?|pip3?|accelerate|torchrun|pytest|sphinx-build|\S+\.(?:py|sh))"
# A line that is displayed as a command, or reads like one.
_COMMAND = re.compile(rf"(?: {{4,}}|\t)\s*\$?\s*{_PROGRAM}\s|\s*(?:\$\s*)?{_PROGRAM}\s+\S+\s+-")

# Commands within sentences, in which words in capitals and … are placeholders.
FORMS = {
    "sepconvert apply MODEL plan.json",
    "sepconvert profile MODEL",
    "sepconvert COMMAND --help",
    "accelerate launch -m sepconvert …",
}

# Guides whose Python blocks convert in auto mode.
OTHER_TASKS = {"segmentation", "super_resolution", "detection", "own_metric"}

FOREIGN = {"--keep-going", "--figure", "--no-deps"}  # options of other programs

MYNETS = """
import numpy as np
import torch
from collections import OrderedDict
from torch import nn
from torch.utils.data import DataLoader

def resnet20():
    torch.manual_seed(0)
    mix = nn.Conv2d(16, 16, 3, padding=1)
    vertical, horizontal = torch.randn(2, 16, 3), torch.randn(16, 2, 3)
    mix.weight.data = torch.einsum("rci,orj->ocij", vertical, horizontal) / 17
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 16, 7, stride=4, padding=3), bn1=nn.BatchNorm2d(16), relu=nn.ReLU(),
        layer1=nn.Sequential(OrderedDict(conv1=mix, relu=nn.ReLU(), conv2=nn.Conv2d(16, 16, 3, padding=1))),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, 10),
    )).eval()

class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = resnet20()

    def forward(self, x):
        return self.net(x)

def certainty(outputs, targets):
    return outputs.softmax(1).gather(1, targets[:, None])[:, 0]

def unet():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 5, 3, padding=1),
    ).eval()

def superres():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2), nn.Sigmoid(),
    ).eval()

class Times255(nn.Module):
    def forward(self, x):
        return 255 * x

def superres255():
    return superres().append(Times255())

def to_unit(outputs):
    return outputs / 255

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.scores, self.sides = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        features = self.stem(x).relu()
        return self.scores(features).sigmoid(), self.sides(features).exp()

def detector():
    return Detector().eval()

def boxes(outputs):
    scores, sides = outputs
    rows, columns = torch.meshgrid(*(4 * torch.arange(n) + 2.0 for n in scores.shape[2:]), indexing="ij")
    centres = torch.stack([columns, rows])
    corners = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1).flatten(2).mT
    best, labels = scores.flatten(2).max(1)
    return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(corners, best, labels)]

def scenes():
    x = torch.from_numpy(np.load("val.npz")["x"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = boxes(detector()(x))
    y = [{"boxes": each["boxes"][::9], "labels": each["labels"][::9]} for each in found]
    return DataLoader(list(zip(x, y)), 16, collate_fn=side_by_side)

def side_by_side(batch):
    x, y = zip(*batch)
    return torch.stack(x), list(y)
"""


ALL = {shlex.join(words): words for page in PAGES for words in commands(page)}
OURS = [text for text, words in ALL.items() if "sepconvert" in words[:4]]


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the options of a sepconvert command as the real command line reads them, or raise its error."""
    arguments = words[words.index("sepconvert") + 1 :]
    options = pages.parsed(
        cli.cli, arguments if arguments[0] in cli.cli.commands else ["convert", *arguments]
    )
    for condition in options.get("fail_if", ()):
        Demand.parse(condition)
    if options.get("input_shape"):
        parse_input_shape(options["input_shape"])
    return options


# Shell --------------------------------------------------------------------------------------------


def test_every_command_of_ours_is_run():
    assert set(OURS) == {canonical(text) for text in (*RUN, *ELSEWHERE)}


@pytest.mark.parametrize("text", OURS)
def test_command_lines_parse(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in pairwise(ALL[text]):
        if name == "--config":  # which another command has written
            Path(value).parent.mkdir()
            Path(value).write_text('model = "model.pt"')
    parsed(ALL[text])


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_other_tests_are_there(test):
    file, name = test.split("::")
    assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_is_tested(page):
    """Blocks of other kinds contain no commands, or are generated from code."""
    text = page.read_text(encoding="utf-8")
    assert not [line for line in FENCE.sub("", text).splitlines() if _COMMAND.match(line)]
    assert not re.search(rf"^\s*\$|^\s*{_PROGRAM}\s", "\n".join(fences(page, "text")), re.MULTILINE)
    assert not [body for body in fences(page, "{eval-rst}") if "code" in body or "::\n" in body]
    # No other fences, quoted or unclosed ones, and no HTML blocks.
    assert not re.search(r"~~~|````|^ *>\s*```|<(pre|code)\b", text, re.MULTILINE)
    assert "```" not in FENCE.sub("", text)
    infos = [info for _, info, _ in FENCE.findall(text)]
    found = {info if info.startswith("sh") else info.partition(" ")[0] for info in infos}
    assert found <= {"sh", "python", "text", "{include}", "{literalinclude}", "{toctree}", "{eval-rst}"}


def test_other_commands_are_run():
    """Other programs are run by `.ci/run`, more quietly and with all tests, or are examples."""
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    ci = {
        canonical(re.sub(r" (--quiet|-q|-m \S+)(?= |$)", "", line))
        for line in lines
        if line.startswith(("pip ", "pytest", "sphinx-build "))
    }
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installations = {shlex.join(words): words for words in commands(BENCHMARKS) if words[0] == "pip"}
    for text, words in (ALL | installations).items():
        if text in OURS:
            continue
        if words[0] == "python":
            name = Path(words[1]).name
            assert words[1] == f"examples/{name}"
            arguments = test_examples.ARGUMENTS.get(name, [])
            assert shlex.join(words[2:]) in shlex.join(arguments), text
        else:
            assert text in ci, text
            # pip does not fail if an extra is missing.
            named = re.findall(r"\[(\w+)\]", text)
            assert all(f"\n{extra} = [" in extras for extra in named), text


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_stand_in_a_block_too(page):
    """Commands in blocks are tested to run; forms of commands and names are exempt."""
    known = {*ALL, *(shlex.join(each) for each in commands(BENCHMARKS))}
    known |= {f"sepconvert {name}" for name in cli.cli.commands} | FORMS
    commands_of_ours = "|".join(cli.cli.commands)
    for text in inline(page):
        if re.match(rf"\$?\s*({_PROGRAM}|git|apt|apt-get|{commands_of_ours})\s", text):
            assert text in FORMS or canonical(text) in known, text


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_options_within_sentences_have_values_that_they_take(page):
    """`--gate latency`, for instance; words in capitals are placeholders."""
    for text in inline(page):
        name, *values = text.replace("=", " ", 1).split()
        if name.startswith("--") and values and not all(value.isupper() for value in values):
            owners = [
                each for each in cli.cli.commands.values() if name in {o for p in each.params for o in p.opts}
            ]
            assert owners, text
            required = [parameter.name for parameter in owners[0].params if parameter.required]
            parsed(["sepconvert", owners[0].name, *required, *shlex.split(text)])


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_every_block_is_of_a_kind_that_is_tested, "```console\n$ sepconvert model.pt\n```\n"),
        (test_commands_within_sentences_stand_in_a_block_too, "Run `sepconvert my.pt --mode AUTO`.\n"),
        (test_options_within_sentences_have_values_that_they_take, "Pass `--gate speed`.\n"),
    ],
    ids=["block", "command", "option"],
)
def test_these_checks_can_fail(tmp_path, check, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((AssertionError, click.UsageError)):
        check(tmp_path / "page.md")


@pytest.mark.parametrize("name", test_examples.SAYS)
def test_commands_of_examples(name):
    """An example's docstring shows its own command, with options that the tests use, and other commands."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / name).read_text(encoding="utf-8")))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    own, *others = [line for line in lines if line.startswith(("python ", "sepconvert "))]
    words = own.replace("[", "").replace("]", "").split()
    assert words[:2] == ["python", f"examples/{name}"]
    named = {word for word in words if word.startswith("-")}
    assert named == {word for word in test_examples.ARGUMENTS.get(name, ()) if word.startswith("-")}
    assert {canonical(line) for line in others} <= {*ALL}


def test_options_that_are_named_exist():
    options = [option for command in cli.cli.commands.values() for option in command.params]
    ours = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    scripts = [*BENCHMARKS.parent.glob("*.py"), ROOT / "tests/fuzz.py"]
    theirs = {
        name for path in scripts for name in re.findall(r'"(--[a-z0-9-]+)"', path.read_text(encoding="utf-8"))
    }
    for page in [*PAGES, BENCHMARKS]:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text(encoding="utf-8")))
        known = ours | (theirs if page == BENCHMARKS else set())
        assert named <= known | FOREIGN | {"--help"}, page


def test_conditions_are_explained():
    text = (DOCS / "howto/measure.md").read_text(encoding="utf-8")
    assert all(f"`{metric}`" in text for metric in UNITS)
    for condition in re.findall(r"`'([^'`]+)'`", text):
        Demand.parse(condition)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Return a folder with the files that the commands name and the results of the first two commands."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "mynets.py").write_text(MYNETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        mynets = importlib.import_module("mynets")
        torch.save(mynets.ResNet(), folder / "resnet.pt")
        del sys.modules["mynets"]
    model = mynets.resnet20()
    torch.save(model, folder / "model.pt")
    torch.save(model, folder / "other.pt")
    torch.save(model.state_dict(), folder / "checkpoint.pth")
    torch.save(squeezenet1_1(num_classes=10).state_dict(), folder / "squeezenet.pth")
    random = np.random.default_rng(0)
    for name, count in (("val", 64), ("train", 128)):
        x = random.integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
        with torch.no_grad():
            y = model(torch.from_numpy(x).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
        np.savez(folder / f"{name}.npz", x=x, y=y)
    (folder / "images").mkdir()
    for index, image in enumerate(x[:64]):
        Image.fromarray(image).save(folder / f"images/{index}.png")
    prepare_tasks(folder, mynets)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        for text in list(RUN)[:2]:
            call(text, *RUN[text])
        for name in ("original", "converted"):
            shutil.copy(folder / f"checkpoint-sepconvert/{name}.onnx", folder)
        call(next(text for text in RUN if "--update-baseline" in text), *SHORT)
        shutil.copy("original.onnx", "net.onnx")
        call("sepconvert net.onnx", *RUN["sepconvert net.onnx"])
        call("sepconvert model.pt --int8 --calib images/ --out int8", *FIT)
        for name in ("original-int8", "converted-int8"):
            shutil.copy(folder / f"int8/{name}.onnx", folder)
    return folder


def prepare_tasks(folder: Path, mynets: ModuleType) -> None:
    """Write networks of other tasks, and data that they are right on, up to some noise."""
    for name in ("unet", "superres", "detector"):
        torch.save(getattr(mynets, name)().state_dict(), folder / f"{name}.pth")
    x = np.load(folder / "val.npz")["x"]
    images = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        masks = mynets.unet()(images).argmax(1).byte().numpy()
        pictures = (255 * mynets.superres()(images)).round().byte().permute(0, 2, 3, 1).numpy()
    masks[:, 0] = 4
    np.savez(folder / "scenes.npz", x=x, y=masks)
    np.savez(folder / "pictures.npz", x=x, y=pictures ^ 7)
    masks[:, :, 0] = 255
    for part, arrays in (("scenes", x), ("masks", masks)):
        (folder / part).mkdir()
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f"{part}/{index}.png")


def call(text: str, *more: str) -> None:
    """Run a command in this process, or by its launcher."""
    launcher, *words = ALL[canonical(text)]
    if launcher == "sepconvert":
        cli.cli.main([*words, *more], prog_name="sepconvert", standalone_mode=False)
    else:
        command = [Path(sys.executable).with_name(launcher), *words, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr
        print(done.stdout)


QUICK = tuple(f"sepconvert {name}" for name in ("inspect", "compare", "apply", "env"))


@pytest.mark.parametrize(
    "text",
    [
        # Conversions and launchers take long.
        pytest.param(text, marks=[pytest.mark.slow] * (not text.startswith(QUICK)))
        for text in list(RUN)[2:]
    ],
)
def test_commands_run(prepared, monkeypatch, capsys, text):
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = parsed(ALL[canonical(text)])
    force = ("--force",) if "force" in options else ()
    out = () if options.get("out") or not force else ("--out", "again")
    try:
        call(text, *RUN[text], *force, *out)
    except sepconvert.DemandNotMetError as error:
        # Three runs of such a small network may find either model slower: both outcomes are legitimate.
        demands = {"--fail-if", "--min-speedup", "--gate", "--confidence"}
        assert demands & set(text.split())
        print(error)
    assert capsys.readouterr().out


def test_the_first_command_leaves_what_is_promised(prepared):
    promised = set()
    for line in (DOCS / "quickstart.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            promised |= set(re.findall(r"`([\w.]+)`", line.split("|")[1]))
    assert {path.name for path in (prepared / "model-sepconvert").iterdir()} == promised
    report = json.loads((prepared / "model-sepconvert/report.json").read_text(encoding="utf-8"))
    assert {each["name"]: each["decision"] for each in report["layers"]} == {
        "conv1": "kept",
        "layer1.conv1": "converted",
        "layer1.conv2": "kept",
    }


# Python -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_convert() -> Callable[..., Any]:
    """Return `sepconvert.convert` with less to do; pages with the same call share the result."""
    known: dict[tuple[Any, ...], Any] = {}
    quick = {
        "timing": sepconvert.Timing(runs=3, measure_seconds=0.0, threads=1),
        "calibration": sepconvert.Calibration(images=32),
    }

    @functools.wraps(sepconvert.convert)
    def convert(*arguments: Any, **options: Any) -> Any:
        mode = options.pop("mode", arguments[2] if len(arguments) > 2 else "exact")
        key = (id(arguments[0]), mode, repr(options.get("metric")), *sorted(options.keys() - quick.keys()))
        if key not in known:
            # Counted, not timed in three runs, which other work may disturb.
            gate = {} if "int8" in options else {"gate": "macs"}
            known[key] = original(*arguments[:2], mode=mode, **{**gate, **options, **quick})
        return known[key]

    original = sepconvert.convert
    return convert


@pytest.fixture(scope="module")
def quick_profile() -> Callable[..., Any]:
    """Return `sepconvert.profile`, run once for each model."""
    known: dict[int, Any] = {}

    @functools.wraps(sepconvert.profile)
    def profile(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if id(model) not in known:
            timing = sepconvert.Timing(runs=3, threads=1)
            known[id(model)] = original(model, *arguments, **{**options, "timing": timing})
        return known[id(model)]

    original = sepconvert.profile
    return profile


@pytest.fixture(scope="module")
def stand_ins(quick_convert, quick_profile) -> dict[str, Callable[..., Any]]:
    """Return quick versions of the package's slow functions."""
    return {"convert": quick_convert, "profile": quick_profile}


@pytest.fixture(scope="module")
def names(prepared) -> dict[str, Any]:
    """Return the names that the Python blocks assume."""
    model = torch.load(prepared / "model.pt", weights_only=False)
    x = torch.rand(96, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    parts = (slice(0, 48), slice(48, 72), slice(72, 96))
    loader, heldout, labelled = (DataLoader(TensorDataset(x[p], y[p]), batch_size=24) for p in parts)
    files = {name: np.load(prepared / f"{name}.npz") for name in ("scenes", "pictures")}
    images = torch.from_numpy(files["scenes"]["x"]).permute(0, 3, 1, 2) / 255
    masks = torch.from_numpy(files["scenes"]["y"]).long()
    wanted = torch.from_numpy(files["pictures"]["y"]).permute(0, 3, 1, 2) / 255
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        mynets = runpy.run_path("mynets.py")
        boxed = mynets["scenes"]()
    return {
        "model": model, "example_inputs": x[:1], "loader": loader, "train": loader, "heldout": heldout,
        "labelled": labelled, "x": images, "small": images, "boxed": boxed, "boxes": mynets["boxes"],
        "scenes": DataLoader(TensorDataset(images, masks), batch_size=24),
        "pictures": DataLoader(TensorDataset(images, wanted), batch_size=24),
        **{name: mynets[name]() for name in ("unet", "superres", "detector")},
    }  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow)
        if page.stem in {"README", "approximate", "continue", *OTHER_TASKS}
        else page
        for page in PAGES
        if fences(page, "python")
    ],
    ids=lambda page: page.stem,
)
def test_python_blocks_run(prepared, names, stand_ins, monkeypatch, page):
    monkeypatch.chdir(prepared)
    for name, function in stand_ins.items():
        monkeypatch.setitem(vars(sepconvert), name, function)
    names = {**names, "converted": names["model"]}
    for block in fences(page, "python"):
        exec(compile(block, str(page), "exec"), names)  # noqa: S102


def test_docstring_examples():
    """All docstring examples pass, and every main function has one."""
    tests = [
        test
        for module in pkgutil.walk_packages(sepconvert.__path__, "sepconvert.")
        if not module.name.endswith("__main__")
        for test in doctest.DocTestFinder().find(importlib.import_module(module.name))
        if test.examples
    ]
    assert {"convert", "inspect", "profile", "compare"} <= {test.name.rpartition(".")[2] for test in tests}
    for test in tests:
        said = io.StringIO()
        assert doctest.DocTestRunner().run(test, out=said.write).failed == 0, said.getvalue()


# Pages --------------------------------------------------------------------------------------------


def test_no_page_repeats_another():
    """Outside of code: a page links to what another one says. Rows of tables may be alike."""
    length, pages_with = 16, dict[tuple[str, ...], Path]()
    for page in [*PAGES, BENCHMARKS]:
        prose = FENCE.sub("\n\n", page.read_text(encoding="utf-8"))
        for paragraph in re.split(r"\n\n|\n(?=\||- |\d\. )", prose):
            words = [word.lower() for word in re.findall(r"[\w×%.,-]+", paragraph)]
            for start in range(len(words) - length + 1):
                run = tuple(words[start : start + length])
                assert pages_with.setdefault(run, page) == page, f"{page}: {' '.join(run)}"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert {*re.findall(r":: sepconvert\.(\w+)$", text, re.MULTILINE)} == {*sepconvert._PUBLIC}


def test_every_command_is_in_the_reference():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r":commands: (.*)", text)
    assert {*listed.split(", ")} == {*cli.cli.commands}


def test_every_example_is_shown():
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    shown = re.findall(r"{literalinclude} \.\./examples/(\S+)", text)
    run = [Path(words[1]).name for words in commands(DOCS / "examples.md") if words[0] == "python"]
    assert sorted(shown) == sorted(run) == sorted(test_examples.SAYS)


def messages() -> Iterator[str]:
    """Yield every text in the package as the command line shows it, with … for values that are filled in."""
    for text in texts():
        yield in_flags(text)


def texts() -> Iterator[str]:
    """Yield every string in the package, with … for values that are filled in."""
    for path in (ROOT / "sepconvert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_quoted_as_they_are():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> `(.+)`$", text, re.MULTILINE)
    quoted += re.findall(r"^\| `([^`]+)` \|", text.partition("## Other messages")[2], re.MULTILINE)
    assert len(quoted) > 8
    said = list(messages())
    for message in quoted:
        parts = [part.strip() for part in message.removeprefix("model.pt: ").split("…")]
        pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
        assert any(pattern.search(each) for each in said), message
