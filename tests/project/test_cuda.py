"""A model on a GPU is converted as on the CPU, and stays where it is."""

import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert import apply, convert, profile
from sepconvert.base.options.values import Calibration, Timing
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.files.models.loading import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def loaders():
    """To fit to, and to report accuracy on."""
    images = evaluation_data()
    x, y = to_input(images.x), torch.from_numpy(images.y)
    return [DataLoader(TensorDataset(x[a:b], y[a:b]), 64) for a, b in ((0, 400), (400, 800))]


def plain():
    """A network whose gradients are summed in one order (those of reflected borders cannot be)."""
    torch.manual_seed(0)
    widths = [(1, 32), (32, 32), (32, 32)]
    blocks = [(nn.Conv2d(*each, 3, 2, 1), nn.BatchNorm2d(each[1]), nn.ReLU()) for each in widths]
    return nn.Sequential(
        *itertools.chain(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()


def on(device, loaders, model=None, **options):
    calib, data = loaders
    x, model = calib.dataset[0][0][None].to(device), (model or load()).to(device)
    defaults = {"mode": "approx", "calib": calib, "data": data, "rank": 2}
    defaults |= {"calibration": Calibration(images=400), "timing": Timing(runs=0)}
    return convert(model, x, **defaults | options)


def layers(result):
    return {layer["name"]: layer for layer in result.report["layers"]}


def devices(model):
    return {each.device.type for each in (*model.parameters(), *model.buffers())}


def test_exact_mode(planted, tmp_path):
    model = nn.Sequential(planted(8, 16, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    x, model = torch.randn(2, 8, 32, 32), model.eval()
    here, there = (
        convert(model.to(device), x.to(device), timing=Timing(runs=10, threads=1), out=folder)
        for device, folder in (("cpu", None), ("cuda", tmp_path))
    )
    assert devices(there.model) == devices(model) == {"cuda"}
    keys = ("name", "decision", "scheme", "rank", "reason")
    assert [[each[key] for key in keys] for each in there.report["layers"]] == [
        [each[key] for key in keys] for each in here.report["layers"]
    ]
    assert "converted" in {each["decision"] for each in there.report["layers"]}
    assert there.report["verification"]["onnx_reason"] is None
    # Products in TensorFloat-32 would excuse a thousand times more.
    tolerance, expected = (each.report["verification"]["onnx_tolerance"] for each in (there, here))
    assert tolerance < 8 * expected
    answer = model(x.cuda()).detach().cpu()
    session = onnxruntime.InferenceSession(tmp_path / "converted.onnx", providers=["CPUExecutionProvider"])
    assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), answer, atol=1e-4)
    archive = load_model(tmp_path / "converted.pt2").model
    assert torch.allclose(archive(x), answer, atol=1e-4)
    assert torch.allclose(apply(model, tmp_path / "plan.json")(x.cuda()).cpu(), answer, atol=1e-4)


def test_approximate_mode(loaders):
    here, there = (on(device, loaders) for device in ("cpu", "cuda"))
    assert devices(there.model) == {"cuda"}
    found = layers(there)
    errors = {
        name: (layer["output_error"], found[name]["output_error"])
        for name, layer in layers(here).items()
        if layer["decision"] == "converted"
    }
    assert errors
    assert all(np.isclose(*pair, rtol=1e-3) for pair in errors.values()), errors


def test_the_same_command_gives_the_same_weights(loaders):
    def converted():
        return on("cuda", loaders, plain(), rank=1, finetune=2)

    first, again = converted(), converted()
    history = first.report["approximation"]["finetune"]["history"]
    assert len(history) > 1
    for name, tensor in first.model.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert not torch.are_deterministic_algorithms_enabled()


def test_auto_mode(loaders):
    timing = Timing(runs=20, measure_seconds=10, threads=1)
    result = on("cuda", loaders, mode="auto", rank=None, min_speedup=1.1, timing=timing)
    assert result.report["delta"]["latency_speedup"]["median"] > 1.1
    assert devices(result.model) == {"cuda"}


def test_profile(loaders):
    model, x = load(), loaders[0].dataset[0][0][None]
    here, there = (
        profile(model.to(device), x.to(device), timing=Timing(runs=5), data=loaders[1])
        for device in ("cpu", "cuda")
    )
    assert (there.macs, there.params) == (here.macs, here.params)
    assert abs(there.accuracy.top1 - here.accuracy.top1) < 0.005
