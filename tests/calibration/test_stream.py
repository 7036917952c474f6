"""Calibration in step, against `F.unfold` over all positions."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import calibrate_worker
import pytest
import torch
from calibrate_worker import fitted
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import geometries, numbered
from torch import nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration import passes
from sepconvert.calibration import stream as calibrate_module
from sepconvert.calibration.batchnorm import reestimate_batchnorm
from sepconvert.calibration.footprint import footprint
from sepconvert.calibration.record import FEWEST_POSITIONS, PATCHES, record
from sepconvert.calibration.stream import calibrate as calibrate_with
from sepconvert.calibration.stream import too_large
from sepconvert.network.copies import private_copy
from sepconvert.network.trace import trace

WORKER = Path(calibrate_worker.__file__)
IMAGES = torch.randn(6, 4, 8, 7, generator=torch.Generator().manual_seed(0)) + 3


def sites_of(model, images=IMAGES):
    return trace(private_copy(model), (images[:1],))


def calibrate(model, batches, sites, seed):
    # As of one image, in which nearly every position is looked at.
    return calibrate_with(model, batches, sites, record(model, batches, sites, images=1, seed=seed))


def drive(model, batches, kernels=None, sites=None):
    """The moments by name, the kernels given being sent back."""
    stream, send, found = (
        calibrate(model, dict(enumerate(batches)), sites or sites_of(model), seed=0),
        None,
        {},
    )
    try:
        while True:
            site, moments = stream.send(send)
            found[site.name] = moments
            send = (kernels or {}).get(site.name)
    except StopIteration:
        return found


def conv(inputs=4, outputs=6, **options):
    torch.manual_seed(1)
    return nn.Conv2d(inputs, outputs, **{"kernel_size": 3, **options})


def patches_of(layer, x):
    """g × M × C·K in float64, the padding done by hand."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x.double(), (left, right, top, bottom), mode=mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    rows = columns.transpose(1, 2).flatten(0, 1)
    return rows.reshape(len(rows), layer.groups, -1).transpose(0, 1)


def outputs_of(y):
    return y.double().flatten(2).transpose(1, 2).flatten(0, 1)


def covariance(a, b):
    return (a - a.mean(-2, keepdim=True)).mT @ (b - b.mean(-2, keepdim=True)) / a.shape[-2]


