"""A report as the pipeline would make it, with numbers that are easy to recognise."""

from typing import Any

import pytest


def structure(scheme: str, rank: int, full_rank: int, error: float, **others: Any) -> dict[str, Any]:
    return {
        "scheme": scheme, "rank": rank, "full_rank": full_rank, "holds": False, "macs": 1, "paying_rank": 2,
        "best_relative_error": error, "tolerance": 1e-6,
        "singular_values_kept": [0.5, 0.25], "singular_values_dropped": [1.5e-9], **others,
    }  # fmt: skip


def layer(name: str, **others: Any) -> dict[str, Any]:
    """A layer that is kept."""
    kernel = {"kernel_size": [3, 3], "in_channels": 8, "out_channels": 16, "groups": 1}
    return {
        "name": name, "kind": "Conv2d", "kernel": kernel, "decision": "kept", "reason": "no exact structure",
        "scheme": None, "rank": None, "macs": [12_345, 12_345], "params": [100, 100], "weight_error": None,
        "output_error": None, "approximation": None, "latency_ms": None, "latency_speedup": None,
        "structures": [structure("spatial-vh", 24, 24, 0.125)], "execution": None,
        "spectrum": {"scheme": "spatial-vh", "cut": 6, "full_rank": 24, "values": [[1, 0.75], [24, 0.125]]},
        "exact": others.get("decision") == "converted",
        **others,
    }  # fmt: skip


def profile(params: int, macs: int, milliseconds: float, top1: float) -> dict[str, Any]:
    interval = [0.9 * milliseconds, 1.1 * milliseconds]
    return {
        "params": params, "macs": macs, "flops": 2 * macs, "onnx_bytes": 5 * params,
        "weight_bytes": 4 * params,
        "latency_ms": {
            "median": milliseconds, "ci95": interval, "runs": 50, "threads": 2, "batch": 1,
            "quantiles": [milliseconds * (0.9 + n / 100) for n in range(21)],
        },
        "accuracy": {"top1": top1, "top5": None, "n": 2000},
        "uncounted_ops": {"aten::add": 3, "aten::mul": 1},
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    """Two layers, one converted; 2 × fewer MACs, 4 × fewer parameters, 1.5 × as fast, 0.25 pp worse."""
    speedup = {"median": 1.5, "ci95": [1.4, 1.6], "significant": True, "noise_floor": [0.98, 1.02]}
    converted = layer(
        "large.conv", decision="converted", scheme="spatial-vh", rank=2, reason="rank 2 of 24",
        macs=[2_000_000, 500_000], weight_error=4.5e-8, latency_ms=[0.25, 0.125], latency_speedup=speedup,
        structures=[structure("spatial-vh", 2, 24, 6.5e-9, holds=True)],
        execution={
            "milliseconds": [0.5, 0.25], "operators": [1, 2], "bytes_moved": [2**20, 2**19],
            "kernels": [["direct, blocked layout"], ["grouped, im2col and GEMM"]], "cause": "memory is slow",
        },
    )  # fmt: skip
    return {
        "schema": "sepconvert.report/1",
        "mode": "exact",
        "model": {"path": "models/net.pt", "sha256": "0123456789abcdef" * 4},
        "environment": {"sepconvert": "0.1.0", "torch": "2.9", "threads": 2, "graph_optimization": "all"},
        "seed": 0,
        "dtype": "float32",
        "original": profile(4000, 2_012_345, 1.5, 0.9675),
        "converted": profile(1000, 1_006_172, 1.0, 0.965),
        "delta": {
            "params_ratio": 4.0,
            "macs_ratio": 2.0,
            "latency_speedup": dict(speedup),
            "accuracy_drop_pp": {"value": 0.25, "ci95": [-0.05, 0.55]},
            "agreement": 0.995,
        },
        "execution": {
            "converted": [1.0, 0.5], "kept": [0.25, 0.25], "layout": [0.0, 0.125], "other": [0.125, 0.125],
            "operators": [4, 6], "layout_changes": [0, 1],
        },
        "changed_predictions": {
            "count": 10, "lost": 6, "won": 1,
            "shown": [{"index": 31, "label": 7, "original": 7, "converted": 2}],
        },
        "layers": [layer("stem.conv"), converted],
        "verification": {
            "torch_max_abs_diff": 3.5e-8, "torch_tolerance": 4.5e-6, "torch_dtype": "float64",
            "onnx_max_abs_diff": 6.5e-8, "onnx_tolerance": 5.5e-6, "onnx_dtype": "float32",
            "onnx_reason": None, "passed": True, "worst_layer": "large.conv",
        },
        "approximation": None,
        "command": "sepconvert models/net.pt --data 'a b'",
        "export": {"dynamic_batch": True, "onnx_dtype": "float32", "reason": None, "missing": {}},
    }  # fmt: skip


@pytest.fixture
def bare(document: dict[str, Any]) -> dict[str, Any]:
    """The same without latency, accuracy, source and ONNX Runtime."""
    for side in ("original", "converted"):
        document[side].update(latency_ms=None, accuracy=None, uncounted_ops={})
    document["delta"].update(latency_speedup=None, accuracy_drop_pp=None, agreement=None, macs_ratio=None)
    document["layers"][1].update(latency_ms=None, latency_speedup=None, execution=None)
    document.update(model=None, execution=None, changed_predictions=None, command=None)
    document["verification"].update(onnx_max_abs_diff=None, onnx_tolerance=None, onnx_reason="no kernel")
    return document


@pytest.fixture
def approximate(document: dict[str, Any]) -> dict[str, Any]:
    """The same as an approximate conversion, on a curve of two plans."""
    errors = {
        "weight_error": 1.25, "output_error": 0.375, "output_error_of_weight_fit": 0.875,
        "output_error_alone": 0.5, "sensitivity": 2.5, "sweeps": 7,
    }  # fmt: skip
    document["layers"][1].update(
        scheme="depthwise-pointwise", rank=1, exact=False, approximation=errors, output_error=0.375,
    )  # fmt: skip
    document["verification"]["torch_tolerance"] = None
    curve = [
        {
            "macs": macs, "macs_ratio": ratio, "converted": count, "cost": macs,
            "expected_divergence": 0.5, "lower_bound": 0.25, "predicted_speedup": None,
            "heldout": {"divergence": 0.0625 * count, "agreement": 0.9}, "batchnorm_reestimated": False,
            "accuracy_drop_pp": drop, "latency_speedup": None, "delivered": count == 1, "ranks": {},
        }
        for macs, ratio, count, drop in (
            (2_012_345, 1.0, 0, None), (1_006_172, 2.0, 1, {"value": 0.25, "ci95": [-0.05, 0.55]}),
        )
    ]  # fmt: skip
    document.update(
        mode="approx",
        approximation={
            "metric": "data",
            "calibration": {"origin": "--calib", "images": 768, "heldout": 256, "patches_per_unknown": 12},
            "budget": {"rank": None, "target_macs": None, "min_speedup": None, "max_drop": 1.0},
            "curve": curve,
            "plans_measured_on_data": 1,
            "steps": [
                {"name": "fit the weights", "divergence": 9.5, "agreement": 0.15, "accuracy": 0.125,
                 "kept": False},
                {"name": "follow the drift, correct the bias", "divergence": 0.0625, "agreement": 0.9,
                 "accuracy": 0.875, "kept": True},
                {"name": "re-estimate BatchNorm", "divergence": 0.75, "agreement": 0.5, "accuracy": None,
                 "kept": False},
            ],
            "finetune": None,
        },
    )  # fmt: skip
    return document
