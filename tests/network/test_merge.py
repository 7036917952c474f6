"""Two convolutions become one where that is the same function, and where it pays. The oracle is the pair."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import numbered, run, spec_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from sepconvert import convert
from sepconvert.base.environment import Runtime
from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Timing
from sepconvert.measure.latency import Speedup
from sepconvert.measure.statistics import Interval
from sepconvert.measure.verification.layer import dense_convolution
from sepconvert.network import trace
from sepconvert.network.copies import private_copy
from sepconvert.network.merge import LinearPair, compose, dense_spec, linear_pairs, merge, obstacle
from sepconvert.pipeline.modes.merging import merge_pairs
from sepconvert.pipeline.replay import apply_plan
from sepconvert.planning.plan import read_plan
from sepconvert.planning.timing import clock as timing
from sepconvert.planning.timing.clock import Clock
from sepconvert.report.text.tables import layer_table, summary

MODES = ("zeros", "reflect", "replicate", "circular")


def conv(*arguments, **options):
    """A convolution of small integers in float64: sums of their products are exact."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        module = nn.Conv2d(*arguments, **options, dtype=torch.float64)
    generator = torch.Generator().manual_seed(sum(module.weight.shape))
    for parameter in module.parameters():
        parameter.data = torch.randint(1, 8, parameter.shape, generator=generator).double()
    return module.eval()


def image(channels, height=9, width=11, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 8, (batch, channels, height, width), generator=generator).double()


def traced(model, *inputs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return trace.traced(model, inputs)


def found(model, *inputs):
    """Names of the linear pairs."""
    pairs = linear_pairs(traced(model, *inputs))
    return [(pair.first.name, pair.second.name) for pair in pairs]


def decided(model, *inputs, gate="none", **options):
    pairs = linear_pairs(traced(model, *inputs))
    clock = Clock(Runtime(1), 0, options.get("cache"), options.get("seconds", 60.0))
    return merge_pairs(model, inputs, pairs, gate=gate, clock=clock, seed=0)


@st.composite
def convolutions(draw, in_channels):
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 4, 6) if in_channels % g == 0]))
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    number = st.sampled_from((0, 0, 1, 2))
    return {
        "in_channels": in_channels,
        "out_channels": groups * draw(st.integers(1, 6 // groups)),
        "kernel_size": (draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((1, 1, 2, 3)))),
        "stride": (1, 1) if padding == "same" else (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "padding": (draw(number), draw(number)) if padding == "numbers" else padding,
        "dilation": (draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((1, 1, 2)))),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(("zeros", "zeros", *MODES))),
    }


@st.composite
def mergeable(draw):
    """Two convolutions that `obstacle` lets through, and the size of an image for them."""
    first = draw(convolutions(draw(st.integers(1, 6))))
    second = draw(convolutions(first["out_channels"]))
    size = draw(st.integers(5, 9)), draw(st.integers(5, 9))
    pair = conv(**first), conv(**second)
    specs = [spec_of(each) for each in pair]
    assume(obstacle(*specs) is None)
    inner = specs[0].output_size(size)
    # A padding of 2 that is no zeros needs 3 pixels.
    assume(min(inner) > 2 and min(specs[1].output_size(inner)) > 0)
    return *pair, size


@numbered(300)
@given(mergeable())
def test_what_is_let_through_is_the_same_function(case):
    first, second, size = case
    model, x = nn.Sequential(first, second), image(first.in_channels, *size)
    expected = run(model, x)
    merged = merge(traced(model, x), [("0", "1")])
    assert isinstance(merged[1], nn.Identity)
    assert torch.equal(run(merged, x), expected)
    spec = dense_spec(spec_of(first), spec_of(second))
    assert spec_of(merged[0]) == spec
    assert spec.output_size(size) == tuple(expected.shape[-2:])
    assert spec.weight_shape == tuple(merged[0].weight.shape)


