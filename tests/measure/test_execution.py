"""Times of operators are attributed to the right layers, and a small gain has a cause."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from sepconvert.base.environment import Runtime
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.execution import (
    Gain,
    OperatorTime,
    by_layer,
    layer_executions,
    model_execution,
    operator_times,
)
from sepconvert.measure.latency import Deployed

BLOCKED, DEPTHWISE, POINTWISE = (
    "direct, blocked layout",
    "depthwise, blocked layout",
    "pointwise, blocked layout",
)


def operator(layer: str | None, kernel: str | None, milliseconds: float, **others: Any) -> OperatorTime:
    kind = "Conv" if kernel else "Add"
    return OperatorTime(**{"name": "any", "layer": layer, "operator": kind, "kernel": kernel,
                           "milliseconds": milliseconds, "bytes_moved": 1000, **others})  # fmt: skip


def cause(
    before: list[OperatorTime], after: list[OperatorTime], macs: tuple[int, int], gain: float
) -> str | None:
    return layer_executions(before, after, {"conv": Gain(macs, gain, "kind")})["conv"].cause


MACS = (8_000_000, 1_000_000)  # 8 times fewer; four times as fast is half of what they promise
DENSE = operator("conv", BLOCKED, 4.0, bytes_moved=10_000)


def test_what_runs_of_a_layer():
    after = [
        operator("conv.branches.0.0", DEPTHWISE, 0.5, bytes_moved=2000),
        operator("conv.branches.0.1", POINTWISE, 1.0, bytes_moved=3000),
        operator("conv.branches.1.1", POINTWISE, 0.25, bytes_moved=3000),
        operator("conv2", BLOCKED, 100.0),  # a name that only begins so
    ]
    found = layer_executions(
        [DENSE, operator("conv2", BLOCKED, 100.0)], after, {"conv": Gain(MACS, 2.3, "kind")}
    )["conv"]
    assert found.milliseconds == (4.0, 1.75)
    assert found.operators == (1, 3)
    assert found.bytes_moved == (10_000, 8000)
    assert found.kernels == ((BLOCKED,), (DEPTHWISE, POINTWISE))


def test_a_layer_of_which_nothing_is_found_is_left_out():
    gains = {name: Gain(MACS, 1.0, "kind") for name in ("conv", "gone")}
    assert layer_executions([DENSE], [DENSE], gains).keys() == {"conv"}


def test_a_gain_of_half_of_what_macs_promise_needs_no_cause():
    after = [operator("conv.0", POINTWISE, 1.0)]
    assert cause([DENSE], after, MACS, 4.0) is None
    assert cause([DENSE], after, MACS, 3.9) is not None
    assert cause([DENSE], after, (8, 9), 0.5) is None  # nothing was promised
    assert cause([DENSE], after, (14, 10), 0.9) is not None  # more than half, but a loss
    assert cause([DENSE], after, (14, 10), 1.0) is None


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([operator("conv.0", "grouped, im2col and GEMM", 3.0)],
         "0.3 GMAC/s, the original at 2.0: grouped, im2col and GEMM instead of the runtime's kernels "
         "for blocked layouts"),
        ([operator("conv.0", POINTWISE, 0.01), operator("conv.1", POINTWISE, 0.01)],
         "2 operators of 10 µs each, mostly the cost of starting them"),
        ([operator("conv.0", DEPTHWISE, 2.0, bytes_moved=10_000)],
         "100.0 MACs per byte that it moves instead of 800.0, at 0.0 GB/s: memory bandwidth is the limit"),
        ([operator("conv.0", DEPTHWISE, 2.0, bytes_moved=10_000),
          operator("pool", None, 1.0, bytes_moved=11_000)],
         "100 % of its time is in depthwise, blocked layout"),  # more could flow
        ([operator("conv.0", DEPTHWISE, 1.5), operator("conv.1", POINTWISE, 0.5)],
         "75 % of its time is in depthwise, blocked layout"),
    ],
)  # fmt: skip
def test_causes(after, expected):
    assert cause([DENSE], after, MACS, 1.5).endswith(expected)


def test_layers_that_are_alike_have_one_cause():
    """One of them is timed a little above what no operator stays below, the other a little below."""
    before = [operator(name, BLOCKED, 4.0, bytes_moved=10_000) for name in ("conv", "twin", "other")]
    after = [operator("conv.0", POINTWISE, 0.0149), operator("twin.0", POINTWISE, 0.0147),
             operator("other.0", POINTWISE, 4.0)]  # fmt: skip
    gains = {name: Gain(MACS, 1.5, "kind") for name in ("conv", "twin")} | {
        "other": Gain(MACS, 1.5, "other kind")
    }
    found = layer_executions(before, after, gains)
    assert found["conv"].cause == found["twin"].cause
    assert "1 operators of 15 µs each" in found["conv"].cause
    assert found["other"].cause.endswith("100 % of its time is in pointwise, blocked layout")


def test_functional_convolutions_are_told_apart_by_their_order():
    functional = {"contrast": ["contrast.conv2d_0", "contrast.conv2d_1"], "": ["conv2d_0"]}
    blur, own = operator("contrast", DEPTHWISE, 1.0), operator(None, DEPTHWISE, 1.0)
    pad, stem = operator("contrast", None, 1.0), operator("stem", BLOCKED, 1.0)

    def names(operators: list[OperatorTime]) -> list[str | None]:
        return [each.layer for each in by_layer(operators, functional)]

    first, second = functional["contrast"]
    assert names([pad, blur, stem, own, pad, blur]) == [
        "contrast", first, "stem", "conv2d_0", "contrast", second
    ]  # fmt: skip
    assert names([blur, blur, blur, blur]) == [first, second, first, second]  # a module called twice
    assert names([blur, blur, blur]) == ["contrast"] * 3  # which of them nobody knows
    assert names([operator(None, None, 1.0, operator="ReorderInput")]) == [None]


def test_the_whole_model():
    reorder = operator(None, None, 0.125, operator="ReorderInput")
    before = [DENSE, operator("other", BLOCKED, 1.0), operator("pool", None, 0.5)]
    after = [reorder, operator("conv.0", POINTWISE, 2.0), operator("other", BLOCKED, 1.5), reorder,
             operator("pool", None, 0.25)]  # fmt: skip
    found = model_execution(before, after, ["conv"])
    assert found.to_dict() == {
        "converted": (4.0, 2.0), "kept": (1.0, 1.5), "layout": (0.0, 0.25), "other": (0.5, 0.25),
        "operators": (3, 5), "layout_changes": (0, 2),
    }  # fmt: skip


# Operators, as the runtime runs them


class Net(nn.Module):
    """Convolutions of each kind, a residual sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.point(torch.relu(self.deep(x))))
        return self.head(self.grouped(x).mean((2, 3)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    save_onnx(export_program(Net().eval(), (torch.randn(1, 3, 16, 16),)), path)
    return path


def times(path, level):
    feeds = {"x": np.zeros((1, 3, 16, 16), np.float32)}
    return operator_times(Deployed(path, Runtime(1, level)), feeds, runs=5)


KINDS = {"stem.0": "direct", "deep": "depthwise", "point": "pointwise", "grouped": "grouped"}


def test_a_profile_that_did_not_fit_on_the_disk_is_told(path):
    script = (
        "import numpy as np, resource, sys; from pathlib import Path;"
        "from sepconvert.base.environment import Runtime;"
        "from sepconvert.measure.execution import operator_times;"
        "from sepconvert.measure.latency import Deployed;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "feeds = {'x': np.zeros((1, 3, 16, 16), np.float32)};"
        "operator_times(Deployed(Path(sys.argv[1]), Runtime(1, 'all')), feeds, runs=5)"
    )
    command = [sys.executable, "-c", script, path]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert "SepconvertError" in found.stderr
    assert "did not write its profile there" in found.stderr


def test_blocked_layouts(path):
    found = {each.layer: each for each in times(path, "all") if each.operator == "Conv"}
    if not any("blocked" in each.kernel for each in found.values()):
        pytest.skip("this processor has no blocked layouts")
    assert found.keys() == KINDS.keys()
    for name in ("stem.0", "deep", "point"):  # groups of few channels are not blocked everywhere
        assert found[name].kernel == f"{KINDS[name]}, blocked layout"


def test_without_optimisation_every_operator_is_that_of_the_file(path):
    found = times(path, "none")
    kernels = {each.layer: each.kernel for each in found if each.operator == "Conv"}
    assert kernels == {
        name: "GEMM" if kind == "pointwise" else f"{kind}, im2col and GEMM" for name, kind in KINDS.items()
    }
    assert [each.layer for each in found if each.operator == "Gemm"] == ["head"]
    assert "stem.2" in [each.layer for each in found if each.operator == "Relu"]
    assert all(each.milliseconds >= 0 for each in found)
    assert sum(each.milliseconds for each in found) > 0
    grouped = next(each for each in found if each.layer == "grouped")
    weights = sum(parameter.numel() for parameter in Net().grouped.parameters())
    assert grouped.bytes_moved == 4 * (2 * 16 * 16 * 16 + weights)


class Blur(nn.Module):
    """A convolution that is no module, of a weight that files name and store once if two are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("binomial", torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.binomial.expand(16, 1, 3, 3), groups=16)


class Blurred(nn.Module):
    """Two of them, and a layer of the same weight in both places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3), Blur(), Blur()
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
        self.deep[1].load_state_dict(self.deep[0].state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.second(torch.relu(self.first(self.stem(x)))))


def test_equal_weights_do_not_make_one_layer_of_two(tmp_path):
    save_onnx(export_program(Blurred().eval(), (torch.randn(1, 3, 16, 16),)), tmp_path / "net.onnx")
    found = times(tmp_path / "net.onnx", "all")
    names = [each.layer for each in found if each.operator == "Conv"]
    assert names == ["stem", "first", "second", "deep.0", "deep.1"]


def test_operators_of_int8_files_belong_to_layers(tmp_path):
    """As ONNX Runtime's quantizer makes such files and its optimizer merges their operators."""

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.waiting = [{"input": np.random.default_rng(0).random((1, 3, 16, 16), np.float32)}]

        def get_next(self):
            return self.waiting.pop() if self.waiting else None

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1152, 4),
    ).eval()  # fmt: skip
    write_onnx(model, (torch.rand(1, 3, 16, 16),), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Batches(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    feed = {"input": np.zeros((1, 3, 16, 16), np.float32)}
    found = operator_times(Deployed(tmp_path / "int8.onnx", Runtime(1)), feed, runs=2)
    convolutions = [(each.layer, each.kernel) for each in found if each.operator == "QLinearConv"]
    assert convolutions == [("0", "int8, dense"), ("2", "int8, depthwise"), ("3", "int8, pointwise")]
    assert "6" in {each.layer for each in found if each.has_weights}
