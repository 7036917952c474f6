import json
import math

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.measure.profiling import anatomy, as_inputs, read_profile


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)
    ).train()


@pytest.fixture(scope="module")
def measured(model):
    x, y = torch.randn(40, 3, 8, 8), torch.arange(40) % 7
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    return (
        sepconvert.profile(
            model, torch.randn(2, 3, 8, 8), data=loader, timing=sepconvert.Timing(runs=5, threads=1)
        ),
        x,
        y,
    )


def test_costs_are_of_one_sample(model, measured):
    profile, _, _ = measured
    pooling = profile.macs - (64 * 8 * 27 + 8 * 7)  # fvcore counts the elements that it pools
    assert pooling in (0, 8, 8 * 64)
    assert profile.flops == 2 * profile.macs
    assert profile.params == 8 * 27 + 8 + 8 * 7 + 7
    assert profile.onnx_bytes > profile.weight_bytes >= 4 * profile.params
    assert model.training


def test_accuracy_is_that_of_the_model_in_eval_mode(model, measured):
    profile, x, y = measured
    with torch.no_grad():
        correct = int((model.eval()(x).argmax(1) == y).sum())
    model.train()
    assert profile.accuracy.n == 40
    assert math.isclose(profile.accuracy.top1, correct / 40)


def test_json(measured):
    document = json.loads(json.dumps(measured[0].to_json(), allow_nan=False))
    assert set(document) >= {
        "params", "macs", "flops", "onnx_bytes", "latency_ms", "accuracy", "uncounted_ops",
    }  # fmt: skip
    assert set(document["latency_ms"]) >= {"median", "ci95", "p90", "runs", "threads", "batch"}
    assert (document["latency_ms"]["runs"], document["latency_ms"]["batch"]) == (5, 2)
    low, high = document["latency_ms"]["ci95"]
    assert 0 < low <= document["latency_ms"]["median"] <= high


def test_anatomy(model, measured):
    assert measured[0].anatomy is None
    found = sepconvert.profile(
        model, torch.randn(2, 3, 8, 8), timing=sepconvert.Timing(runs=5, threads=2), batches=[4, 1]
    ).anatomy
    assert [(each.threads, each.batch) for each in found.latencies] == [
        (threads, batch) for threads in (1, 2) for batch in (1, 2, 4)
    ]
    first = found.latencies[0]
    assert first.per_second == pytest.approx(1000 / first.median_ms)
    assert found.startup.session_ms > 0
    assert found.startup.first_run_ms > 0
    # The convolution's input, its output and, if that is not written in place, ReLU's: of one sample.
    assert found.peak_activation_bytes == 4 * 64 * (8 + 8)
    assert {each.layer for each in found.operators} >= {"0", "4"}
    document = found.to_json()
    assert set(document) == {"peak_activation_bytes", "startup", "latencies_ms", "operators"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_file_that_fixes_the_batch_is_timed_in_that_alone(model, tmp_path):
    path = tmp_path / "model.onnx"
    x = torch.randn(2, 3, 8, 8)
    save_onnx(export_program(model, (x,), dynamic_batch=False), path)
    found = anatomy(path, [x.numpy()], batches=[1, 8], runs=3, runtime=Runtime(1), seed=0)
    assert [each.batch for each in found.latencies] == [2]
    assert found.peak_activation_bytes == 2 * 4 * 64 * (8 + 8)


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="a provider of some installations",
)
def test_a_provider_without_threads_is_timed_once(model, tmp_path):
    path = tmp_path / "model.onnx"
    x = torch.randn(2, 3, 8, 8)
    save_onnx(export_program(model, (x,), dynamic_batch=False), path)
    runtime = Runtime(2, provider="azure")
    found = anatomy(path, [x.numpy()], batches=[], runs=3, runtime=runtime, seed=0)
    assert [each.threads for each in found.latencies] == [2]


def test_an_unknown_provider(model):
    with pytest.raises(SepconvertError, match=r"`provider`: expected one that .* has \(.*cpu.*\), got 'npu'"):
        sepconvert.profile(model, torch.randn(1, 3, 8, 8), timing=sepconvert.Timing(provider="npu"))


def test_comparison_prints_ratios_against_the_first(model, measured):
    other = sepconvert.profile(
        nn.Sequential(nn.Conv2d(3, 8, 1)), torch.randn(1, 3, 8, 8), timing=sepconvert.Timing(runs=0)
    )
    assert (other.latency, other.accuracy) == (None, None)
    text = str(sepconvert.compare(measured[0], other))
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert f"{other.macs:,} ({measured[0].macs / other.macs:.2f}×)" in lines["MACs"]
    assert f"{other.params:,} ({measured[0].params / other.params:.2f}×)" in lines["parameters"]
    assert "% of 40" in lines["top-1"]
    assert lines["top-1"].rstrip().endswith("-")


