import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.cost import Counter, count

X = torch.randn(1, 8, 16, 12)


# Output pixels × output channels × input channels of a group × kernel area, worked out by hand.
CONVOLUTIONS = {
    "dense": (nn.Conv2d(8, 10, 3, padding=1), 16 * 12 * 10 * 8 * 9),
    "no bias": (nn.Conv2d(8, 10, 3, padding=1, bias=False), 16 * 12 * 10 * 8 * 9),
    "valid": (nn.Conv2d(8, 10, 3), 14 * 10 * 10 * 8 * 9),
    "strided": (nn.Conv2d(8, 10, 3, stride=(2, 3), padding=1), 8 * 4 * 10 * 8 * 9),
    "dilated": (nn.Conv2d(8, 10, 3, dilation=(2, 1)), 12 * 10 * 10 * 8 * 9),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), 16 * 12 * 12 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 5, padding=2, groups=8), 16 * 12 * 8 * 1 * 25),
    "pointwise": (nn.Conv2d(8, 10, 1), 16 * 12 * 10 * 8),
    "rectangular": (nn.Conv2d(8, 10, (3, 1), padding=(1, 0)), 16 * 12 * 10 * 8 * 3),
    "same": (nn.Conv2d(8, 10, (4, 3), padding="same"), 16 * 12 * 10 * 8 * 12),
    "same dilated": (nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8), 16 * 12 * 8 * 9),
    "valid by name": (nn.Conv2d(8, 10, 3, padding="valid"), 14 * 10 * 10 * 8 * 9),
    "reflect": (nn.Conv2d(8, 10, 3, padding=1, padding_mode="reflect"), 16 * 12 * 10 * 8 * 9),
    "circular same": (nn.Conv2d(8, 10, 3, padding="same", padding_mode="circular"), 16 * 12 * 10 * 8 * 9),
    # every *input* pixel meets the whole kernel
    "transposed": (nn.ConvTranspose2d(8, 10, 3, stride=2), 16 * 12 * 8 * 10 * 9),
    "transposed grouped": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), 16 * 12 * 8 * 3 * 9),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_by_hand(case: str) -> None:
    module, macs = CONVOLUTIONS[case]
    cost = count(nn.Sequential(module, nn.ReLU()), (X,))
    assert cost.macs == macs
    assert cost.flops == 2 * macs
    assert cost.params == sum(p.numel() for p in module.parameters())


def test_a_shared_module_counts_per_call_and_its_parameters_once() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    cost = count(nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(8, 4, 1)), (X,))
    assert cost.macs == 2 * 16 * 12 * 8 * 8 * 9 + 16 * 12 * 8 * 4
    assert cost.params == 8 * 8 * 9 + 8 + 8 * 4 + 4


def test_tied_parameters_count_once() -> None:
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    assert count(nn.Sequential(one, other), (torch.zeros(1, 6),)).params == 36 + 6 + 6


def test_functional_convolutions_count() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(8, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.get_buffer("kernel"), stride=2, padding=1, groups=8)

    cost = count(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sequential(Blur())), (X,))
    blur = 8 * 6 * 8 * 9
    assert cost.macs == 16 * 12 * 64 + blur
    assert cost.params == 8 * 8 + 8


def test_blur_pool_of_timm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm scripts activations on import, which recent torch deprecates
        from timm.layers.blur_pool import BlurPool2d
    cost = count(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), BlurPool2d(8)), (X,))
    assert cost.macs == 16 * 12 * 64 + 8 * 6 * 8 * 9
    assert cost.params == 64


def test_the_count_is_per_sample() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 10, 5))
    assert count(model, (X.repeat(6, 1, 1, 1),)) == count(model, (X,))