GEOMETRIES = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 2), "dilation": (2, 1)},
    "grouped": {"groups": 2, "padding": 1},
    "not square": {"kernel_size": (1, 5), "padding": (0, 2), "bias": False},
    "same": {"kernel_size": (2, 4), "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 1), "padding_mode": "circular", "groups": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("batch", [6, 4, 1])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_moments_of_one_layer(options, batch):
    layer = conv(**options)
    moments = drive(nn.Sequential(layer), IMAGES.split(batch))["0"]
    x, y = patches_of(layer, IMAGES), outputs_of(layer(IMAGES).detach())
    assert moments.count == x.shape[1]
    torch.testing.assert_close(moments.covariance, covariance(x, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.mean, x.mean(1), rtol=1e-9, atol=1e-9)
    assert moments.power == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-5)
    # Both networks are one as yet.
    assert not moments.missed_covariance.any()
    assert not moments.cross.any()
    assert not moments.missed.any()


def test_inputs_come_from_the_converted_network_and_targets_from_the_original():
    model = nn.Sequential(conv(padding=1), nn.ReLU(), conv(6, 5, padding=1, groups=1))
    weight, bias = torch.randn(6, 4, 3, 3).double(), torch.randn(6).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = drive(model, IMAGES.split(4), {"0": (weight, bias)})["2"]
    with torch.no_grad():
        x = F.relu(F.conv2d(IMAGES, weight.float(), bias.float(), padding=1))
        missed = outputs_of(model(IMAGES)) - outputs_of(model[2](x))
        patches = patches_of(model[2], x)
    torch.testing.assert_close(moments.covariance, covariance(patches, patches), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.cross, covariance(missed[None], patches), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.missed, missed.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moments.missed_covariance, covariance(missed[None], missed[None]), rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        return self.last(self.shared(F.relu(self.shared(x))))


def test_a_module_called_twice_is_met_first_with_all_that_it_gets():
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
    sites = trace(private_copy(model), (IMAGES[:1] / 100,))
    found = []
    stream = calibrate(model, {0: IMAGES}, sites, seed=0)
    for site, moments in stream:
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
        found["conv2d_0"].covariance, covariance(columns, columns), rtol=1e-9, atol=1e-9
    )


def test_positions_are_a_seeded_sample_that_batches_alone_decide():
    images = torch.randn(4, 4, 40, 40)
    layer = nn.Sequential(conv())
    sites = sites_of(layer, images)
    found = drive(layer, images.split(2), sites=sites)["0"]
    assert found.count == 4 * PATCHES * layer[0].weight[0].numel()
    again = drive(layer, images.split(2), sites=sites)["0"]
    assert torch.equal(found.covariance, again.covariance)
    backwards = next(calibrate(layer, {1: images[2:], 0: images[:2]}, sites, seed=0))[1]
    torch.testing.assert_close(backwards.covariance, found.covariance, rtol=1e-12, atol=1e-12)
    other = next(calibrate(layer, {0: images}, sites, seed=1))[1]
    assert not torch.allclose(other.covariance, found.covariance)


def test_large_means_cancel_nothing():
    images = (torch.randn(6, 4, 8, 7, dtype=torch.float64) + 1e7).split(2)
    layer = nn.Sequential(conv().double())
    moments = drive(layer, images, sites=sites_of(layer, images[0]))["0"]
    x = patches_of(layer[0], torch.cat(images) - 1e7)
    torch.testing.assert_close(moments.covariance, covariance(x, x), rtol=1e-6, atol=1e-7)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = conv(), conv()

    def forward(self, x):
        return self.left(x) if x.mean() > 0 else self.right(x)


def test_errors_leave_no_thread_behind():
    before = threading.active_count()
    model = Branching()
    sites = (*sites_of(model)[:1], *sites_of(model, -IMAGES)[:1])
    with pytest.raises(SepconvertError, match=r"do not take the same way .*left.*--exclude"):
        drive(model, [IMAGES[:2], -IMAGES[:2]], sites=sites)
    layer = nn.Sequential(conv(), conv(6, 4))
    with pytest.raises(SepconvertError, match="the model fails on images of shape"):
        drive(layer, [IMAGES[:, :3]], sites=sites_of(layer))
    broken = IMAGES.clone()
    broken[4, 0, 0, 0] = float("nan")
    with pytest.raises(SepconvertError, match="NaN or Inf reaches the layer 0"):
        drive(layer, [broken])
    stream = calibrate(layer, {0: IMAGES}, sites_of(layer), seed=0)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def wide_at_first():
    torch.manual_seed(4)
    return nn.Sequential(
        conv(4, 12, padding=1),
        nn.ReLU(),
        conv(12, 12, padding=1),
        nn.MaxPool2d(2),
        conv(12, 6),
        conv(6, 3, kernel_size=1),
    )


def test_passes_that_find_no_room_to_wait_begin_anew_and_change_nothing(monkeypatch):
    model, batches = wide_at_first(), dict(enumerate(IMAGES.split(1)))
    sites = sites_of(model)
    answers = record(model, batches, sites, images=1, seed=0)
    kernel = torch.randn(12, 12, 3, 3).double(), torch.randn(12).double()
    began = []
    begin = passes._Pass.run
    monkeypatch.setattr(passes._Pass, "run", lambda self: (began.append(self), begin(self)))

    def run(room):
        began.clear()
        monkeypatch.setattr(calibrate_module, "allowance", lambda memory: room)
        stream, send, found = calibrate_with(model, batches, sites, answers), None, []
        with contextlib.suppress(StopIteration):
            while True:
                site, moments = stream.send(send)
                found.append((site.name, moments))
                send = kernel if site.name == "2" else None
        return found, len(began)

    everything, once = run(1e9)
    nothing, often = run(0)
    # Of room for all but the activations behind the first layers, which are the largest.
    moments = max(calibrate_module._bytes_of_moments(site) for site in sites)
    some, seldom = run(moments + 2 * footprint(model, (IMAGES[:1],)).peak + 15_000)
    assert [name for name, _ in everything] == ["0", "2", "4", "5"]
    assert once == 6
    assert often == 4 * 6
    assert once < seldom < often
    for found in (nothing, some):
        for (name, expected), (other, actual) in zip(everything, found, strict=True):
            assert name == other
            for field in dataclasses.fields(expected):
                left, right = getattr(expected, field.name), getattr(actual, field.name)
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_memory_is_estimated_first(monkeypatch):
    layer = nn.Sequential(conv(), nn.ReLU(), conv(6, 64), nn.ReLU(), conv(64, 4))
    batches, sites = {0: IMAGES}, sites_of(layer)
    with pytest.raises(
        SepconvertError, match=r"needs .* GB, .* are there by --memory; pass more --memory or"
    ):
        too_large(layer, batches, sites, images=6, memory=1e6)
    assert too_large(layer, batches, sites, images=6) == {}
    unknowns = 64 * 9
    monkeypatch.setattr(calibrate_module, "allowance", lambda memory: 8 * 5 * unknowns**2)
    assert too_large(layer, batches, sites, images=6) == {
        "4": "its statistics take 0.013 GB; 0.013 are there as half of what is free; pass more --memory"
    }
    assert too_large(layer, {}, sites, images=6) == {}


def test_batchnorm_takes_the_statistics_of_its_own_inputs():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.BatchNorm2d(6, track_running_stats=False)
    )
    model.eval()
    assert reestimate_batchnorm(model, IMAGES.split(3)) == 1
    with torch.no_grad():
        y = [model[0](batch) for batch in IMAGES.split(3)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in y]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var((0, 2, 3)) for b in y]).mean(0))
    assert (model[1].momentum, model[1].training) == (0.1, False)


