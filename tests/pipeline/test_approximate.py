"""Approximate mode from beginning to end, on the small trained network of the demonstration."""

import json
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from hypothesis import assume, given
from strategies import geometries, numbered
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sepconvert import DemandNotMetError, SepconvertError, convert
from sepconvert.base.notes import ReasonCode
from sepconvert.base.options import Budget
from sepconvert.base.progress import silent
from sepconvert.calibration.heldout import Heldout
from sepconvert.calibration.record import record
from sepconvert.calibration.split import Calibration, split_data
from sepconvert.cli.demo.images import evaluation_data
from sepconvert.cli.demo.net import load, to_input
from sepconvert.measure.latency import PairTiming, Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.network.copies import private_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.trace import trace
from sepconvert.pipeline import convert as pipeline
from sepconvert.pipeline.replay import apply_plan
from sepconvert.planning.forms import Prices, depthwise_forms, measured_prices
from sepconvert.planning.plan import read_plan
from sepconvert.planning.survey import survey
from sepconvert.planning.timing import FormTime, FormTimes
from sepconvert.planning.workshop import Workshop
from sepconvert.report.sentences import warnings_of
from sepconvert.report.tables import summary


@pytest.fixture(scope="module")
def samples():
    images = evaluation_data()
    return to_input(images.x), torch.from_numpy(images.y)


@pytest.fixture(scope="module")
def calib(samples):
    return DataLoader(TensorDataset(samples[0][:200], samples[1][:200]), batch_size=64)


@pytest.fixture(scope="module")
def data(samples):
    return DataLoader(TensorDataset(samples[0][200:600], samples[1][200:600]), batch_size=200)


def approx(samples, **options):
    return convert(load(), samples[0][:2], mode="approx", **{"runs": 0, "calib_images": 200, **options})


