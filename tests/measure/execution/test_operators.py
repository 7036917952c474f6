"""Times of operators, as the runtime runs them, are attributed to the right layers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from sepconvert.base.environment import Runtime
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.execution.operators import operator_times
from sepconvert.measure.latency import Deployed


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
    feeds = {"input": np.zeros((1, 3, 16, 16), np.float32)}
    return operator_times(Deployed(path, Runtime(1, level)), feeds, runs=5)


KINDS = {"stem.0": "direct", "deep": "depthwise", "point": "pointwise", "grouped": "grouped"}


def test_a_profile_that_did_not_fit_on_the_disk_is_told(path):
    script = (
        "import numpy as np, resource, sys; from pathlib import Path;"
        "from sepconvert.base.environment import Runtime;"
        "from sepconvert.measure.execution.operators import operator_times;"
        "from sepconvert.measure.latency import Deployed;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "feeds = {'input': np.zeros((1, 3, 16, 16), np.float32)};"
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