# Of any geometry, behind a layer that is replaced


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@numbered(150)
@given(geometries(dtypes=(torch.float64,)), st.sampled_from((1, 2, 5)))
def test_moments_of_any_layer_behind_a_replaced_one(geometry, batch):
    layer, channels = geometry.conv(), geometry.in_channels
    model = nn.Sequential(nn.Conv2d(channels, channels, 1).double(), layer).requires_grad_(False)
    images = torch.randn(5, channels, *geometry.size, dtype=torch.float64)
    height, width = model(images).shape[2:]
    assume(height * width <= max(FEWEST_POSITIONS, PATCHES * layer.weight[0].numel()))
    kernel = torch.randn(channels, channels, 1, 1).double(), torch.randn(channels).double()
    moments = drive(model, images.split(batch), {"0": kernel}, sites_of(model, images))["1"]
    x = F.conv2d(images, *kernel)
    patches, wanted = patches_of(layer, x), outputs_of(model(images))
    missed = wanted - outputs_of(layer(x))
    by_group = missed.reshape(len(missed), geometry.groups, -1).transpose(0, 1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert moments.count == len(wanted)
    torch.testing.assert_close(moments.covariance, covariance(patches, patches), **close)
    torch.testing.assert_close(moments.cross, covariance(by_group, patches), **close)
    torch.testing.assert_close(moments.mean, patches.mean(1), **close)
    torch.testing.assert_close(moments.missed, missed.mean(0), **close)
    torch.testing.assert_close(moments.missed_covariance, covariance(by_group, by_group), **close)
    outputs_by_group = wanted.reshape(len(wanted), geometry.groups, -1).transpose(0, 1)
    torch.testing.assert_close(
        moments.output_covariance, covariance(outputs_by_group, outputs_by_group), **close
    )
    assert moments.power == pytest.approx(float(wanted.var(0, correction=0).sum()), abs=1e-9)


def test_no_position_is_drawn_twice():
    images = torch.rand(1, 1, 1, 17, dtype=torch.float64)
    assert images[0].numel() == FEWEST_POSITIONS + 1
    model = nn.Sequential(nn.Conv2d(1, 1, 1).double())
    found = {seed: next(calibrate(model, {0: images}, sites_of(model, images), seed=seed)) for seed in (0, 1)}
    left_out = [images.sum() - FEWEST_POSITIONS * moments.mean.item() for _, moments in found.values()]
    assert all((images - value).abs().min() < 1e-9 for value in left_out)
    assert left_out[0] != pytest.approx(left_out[1])


# Models that run otherwise on the images than on the example


class Loop(nn.Module):
    """Calls a layer once more for bright images."""

    def __init__(self):
        super().__init__()
        self.repeated, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        for _ in range(2 if x.mean() > 0 else 1):
            x = self.repeated(x)
        return self.last(x)


class Rarely(nn.Module):
    """Calls a layer twice, but for dark images alone."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = conv(4, 4, padding=1), conv(4, 3)

    def forward(self, x):
        return self.last(self.shared(self.shared(x)) if x.mean() < 0 else x)


def test_a_shared_layer_that_no_image_reaches_is_passed_over():
    model = Rarely()
    assert list(drive(model, [IMAGES], sites=sites_of(model, -IMAGES))) == ["last"]


class Persistent(nn.Module):
    """Tries again, whatever happens."""

    def __init__(self):
        super().__init__()
        self.layer = conv()

    def forward(self, x):
        for _ in range(2):
            try:
                return self.layer(x)
            except BaseException:  # noqa: S112
                continue
        return x


def test_a_model_that_swallows_every_error_can_be_stopped():
    model, before = Persistent(), threading.active_count()
    stream = calibrate(model, {0: IMAGES}, sites_of(model), seed=0)
    next(stream)
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert threading.active_count() == before


def test_no_thread_outlives_an_error_of_the_caller():
    before = threading.active_count()

    def fit():
        for _ in calibrate(model, {0: IMAGES, 1: IMAGES}, sites_of(model), seed=0):
            raise ValueError("no fit")

    model = nn.Sequential(conv(), conv(6, 4))
    with pytest.raises(ValueError, match="no fit"):
        fit()
    assert threading.active_count() == before


def test_a_process_without_a_share_of_the_images_says_so():
    """Fewer batches than processes."""
    model = nn.Sequential(conv())
    with pytest.raises(SepconvertError):
        drive(model, [], sites=sites_of(model))


def test_batchnorm_of_a_batch_of_one():
    """The last batch may hold a single image, of which a BatchNorm behind pooling has no variance."""
    model = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6)).eval()
    reestimate_batchnorm(model, IMAGES.split(5))
    assert all(value.isfinite().all() for value in model.state_dict().values())


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
    errors = [worker.communicate(timeout=60)[1].decode() for worker in workers]
    return folder, "\n".join(errors)


@pytest.mark.parametrize("batches", [3])
def test_two_processes_find_what_one_does(two_processes, batches):
    folder, errors = two_processes
    alone = fitted(batches)
    for rank in range(2):
        path = folder / f"{batches}-{rank}.pt"
        assert path.is_file(), errors
        for name, values in torch.load(path).items():
            for found, expected in zip(values, alone[name], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    both = [torch.load(folder / f"{batches}-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(a, b) for name in alone for a, b in zip(both[0][name], both[1][name], strict=True))
