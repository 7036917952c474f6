"""A plan and its weights on a fresh model."""

import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch
from conversions import close, run
from torch import nn

from sepconvert.base.documents import sealed
from sepconvert.base.errors import SepconvertError, VerificationError
from sepconvert.pipeline.replay import apply_plan
from sepconvert.planning.plan import read_plan


@pytest.fixture
def replayable(net, conversion, tmp_path):
    """A fresh model and a writable copy of the plan's folder."""
    for name in ("plan.json", "converted.safetensors"):
        (tmp_path / name).write_bytes((conversion[1] / name).read_bytes())
    (tmp_path / "out").mkdir()
    return copy.deepcopy(net), tmp_path


def replay(model, folder, sha256="ab" * 32):
    return apply_plan(
        model,
        read_plan(folder / "plan.json"),
        folder / "converted.safetensors",
        folder / "out",
        model_sha256=sha256,
    )


def test_apply_reproduces_the_conversion(replayable, conversion, x):
    model, folder = replayable
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(-3)  # the plan's weights replace these
    assert replay(model, folder, sha256=None) is None
    converted = copy.deepcopy(conversion[0].model).eval()
    assert torch.equal(torch.export.load(folder / "out" / "converted.pt2").module()(x), converted(x))
    assert close(torch.from_numpy(run(folder / "out" / "converted.onnx", x)[0]), converted(x))


def test_apply_verifies_on_the_very_model(replayable):
    verified = replay(*replayable)
    assert verified["max_abs_diff"] <= verified["tolerance"]


def tamper(folder, name, factor):
    path = folder / "converted.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[name] = tensors[name] * factor
    safetensors.torch.save_file(tensors, path)


def rehash(folder):
    document = json.loads((folder / "plan.json").read_text())
    document["weights_sha256"] = hashlib.sha256((folder / "converted.safetensors").read_bytes()).hexdigest()
    (folder / "plan.json").write_text(json.dumps(sealed(document)))


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [("body.0.branches.0.0.weight", "body.0"), ("conv2d_0.branches.0.1.weight", "conv2d_0")],
)
def test_tampered_weights(replayable, tensor, layer):
    model, folder = replayable
    tamper(folder, tensor, 1.001)
    with pytest.raises(SepconvertError, match="is not the file that the plan was written with"):
        replay(model, folder)
    rehash(folder)
    with pytest.raises(VerificationError, match=rf"verification failed: .*\b{layer}\b") as caught:
        replay(model, folder)
    assert caught.value.exit_code == 3
    assert not list((folder / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: nn.Sequential(nn.Conv2d(3, 4, 3)), "expected a convolution stem.*the model has none"),
        (lambda model: setattr(model, "stem", nn.Conv2d(3, 8, 5, padding=1)), "expected a convolution stem"),
        (lambda model: setattr(model, "stem", nn.Conv2d(1, 8, 5, padding=2)), "check the input's shape"),
        (
            lambda model: setattr(model, "head", nn.Bilinear(8, 8, 5)),
            "missing .* pass a tuple of all its inputs",
        ),
        (lambda model: setattr(model, "head", nn.Linear(8, 6)), "do not fit the model"),
        (lambda model: setattr(model, "extra", nn.Linear(8, 6)), "do not fit the model"),
    ],
)
def test_the_plan_of_another_model(replayable, change, message):
    model, folder = replayable
    other = change(model) or model
    with pytest.raises(SepconvertError, match=message) as caught:
        replay(other, folder, sha256=None)
    assert "\n" not in str(caught.value)


def test_weights_that_are_gone(replayable):
    model, folder = replayable
    (folder / "converted.safetensors").unlink()
    with pytest.raises(SepconvertError, match=r"cannot be read: .*belongs beside the plan"):
        replay(model, folder)
