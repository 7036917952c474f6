"""BatchNorms go into sums of convolutions, log-sigmoids keep their digits, and the answer stays."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_ir.passes import PassResult, PostconditionError
from torch import nn

import sepconvert
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.passes import FoldBatchNormPass, LogSigmoidPass

X = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))


class Sums(nn.Module):
    """Sums of which the BatchNorm can be folded, and such of which it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(
            nn.Conv2d(4, 8, 3, padding=1, bias=bias) for bias in (False, True, False, True, False, True)
        )
        self.shared = nn.Conv2d(8, 8, 1, groups=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Conv2d(8, 5, 3)

    def forward(self, x):
        first, second, third, fourth, fifth, sixth = self.plain
        y = self.norms[0](first(x) + second(x) + third(x)).relu()  # three branches
        y = self.norms[1](self.shared(y) + self.shared(2 * y)).relu()  # one kernel in two places
        y = self.norms[2](self.shared(y) + fourth(x) + y)  # not of convolutions alone
        total = fifth(x) + sixth(x)
        return self.head(self.norms[3](total) * y + total)  # read elsewhere


def trained(model: nn.Module) -> nn.Module:
    """With statistics and weights of BatchNorm that are not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model.train()(3 * torch.randn_like(X) + 1)
    return model.eval()


def answer(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def operators(path, kind):
    return sum(node.op_type == kind for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_convolutions_take_in_their_batchnorm(tmp_path, dtype):
    model = trained(Sums())
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(X.double()).numpy()
    model.to(dtype)
    state = copy.deepcopy(model.state_dict())
    save_onnx(export_program(model, (X.to(dtype),)), tmp_path / "sums.onnx")
    assert operators(tmp_path / "sums.onnx", "BatchNormalization") == 2
    error = np.abs(answer(tmp_path / "sums.onnx", X.to(dtype)) - expected).max() / np.abs(expected).max()
    assert error < 20 * torch.finfo(dtype).eps
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_pass_says_whether_it_changed_the_model(tmp_path):
    """In place; and a model that was folded holds nothing more to fold."""
    program = torch.export.export(trained(Sums()), (X,))
    model = torch.onnx.export(program, dynamo=True, verbose=False).model
    first = FoldBatchNormPass()(model)
    assert first.modified
    assert first.model is model
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("BatchNormalization") == 2
    assert not FoldBatchNormPass()(model).modified
    assert [node.op_type for node in model.graph] == kinds


def test_a_pass_that_leaves_something_to_fold_breaks_its_contract():
    class Idle(FoldBatchNormPass):
        def call(self, model):
            return PassResult(model, False)

    program = torch.export.export(trained(Sums()), (X,))
    with pytest.raises(PostconditionError, match="could be folded are left"):
        Idle()(torch.onnx.export(program, dynamo=True, verbose=False).model)


def test_nothing_is_left_of_what_is_folded(tmp_path):
    save_onnx(export_program(trained(Sums()), (X,)), tmp_path / "sums.onnx")
    graph = onnx.load(str(tmp_path / "sums.onnx")).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read


@pytest.mark.parametrize("rank", [1, 3])
def test_branches_of_replaced_layers_need_no_batchnorm(tmp_path, rank):
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    )
    sepconvert.convert(
        trained(net),
        X,
        "approx",
        rank=rank,
        selection=sepconvert.Selection(include=["*"]),
        timing=sepconvert.Timing(runs=0),
        out=tmp_path,
    )
    assert operators(tmp_path / "converted.onnx", "BatchNormalization") == 0
    assert operators(tmp_path / "converted.onnx", "Conv") == 4 * rank


class Logarithms(nn.Module):
    def forward(self, x):
        return nn.functional.logsigmoid(x), x.sigmoid().log() + 1, (x.sigmoid() + 1).log(), x.sigmoid()


def test_log_sigmoids_are_finite_where_the_sigmoid_is_zero(tmp_path):
    x = torch.linspace(-300, 300, 81).reshape(1, 1, 9, 9)
    save_onnx(export_program(Logarithms(), (x,)), tmp_path / "logarithms.onnx")
    assert operators(tmp_path / "logarithms.onnx", "Softplus") == 1  # of two that are equal
    assert operators(tmp_path / "logarithms.onnx", "Log") == 1
    found = onnxruntime.InferenceSession(str(tmp_path / "logarithms.onnx")).run(None, {"x": x.numpy()})
    for value, exact in zip(found, Logarithms()(x.double()), strict=True):
        error = np.abs(value - exact.numpy())
        assert (error <= 4 * torch.finfo(torch.float32).eps * (1 + exact.abs().numpy())).all()


def test_the_pass_for_log_sigmoids_says_whether_it_changed_the_model():
    model = torch.onnx.export(torch.export.export(Logarithms(), (X,)), dynamo=True, verbose=False).model
    assert LogSigmoidPass()(model).modified
    assert not LogSigmoidPass()(model).modified


def test_a_log_sigmoid_that_is_left_breaks_the_contract():
    class Idle(LogSigmoidPass):
        def call(self, model):
            return PassResult(model, False)

    program = torch.export.export(Logarithms(), (X,))
    with pytest.raises(PostconditionError, match="logarithms of sigmoids are left"):
        Idle()(torch.onnx.export(program, dynamo=True, verbose=False).model)
