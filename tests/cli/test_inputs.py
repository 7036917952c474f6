"""What commands read, good and bad: models, data, factories, loaders."""

import inspect
import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import SHAPE, Outcome, listing
from data_files import folder_of, palette
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.cli.inputs import (
    arranged,
    read_data_and_examples,
    read_data_and_inputs,
    read_images,
    with_normalisation,
)
from sepconvert.files.models.libraries import Normalisation
from sepconvert.files.models.loading import LoadedModel
from sepconvert.files.onnx.facts import OnnxFile


def test_weights_of_another_precision_are_told_of(here, run):
    weights = torch.load("scaled-weights.pt")
    torch.save({name: value.half() for name, value in weights.items()}, "half.pt")
    arguments = (*SHAPE, "--factory", "cli_test_code.py:build")
    assert "float16 weights, in the float32 model" in run("inspect", "half.pt", *arguments).err
    assert "float" not in run("inspect", "scaled-weights.pt", *arguments).err


def test_extra_keys_of_a_checkpoint_are_left_out_by_the_option_that_the_error_names(here, run):
    weights = torch.load("scaled-weights.pt")
    torch.save({**weights, "head.weight": torch.ones(2), "head.bias": torch.ones(2)}, "extra.pt")
    arguments = ("inspect", "extra.pt", *SHAPE, "--factory", "cli_test_code.py:build")
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    (option,) = re.findall(r"--ignore-extra-keys \S+$", outcome.err.rstrip())
    assert option == "--ignore-extra-keys 'head.*'"
    outcome = run(*arguments, *shlex.split(option))
    assert outcome.code == 0
    told = "sepconvert: extra.pt: 2 keys are left out (--ignore-extra-keys): head.weight, head.bias\n"
    assert told in outcome.err


