"""Passes that wait, start again, fail or are no longer needed: no thread outlives them."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from in_step import IMAGES, calibrate, conv, drive, sites_of
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration import passes, stream
from sepconvert.calibration.footprint import footprint
from sepconvert.calibration.record import record
from sepconvert.network.tensors import InputBatch


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
    with pytest.raises(SepconvertError, match=r"do not take the same way .*left.*`exclude`"):
        drive(model, [IMAGES[:2], -IMAGES[:2]], sites=sites)
    layer = nn.Sequential(conv(), conv(6, 4))
    broken = IMAGES.clone()
    broken[4, 0, 0, 0] = float("nan")
    with pytest.raises(SepconvertError, match="NaN or Inf reaches the layer 0"):
        drive(layer, [broken])
    running = calibrate(layer, {0: IMAGES}, sites_of(layer), seed=0)
    next(running)
    assert threading.active_count() > before
    running.close()
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
    model, batches = wide_at_first(), dict(enumerate(InputBatch((IMAGES,)).split(1)))
    sites = sites_of(model)
    recorded = record(model, batches, sites, images=1, seed=0)
    kernel = torch.randn(12, 12, 3, 3).double(), torch.randn(12).double()
    began = []
    begin = passes._Pass.run
    monkeypatch.setattr(passes._Pass, "run", lambda self: (began.append(self), begin(self)))

    def run(room):
        began.clear()
        monkeypatch.setattr(stream, "allowance", lambda memory: room)
        running, send, found = stream.calibrate(model, batches, sites, recorded), None, []
        with contextlib.suppress(StopIteration):
            while True:
                site, moments = running.send(send)
                found.append((site.name, moments))
                send = kernel if site.name == "2" else None
        return found, len(began)

    everything, once = run(1e9)
    nothing, often = run(0)
    # Of room for all but the activations behind the first layers, which are the largest.
    moments = max(stream.bytes_of_moments(site) for site in sites)
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
    running = calibrate(model, {0: IMAGES}, sites_of(model), seed=0)
    next(running)
    closing = threading.Thread(target=running.close, daemon=True)
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