@pytest.fixture(scope="module")
def fixed(samples, calib, data, tmp_path_factory):
    """Rank 2 everywhere, with its files."""
    folder = tmp_path_factory.mktemp("fixed")
    model = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = convert(
        model,
        samples[0][:2],
        mode="approx",
        rank=2,
        calib=calib,
        data=data,
        calib_images=200,
        runs=0,
        out=folder,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    places = [{each.data_ptr() for each in net.parameters()} for net in (model, result.model)]
    assert places[0].isdisjoint(places[1])  # plans share memory with the original: the one delivered does not
    return result, folder


def converted(report):
    return [layer for layer in report["layers"] if layer["decision"] == "converted"]


def test_report(fixed):
    result, _ = fixed
    json.dumps(result.report, allow_nan=False)
    found = result.report["approximation"]
    assert found["metric"] == "data"
    assert found["calibration"] == {
        "origin": "--calib",
        "images": 150,
        "heldout": 50,
        "patches_per_unknown": 12,
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
    assert result.report["converted"]["accuracy"]["n"] == 400


def test_a_conversion_that_puts_accuracy_at_risk_says_so(samples, calib, fixed):
    """One depthwise kernel a channel is too little for this network, two are not."""
    x, y = samples
    others = DataLoader(TensorDataset(x[200:], y[200:]), batch_size=200)
    poor = {"rank": 1, "gate": "none", "calib": calib}
    drop, few = warnings_of(approx(samples, **poor, data=others).report)
    assert drop.text.startswith("accuracy falls by 1.")
    assert few.text.startswith("accuracy is at risk: the model keeps 14,587 of 143,786 parameters")
    assert "`finetune`" in few.text
    assert warnings_of(approx(samples, **poor).report) == [few]
    assert warnings_of(fixed[0].report) == []


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


def test_a_plan_can_be_replayed(fixed, tmp_path):
    result, folder = fixed
    weights = folder / "converted.safetensors"
    plan = read_plan(result.plan)
    assert apply_plan(load(), plan, weights, tmp_path, model_sha256=None) is None
    assert (tmp_path / "converted.onnx").read_bytes() == (folder / "converted.onnx").read_bytes()


def test_the_same_command_gives_the_same_weights(small):
    first, second = (convert_small(small, rank=2) for _ in range(2))
    expected = first.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())
    assert first.plan == second.plan


@pytest.fixture(scope="module")
def small():
    """An untrained network, images, and for labels what it says of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    x = torch.randn(300, 3, 14, 14) + torch.randn(300, 3, 1, 1)
    with torch.no_grad():
        return model, DataLoader(TensorDataset(x, model(x).argmax(1)), batch_size=100)


def convert_small(small, **options):
    model, loader = small
    images = torch.cat([x for x, _ in loader])
    options = {"mode": "approx", "runs": 0, "calib": loader, "calib_images": 64, **options}
    return convert(model, images[:2], **options)


def test_budgets(small):
    result = convert_small(small, target_macs=0.6, data=small[1])
    assert result.report["delta"]["macs_ratio"] >= 1 / 0.6
    result = convert_small(small, max_drop=5.0, data=small[1])
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
    assert all("latency_speedup" in point for point in caught.value.curve)
    assert len(caught.value.curve) >= 3
    with pytest.raises(DemandNotMetError, match=r"`rank` 1 and `max_drop` 0 .*smallest drop"):
        convert_small(small, rank=1, max_drop=0, data=small[1])


def test_a_demanded_speed_is_measured(small):
    model, loader = small
    options = {"mode": "approx", "calib": loader, "calib_images": 64, "runs": 5}
    with pytest.raises(DemandNotMetError, match=r"`min_speedup` 50 .*largest speed-up") as caught:
        convert(model, torch.randn(1, 3, 14, 14), min_speedup=50, **options)
    assert any(point["latency_speedup"] for point in caught.value.curve)
    report = convert(model, torch.randn(1, 3, 14, 14), min_speedup=0.01, **options).report
    assert any(point["latency_speedup"] for point in report["approximation"]["curve"])


def test_a_demanded_speed_holds_of_the_files_too(small, monkeypatch):
    model, loader = small
    measured = pipeline.time_files

    def slower(*arguments: Any) -> PairTiming:
        speedup = Speedup(0.005, Interval(0.004, 0.006), Interval(0.9, 1.1))
        return replace(measured(*arguments), speedup=speedup)

    monkeypatch.setattr(pipeline, "time_files", slower)
    options = {"mode": "approx", "calib": loader, "calib_images": 64, "runs": 5}
    with pytest.raises(DemandNotMetError, match=r"--min-speedup 0.01: .*0.01× as fast \[0.00, 0.01\]"):
        convert(model, torch.randn(1, 3, 14, 14), min_speedup=0.01, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank`: expected"),
        ({"target_macs": 1.5}, "`target_macs`: expected"),
        ({"min_speedup": -1}, "`min_speedup`: expected"),
        ({"max_drop": float("nan")}, "`max_drop`: expected"),
        ({"rank": 1, "target_macs": 0.5}, "pass one of them"),
        ({}, "need a budget"),
        ({"rank": 1, "finetune": 2}, "--finetune: needs images to train on"),
        ({"max_drop": 1.0}, "`max_drop`: needs labelled data"),
        ({"rank": 1, "calib_images": 0}, "`images`: expected a whole number from 1, got 0"),
    ],
)
def test_bad_demands(samples, options, message):
    with pytest.raises(SepconvertError, match=message):
        approx(samples, **options)
    with pytest.raises(SepconvertError, match="are for the modes approx and auto"):
        convert(load(), samples[0][:2], rank=1)


def test_without_images_the_weights_are_fitted_and_the_report_says_so(samples):
    result = approx(samples, rank=2)
    assert result.report["approximation"]["metric"] == "weights"
    assert result.report["approximation"]["steps"] == []
    assert converted(result.report)


class Recorded(Dataset):
    """Remembers which samples were asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], self.y[index]


def test_what_is_calibrated_on_is_not_scored(samples):
    dataset = Recorded(samples[0][:300], samples[1][:300])
    parts = split_data(DataLoader(dataset, batch_size=32), None, None, 100, 0, seed=0)
    calibrated = set(dataset.asked)
    assert len(calibrated) == 100
    assert parts.calibration.origin == "split off --data, and not scored"
    dataset.asked.clear()
    assert sum(len(x) for x, _ in parts.scored) == 200
    assert calibrated.isdisjoint(dataset.asked)
    # What is held out is not trained on either.
    parts = split_data(None, DataLoader(dataset, batch_size=32), None, 100, 3, seed=0)
    dataset.asked.clear()
    heldout = [x for x, _ in parts.heldout] and set(dataset.asked)
    dataset.asked.clear()
    assert sum(len(x) for x, _ in parts.train) == 275
    assert heldout.isdisjoint(dataset.asked)


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(small, count):
    model, loader = small
    x, y = next(iter(loader))
    few = DataLoader(TensorDataset(x[:count], y[:count]))
    result = convert(model, x[:1], mode="approx", rank=2, calib=few, runs=0)
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
            approx(samples, rank=1, calib=loader(samples[0][:8]), train=odd, finetune=1)
    with pytest.raises(SepconvertError, match="every image is of one colour"):
        approx(samples, rank=1, calib=loader(torch.zeros(8, 1, 28, 28)))


