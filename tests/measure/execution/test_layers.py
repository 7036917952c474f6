"""What layers gain in the runtime: attributed to the right layers, and a small gain has a cause."""

from typing import Any

import pytest

from sepconvert.measure.execution.layers import Gain, by_layer, layer_executions, model_execution
from sepconvert.measure.execution.operators import OperatorTime

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