def test_inputs_that_do_not_fit(model):
    with pytest.raises(SepconvertError):
        sepconvert.profile(model, torch.randn(1, 4, 8, 8), timing=sepconvert.Timing(runs=0))


# Stored profiles


@pytest.fixture
def stored(measured):
    return {
        "schema": "sepconvert.profile/1",
        "model": {"path": "net.pt", "sha256": "12ab"},
        "environment": {"cpu": "fast", "threads": 1},
        **json.loads(json.dumps(measured[0].to_json())),
    }


def test_what_is_stored_is_read(measured, stored, tmp_path):
    (tmp_path / "net.json").write_text(json.dumps(stored))
    found = read_profile(tmp_path / "net.json")
    assert found.profile == measured[0]
    assert (found.model, found.sha256) == ("net.pt", "12ab")
    assert found.differences({"cpu": "fast", "threads": 1}) == []
    assert found.differences({"cpu": "slow", "threads": 1, "python": "4"}) == ["cpu (fast, slow)"]
    assert found.differences({"cpu": "fast", "threads": 1, "spinning": "on", "load_average": 9.0}) == [
        "spinning (None, on)"
    ]


KEYS = (
    "schema",
    "model",
    "environment",
    "params",
    "macs",
    "onnx_bytes",
    "weight_bytes",
    "latency_ms",
    "accuracy",
)


@pytest.mark.parametrize("key", [*KEYS, "uncounted_ops", "latency_ms.ci95", "latency_ms.runs", "accuracy.n"])
def test_a_missing_key_is_named(stored, tmp_path, key):
    *outer, last = key.split(".")
    inside = stored[outer[0]] if outer else stored
    del inside[last]
    (tmp_path / "net.json").write_text(json.dumps(stored))
    with pytest.raises(SepconvertError, match=rf"net.json: not a profile .* missing required field '{last}'"):
        read_profile(tmp_path / "net.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("params", -1), ("params", 1.5), ("macs", True), ("macs", None), ("onnx_bytes", "4"),
        ("weight_bytes", -4),
        ("latency_ms", {"median": math.nan}), ("latency_ms", {"quantiles": [math.inf] * 21}),
        ("latency_ms", {"quantiles": [1.0]}), ("latency_ms", {"quantiles": [2.0, *[1.0] * 20]}),
        ("latency_ms", {"batch": 0}), ("latency_ms", {"ci95": [9.0, 8.0]}), ("latency_ms", {"runs": -1}),
        ("latency_ms", {"ci95": [1.0]}), ("latency_ms", {"ci95": [0.1, "x"]}), ("latency_ms", 3),
        ("accuracy", {"top1": 1.5}), ("accuracy", {"top1": math.nan}), ("accuracy", {"top5": -0.1}),
        ("uncounted_ops", 3), ("environment", 3), ("model", []),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(stored, tmp_path, key, value):
    stored[key] = {**stored[key], **value} if isinstance(value, dict) else value
    (tmp_path / "net.json").write_text(json.dumps(stored))
    with pytest.raises(SepconvertError, match=r"net\.json: not a profile"):
        read_profile(tmp_path / "net.json")


def test_nesting_without_end_is_no_profile(tmp_path):
    (tmp_path / "net.json").write_text("[" * 200_000)
    with pytest.raises(SepconvertError, match=r"net\.json: not a profile"):
        read_profile(tmp_path / "net.json")


def test_another_version_is_named(stored, tmp_path):
    stored["schema"] = "sepconvert.profile/2"
    (tmp_path / "net.json").write_text(json.dumps(stored))
    with pytest.raises(SepconvertError, match=r"expected schema .*1., got .*2."):
        read_profile(tmp_path / "net.json")


def test_inputs_by_name():
    class Weighted(nn.Module):
        def forward(self, left, right, share=0.5):
            return share * left + (1 - share) * right

    left, right = torch.zeros(1, 2), torch.ones(1, 2)
    assert as_inputs(Weighted(), {"right": right, "left": left}) == (left, right, 0.5)
    assert as_inputs(nn.Identity(), left) == (left,)
    assert as_inputs(nn.Identity(), {"left": left}) == ({"left": left},)