CONVERSIONS = {
    "missing file": ("nope.pt", *SHAPE),
    "directory": (".", *SHAPE),
    "truncated": ("truncated.pt", *SHAPE),
    "text": ("text.pt", *SHAPE),
    "empty": ("empty.pt", *SHAPE),
    "zip": ("zip.pt", *SHAPE),
    "evil": ("evil.pt", *SHAPE),
    "evil pickle": ("evil.pkl", *SHAPE),
    "evil, allowed": ("evil.pt", *SHAPE, "--allow", "posix.system"),
    "no factory": ("weights.pt", *SHAPE),
    "factory raises": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:fail"),
    "factory is missing": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:nothing"),
    "factory file is missing": ("weights.pt", *SHAPE, "--factory", "nothing.py:build"),
    "factory module is missing": ("weights.pt", *SHAPE, "--factory", "nothing.here:build"),
    "factory makes a number": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:number"),
    "factory of another model": ("weights.pt", *SHAPE, "--factory", "cli_test_code.py:build"),
    "extra keys without a factory": ("net.pt", *SHAPE, "--ignore-extra-keys", "*"),
    "a name without weights": ("net", *SHAPE, "--factory", "cli_test_code.py:build"),
    "another name without weights": ("a-net", *SHAPE, "--factory", "cli_test_code.py:build"),
    "factory is no name": ("weights.pt", *SHAPE, "--factory", "build"),
    "wrong channels": ("net.pt", "--input-shape", "4x8x8"),
    "wrong rank": ("net.pt", "--input-shape", "8"),
    "bad shape": ("net.pt", "--input-shape", "3xx8"),
    "zero shape": ("net.pt", "--input-shape", "3x0x8"),
    "huge shape": ("net.pt", "--input-shape", "3x99999999x99999999"),
    "no shape": ("net.pt",),
    "data with wrong channels": ("net.pt", "--data", "channels.npz"),
    "data of another shape": ("net.pt", *SHAPE, "--data", "channels.npz"),
    "no data": ("net.pt", "--data", "none.npz"),
    "data without y": ("net.pt", "--data", "unlabelled.npz"),
    "data that are missing": ("net.pt", "--data", "nope.npz"),
    "data that are no data": ("net.pt", "--data", "text.pt"),
    "batch above the data": ("net.pt", "--data", "data.npz", "--batch", "21"),
    "mean of two": ("net.pt", "--data", "images.npz", "--mean", "0.5,0.5"),
    "mean of words": ("net.pt", "--data", "images.npz", "--mean", "a,b,c"),
    "std of zero": ("net.pt", "--data", "images.npz", "--std", "0,0,0"),
    "mean for floats": ("net.pt", "--data", "data.npz", "--mean", "0.5,0.5,0.5"),
    "mean without data": ("net.pt", *SHAPE, "--mean", "0.5,0.5,0.5"),
    "targets without data": ("net.pt", *SHAPE, "--targets", "masks"),
    "targets for an archive": ("net.pt", "--data", "data.npz", "--targets", "masks"),
    "targets that are missing": ("net.pt", "--data", ".", "--targets", "masks"),
    "targets of nothing": ("net.pt", "--data", ".", "--targets", "."),
    "a metric of other targets": ("net.pt", "--data", "data.npz", "--metric", "psnr"),
    "resize to nothing": ("net.pt", "--data", "images.npz", "--resize", "0"),
    "resize to words": ("net.pt", "--data", "images.npz", "--resize", "big"),
    "below a file": ("net.pt", *SHAPE, "--out", "text.pt/a/b"),
    "in proc": ("net.pt", *SHAPE, "--out", "/proc/out"),
    "out is a file": ("net.pt", *SHAPE, "--out", "text.pt", "--force"),
    "out is here": ("net.pt", *SHAPE, "--out", ".", "--force"),
    "tol": ("net.pt", *SHAPE, "--tol", "1"),
    "negative tol": ("net.pt", *SHAPE, "--tol", "-1e-3"),
    "tol is no number": ("net.pt", *SHAPE, "--tol", "nan"),
    "unknown option": ("net.pt", "--bogus"),
    "unknown mode": ("net.pt", "--mode", "magic"),
    "unknown command": ("convrt", "net.pt"),
    "no model": ("--quiet",),
    "batch of too many": ("net.pt", *SHAPE, "--batch", "100000000"),
    "threads without end": ("net.pt", *SHAPE, "--threads", "100000000"),
    "seed of 70 bits": ("net.pt", *SHAPE, "--seed", str(2**70)),
    "no memory": ("net.pt", *SHAPE, "--mode", "approx", "--rank", "1", "--memory", "nan"),
    "device without data": ("net.pt", *SHAPE, "--device", "meta"),
    "train without fine-tuning": (
        "net.pt",
        *SHAPE,
        "--mode",
        "approx",
        "--rank",
        "1",
        "--train",
        "data.npz",
    ),
    "checkpoint in exact mode": ("net.pt", *SHAPE, "--checkpoint", "c.pt"),
    "loader that ends the program": ("net.pt", "--data", "cli_test_code.py:leaving"),
    "batch of none": ("net.pt", *SHAPE, "--batch", "0"),
    "runs of words": ("net.pt", *SHAPE, "--runs", "many"),
}


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_bad_usage_and_input_give_one_line_and_leave_nothing(here, run, arguments):
    before = listing(here.parent)
    if "--out" not in arguments:
        arguments = (*arguments, "--out", "new/out")
    outcome = run(*arguments)
    lines = [line for line in outcome.err.splitlines() if line != "the user's own words"]
    assert (outcome.code, outcome.out) == (2, "")
    assert len(lines) == 1, outcome.err
    assert re.match(r"sepconvert: \S", lines[0])
    assert not re.search(r"unexpected [A-Z]|\.;", lines[0])
    assert listing(here.parent) == before


