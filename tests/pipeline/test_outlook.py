"""An outlook names the forms that a conversion tries, and a time that has the right order."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.options.values import Budget, Calibration, Finetuning, Int8, Selection, Timing
from sepconvert.factorize.structures import FORMS
from sepconvert.pipeline import outlook as module
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.outlook import outlook

X = torch.rand(1, 8, 12, 12)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3)).eval()


def loader(count, *, labels=True):
    images = torch.rand(count, 8, 12, 12)
    return DataLoader(TensorDataset(images, torch.zeros(count, dtype=torch.long)) if labels else images)


def job(mode="auto", **settings):
    return Job(mode=mode, budget=Budget(max_drop=1.0), timing=Timing(runs=5), **settings)


def test_forms_are_those_of_the_mode(net):
    auto, approx = (outlook(net, X, loader(40), None, job(mode)) for mode in ("auto", "approx"))
    first, pointwise, last = auto.layers
    assert {scheme for scheme, _ in first.forms} > {scheme for scheme, _ in approx.layers[0].forms}
    assert all(scheme in FORMS for scheme, _ in first.forms)
    assert {scheme for scheme, _ in approx.layers[0].forms} == {"depthwise-pointwise", "pointwise-depthwise"}
    assert approx.layers[1].reason.text == "a 1×1 convolution is pointwise already"
    assert len(last.forms) > 0
    assert pointwise.reason is None


def test_layers_that_are_not_selected_have_a_reason(net):
    found = outlook(net, X, loader(40), None, job(selection=Selection(include=("3",))))
    assert [bool(layer.forms) for layer in found.layers] == [False, False, True]
    assert found.to_json()["layers"][0]["reason"] == "not selected"


def test_images_are_divided_as_in_a_conversion(net):
    assert outlook(net, X, loader(100), loader(40), job()).images == {
        "fitted": 30, "held out": 10, "scored": 100,
    }  # fmt: skip
    few = job(calibration=Calibration(images=20))
    assert outlook(net, X, loader(100), None, few).images == {"fitted": 15, "held out": 5, "scored": 80}
    assert outlook(net, X, None, None, job()).images == {"fitted": 0, "held out": 0, "scored": 0}


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.rand(8, 12, 12)


def test_images_that_are_not_counted_beforehand(net):
    found = outlook(net, X, loader(100), DataLoader(Unsized()), job())
    assert found.images == {"fitted": 0, "held out": 0, "scored": 100}


def test_what_is_not_counted_is_named(net):
    assert outlook(net, X, loader(40), None, job()).uncounted == ()
    tuned = job(finetuning=Finetuning(epochs=1), int8=Int8(form="on"))
    assert outlook(net, X, loader(40), None, tuned).to_json()["uncounted"] == ["fine-tuning", "int8"]


def test_time_grows_with_the_work(net, monkeypatch):
    monkeypatch.setattr(module, "_seconds_a_sample", lambda *_: 0.01)
    monkeypatch.setattr(module, "_products_a_second", lambda: 1e9)
    low, high = outlook(net, X, loader(40), None, job()).seconds
    assert 0 < low < high
    more = outlook(net, X, loader(4000), None, job()).seconds
    assert more[0] > low
    assert outlook(net, X, loader(40), None, job(gate="macs")).seconds[0] < low


def test_memory_holds_at_least_what_the_process_has(net):
    assert outlook(net, X, loader(40), None, job()).bytes > 2**30
