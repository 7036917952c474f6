"""Approximate and auto mode from beginning to end, on small networks."""

import copy
import json
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from conversions import apart, convert_small, converted, decided
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from sepconvert import DemandNotMetError, SepconvertError, convert
from sepconvert.base.environment import Runtime
from sepconvert.base.options.values import (
    Calibration,
    Finetuning,
    Selection,
    Timing,
)
from sepconvert.cli.demo.net import load
from sepconvert.factorize.approximate.problem import Problem
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.latency import Deployed, PairTiming, Speedup, measure_pair
from sepconvert.measure.statistics import Interval
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.pipeline import stages
from sepconvert.pipeline.replay import apply_plan
from sepconvert.planning.plan import read_plan
from sepconvert.report.text.sentences import warnings_of


@pytest.fixture(scope="module")
def calib(samples):
    return DataLoader(TensorDataset(samples[0][:200], samples[1][:200]), batch_size=64)


def approx(samples, **options):
    return decided(load(), samples[0][:2], "approx", calibration=Calibration(images=200), **options)


@pytest.fixture(scope="module")
def fixed(small, tmp_path_factory):
    """Rank 2 everywhere, with its files."""
    folder = tmp_path_factory.mktemp("fixed")
    model, loader = small
    calib = DataLoader(Subset(loader.dataset, range(200)), batch_size=64)
    data = DataLoader(Subset(loader.dataset, range(200, 300)), batch_size=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = convert(
        model,
        loader.dataset[:2][0],
        mode="approx",
        rank=2,
        calib=calib,
        data=data,
        calibration=Calibration(images=200),
        timing=Timing(runs=0),
        out=folder,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    places = [{each.data_ptr() for each in net.parameters()} for net in (model, result.model)]
    assert places[0].isdisjoint(places[1])  # plans share memory with the original: the one delivered does not
    return result, folder


def test_report(fixed):
    result, _ = fixed
    json.dumps(result.report, allow_nan=False)
    found = result.report["approximation"]
    assert found["metric"] == "data"
    assert found["calibration"] == {
        "origin": "`calib`",
        "images": 150,
        "heldout": 50,
        "patches_per_unknown": 12,
        "seen_twice": {"calib": {"images": 200, "compared": 200, "scored": 0}, "train": None},
    }
    names = [step["name"] for step in found["steps"]]
    assert names[:3] == ["fit the weights", "fit the outputs", "follow the drift, correct the bias"]
    assert [step["kind"] for step in found["steps"]] == ["weights", "data", "data", "batchnorm"][: len(names)]
    by_name = {step["name"]: step["divergence"] for step in found["steps"]}
    assert by_name["follow the drift, correct the bias"] < by_name["fit the weights"]
    assert converted(result.report)
    for layer in converted(result.report):
        assert layer["rank"] == 2
        assert layer["macs"][1] < layer["macs"][0]
        assert not layer["exact"]
        errors = layer["approximation"]
        assert errors["output_error_alone"] <= errors["output_error_of_weight_fit"] * 1.01
        assert errors["sensitivity"] >= 0
    kept = [layer for layer in result.report["layers"] if layer["decision"] == "kept"]
    assert all(layer["reason"] for layer in kept)
    dense = result.report["original"]["macs"] - sum(layer["macs"][0] for layer in result.report["layers"])
    assert result.report["converted"]["macs"] == dense + sum(
        layer["macs"][1] for layer in result.report["layers"]
    )
    assert result.report["verification"]["passed"]
    assert result.report["converted"]["accuracy"]["n"] == 100


@pytest.mark.slow
def test_a_conversion_that_puts_accuracy_at_risk_says_so(samples, calib):
    """One depthwise kernel a channel is too little for this network, two are not."""
    x, y = samples
    others = DataLoader(TensorDataset(x[200:], y[200:]), batch_size=200)
    poor = {"rank": 1, "gate": "none", "calib": calib}
    drop, few = warnings_of(approx(samples, **poor, data=others).report)
    assert drop.text.startswith("accuracy falls by 1.")
    assert few.text.startswith("accuracy is at risk: the model keeps 14,587 of 143,786 parameters")
    assert "`finetune`" in few.text
    assert warnings_of(approx(samples, **poor).report)[1:] == [few]  # after the verdict
    assert warnings_of(approx(samples, rank=2, calib=calib, data=others).report) == []


def test_multipliers_become_branches_in_onnx_too(fixed):
    result, folder = fixed
    layer = next(module for module in result.model.modules() if isinstance(module, FactorizedConv2d))
    assert len(layer.branches) == 2
    counts, multiplied = {}, {}
    for name in ("original", "converted"):
        graph = onnx.load(folder / f"{name}.onnx").graph
        weights = {each.name: tuple(each.dims) for each in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "Conv"]
        groups = [next((a.i for a in node.attribute if a.name == "group"), 1) for node in nodes]
        shapes = [weights[node.input[1]] for node in nodes]
        counts[name] = len(nodes)
        multiplied[name] = {s for s, g in zip(shapes, groups, strict=True) if s[1] == 1 and s[0] != g > 1}
    # Two branches of two for each layer, and no depthwise convolution with a multiplier of ours.
    assert counts["converted"] == counts["original"] + 3 * len(converted(result.report))
    assert multiplied["converted"] <= multiplied["original"]


def test_a_plan_can_be_replayed(small, fixed, tmp_path):
    result, folder = fixed
    weights = folder / "converted.safetensors"
    plan = read_plan(result.plan)
    assert apply_plan(copy.deepcopy(small[0]), plan, weights, tmp_path, model_sha256=None) is None
    assert (tmp_path / "converted.onnx").read_bytes() == (folder / "converted.onnx").read_bytes()


def test_the_same_command_gives_the_same_weights(small):
    first, second = (convert_small(small, rank=2) for _ in range(2))
    expected = first.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())
    assert first.plan == second.plan


def test_budgets(small):
    result = convert_small(small, target_macs=0.6, data=apart(small[1])[1])
    assert result.report["delta"]["macs_ratio"] >= 1 / 0.6
    result = convert_small(small, max_drop=5.0, data=apart(small[1])[1])
    found = result.report["approximation"]
    assert result.report["delta"]["accuracy_drop_pp"]["value"] <= 5.0
    assert len(found["curve"]) >= 3
    assert (
        found["plans_measured_on_data"] == sum(p["accuracy_drop_pp"] is not None for p in found["curve"]) > 0
    )
    (delivered,) = [point for point in found["curve"] if point["delivered"]]
    assert delivered["macs"] == result.report["converted"]["macs"]
    # Nothing measured to be good enough is cheaper.
    for point in found["curve"]:
        if point["accuracy_drop_pp"] and point["accuracy_drop_pp"]["value"] <= 5.0:
            assert point["macs"] >= delivered["macs"]
    with pytest.raises(DemandNotMetError, match=r"no plan meets `target_macs` 0.01") as caught:
        convert_small(small, target_macs=0.01)
    assert min(point["macs"] for point in caught.value.curve) > 0.01 * result.report["original"]["macs"]
    assert len(caught.value.curve) >= 3
    with pytest.raises(DemandNotMetError, match=r"`rank` 1 and `max_drop` 0 .*smallest drop"):
        convert_small(small, rank=1, max_drop=0, data=apart(small[1])[1])


@pytest.mark.slow
def test_a_demanded_speed_is_measured(small):
    model, loader = small
    options = {
        "mode": "approx", "calib": loader, "calibration": Calibration(images=64), "timing": Timing(runs=5),
    }  # fmt: skip
    with pytest.raises(DemandNotMetError, match=r"`min_speedup` 50 .*largest speed-up") as caught:
        convert(model, torch.randn(1, 3, 14, 14), min_speedup=50, **options)
    speedups = [point["latency_speedup"] for point in caught.value.curve]
    assert 0 < max(each["median"] for each in speedups if each) < 50
    report = convert(model, torch.randn(1, 3, 14, 14), min_speedup=0.01, **options).report
    assert any(point["latency_speedup"] for point in report["approximation"]["curve"])


@pytest.mark.slow
def test_a_demanded_speed_holds_of_the_files_too(small, monkeypatch):
    model, loader = small
    measured = stages.time_files

    def slower(*arguments: Any) -> PairTiming:
        speedup = Speedup(0.005, Interval(0.004, 0.006), Interval(0.9, 1.1))
        return replace(measured(*arguments), speedup=speedup)

    monkeypatch.setattr(stages, "time_files", slower)
    options = {
        "mode": "approx", "calib": loader, "calibration": Calibration(images=64), "timing": Timing(runs=5),
    }  # fmt: skip
    with pytest.raises(DemandNotMetError, match=r"`min_speedup` 0.01: .*0.01× as fast \[0.00, 0.01\]"):
        convert(model, torch.randn(1, 3, 14, 14), min_speedup=0.01, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank`: expected"),
        ({"rank": 1.5}, "`rank`: expected a whole number from 1, got 1.5"),
        ({"target_macs": 1.5}, "`target_macs`: expected"),
        ({"target_macs": float("nan")}, "`target_macs`: expected a number above 0, at most 1, got nan"),
        ({"min_speedup": -1}, "`min_speedup`: expected"),
        ({"max_drop": float("nan")}, "`max_drop`: expected"),
        ({"rank": 1, "target_macs": 0.5}, "pass one of them"),
        ({}, "need a budget"),
        ({"rank": 1, "finetune": 2}, "`finetune`: needs images to train on"),
        ({"max_drop": 1.0}, "`max_drop`: needs labelled data"),
    ],
)
def test_bad_demands(samples, options, message):
    with pytest.raises(SepconvertError, match=message):
        approx(samples, **options)
    with pytest.raises(SepconvertError, match="are for the modes approx and auto"):
        decided(load(), samples[0][:2], rank=1)


def test_without_images_the_weights_are_fitted_and_the_report_says_so(samples):
    result = approx(samples, rank=2)
    assert result.report["approximation"]["metric"] == "weights"
    assert result.report["approximation"]["steps"] == []
    assert converted(result.report)


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(small, count):
    model, loader = small
    x, y = next(iter(loader))
    few = DataLoader(TensorDataset(x[:count], y[:count]))
    result = decided(model, x[:1], mode="approx", rank=2, calib=few)
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    assert result.report["approximation"]["calibration"]["heldout"] == 0


def test_bad_images(samples):
    def loader(images):
        return DataLoader(TensorDataset(images, samples[1][: len(images)]))

    broken = samples[0][:8].clone()
    broken[3, 0, 0, 0] = float("inf")
    with pytest.raises(SepconvertError, match="NaN or Inf"):
        approx(samples, rank=1, calib=loader(broken))
    for shape in ((5, 28, 28), (1, 20, 20)):  # the second would run
        odd, said = loader(torch.randn(8, *shape)), "×".join(map(str, shape))
        with pytest.raises(SepconvertError, match=f"images to fit to are {said}, .* run on 1×28×28"):
            approx(samples, rank=1, calib=odd)
        with pytest.raises(SepconvertError, match=f"images to train on are {said}, .* run on 1×28×28"):
            approx(samples, rank=1, calib=loader(samples[0][:8]), finetune=Finetuning(1, train=odd))
    with pytest.raises(SepconvertError, match="every image is of one colour"):
        approx(samples, rank=1, calib=loader(torch.zeros(8, 1, 28, 28)))


class Siamese(nn.Module):
    """Compares two pictures by features of one branch, and tells which of three shifts lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.joint = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, left, right):
        both = torch.cat([self.branch(left), self.branch(right)], 1)
        return self.head(self.joint(both).relu().mean((2, 3)))


class Mapped(Siamese):
    def forward(self, views):
        return super().forward(views["left"], views["right"])


@pytest.fixture(scope="module")
def stereo():
    """A trained network, and pairs of pictures that differ by a shift of 0, 1 or 2 columns."""
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(480, 1, 12, 12, generator=generator)
    shifts = torch.arange(480) % 3
    right = torch.stack([picture.roll(int(shift), 2) for picture, shift in zip(left, shifts, strict=True)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Siamese()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(left[:320], right[:320]), shifts[:320]).backward()
            optimizer.step()
    return model.eval(), left, right, shifts


class Pairs(torch.utils.data.Dataset):
    def __init__(self, stereo, chosen, named):
        _, left, right, shifts = stereo
        self.parts, self.named = (left[chosen], right[chosen], shifts[chosen]), named

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        left, right, shift = (part[index] for part in self.parts)
        return ({"right": right, "left": left} if self.named else (left, right)), shift


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        pytest.param("approx", "positions", marks=pytest.mark.slow),
        ("approx", "one mapping"),
        pytest.param("auto", "names", marks=pytest.mark.slow),
        pytest.param("auto", "positions", marks=pytest.mark.slow),
        pytest.param("auto", "one mapping", marks=pytest.mark.slow),
    ],
)
def test_models_of_several_inputs(stereo, form, mode):
    trained, left, right, _ = stereo
    model = trained
    if form == "one mapping":
        model = Mapped()
        model.load_state_dict(trained.state_dict())
        model.eval()
    inputs = ({"left": left[:1], "right": right[:1]},) if form == "one mapping" else (left[:1], right[:1])
    data, calib = (
        DataLoader(Pairs(stereo, chosen, form != "positions"), 32)
        for chosen in (slice(320, None), slice(320))
    )
    budget = {"rank": 1} if mode == "approx" else {"target_macs": 0.4}
    result = convert(
        model, inputs, mode, data=data, calib=calib, gate="none" if mode == "approx" else "macs", **budget,
        finetune=2 if form == "positions" else 0, timing=Timing(runs=0),
    )  # fmt: skip
    assert converted(result.report)
    with torch.no_grad():
        expected = result.model(*inputs)
        plain = model(*inputs)
    assert not torch.equal(expected, plain)
    found = result.report["delta"]["accuracy_drop_pp"]
    assert found["n"] == 160
    assert result.report["original"]["accuracy"]["top1"] > 0.9
    labelled = [(x, y) for x, y in data]
    right_now = sum(int((result.model(*_given(x, form)).argmax(1) == y).sum()) for x, y in labelled)
    assert result.report["converted"]["accuracy"]["top1"] == pytest.approx(right_now / 160)
    assert result.report["verification"]["onnx_max_abs_diff"] is not None
    if form == "positions":
        assert result.report["approximation"]["finetune"]["history"]


def _given(x, form):
    if form == "one mapping":
        return (x,)
    return (x["left"], x["right"]) if form == "names" else x


def test_one_tensor_for_a_model_of_two(stereo):
    model, left, right, _ = stereo
    loader = DataLoader(TensorDataset(left[:8], torch.full((8,), -1)))
    with pytest.raises(SepconvertError, match=r"images to fit to are 1×12×12, .* run on 1×12×12 and 1×12×12"):
        convert(model, (left[:1], right[:1]), "approx", rank=1, calib=loader, timing=Timing(runs=0))


def test_models_of_several_inputs_are_fitted_to_weights_alone(stereo):
    model, left, right, _ = stereo
    result = convert(model, (left[:1], right[:1]), "approx", rank=1, gate="none", timing=Timing(runs=0))
    assert converted(result.report)
    assert result.report["verification"]["onnx_max_abs_diff"] is not None


def test_few_channels_are_kept_unless_they_are_named(calib):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    x = torch.randn(8, 3, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.zeros(8).long()))
    report = decided(model, x[:1], mode="approx", rank=1, calib=loader).report
    reasons = [layer["reason"] for layer in report["layers"]]
    assert "including 0 by name converts it nonetheless" in reasons[0]
    assert reasons[1:] == [
        "a 1×1 convolution is pointwise already",
        "it does not mix channels: it is depthwise already",
    ]
    report = decided(
        model, x[:1], mode="approx", rank=1, calib=loader, selection=Selection(include=["0"])
    ).report
    assert [layer["name"] for layer in converted(report)] == ["0"]
    report = decided(
        model, x[:1], mode="approx", rank=9, calib=loader, selection=Selection(include=["0"])
    ).report
    assert "no form passes the gate" in report["layers"][0]["reason"]


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3),
    ],
)
def test_labels_do_not_make_up_for_answers_that_are_not_the_original_s(middle):
    """Statistics that no data has seen, and labels at random: re-estimation can please but the labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        middle, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].running_var.fill_(0.01)  # ten times too sure, of what is wrong for most labels
        model[-1].weight.mul_(3)
    x, y = torch.randn(96, 8, 10, 10), torch.randint(0, 5, (96,))
    calib = DataLoader(TensorDataset(x, y), batch_size=32)
    result = decided(model, x[:4], mode="approx", rank=9, gate="none", calib=calib)
    *_, fitted, renewed = result.report["approximation"]["steps"]
    assert renewed["name"] == "re-estimate BatchNorm"
    assert renewed["divergence"] > fitted["divergence"]
    assert renewed["label_loss"] < fitted["label_loss"]
    assert not renewed["kept"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


class Logarithm(nn.Module):
    """The logarithm of means, most of which are negative."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)).log()


def test_an_original_that_answers_nan():
    torch.manual_seed(0)
    x = torch.randn(16, 8, 6, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(16).long()), batch_size=8)
    with pytest.raises(SepconvertError, match="NaN or Inf"):
        decided(Logarithm(), x[:2], mode="approx", rank=1, calib=loader)


@pytest.fixture(scope="module")
def timed(small, tmp_path_factory):
    """A function for auto mode at measured cost, which keeps the times of layers from call to call."""
    model, loader = small
    cache, images = tmp_path_factory.mktemp("cache"), torch.cat([x for x, _ in loader])
    timing, calibration = Timing(threads=1, runs=10, cache=cache), Calibration(images=64)
    calib, data = apart(loader)
    return lambda: convert(
        model,
        images[:2],
        "auto",
        max_drop=5.0,
        calib=calib,
        data=data,
        calibration=calibration,
        timing=timing,
    )


@pytest.mark.slow
def test_auto_mode(timed):
    report = timed().report
    json.dumps(report, allow_nan=False)
    found = report["approximation"]
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 5.0
    # A plan that replaces nothing is not timed.
    assert all(
        point["latency_speedup"] for point in found["curve"] if point["heldout"] and point["converted"]
    )
    assert found["unit"] == "milliseconds"
    for point in found["curve"]:
        assert point["lower_bound"] <= point["expected_divergence"] + 1e-12
    for layer in report["layers"]:
        assert (layer["decision"] == "kept") == (layer["scheme"] is None)
        assert layer["reason"]
    (delivered,) = [point for point in found["curve"] if point["delivered"]]
    assert {name: tuple(form) for name, form in delivered["ranks"].items()} == {
        layer["name"]: (layer["scheme"], layer["rank"]) for layer in converted(report)
    }


def test_the_curve_of_auto_mode(small):
    report = convert_small(small, mode="auto", gate="macs", max_drop=5.0, data=apart(small[1])[1]).report
    curve = report["approximation"]["curve"]
    carried_out = [point for point in curve if point["heldout"]]
    assert len(carried_out) >= 5
    assert all(point["lower_bound"] <= point["expected_divergence"] for point in curve)
    assert [point["cost"] for point in curve] == sorted((point["cost"] for point in curve), reverse=True)
    # Those far down the curve diverge further.
    assert carried_out[-1]["heldout"]["divergence"] > carried_out[0]["heldout"]["divergence"]


@pytest.mark.slow
def test_the_same_times_give_the_same_offers(timed):
    first, second = (
        {(p["cost"], p["expected_divergence"]) for p in result.report["approximation"]["curve"][:3]}
        for result in (timed(), timed())
    )
    assert first == second


def test_shares_of_parameters(small):
    report = convert_small(small, mode="auto", gate="macs", target_params=0.7).report
    assert report["delta"]["params_ratio"] >= 1 / 0.7
    assert report["approximation"]["unit"] == "params"
    with pytest.raises(DemandNotMetError, match=r"`target_params` 0\.01"):
        convert_small(small, mode="auto", gate="macs", target_params=0.01)


def test_exact_forms_are_among_those_of_auto_mode(planted):
    """A kernel of rank 3, which is on no grid, is found, and costs the network nothing."""
    torch.manual_seed(0)
    conv = planted(16, 16, 3, rank=3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    x = torch.randn(64, 16, 10, 10)
    loader = DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), batch_size=32)
    report = decided(
        model,
        x[:1],
        mode="auto",
        gate="macs",
        target_macs=0.25,
        calib=loader,
        calibration=Calibration(images=64),
    ).report
    (layer,) = converted(report)
    assert (layer["scheme"], layer["rank"]) == ("spatial-vh", 3)
    assert layer["output_error"] < 1e-3


class Blurred(nn.Module):
    """Fixed filters that separate, and some that do not, before a trained layer."""

    def __init__(self, blur):
        super().__init__()
        self.register_buffer("blur", blur)
        self.register_buffer("odd", torch.randn(blur.shape, generator=torch.Generator().manual_seed(1)))
        self.conv = nn.Conv2d(len(blur), 8, 3)

    def forward(self, x):
        x = F.conv2d(x, self.blur, padding=2, groups=len(self.blur))
        return self.conv(F.conv2d(x, self.odd, padding=2, groups=len(self.blur))).mean((2, 3))


def test_fixed_filters_take_exact_forms_in_auto_mode(binomial):
    torch.manual_seed(0)
    model, x = Blurred(binomial(8)).eval(), torch.randn(48, 8, 16, 16)
    loader = DataLoader(TensorDataset(x, torch.full((48,), -1)), batch_size=16)
    result = decided(
        model,
        x[:1],
        mode="auto",
        gate="macs",
        target_macs=0.9,
        calib=loader,
        calibration=Calibration(images=48),
    )
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert layers["conv2d_0"]["scheme"].startswith("channelwise-spatial")
    assert (layers["conv2d_0"]["rank"], layers["conv2d_0"]["params"]) == (1, [0, 0])
    assert layers["conv2d_0"]["output_error"] < 1e-6
    assert "fixed: exact forms alone" in layers["conv2d_1"]["reason"]
    assert layers["conv"]["decision"] == "kept"  # as the others suffice
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    report = decided(
        model, x[:1], mode="approx", rank=1, calib=loader, calibration=Calibration(images=48)
    ).report
    assert "fixed: exact forms alone" in report["layers"][0]["reason"]


def test_pointwise_and_depthwise_layers_have_forms_in_auto_mode(planted):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 5, padding=2, groups=64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = torch.randn(64, 32, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), batch_size=32)
    report = decided(
        model,
        x[:1],
        mode="auto",
        gate="macs",
        target_macs=0.5,
        calib=loader,
        calibration=Calibration(images=64),
    ).report
    schemes = {layer["name"]: layer["scheme"] for layer in converted(report)}
    assert schemes["0"] in ("output-subspace", "input-subspace")
    assert schemes["2"].startswith("channelwise-spatial")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_auto_mode_has_what_exact_mode_has_whatever_time_there_is(samples, seconds, tmp_path):
    """What is free of loss is in every plan, and the whole is as fast as that of exact mode."""
    x, model = samples[0][:300], load()
    labels = model.eval()(x).argmax(1)
    calib = DataLoader(TensorDataset(x[:200], labels[:200]), batch_size=64)
    data = DataLoader(TensorDataset(x[200:], labels[200:]), batch_size=100)
    folders = tmp_path / "exact", tmp_path / "auto"
    exact = convert(model, x[:8], out=folders[0], timing=Timing(runs=0, threads=1))
    auto = convert(
        model, x[:8], "auto", data=data, calib=calib, max_drop=5.0, calibration=Calibration(images=200),
        timing=Timing(runs=20, threads=1, measure_seconds=seconds), out=folders[1],
    )  # fmt: skip
    kept = {layer["name"]: layer["reason"] for layer in auto.report["layers"] if layer["decision"] == "kept"}
    converted = {layer["name"] for layer in exact.report["layers"] if layer["decision"] == "converted"}
    assert converted
    for name in converted & kept.keys():
        # Measured or modelled, and no gain.
        assert "faster" in kept[name] or "saves no time" in kept[name], name
    assert not any("no time was left" in reason for reason in kept.values())
    assert bool(auto.report["approximation"]["modelled"]) or seconds > 0
    timed = measure_pair(
        *(Deployed(folder / "converted.onnx", Runtime(1)) for folder in folders),
        onnx_feed(model, (x[:8],)), runs=30, batch=8, seed=0,
    )  # fmt: skip
    assert not (timed.speedup.significant and timed.speedup.median < 1)


def test_a_segmenter_is_compared_by_its_pixels():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*body, nn.Conv2d(16, 5, 1))
    x = torch.randn(32, 3, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.full((32,), -1)), 8)
    found = convert(
        model, x[:1], "approx", rank=2, calib=loader, timing=Timing(runs=0), finetune=1, gate="none"
    )
    described = found.report["approximation"]
    assert described["divergence"] == ["kl"]
    assert all(0 < step["agreement"] < 1 for step in described["steps"])
    assert described["finetune"]["delivered"]["divergence"] <= described["steps"][-2]["divergence"] * 1.01


def test_a_second_conversion_fits_nothing_anew(small, tmp_path, monkeypatch):
    def run(**options):
        return convert_small(
            small, "auto", target_macs=0.6, gate="macs", timing=Timing(runs=0, cache=tmp_path), **options
        )

    first = run()
    with monkeypatch.context() as without:
        without.setattr(Problem, "fit", None)
        again = run()
    assert again.plan["layers"] == first.plan["layers"]
    assert again.report["approximation"]["steps"] == first.report["approximation"]["steps"]
    for one, other in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_other_weights_images_and_seeds_are_fitted_anew(small, tmp_path, monkeypatch):
    def run(network, **options):
        return convert_small(
            network, "auto", target_macs=0.6, gate="macs", timing=Timing(runs=0, cache=tmp_path), **options
        )

    model, loader = small
    run(small)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    monkeypatch.setattr(Problem, "fit", None)
    for network, options in (((other, loader), {}), (small, {"seed": 1})):
        with pytest.raises(TypeError):
            run(network, **options)