@pytest.mark.parametrize("data", ["labels.npz", "cli_test_code.py:late_stranger"])
def test_labels_beyond_the_classes(here, run, data):
    before = listing(here.parent)
    outcome = run("net.pt", "--data", data, "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"sepconvert: --data: labels: expected 0 to 3.*4 classes, got 4.*\n", outcome.err)
    assert listing(here.parent) == before


@pytest.mark.parametrize("loader", ["failing", "failing_in_a_worker"])
def test_a_loader_that_fails_midway(here, run, loader):
    before = listing(here.parent)
    outcome = run("net.pt", "--data", f"cli_test_code.py:{loader}", "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    cause = re.escape("(OSError: [Errno 5] Input/output error: '9.png')")
    assert re.fullmatch(rf"sepconvert: --data, .*a loader failed.*{cause}; fix it.*\n", outcome.err)
    assert listing(here.parent) == before


def test_a_loader_that_ends_too_soon(here, run):
    """torch takes StopIteration out of a data set for the end of the data."""
    before = listing(here.parent)
    outcome = run("net.pt", "--data", "cli_test_code.py:short", "--runs", "0")
    assert (outcome.code, outcome.out) == (2, "")
    assert "data: the loader ended after 2 of 3 batches; fix its data set" in outcome.err
    assert listing(here.parent) == before


def test_the_refusal_of_a_class_names_the_option_that_admits_it(here, run):
    outcome = run("scaled.pt", *SHAPE, "--runs", "0")
    assert outcome.code == 2
    (option,) = re.findall(r"--allow [\w.]+", outcome.err)
    assert option == "--allow cli_test_code.Scaled"
    outcome = run("scaled.pt", *SHAPE, "--dry-run", *option.split())
    assert (outcome.code, outcome.err) == (0, "")


def test_trust_is_told(here, run, monkeypatch):
    monkeypatch.syspath_prepend(here)
    outcome = run("scaled.pt", *SHAPE, "--dry-run", "--trust", "--quiet")
    assert outcome == Outcome(0, "", "sepconvert: --trust: scaled.pt is run as a program\n")


def test_a_malicious_pickle_never_runs(here, run):
    for file in ("evil.pt", "evil.pkl"):
        for command in (["inspect", file], [file], ["--dry-run", file], [file, "--allow", "posix.system"]):
            assert run(*command, *SHAPE).code == 2
    assert not (here / "pwned").exists()
    assert run("evil.pt", *SHAPE, "--trust").code == 2  # it can run after all, but is no model
    assert (here / "pwned").exists()


# Targets, sizes and inputs of any form

RNG = np.random.default_rng(0)


def options(**given):
    names = (
        "data",
        "targets",
        "calib",
        "train",
        "mean",
        "std",
        "resize",
        "input_shape",
        "metric",
        "batch_dim",
    )
    return {**dict.fromkeys(names), "batch": 1, "seed": 0, "device": "cpu", **given}


def images(folder, sizes, masks=True):
    """Save images, and masks of two classes, of such sizes; return the options that name them."""
    shown = {f"{n}.png": RNG.integers(0, 256, (*each, 3), dtype=np.uint8) for n, each in enumerate(sizes)}
    given = {"data": str(folder_of(folder / "images", shown))}
    if masks:
        palettes = {name: palette(each[..., 0] > 99) for name, each in shown.items()}
        given["targets"] = str(folder_of(folder / "masks", palettes))
    return given


SIZES = [(8, 10), (8, 10), (12, 6)]


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left, right, scale=1.0):
        return scale * (self.conv(left).mean((2, 3)) - self.conv(right).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, steps):  # T × N × F
        return self.head(self.cell(steps)[0])


def module_of(path, samples, **loading):
    """Write a file with a callable, and return its name: a loader of such samples."""
    torch.save((samples, loading), path.with_suffix(".pt"))
    path.write_text(
        "import torch\nfrom torch.utils.data import DataLoader\n"
        f"samples, loading = torch.load({str(path.with_suffix('.pt'))!r}, weights_only=False)\n"
        "def make():\n    return DataLoader(samples, **loading)\n"
    )
    return f"{path}:make"


def pairs_of_images(count=5):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(count, 2, 3, 8, 8, generator=generator)
    return [({"right": right, "left": left}, n % 4) for n, (right, left) in enumerate(values)]


def test_images_of_several_sizes_are_timed_at_a_size_that_is_named(tmp_path):
    given = options(**images(tmp_path, SIZES), metric="miou")
    with pytest.raises(SepconvertError, match="`input_shape`: is needed, as the images differ in size"):
        read_data_and_examples(given, None, dense())
    data, (example,) = read_data_and_examples({**given, "input_shape": "3x8x10", "batch": 2}, None, dense())
    assert example.shape == (2, 3, 8, 10)
    assert [tuple(y.shape) for _, y in data] == [(1, *size) for size in SIZES]
    with pytest.raises(SepconvertError, match="samples are 3×8×10, the model takes 1×8×10"):
        read_data_and_examples({**given, "input_shape": "1x8x10"}, None, dense())
    data, (example,) = read_data_and_examples({**given, "resize": (4, 4)}, None, dense())
    assert example.shape == (1, 3, 4, 4)


def test_calibration_images_of_several_sizes_are_for_dense_tasks(tmp_path):
    given = images(tmp_path, SIZES, masks=False)
    options_of = options(calib=given["data"])
    with pytest.raises(SepconvertError, match="pass `resize`"):
        read_images(options_of, "calib")
    found = read_images({**options_of, "metric": "psnr"}, "calib")
    assert [tuple(x.shape[2:]) for x, _ in found] == SIZES
    with pytest.raises(SepconvertError, match="`input_shape`: is needed"):
        read_data_and_examples({**options_of, "metric": "psnr"}, None, dense())


def test_a_loader_of_two_sizes_needs_a_size_too(tmp_path):
    spec = module_of(tmp_path / "sizes.py", [(torch.rand(3, *size), torch.zeros(size)) for size in SIZES[1:]])
    given = options(data=spec, metric="mse")
    with pytest.raises(SepconvertError, match="`input_shape`: is needed"):
        read_data_and_examples(given, None, dense())
    _, (example,) = read_data_and_examples({**given, "input_shape": "3x20x20"}, None, dense())
    assert example.shape == (1, 3, 20, 20)
    with pytest.raises(SepconvertError, match="samples are 3×8×10, the model takes 3×20×20"):
        read_data_and_examples({**given, "input_shape": "3x20x20", "metric": None}, None, dense())


@pytest.mark.parametrize("form", [dict, tuple])
def test_example_inputs_are_those_of_the_data(tmp_path, form):
    samples = pairs_of_images()
    if form is tuple:
        samples = [((x["left"], x["right"]), y) for x, y in samples]
    given = options(data=module_of(tmp_path / f"pairs_{form.__name__}.py", samples, batch_size=3), batch=2)
    loaded = LoadedModel(Siamese().double(), Path("m"), "0", None)
    data, inputs = read_data_and_inputs(given, loaded)
    left = [x["left"] if form is dict else x[0] for x, _ in samples]
    right = [x["right"] if form is dict else x[1] for x, _ in samples]
    assert torch.equal(inputs[0], torch.stack(left[:2]).double())
    assert torch.equal(inputs[1], torch.stack(right[:2]).double())
    assert inputs[2:] == ((1.0,) if form is dict else ())
    assert [y.tolist() for _, y in data] == [[0, 1, 2], [3, 0]]
    with pytest.raises(SepconvertError, match="--batch 4: the data begins with a batch of 3"):
        read_data_and_inputs({**given, "batch": 4}, loaded)
    with pytest.raises(
        SepconvertError, match="`input_shape`: is of one input, and `data` has 2; leave it out"
    ):
        read_data_and_inputs({**given, "input_shape": "3x8x8"}, loaded)


WAYS = Normalisation((0.5, 0.25, 0.125), (0.5, 0.5, 0.25)), Normalisation((0.5,) * 3, (0.5,) * 3)


def from_a_library(path, way):
    return LoadedModel(nn.Identity(), Path(path), "0", None, normalisation=way)


def test_images_of_a_library_are_normalised_as_it_says(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=np.zeros(4, int))
    np.savez(tmp_path / "floats.npz", x=np.ones((4, 3, 8, 8), np.float32), y=np.zeros(4, int))
    folder_of(tmp_path / "folder", {f"{n}.png": pixels[n] for n in range(2)})
    given = options(data=str(tmp_path / "images.npz"), calib=str(tmp_path / "folder"))
    expected = ((pixels / 255 - WAYS[0].mean) / WAYS[0].std).transpose(0, 3, 1, 2)
    suited = with_normalisation(given, [from_a_library("timm:a", WAYS[0]), from_a_library("b.pt", None)])
    told = "sepconvert: timm:a: uint8 images are normalised as its library says: --mean 0.5,0.25,0.125 --std "
    assert capsys.readouterr().err == f"{told}0.5,0.5,0.25; pass these if others are right\n"
    ((x, _),) = read_data_and_examples(suited, None, nn.Identity())[0]
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    ((x, _),) = read_images(suited, "calib")
    np.testing.assert_allclose(x.numpy(), expected[:2], atol=1e-6)
    # What is float, or normalised otherwise, is left alone, and nothing is told.
    floats = {"data": str(tmp_path / "floats.npz"), "calib": None}
    for other in (floats, {"mean": (0.0,) * 3}, {"std": (1.0,) * 3}):
        left = {**given, **other}
        assert with_normalisation(left, [from_a_library("timm:a", WAYS[0])]) == left
    assert with_normalisation(given, [from_a_library("b.pt", None)]) == given
    assert capsys.readouterr().err == ""
    mixed = {**suited, "data": str(tmp_path / "floats.npz")}
    ((x, _),) = read_data_and_examples(mixed, None, nn.Identity())[0]
    assert (x == 1).all()


def test_models_that_are_normalised_differently_are_not_compared_on_the_same_images(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.zeros(4, int))
    models = [from_a_library(f"timm:{name}", way) for name, way in zip("ab", WAYS, strict=True)]
    given = options(data=str(tmp_path / "images.npz"))
    with pytest.raises(SepconvertError, match="timm:b: its library normalises images in another way than"):
        with_normalisation(given, models)
    assert with_normalisation({**given, "mean": (0.0,) * 3}, models)["mean"] == (0.0,) * 3


def test_calibration_data_of_several_inputs_give_the_example(tmp_path):
    samples = [x for x, _ in pairs_of_images()]
    calib = module_of(tmp_path / "unlabelled.py", samples, batch_size=3)
    _, inputs = read_data_and_examples(options(calib=calib), None, Siamese())
    assert torch.equal(inputs[0][0], samples[0]["left"])
    assert torch.equal(inputs[1][0], samples[0]["right"])


@pytest.mark.parametrize("batch_dim", [1, None])
def test_samples_lie_in_the_second_dimension(tmp_path, batch_dim):
    """Said, or found by running the model."""
    steps = torch.rand(9, 4, 6)
    spec = module_of(tmp_path / "steps.py", [(steps, torch.zeros(4))], batch_size=None)
    given = options(data=spec, batch=3, batch_dim=batch_dim)
    _, inputs = read_data_and_examples(given, None, Recurrent().eval())
    assert torch.equal(inputs[0], steps[:, :3])


def test_random_inputs_have_the_samples_where_they_are_said_to_be():
    given = options(input_shape="9x6", batch=3, batch_dim=1)
    assert read_data_and_examples(given, None, Recurrent())[1][0].shape == (9, 3, 6)
    example = ({"a": torch.rand(9, 1, 6), "n": torch.tensor(3)},)
    (found,) = read_data_and_examples({**given, "input_shape": None}, example, Recurrent())[1]
    assert found["a"].shape == (9, 3, 6)
    assert found["n"] == 3


def test_inputs_of_a_file_go_by_name_or_by_position():
    file = OnnxFile(("left", "right"), ((None, 3), (None, 3)), (), 0, 0, {}, None, (0, 0), "")
    left, right = torch.zeros(1, 3), torch.ones(1, 3)
    assert arranged(file, {"right": right, "more": 1, "left": left}) == (left, right)
    assert arranged(file, [left, right]) == (left, right)
    assert arranged(file, left) == (left,)
    with pytest.raises(
        SepconvertError, match="the inputs lack right, which the ONNX file takes, and hold left"
    ):
        arranged(file, {"left": left})


def test_targets_to_train_on_are_kept_in_any_form(tmp_path):
    masks = RNG.integers(0, 3, (4, 8, 8))
    x = RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "masks.npz", x=x, y=masks)
    np.savez(tmp_path / "alone.npz", x=x)
    given = options(train=str(tmp_path / "masks.npz"), calib=str(tmp_path / "alone.npz"))
    ((_, y),) = read_images(given, "train")
    assert y.tolist() == masks.tolist()
    ((_, y),) = read_images(given, "calib")
    assert y.tolist() == [-1] * 4
    assert read_images(options(), "calib") is None


