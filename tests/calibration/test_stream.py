"""The network converted so far, layer by layer, against `F.unfold` over all positions."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import calibrate_worker
import pytest
import torch
from calibrate_worker import fitted
from in_step import IMAGES, calibrate, conv, covariance, drive, outputs_of, patches_of, sites_of
from torch import nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration import stream
from sepconvert.calibration.stream import too_large
from sepconvert.network.tensors import InputBatch

WORKER = Path(calibrate_worker.__file__)


def test_inputs_come_from_the_converted_network_and_targets_from_the_original():
    model = nn.Sequential(conv(padding=1), nn.ReLU(), conv(6, 5, padding=1, groups=1))
    weight, bias = torch.randn(6, 4, 3, 3).double(), torch.randn(6).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = drive(model, IMAGES.split(4), {"0": (weight, bias)})["2"]
    with torch.no_grad():
        x = F.relu(F.conv2d(IMAGES, weight.float(), bias.float(), padding=1))
        residual = outputs_of(model(IMAGES)) - outputs_of(model[2](x))
        patches = patches_of(model[2], x)
    torch.testing.assert_close(moments.covariance, covariance(patches, patches), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.cross, covariance(residual[None], patches), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.residual_mean, residual.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moments.residual_covariance, covariance(residual[None], residual[None]), rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        return self.last(self.shared(F.relu(self.shared(x))))


def test_a_module_called_twice_comes_first_with_all_its_inputs():
    model = Twice()
    found = drive(model, IMAGES.split(3))
    assert list(found) == ["shared", "last"]
    with torch.no_grad():
        x = torch.cat(
            [patches_of(model.shared, IMAGES), patches_of(model.shared, F.relu(model.shared(IMAGES)))], 1
        )
    assert found["shared"].count == x.shape[1]
    torch.testing.assert_close(found["shared"].covariance, covariance(x, x), rtol=1e-5, atol=1e-5)
    kernel = torch.zeros(4, 4, 3, 3).double(), torch.ones(4).double()
    inputs = drive(model, IMAGES.split(3), {"shared": kernel})["last"]
    assert torch.allclose(inputs.mean, torch.ones_like(inputs.mean))


class Repeats(nn.Module):
    """Calls a layer again and again on large inputs."""

    def __init__(self):
        super().__init__()
        self.again, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        for _ in range(3 if x.abs().max() > 1 else 1):
            x = self.again(x)
        return self.last(x)


def test_a_layer_that_images_call_more_often_than_the_example():
    model = Repeats()
    found = []
    for site, moments in calibrate(model, {0: IMAGES}, sites_of(model, IMAGES / 100), seed=0):
        found.append(site.name)
        inputs = moments
    assert found == ["again", "last"]
    with torch.no_grad():
        x = patches_of(model.last, model.again(model.again(model.again(IMAGES))))
    torch.testing.assert_close(inputs.covariance, covariance(x, x), rtol=1e-5, atol=1e-5)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.kernel, stride=(1, 2)), self.kernel[:, :1].repeat(1, 5, 1, 1))


def test_functional_convolutions():
    model = Functional()
    found = drive(model, IMAGES.split(6))
    columns = F.unfold(IMAGES.double(), 3, stride=(1, 2)).transpose(1, 2).flatten(0, 1)[None]
    torch.testing.assert_close(
        found["conv2d_0"].covariance, covariance(columns, columns), rtol=1e-5, atol=1e-5
    )


def test_memory_is_estimated_first(monkeypatch):
    layer = nn.Sequential(conv(), nn.ReLU(), conv(6, 64), nn.ReLU(), conv(64, 4))
    batches, sites = {0: InputBatch((IMAGES,))}, sites_of(layer)
    needs = r"needs .* GB, .* GB are available \(`memory`\); pass more `memory` or fewer `calib_images`"
    with pytest.raises(SepconvertError, match=needs):
        too_large(layer, batches, sites, images=6, memory=1e6)
    assert too_large(layer, batches, sites, images=6) == {}
    unknowns = 64 * 9
    monkeypatch.setattr(stream, "allowance", lambda memory: 8 * 5 * unknowns**2)
    limit = "0.013 GB are available (half of the free memory); pass more `memory`"
    assert too_large(layer, batches, sites, images=6) == {"4": f"its statistics take 0.013 GB; {limit}"}


class Rarely(nn.Module):
    """Calls a layer twice, but for dark images alone."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        return self.last(self.shared(self.shared(x)) if x.mean() < 0 else x)


def test_a_shared_layer_that_no_image_reaches_is_left_out():
    model = Rarely()
    assert list(drive(model, [IMAGES], sites=sites_of(model, -IMAGES))) == ["last"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with what each of two processes found, and what they said."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, WORKER, str(rank), "2", str(port), folder],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return folder, "\n".join(errors)


@pytest.mark.slow
def test_two_processes_find_what_one_does(two_processes):
    folder, errors = two_processes
    alone = fitted(3)
    for rank in range(2):
        path = folder / f"{rank}.pt"
        assert path.is_file(), errors
        for name, values in torch.load(path).items():
            for found, expected in zip(values, alone[name], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    both = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(a, b) for name in alone for a, b in zip(both[0][name], both[1][name], strict=True))