def test_eval_mode_counts_batch_norm_as_scale_and_shift_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert count(model, (X,)).macs == 16 * 12 * 8 * 4 + 2 * 16 * 12 * 4
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("counter", ["fvcore", "torch"])
def test_deformable_convolutions_count_as_dense_ones(counter: Counter) -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offsets, self.deform = nn.Conv2d(8, 18, 3), ops.DeformConv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.deform(x, self.offsets(x))  # type: ignore[no-any-return]

    cost = count(Deformable(), (X,), counter)
    assert (cost.macs, cost.counter) == ((X.shape[2] - 2) * (X.shape[3] - 2) * 8 * 9 * (18 + 4), counter)
    assert "torchvision::deform_conv2d" not in cost.uncounted_ops


def test_what_is_not_counted_is_named(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 8  # a Python number out of a shape: the tracer warns of it
            if bool(x.sum() > 1e9):
                return x
            return F.max_pool2d(x + torch.sigmoid(x), 2)

    cost = count(nn.Sequential(Residual(), nn.Conv2d(8, 4, 1)), (X,))
    assert cost.macs == 8 * 6 * 8 * 4
    assert cost.uncounted_ops["aten::max_pool2d"] == 1
    assert cost.uncounted_ops["aten::sigmoid"] == 1
    assert cost.uncounted_ops["aten::add"] == 1
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@dataclass
class Heads:
    logits: Tensor
    extra: Any


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: {"a": a, "b": b},
        lambda a, b: Heads(a, {"deep": [b, None, "text"]}),
        lambda a, b: (a, [b, 3]),
    ],
)
def test_every_head_of_a_structured_output_counts(pack: Any) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Any:
            return pack(self.model(x), self.other(x))

    macs = 16 * 12 * 8
    cost = count(TwoHeads(), (X,))
    assert cost.macs == 9 * macs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    assert count(model, (X.to(dtype),)).macs == 14 * 10 * 4 * (8 * 9 + 2)


def test_graph_modules() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1)))
    graph_module = fx.symbolic_trace(model)
    assert count(graph_module, (X,)) == count(model, (X,))


def test_exported_models() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")).eval()
    exported = torch.export.export(model, (X,)).module()
    expected = count(model, (X,))
    for each in (exported, nn.Sequential(exported)):
        cost = count(each, (X,))
        assert (cost.macs, cost.params) == (expected.macs, expected.params)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_what_cannot_be_traced_is_counted_as_it_runs(case: str) -> None:
    module, macs = CONVOLUTIONS[case]

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [module, nn.ReLU()]  # whose parameters the tracer takes for constants

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    cost = count(Listed(), (X.repeat(3, 1, 1, 1),))
    assert cost.counter == "torch"
    assert cost.macs == macs
    assert cost.uncounted_ops["aten::relu"] == 1
    counted_like_it = count(nn.Sequential(module, nn.BatchNorm2d(module.out_channels)), (X,), "torch")
    assert (counted_like_it.macs, counted_like_it.counter) == (macs, "torch")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Untraceable(), (X,), r"runs on \(1, 8, 16, 12\), got ValueError: first line; check"),
        (nn.Conv2d(3, 4, 3), (X,), r"got RuntimeError: Given groups=1, .* to have 3 channels"),
        (nn.Conv2d(3, 4, 3), (), "got no inputs"),
        (nn.Conv2d(8, 4, 3), (X[:0],), r"batch of at least 1, got \(0, 8, 16, 12\)"),
    ],
)
def test_errors_are_one_line(model: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(SepconvertError, match=message) as caught:
        count(model, inputs)
    assert "\n" not in str(caught.value)


def test_an_output_without_tensors_is_refused_not_counted_zero() -> None:
    class Mute(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "done"

    with pytest.raises(SepconvertError, match="returns str, in which no tensor is found"):
        count(Mute(), (X,))


def test_a_failed_trace_leaves_the_model_usable() -> None:
    model = Untraceable()
    seen = []
    model.conv.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(SepconvertError):
        count(model, (X,))
    assert seen, "the user's own hook still runs"
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 1]
    model.conv._forward_hooks.clear()
    pickle.dumps(model)
    assert model.training