def test_masks_are_scored_in_a_profile(here, run):
    given = images(here, [(8, 8)] * 3)
    torch.save(dense(), "dense.pt")
    arguments = ("profile", "dense.pt", "--data", given["data"], "--targets", given["targets"], "--runs", "0")
    outcome = run(*arguments, "--metric", "pixel-accuracy")
    assert (outcome.code, outcome.err) == (0, "")
    ((x, y),) = read_data_and_examples(options(**given, metric="miou"), None, dense())[0]
    share = 100 * float((dense()(x).argmax(1) == y).double().mean())
    assert f"{share:.2f} % of 3" in outcome.out
    outcome = run(*arguments)
    assert outcome.code == 2
    assert re.fullmatch(r"sepconvert: accuracy: expected logits .* say by --metric what .*\n", outcome.err)


def test_models_of_named_inputs_are_compared(here, run):
    """Inputs of the files that are made of them have other names."""
    spec = module_of(here / "named.py", pairs_of_images(), batch_size=3)
    (here / "siamese.py").write_text(
        f"from torch import nn\n{inspect.getsource(Siamese)}\ndef make():\n    return Siamese().eval()\n"
    )
    torch.manual_seed(0)
    samples = pairs_of_images()
    torch.save(Siamese().state_dict(), "a.pt")
    torch.save(Siamese().state_dict(), "b.pt")
    outcome = run(
        "compare", "a.pt", "b.pt", "--factory", "siamese.py:make", "--data", spec, "--runs", "0",
        "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    model = Siamese().eval()
    shown = []
    for name in ("a.pt", "b.pt"):
        model.load_state_dict(torch.load(name))
        predicted = [int(model(x["left"][None], x["right"][None]).argmax()) for x, _ in samples]
        shown.append(sum(each == y for each, (_, y) in zip(predicted, samples, strict=True)) / len(samples))
    found = [each["accuracy"]["top1"] for each in json.loads(outcome.out)["profiles"]]
    assert found == pytest.approx(shown)


@pytest.mark.slow
def test_a_conversion_on_images_of_several_sizes(here, run):
    """Factors are fitted to some of them, and the metric is that of the others."""
    given = images(here, SIZES * 8)
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)).eval(), "dense.pt")
    outcome = run(
        "dense.pt", "--data", given["data"], "--targets", given["targets"], "--metric", "miou", "--mode",
        "approx", "--rank", "2", "--input-shape", "3x16x16", "--runs", "0", "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["approximation"]["calibration"]["images"] == 9  # and 3 to judge by
    assert report["delta"]["metric"]["n"] == 12
    assert report["delta"]["metric"]["name"] == "miou"


def test_images_are_given_to_a_file_in_its_own_order(here, run):
    """A file that takes N×H×W×C, as those from TensorFlow do."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["t", "w"], ["c"]),
        onnx.helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        onnx.helper.make_node("Flatten", ["p"], ["y"]),
    ]
    types = [
        onnx.helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("x", ["batch", 8, 8, 3]), ("y", ["batch", 4]))
    ]
    initializers = [onnx.numpy_helper.from_array(weight, "w")]
    graph = onnx.helper.make_graph(nodes, "graph", types[:1], types[1:], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, "nhwc.onnx")
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"x": images.astype(np.float32) / 255})[0].argmax(1)
    np.savez("nhwc.npz", x=images, y=labels)
    for command in (("nhwc.onnx", "--runs", "0", "--out", "nhwc"), ("profile", "nhwc.onnx", "--runs", "0")):
        outcome = run(*command, "--data", "nhwc.npz", "--json")
        assert "the ONNX file takes images as N×H×W×C" in outcome.err
        report = json.loads(outcome.out)
        found = report["original"]["accuracy"] if "original" in report else report["accuracy"]
        assert found["top1"] == 1
    outcome = run("inspect", "nhwc.onnx", "--data", "nhwc.npz", "--layout", "nchw")
    assert outcome.code == 2
    assert "cannot run the model on these inputs" in outcome.err
    assert "N×H×W×C" not in outcome.err


@pytest.mark.parametrize(
    ("option", "words"),
    [(("--device", "cuda"), "--device cuda: "), (("--no-dynamic-batch",), "batch: an ONNX")],
)
def test_options_that_an_onnx_file_cannot_obey_are_refused(here, run, option, words):
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"])]
    types = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "graph", types[:1], types[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=8), "relu.onnx")
    outcome = run("relu.onnx", *option, "--out", "never")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err


def test_a_torch_model_takes_no_other_layout(here, run):
    outcome = run("inspect", "net.pt", *SHAPE, "--layout", "nhwc")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--layout nhwc: is for ONNX files" in outcome.err