# What is done about each condition: two convolutions, the second with as many channels as the first returns.
MERGEABLE = {
    "vertical, horizontal": (
        {"kernel_size": (3, 1), "padding": (1, 0), "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ),
    "depthwise, pointwise": ({"kernel_size": 3, "padding": 1, "groups": 4}, {"kernel_size": 1}),
    "pointwise, depthwise": (
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    ),
    "pointwise, pointwise": ({"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "stride": 3}),
    "groups of two, of four": (
        {"kernel_size": 3, "groups": 2, "padding": 1},
        {"kernel_size": 1, "groups": 4},
    ),
    "full padding": (
        {"kernel_size": 3, "padding": 2, "bias": False},
        {"kernel_size": 3, "padding": 1},
    ),
    "both extend": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3}),
    "stride before dilation": (
        {"kernel_size": 3, "dilation": 4, "stride": 2},
        {"kernel_size": 2, "dilation": 2},
    ),
    "same of even kernels": (
        {"kernel_size": (2, 1), "padding": "same", "bias": False},
        {"kernel_size": (1, 4), "padding": "same"},
    ),
    **{
        f"{mode}, with a bias": (
            {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": mode, "stride": (2, 1)},
            {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": mode, "stride": (1, 2)},
        )
        for mode in MODES[1:]
    },
    "the first alone pads": (
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding_mode": "circular"},
    ),
}

REFUSED = {
    "a bias before a border of zeros": (
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        "not with the bias",
    ),
    "both extend behind half a padding": (
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1},
        "cut off",
    ),
    "holes": ({"kernel_size": 3, "stride": 2}, {"kernel_size": 3}, "1 pixels apart, those of the second 2"),
    "reflect, then zeros": (
        {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect", "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        "one pads with reflect, the other with zeros",
    ),
    **{
        f"{mode} behind {what}": (
            {"bias": False, "padding_mode": mode} | first,
            {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": mode},
            "does not leave as it is",
        )
        for mode in MODES[1:]
        for what, first in {
            "a kernel": {"kernel_size": (1, 3), "padding": (0, 1)},
            "a kernel alone": {"kernel_size": (1, 3)},
            "a stride": {"kernel_size": 1, "stride": (1, 2)},
            "a padding": {"kernel_size": 1, "padding": (0, 1)},
        }.items()
    },
    "a border of two widths": (
        {"kernel_size": (2, 1), "padding": "same", "bias": False},
        {"kernel_size": (2, 1)},
        "takes no padding",
    ),
}


def two(first, second):
    return conv(4, 4, **first), conv(4, 8, **second)


@pytest.mark.parametrize("case", MERGEABLE.values(), ids=MERGEABLE)
def test_what_can_be_merged_is_merged(case):
    first, second = two(*case)
    assert obstacle(spec_of(first), spec_of(second)) is None
    model, x = nn.Sequential(first, second), image(4, 19, 22)
    assert torch.equal(run(merge(traced(model, x), [("0", "1")]), x), run(model, x))


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_with_the_reason(case):
    first, second = two(*case[:2])
    reason = obstacle(spec_of(first), spec_of(second))
    assert case[2] in reason
    model, x = nn.Sequential(first, second), image(4, 10, 12)
    with pytest.raises(SepconvertError, match=r"^plan: cannot merge 1 into 0: .*; use the plan's model$"):
        merge(traced(model, x), [("0", "1")])
    merged, (decision,) = decided(model, x)
    assert merged is model
    assert (decision.decision, decision.reason.text, decision.spec) == ("kept", reason, None)


# The same function at least on images of some size, yet refused: the rules are kept simple.
SIMPLY_REFUSED = {
    "a border of two widths",
    "replicate behind a padding",
    "circular behind a kernel",
    "circular behind a stride",
}


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - SIMPLY_REFUSED))
def test_what_is_refused_would_be_another_function(name):
    first, second = two(*REFUSED[name][:2])
    model, x = nn.Sequential(first, second), image(4, 10, 12)
    sites = traced(model, x).sites
    dense = compose(sites[0].conv, sites[1].conv)
    wrong = dense_convolution(dense.spec, x, dense.weight, dense.bias)
    expected = run(model, x)
    assert wrong.shape != expected.shape or not torch.allclose(wrong, expected)


def test_the_dense_kernel_by_its_definition():
    first, second = conv(4, 6, 3, groups=2), conv(6, 6, (1, 2), groups=3)
    sites = traced(nn.Sequential(first, second), image(4)).sites
    dense = compose(sites[0].conv, sites[1].conv)
    expected = torch.zeros(6, 4, 3, 4, dtype=torch.float64)
    for o in range(6):
        for r in range(2 * (o // 2), 2 * (o // 2) + 2):  # the inner channels that output o reads
            for c in range(2 * (r // 3), 2 * (r // 3) + 2):  # the inputs that inner channel r reads
                for j in range(2):
                    expected[o, c, :, j : j + 3] += second.weight[o, r % 2, 0, j] * first.weight[r, c % 2]
    assert dense.spec.groups == 1
    assert torch.equal(dense.weight, expected)


class Functional(nn.Module):
    """Two convolutions, and `between` what happens to the first's output."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.between = between
        self.a = first or conv(4, 4, 3, padding=1, groups=4)
        self.b = second or conv(4, 4, 1)

    def forward(self, x):
        return self.between(self, x)


def residual(self, x):
    y = self.a(x)
    return y + self.b(y)


def outside(self, x):
    y = self.a(x)
    return self.b(y), y


def kept_in_the_module(self, x):
    self.features = self.a(x)
    return self.b(self.features)


def in_a_list(self, x):
    features = [x]
    for each in (self.a, self.b):
        features.append(each(features[-1]))
    return features[1:]


def shape_is_read(self, x):
    y = self.a(x)
    return F.interpolate(self.b(y), size=y.shape[-2:])


def size_is_read(self, x):
    y = self.a(x)
    return self.b(y).reshape(y.size(0), -1)


def changed_in_place(self, x):
    y = self.a(x)
    y.mul_(2)
    return self.b(y)


def twice(self, x):
    y = self.a(x)
    return self.b(y) + self.b(y)


def view(self, x):
    return self.b(self.a(x).transpose(2, 3))


NO_PAIR = {
    "residual": residual,
    "output of the model": outside,
    "kept in the module": kept_in_the_module,
    "kept in a list": in_a_list,
    "shape": shape_is_read,
    "size": size_is_read,
    "in place": changed_in_place,
    "activation": lambda self, x: self.b(self.a(x).relu()),
    "activation in place": lambda self, x: self.b(self.a(x).relu_()),
    "dropout that is on": lambda self, x: self.b(F.dropout(self.a(x), 0.5)),
    "read twice": twice,
    "the first called again": lambda self, x: self.b(self.a(x)) + self.a(x),
    "the second called again": lambda self, x: self.b(self.a(x)) + self.b(x),
    "view": view,
    "its own convolution": lambda self, x: self.b(x) + self.a(x),
}


@pytest.mark.parametrize("between", NO_PAIR.values(), ids=NO_PAIR)
def test_no_pair_where_something_else_happens(between):
    assert found(Functional(between), image(4)) == []


PAIR = {
    "nothing": lambda self, x: self.b(self.a(x)),
    "dropout that is off": lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training)),
    "the same tensor": lambda self, x: self.b(self.a(x).contiguous().double()),
    "a residual around both": lambda self, x: x + self.b(self.a(x)),
}


@pytest.mark.parametrize("between", PAIR.values(), ids=PAIR)
@pytest.mark.parametrize("training", [False, True])
def test_a_pair_where_nothing_happens(between, training):
    assert found(Functional(between).train(training), image(4)) == [("a", "b")]


def test_no_pair_where_two_convolutions_read():
    model = Functional(lambda self, x: torch.cat([each(y) for y in [self.a(x)] for each in (self.b, self.c)]))
    model.c = conv(4, 4, 1)
    assert found(model, image(4)) == []


def test_modules_that_return_their_input_may_lie_between():
    layers = conv(4, 4, 1), nn.Identity(), nn.Dropout(), nn.Dropout2d(), conv(4, 4, 1)
    assert found(nn.Sequential(*layers).train(), image(4)) == [("0", "4")]
    for other in (nn.ReLU(), nn.BatchNorm2d(4).double(), nn.MaxPool2d(1), nn.Hardtanh(-1e9, 1e9)):
        assert found(nn.Sequential(layers[0], other, layers[4]), image(4)) == []


def hooked(register):
    model = Functional(PAIR["nothing"])
    register(model)
    return model


def keeping(model):
    model.features = []
    wrapped = nn.Sequential(model.a)
    wrapped.register_forward_hook(lambda module, inputs, output: model.features.append(output))
    model.a, model.wrapped = nn.Identity(), wrapped
    model.between = lambda self, x: self.b(self.wrapped(x))


OTHERS = {
    "forward hook of the first": hooked(lambda model: model.a.register_forward_hook(lambda *values: None)),
    "pre-hook of the second": hooked(lambda model: model.b.register_forward_pre_hook(lambda *values: None)),
    "backward hook": hooked(lambda model: model.a.register_full_backward_hook(lambda *values: None)),
    "a hook that keeps the output": hooked(keeping),
    "parametrised": hooked(lambda model: parametrizations.weight_norm(model.b)),
    "pruned": hooked(lambda model: prune.identity(model.a, "weight")),
    "frozen in part": hooked(lambda model: model.a.requires_grad_(False)),
    "the first under two names": hooked(lambda model: setattr(model, "alias", model.a)),
    "the second under two names": hooked(lambda model: setattr(model, "alias", model.b)),
    "a forward of its own": hooked(lambda model: setattr(model.b, "forward", model.b.forward)),
}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
def test_no_pair_of_convolutions_that_are_more_than_that(model):
    assert found(model, image(4)) == []


def test_no_pair_of_shared_modules():
    shared = conv(4, 4, 1)
    assert found(nn.Sequential(shared, conv(4, 4, 1), nn.ReLU(), shared), image(4)) == []
    assert found(nn.Sequential(shared, shared), image(4)) == []
    tied = nn.Sequential(conv(4, 4, 1), conv(4, 4, 1))
    tied[1].weight = tied[0].weight
    assert found(tied, image(4)) == []


def test_no_pair_of_other_modules():
    class Own(nn.Conv2d):
        pass

    own = Own(4, 4, 1, dtype=torch.float64)
    assert found(nn.Sequential(own, conv(4, 4, 1)), image(4)) == []
    assert found(nn.Sequential(conv(4, 4, 1), own), image(4)) == []
    assert found(nn.Sequential(conv(4, 4, 1), nn.ConvTranspose2d(4, 4, 1).double()), image(4)) == []


def test_watching_leaves_the_model_alone():
    model = Functional(PAIR["nothing"])
    found(model, image(4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Net(nn.Module):
    """Depthwise → pointwise, and vertical → horizontal, with a layer between and a pair that must stay."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = conv(4, 4, 3, padding=1, groups=4), conv(4, 8, 1)
        self.act = nn.ReLU()
        self.block = nn.Sequential(
            conv(8, 4, (3, 1), padding=(1, 0), bias=False), nn.Dropout(), conv(4, 8, (1, 3), padding=(0, 1))
        )
        self.head = nn.Sequential(nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 3, 1))

    def forward(self, x):
        return self.head(self.block(self.act(self.pointwise(self.depthwise(x)))))


@pytest.mark.parametrize("training", [False, True])
def test_a_network(training):
    model, x = Net().train(training), image(4)
    model.block.requires_grad_(False)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    pairs = linear_pairs(traced(model, x))
    names = [("depthwise", "pointwise"), ("block.0", "block.2")]
    assert [(pair.first.name, pair.second.name) for pair in pairs] == names
    merged = merge(traced(model, x), names)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(private_copy(merged)(x), expected)
    assert [type(merged.get_submodule(second)) for _, second in names] == [nn.Identity] * 2
    assert {each.training for each in merged.modules()} == {training}
    assert merged.depthwise.kernel_size == merged.block[0].kernel_size == (3, 3)
    assert merged.depthwise.weight.requires_grad
    assert not merged.block[0].weight.requires_grad
    assert type(merged) is Net
    # The original is as it was.
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dtype_of_the_model():
    model = nn.Sequential(conv(4, 4, 1), conv(4, 4, 3)).half()
    merged = merge(traced(model, image(4).half()), [("0", "1")])
    assert merged[0].weight.dtype == merged[0].bias.dtype == torch.float16


def test_the_gates_count_macs():
    model, x = Net(), image(4)
    for gate in ("macs", "none"):
        merged, decisions = decided(model, x, gate=gate)
        assert [(each.first, each.second, each.decision) for each in decisions] == [
            ("depthwise", "pointwise", "kept"),  # 4 · 9 + 32 weights instead of 288
            ("block.0", "block.2", "kept"),  # 96 + 96 instead of 576
        ]
        assert merged is model
        assert decisions[0].macs == (68 * 99, 288 * 99)
        assert decisions[0].reason.text == "the dense form has 28,512 MACs instead of 6,732"
    wide = nn.Sequential(conv(2, 16, 1), conv(16, 2, 3), nn.ReLU(), conv(2, 2, 1))
    merged, (decision,) = decided(wide, image(2))
    assert decision.decision == "merged"
    assert decision.macs == (32 * 99 + 288 * 63, 36 * 63)
    assert torch.equal(run(merged, image(2)), run(wide, image(2)))


def test_pairs_that_continue_one_another():
    model = nn.Sequential(
        conv(4, 16, 1, bias=False),
        conv(16, 16, (3, 1), padding=(1, 0), bias=False),
        conv(16, 16, (1, 3), padding=(0, 1)),
        nn.Identity(),
        conv(16, 3, 1),
    )
    x = image(4)
    merged, decisions = decided(model, x)
    assert [(each.first, each.second) for each in decisions] == [("0", "1"), ("0", "2"), ("0", "4")]
    assert {each.decision for each in decisions} == {"merged"}
    assert merged[0].weight.shape == (3, 4, 3, 3)
    assert torch.equal(run(merged, x), run(model, x))
    again = merge(traced(model, x), [(each.first, each.second) for each in decisions])
    assert torch.equal(again[0].weight, merged[0].weight)


@pytest.fixture
def timed_as(monkeypatch):
    """Says what a measurement yields; returns the list of measurements."""

    def set_ratio(ratio):
        calls = []
        monkeypatch.setattr(
            timing, "time_all", lambda models, **o: calls.append(models) or [[1.0]] * len(models)
        )
        monkeypatch.setattr(timing, "speedup", lambda before, again, after: ratio)
        return calls

    return set_ratio


FASTER = Speedup(1.5, Interval(1.4, 1.6), Interval(0.95, 1.05))
SLOWER = Speedup(0.5, Interval(0.4, 0.6), Interval(0.95, 1.05))
UNCERTAIN = Speedup(1.03, Interval(1.01, 1.06), Interval(0.95, 1.05))


@pytest.mark.parametrize(("ratio", "decision"), [(FASTER, "merged"), (SLOWER, "kept"), (UNCERTAIN, "kept")])
def test_what_is_measured_decides(ratio, decision, timed_as):
    timed_as(ratio)
    model, x = Net(), image(4)
    merged, decisions = decided(model, x, gate="latency")
    assert [each.decision for each in decisions] == [decision] * 2
    assert all(each.speedup == ratio for each in decisions)
    low, high = ratio.ci95.to_list()
    noise = "" if ratio.significant else " ~ within noise"
    assert decisions[0].reason.text == (
        f"the dense form is measured {ratio.median:.2f}× as fast [{low:.2f}, {high:.2f}]{noise}"
    )
    assert torch.equal(run(merged.eval(), x), run(model.eval(), x))
    assert decisions[0].to_json()["speedup"] == ratio.to_dict()


def test_a_real_measurement_and_the_decision_agree():
    small = nn.Sequential(
        conv(8, 8, (5, 1), padding=(2, 0), bias=False), conv(8, 8, (1, 5), padding=(0, 2))
    ).float()
    x = image(8, 16, 16, batch=1).float()
    merged, (decision,) = decided(small, x, gate="latency")
    ratio = decision.speedup
    assert decision.macs == (2 * 320 * 256, 1600 * 256)
    assert (decision.decision == "merged") == (ratio.significant and ratio.median > 1)
    assert (merged is small) == (decision.decision == "kept")


def test_time_may_be_up():
    _, decisions = decided(Net(), image(4), gate="latency", seconds=0.0)
    assert decisions
    assert all("by the model of times" in each.reason.text for each in decisions)
    assert all(each.speedup is None for each in decisions)


def test_pairs_of_one_shape_are_timed_once(timed_as):
    calls = timed_as(SLOWER)
    model = nn.Sequential(conv(4, 4, 1), conv(4, 4, 1), nn.ReLU(), conv(4, 4, 1), conv(4, 4, 1))
    _, decisions = decided(model, image(4), gate="latency")
    assert (len(decisions), len(calls)) == (2, 1)


def test_times_are_remembered(timed_as, tmp_path):
    timed_as(SLOWER)
    model, x = Net(), image(4)
    first = decided(model, x, gate="latency", cache=tmp_path)
    calls = timed_as(FASTER)
    assert decided(model, x, gate="latency", cache=tmp_path)[1] == first[1]
    assert calls == []


def reads_the_weight(self, x):
    return self.b(self.a(x)) * self.b.weight.abs().max()


def test_a_model_that_needs_the_second_convolution_keeps_it():
    model, x = Functional(reads_the_weight, conv(4, 4, 1), conv(4, 4, 1)), image(4)
    merged, (decision,) = decided(model, x)
    assert merged is model
    assert decision.reason.text.startswith("the model does not run without it: ")


def test_a_pair_that_is_none_is_noticed(monkeypatch):
    """Whatever the watch overlooks, the outputs show."""
    model, x = Functional(residual, conv(4, 4, 1), conv(4, 4, 1)), image(4)
    sites = traced(model, x).sites
    pairs = (LinearPair(sites[0], sites[1]),)
    clock = Clock(Runtime(1), 0, None, 1.0)
    merged, (decision,) = merge_pairs(model, (x,), pairs, gate="none", clock=clock, seed=0)
    assert merged is model
    assert decision.reason.text.startswith("merged, the outputs of the model move by ")


def test_a_kernel_that_overflows_stays_in_two():
    model = nn.Sequential(conv(4, 4, 1), conv(4, 4, 1)).half()
    with torch.no_grad():
        for module in model:
            module.weight.fill_(300.0)
    x = image(4).half() / 1000
    merged, (decision,) = decided(model, x)
    assert merged is model
    assert decision.reason.text == "the dense kernel overflows torch.float16"


def test_trained_weights_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 64, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(64, 4, (1, 3), padding=(0, 1)),
    ).eval()  # fmt: skip
    x = torch.randn(2, 8, 9, 9)
    merged, decisions = decided(model, x)
    assert [each.decision for each in decisions] == ["kept", "merged"]
    assert torch.allclose(run(merged, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_names_that_a_model_lacks():
    model, x = Net(), image(4)
    found = traced(model, x)
    kept = replace(found, sites=tuple(replace(site, obstacle="kept") for site in found.sites))
    for host, names in (
        (found, [("depthwise", "nowhere")]),
        (found, [("depthwise", "pointwise"), ("pointwise", "head.1")]),
        (kept, [("depthwise", "pointwise")]),
    ):
        with pytest.raises(SepconvertError, match="the model has no two plain convolutions of these names"):
            merge(host, names)


class Factored(nn.Module):
    """Two pairs that cost more than what they amount to, and one that costs less."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 3, stride=2))
        self.body = nn.Sequential(
            nn.Conv2d(8, 64, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(64, 16, (1, 3), padding=(0, 1))
        )
        self.light = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for each in (self.stem, self.body, self.light):
            x = each(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    """A conversion in auto mode, its model and its folder."""
    model, folder = Factored().eval(), tmp_path_factory.mktemp("auto")
    x = torch.randn(128, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    images, others = (DataLoader(TensorDataset(part, model(part).argmax(1)), 32) for part in x.split(64))
    # The dense forms alone take 0.26 of the MACs.
    options = {"calib": images, "data": others, "target_macs": 0.2, "timing": Timing(runs=0), "out": folder}
    result = convert(model, x[:2], "auto", gate="macs", **options)
    return model, result, folder


def test_auto_mode_merges_and_goes_on(automatic):
    model, result, _ = automatic
    layers = {layer["name"]: layer for layer in result.report["layers"]}
    assert list(layers) == ["stem.0", "stem.1", "body.0", "body.1", "light.0", "light.1"]
    for first in ("stem", "body"):
        second = layers[f"{first}.1"]
        assert (second["decision"], second["scheme"], second["exact"]) == ("converted", "merged", True)
        assert second["reason"] == f"merged into {first}.0"
        assert second["macs"][1] == second["params"][1] == 0
        assert layers[f"{first}.0"]["decision"] == "converted"
        assert layers[f"{first}.0"]["reason"].startswith(f"takes in {first}.1; ")
    assert layers["light.1"]["decision"] == "kept"
    schemes = {layers[f"{first}.0"]["scheme"] for first in ("stem", "body")}
    assert schemes - {"merged"}  # a dense form found factors
    factored = [layer for layer in layers.values() if layer["factors"]]
    assert factored
    assert all(sum(each["macs"] for each in layer["factors"]) == layer["macs"][1] for layer in factored)
    # What the layers say adds up to what is counted.
    for key in ("macs", "params"):
        before, after = (sum(layer[key][i] for layer in layers.values()) for i in (0, 1))
        total, converted = result.report["original"][key], result.report["converted"][key]
        assert total - before == converted - after
    assert result.report["converted"]["macs"] <= 0.2 * result.report["original"]["macs"]
    found = result.report["approximation"]
    delivered = next(point for point in found["curve"] if point["delivered"])
    assert delivered["macs"] == result.report["converted"]["macs"]
    assert [(each["first"], each["second"], each["decision"]) for each in found["merges"]] == [
        ("stem.0", "stem.1", "merged"), ("body.0", "body.1", "merged"), ("light.0", "light.1", "kept")
    ]  # fmt: skip
    assert result.plan["merges"] == [["stem.0", "stem.1"], ["body.0", "body.1"]]
    assert isinstance(model.stem[1], nn.Conv2d)


def test_the_report_tells_of_merges(automatic):
    _, result, folder = automatic
    text = summary(result.report)
    assert "Merged: stem.1 into stem.0; the dense form has " in text
    assert "Not merged: 1 of 3 linear pairs of convolutions; report.json says why." in text
    assert "None" not in layer_table(result.report["layers"])
    assert "merged into stem.0" in (folder / "report.html").read_text()


def test_a_plan_with_merges_can_be_replayed(automatic, tmp_path):
    _, _, folder = automatic
    fresh = Factored().eval()
    with torch.no_grad():
        for value in fresh.parameters():
            value.mul_(-3)  # the plan's weights replace these
    plan, weights = read_plan(folder / "plan.json"), folder / "converted.safetensors"
    apply_plan(fresh, plan, weights, tmp_path, model_sha256=None)
    assert (tmp_path / "converted.onnx").read_bytes() == (folder / "converted.onnx").read_bytes()


def test_a_plan_for_another_model_is_refused(automatic, tmp_path):
    _, _, folder = automatic
    other = Factored().eval()
    other.stem[1] = nn.Conv2d(32, 8, 3, stride=2, padding=1)
    plan, weights = read_plan(folder / "plan.json"), folder / "converted.safetensors"
    with pytest.raises(SepconvertError, match=r"cannot merge stem\.1 into stem\.0: the second pads"):
        apply_plan(other, plan, weights, tmp_path, model_sha256=None)