def test_models_of_several_inputs_are_fitted_to_weights_alone(planted):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = planted(8, 16, rank=9), planted(8, 16, rank=9, seed=1)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x = torch.randn(8, 8, 10, 10)
    loader = DataLoader(TensorDataset(x, torch.full((8,), -1)))
    with pytest.raises(SepconvertError, match="the model takes 2 tensors, and can be shown one"):
        convert(Sum(), (x[:1], x[1:2]), "approx", rank=1, calib=loader, runs=0)
    result = convert(Sum(), (x[:1], x[1:2]), "approx", rank=1, runs=0)
    assert len(converted(result.report)) == 2
    assert result.report["verification"]["onnx_max_abs_diff"] is not None


def test_batches_of_calibration_do_not_hang_on_those_of_the_loader(samples):
    parts = [
        split_data(None, DataLoader(TensorDataset(*samples), batch_size=size), None, 400, 0, 0)
        for size in (1, 200)
    ]
    one, many = (part.calibration.fit for part in parts)
    assert [len(batch) for batch in one] == [64, 64, 64, 64, 44]
    assert all(map(torch.equal, one, many))


def test_few_channels_are_kept_unless_they_are_named(calib):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    x = torch.randn(8, 3, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.zeros(8).long()))
    report = convert(model, x[:1], mode="approx", rank=1, calib=loader, runs=0).report
    reasons = [layer["reason"] for layer in report["layers"]]
    assert "including 0 by name converts it nonetheless" in reasons[0]
    assert reasons[1:] == [
        "a 1×1 convolution is pointwise already",
        "it does not mix channels: it is depthwise already",
    ]
    report = convert(model, x[:1], mode="approx", rank=1, calib=loader, include=["0"], runs=0).report
    assert [layer["name"] for layer in converted(report)] == ["0"]
    report = convert(model, x[:1], mode="approx", rank=9, calib=loader, include=["0"], runs=0).report
    assert "no form passes the gate" in report["layers"][0]["reason"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@numbered(200)
@given(geometries())
def test_full_rank_is_the_original_on_every_kind_of_layer(geometry):
    conv = geometry.conv()
    dtype = conv.weight.dtype
    if dtype not in (torch.float32, torch.float64):
        conv, dtype = conv.float(), torch.float32
    model = nn.Sequential(conv).eval()
    images = geometry.inputs().to(dtype)
    images = images if images.ndim == 4 else images[None]
    sites = [
        site
        for site in trace(private_copy(model), (images,))
        if site.conv is not None and min(site.conv.spec.weight_shape[0] // site.conv.spec.groups, 2) > 1
        and site.conv.spec.weight_shape[1] > 1 and max(site.conv.spec.kernel_size) > 1
    ]  # fmt: skip
    assume(sites)
    full = conv.weight[0, 0].numel()
    prices = {site.name: Prices(1, dict.fromkeys(depthwise_forms(site.conv.spec, full), 1)) for site in sites}
    answers = record(model, {0: images}, sites, images=1, seed=0)
    calibration = Calibration((images,), (images,), "test", answers)
    heldout = Heldout(model, calibration.heldout)
    found = survey(model, sites, calibration, heldout, prices, silent)
    choice = {name: each.candidates()[0] for name, each in found.items()}
    fitted = Workshop(model, sites, found, calibration, heldout, silent).carry_out(choice)
    with torch.no_grad():
        expected, actual = model(images), fitted.model(images)
        magnitude = nn.functional.conv2d(
            torch.ones_like(images[:1, :, :1, :1]).expand(-1, -1, *conv.kernel_size) * images.abs().max(),
            conv.weight.abs(), groups=conv.groups,
        ).max()  # fmt: skip
    # Sums of products of factors that are rounded: about the magnitude of the terms times eps·κ.
    assert (actual - expected).abs().max() <= 1e3 * torch.finfo(dtype).eps * (magnitude + 1)


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
    result = convert(model, x[:4], mode="approx", rank=9, gate="none", calib=calib, runs=0)
    *_, fitted, renewed = result.report["approximation"]["steps"]
    assert renewed["name"] == "re-estimate BatchNorm"
    assert renewed["divergence"] > fitted["divergence"]
    assert renewed["label_loss"] < fitted["label_loss"]
    assert not renewed["kept"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_plans_have_in_common_is_fitted_once():
    """Layers before the first that differs are taken over; the result is, bit by bit, the same."""
    torch.manual_seed(0)
    twice = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    images = torch.randn(24, 3, 14, 14)
    sites = [site for site in trace(private_copy(model), (images[:1],)) if site.name != "0"]
    answers = record(model, {0: images}, sites, images=24, seed=0)
    calibration = Calibration((images,), (images[:4],), "test", answers)
    heldout = Heldout(model, calibration.heldout)
    forms = {site.name: dict.fromkeys([("depthwise-pointwise", r) for r in (1, 2, 3)], 1) for site in sites}
    prices = {name: Prices(4, {form: form[1] for form in each}) for name, each in forms.items()}
    found = survey(model, sites, calibration, heldout, prices, silent)
    fitted = []

    def counted(each, description):
        fitted.extend([description] * len(each))
        return each

    def workshop():
        return Workshop(model, sites, found, calibration, heldout, counted)

    def plan(ranks, shop):
        fitted.clear()
        offered = {name: {c.rank: c for c in each.candidates()} for name, each in found.items()}
        return shop.carry_out({name: offered[name][rank] for name, rank in ranks.items()})

    first, second = {"2": 1, "4": 2, "8": 1}, {"2": 1, "4": 2, "8": 3}
    alone = plan(second, workshop())
    assert len(fitted) == 3
    shop = workshop()
    known = plan(first, shop), plan({"4": 2}, shop)
    after = plan(second, shop)
    assert len(fitted) == 1
    assert list(after.layers) == list(alone.layers)
    for one, other in zip(after.model.state_dict().values(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # The module that is called twice is the first to be fitted, and here it differs.
    plan({"2": 1, "4": 1, "8": 1}, shop)
    assert len(fitted) == 3
    plan({"4": 2, "8": 1}, shop)
    assert len(fitted) == 1
    assert plan(first, shop).layers == known[0].layers
    assert not fitted
    # What was not replaced is held once, however many plans there are.
    assert {each.model[0].weight.data_ptr() for each in (*known, alone)} == {model[0].weight.data_ptr()}


class Counting(nn.Module):
    """Remembers how many images it was shown."""

    shown = 0

    def forward(self, x):
        Counting.shown += len(x)
        return x


@pytest.mark.parametrize(("layers", "images"), [(2, 128), (40, 64), (200, 16)])
def test_sensitivities_take_time_that_is_linear_in_layers(layers, images):
    """Each is a pass of all layers: of more than 20, each is judged on fewer images, down to 16."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, (3, 1), padding=(1, 0)) for _ in range(layers)]
    model = nn.Sequential(Counting(), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    heldout = Heldout(model, torch.randn(200, 4, 2, 2).split(60))
    sites = trace(private_copy(model), (heldout.batches[0],))
    prices = {site.name: Prices(3, {("depthwise-pointwise", 1): 1}) for site in sites}
    Counting.shown = 0
    found = survey(model, sites, None, heldout, prices, silent)
    assert len(found) == layers
    # Once for what is expected and once for each layer; each copy of the model tries one image before.
    assert Counting.shown == (images + 1) * (layers + 1)


def test_budget_defaults():
    assert Budget().or_default(labelled=True, timed=False) == Budget(max_drop=1.0)
    assert Budget(rank=2).or_default(labelled=False, timed=False) == Budget(rank=2)


# Data at the edge


@pytest.mark.parametrize(("count", "role"), [(1, "data"), (0, "data"), (0, "calib")])
def test_too_few_images_to_split(samples, count, role):
    loader = DataLoader(TensorDataset(samples[0][:count], samples[1][:count]))
    parts = {"data": None, "calib": None, role: loader}
    with pytest.raises(SepconvertError):
        split_data(parts["data"], parts["calib"], None, 8, 0, seed=0)


def test_training_images_of_their_own_are_held_out_from(samples):
    """Those to fit to may have no labels where those to train on have some."""
    calib = DataLoader(TensorDataset(samples[0][:40]), batch_size=8)
    train = Recorded(samples[0][100:200], samples[1][100:200])
    parts = split_data(None, calib, DataLoader(train, batch_size=8), 40, 1, seed=0)
    assert parts.labelled
    assert all((labels == -1).all() for labels in parts.calibration.labels)
    train.asked.clear()
    judged = [y for _, y in parts.heldout] and set(train.asked)
    train.asked.clear()
    assert sum(len(x) for x, _ in parts.train) == 75
    assert len(judged) == 25
    assert judged.isdisjoint(train.asked)
    with pytest.raises(SepconvertError, match="needs images to judge by too, got 3 in all"):
        split_data(None, calib, DataLoader(TensorDataset(samples[0][:3])), 40, 1, seed=0)


def test_images_need_no_labels(samples):
    loader = DataLoader(TensorDataset(samples[0][:8]), batch_size=4)
    parts = split_data(None, loader, None, 8, 0, seed=0)
    assert sum(map(len, parts.calibration.fit)) == 6
    assert not parts.labelled


def test_labels_of_images_held_out_count(samples):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(27, 5)) for _ in range(2))
    x, y = torch.randn(9, 3, 3, 3), torch.tensor([0, 1, 2, 3, 4, -1, -1, 0, 7])  # 7 is none of the classes
    parts = ([x[:4], x[4:]], [y[:4], y[4:]])
    found = Heldout(model, *parts).measure(other)
    known = [0, 1, 2, 3, 4, 7]
    with torch.no_grad():
        logits = other(x)
        expected = nn.functional.cross_entropy(logits[known], y[known])
    assert found.label_loss == pytest.approx(float(expected), rel=1e-5)
    assert found.accuracy == float((logits[known].argmax(1) == y[known]).double().mean())
    without = Heldout(model, parts[0]).measure(other)
    assert (without.accuracy, without.label_loss) == (None, None)
    assert without.divergence == found.divergence == without.loss
    assert found.loss == found.divergence + found.label_loss
    # And they come from where the images come from.
    parts = split_data(None, DataLoader(TensorDataset(*samples), batch_size=7), None, 100, 0, seed=0)
    seen = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*samples, strict=True)}
    for images, labels in zip(parts.calibration.heldout, parts.calibration.labels, strict=True):
        assert [seen[tuple(image.flatten().tolist())] for image in images] == labels.tolist()


class Logarithm(nn.Module):
    """Of some images the original itself says NaN."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)).log()


def test_an_original_that_answers_nan():
    torch.manual_seed(0)
    x = torch.randn(16, 8, 6, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(16).long()), batch_size=8)
    try:
        report = convert(Logarithm(), x[:2], mode="approx", rank=1, calib=loader, runs=0).report
    except SepconvertError:
        return
    json.dumps(report, allow_nan=False)


# Every scheme, at measured cost


@pytest.fixture(scope="module")
def timed(small, tmp_path_factory):
    """Auto mode twice, with what the first has measured for the second."""
    cache = tmp_path_factory.mktemp("cache")
    options = {"mode": "auto", "max_drop": 5.0, "data": small[1], "threads": 1, "runs": 10, "cache": cache}
    return [convert_small(small, **options) for _ in range(2)]


def test_auto_mode(timed):
    report = timed[0].report
    json.dumps(report, allow_nan=False)
    found = report["approximation"]
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 5.0
    assert all(point["latency_speedup"] for point in found["curve"] if point["heldout"])
    assert found["unit"] == "milliseconds"
    for point in found["curve"]:
        assert point["lower_bound"] <= point["expected_divergence"] + 1e-12
    for layer in report["layers"]:
        assert layer["decision"] == "converted" or layer["reason"]
    (delivered,) = [point for point in found["curve"] if point["delivered"]]
    assert {name: tuple(form) for name, form in delivered["ranks"].items()} == {
        layer["name"]: (layer["scheme"], layer["rank"]) for layer in converted(report)
    }


def test_the_curve_of_auto_mode(small):
    report = convert_small(small, mode="auto", gate="macs", max_drop=5.0, data=small[1]).report
    curve = report["approximation"]["curve"]
    carried_out = [point for point in curve if point["heldout"]]
    assert len(carried_out) >= 6
    assert all(point["lower_bound"] <= point["expected_divergence"] for point in curve)
    assert [point["cost"] for point in curve] == sorted((point["cost"] for point in curve), reverse=True)
    # Those far down the curve diverge further.
    assert carried_out[-1]["heldout"]["divergence"] > carried_out[0]["heldout"]["divergence"]


def test_the_same_times_give_the_same_offers(timed):
    first, second = (
        {(p["cost"], p["expected_divergence"]) for p in result.report["approximation"]["curve"][:3]}
        for result in timed
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
    report = convert(
        model, x[:1], mode="auto", gate="macs", target_macs=0.25, calib=loader, calib_images=64, runs=0
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


def test_layers_of_many_macs_for_each_form_are_timed_first():
    """Else a filter of one form waits for layers of fifty, and time is up; exact forms do not wait either."""
    sites = {site.name: site for site in trace(load(), (torch.zeros(1, 1, 28, 28),))}
    counts = {"head.conv": 20, "contrast.conv2d_0": 1, "large.conv": 40, "edges.conv2d_0": 0}
    prices = {name: Prices(1.0, {("any", rank): 0.5 for rank in range(n)}) for name, n in counts.items()}
    held = ("any", 16)
    exact = {"large.conv": [held], "contrast.conv2d_0": [("any", 0)]}
    asked = []

    class TimeFor:
        """One call."""

        def forms(self, site, forms):
            asked.append((site.name, len(forms)))
            if len(asked) > 1:
                return None
            return FormTimes(1.0, {form: FormTime(0.4, faster=True) for form in forms})

    found, reasons = measured_prices([sites[name] for name in counts], prices, exact, TimeFor(), silent)
    assert asked == [
        ("large.conv", 1), ("contrast.conv2d_0", 1), ("contrast.conv2d_0", 1), ("large.conv", 40),
        ("head.conv", 20),
    ]  # fmt: skip
    assert found == {"large.conv": Prices(1.0, {held: 0.4})}
    assert reasons.keys() == {"contrast.conv2d_0", "head.conv"}
    assert {reason.code for reason in reasons.values()} == {ReasonCode.UNTIMED}


def test_fixed_filters_take_exact_forms_in_auto_mode(binomial):
    torch.manual_seed(0)
    model, x = Blurred(binomial(8)).eval(), torch.randn(48, 8, 16, 16)
    loader = DataLoader(TensorDataset(x, torch.full((48,), -1)), batch_size=16)
    result = convert(
        model, x[:1], mode="auto", gate="macs", target_macs=0.9, calib=loader, calib_images=48, runs=0
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
    report = convert(model, x[:1], mode="approx", rank=1, calib=loader, calib_images=48, runs=0).report
    assert "fixed: exact forms alone" in report["layers"][0]["reason"]


def test_pointwise_and_depthwise_layers_have_forms_in_auto_mode(planted):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 5, padding=2, groups=64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = torch.randn(64, 32, 12, 12)
    loader = DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), batch_size=32)
    report = convert(
        model, x[:1], mode="auto", gate="macs", target_macs=0.5, calib=loader, calib_images=64, runs=0
    ).report
    schemes = {layer["name"]: layer["scheme"] for layer in converted(report)}
    assert schemes["0"] in ("output-subspace", "input-subspace")
    assert schemes["2"].startswith("channelwise-spatial")


def test_of_plans_that_fine_tuning_brings_back_the_last_is_delivered(small, monkeypatch):
    monkeypatch.setattr("sepconvert.pipeline.delivery._WON_BACK", 1000.0)  # the cheapest plan of all
    report = convert_small(small, max_drop=0.5, data=small[1], finetune=1).report
    attempts = report["approximation"]["finetune"]["attempts"]
    assert attempts[0]["drop_pp"] > 0.5
    assert 1 <= len(attempts) <= 3
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 0.5
    within = [each for each in attempts if each["drop_pp"] <= 0.5]
    assert [each for each in attempts if each["delivered"]] == within[-1:]
    used = "fine-tune" in [step["name"] for step in report["approximation"]["steps"]]
    assert used is bool(within)
    assert "it was not delivered" in " ".join(summary(report).split())


def test_fine_tuning_may_win_back_what_a_plan_loses(small):
    report = convert_small(small, max_drop=30.0, data=small[1], finetune=1).report
    assert report["approximation"]["finetune"]["attempts"][-1]["delivered"]
    assert report["approximation"]["steps"][-1]["name"] == "fine-tune"
    assert report["delta"]["accuracy_drop_pp"]["value"] <= 30
