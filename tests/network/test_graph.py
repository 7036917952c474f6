"""Functional convolutions in forwards of every kind. The oracle is the original module itself."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.symbolic import expect, exported_graph, stand_in, symbolic_graph

BATCHES = (1, 2, 5)


def binomial(channels):
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return torch.outer(line, line).repeat(channels, 1, 1, 1)


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", binomial(3))
        self.factor = 2

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=2, groups=3)


class Checked(Blur):
    """As kornia's filters are: checks of shape and type, a kernel cast to the input."""

    def forward(self, input):
        if not isinstance(input, torch.Tensor) or len(input.shape) != 4:
            raise ValueError("expected N × C × H × W")
        if input.shape[-1] < 5 or input.shape[-2] < 5:
            raise ValueError("too small")
        batch, channels, height, width = input.shape
        kernel = self.kernel[:1].to(input.device, input.dtype).expand(channels, 1, -1, -1)
        padded = F.pad(input, (2, 2, 2, 2), mode="reflect").reshape(batch, channels, height + 4, width + 4)
        return F.conv2d(padded, kernel, groups=channels).view(batch, channels, height, width)


class Made(nn.Module):
    """The kernel is made in the forward, in float64, and cast."""

    def forward(self, x):
        if x.ndim != 4:
            raise ValueError("expected N × C × H × W")
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16
        kernel = (line[:, None] * line).to(x).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, kernel, groups=x.shape[1])


class InPlace(Blur):
    """Results of in-place calls that nobody reads."""

    def forward(self, x):
        y = x * 1
        y.mul_(2)
        F.relu(y, inplace=True)
        y = F.conv2d(y, self.kernel, groups=3)
        y.add_(1)
        return y


class Ssim(nn.Module):
    """Structural similarity with an 11×11 Gaussian; two inputs."""

    def __init__(self):
        super().__init__()
        line = torch.exp(-(torch.arange(11) - 5.0).square() / 4.5)
        line = (line / line.sum()).double()
        self.register_buffer("window", torch.outer(line, line).float().repeat(3, 1, 1, 1))

    def forward(self, a, b):
        if a.shape != b.shape:
            raise ValueError("expected images of one size")
        if min(a.shape[-2:]) < 11:
            raise ValueError("too small")
        mean_a, mean_b, aa, bb, ab = (
            F.conv2d(value, self.window, groups=a.shape[1]) for value in (a, b, a * a, b * b, a * b)
        )
        covariance = ab - mean_a * mean_b
        variances = aa - mean_a**2 + bb - mean_b**2
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        return 1 - (luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean((1, 2, 3))


class Mixed(nn.Module):
    """Functional calls between submodules, one convolution called by `.forward`, defaults, keywords."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.act, self.blur = conv, nn.ReLU(inplace=True), Blur()
        self.weight = nn.Parameter(binomial(3))

    def forward(self, x, scale=1.0):
        y = self.conv.forward(x)
        self.act(y)
        return self.blur(y) + scale * torch.conv2d(
            input=y, weight=self.weight, bias=torch.ones(3), stride=1, padding="same", groups=3
        )


CASES = {
    "plain": (lambda planted: Blur(), 1),
    "checked": (lambda planted: Checked(), 1),
    "made": (lambda planted: Made(), 1),
    "in place": (lambda planted: InPlace(), 1),
    "ssim": (lambda planted: Ssim(), 2),
    "mixed": (lambda planted: Mixed(planted(3, 3, padding=1, rank=1)), 1),
}


@pytest.fixture(params=CASES)
def case(request, planted):
    make, inputs = CASES[request.param]
    return make(planted).eval(), inputs


def images(count, batch=2, size=(16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch, 3, *size, generator=generator) for _ in range(count))


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_of_other_batches_and_sizes_are_kept(case, separated, batch):
    model, count = case
    converted, names, _ = separated(model, *images(count, batch))
    assert names
    for other in BATCHES:
        for size in ((16, 16), (11, 23), (20, 12)):
            values = images(count, other, size, seed=1)
            assert close(converted(*values), model(*values))


def test_every_functional_convolution_is_replaced(case, separated):
    model, count = case
    converted, names, obstacles = separated(model, *images(count))
    assert not obstacles
    for name in names:
        assert isinstance(converted.get_submodule(name), FactorizedConv2d)
    calls = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
        for module in converted.modules()
        if isinstance(module, FactorizedConv2d)
    ]
    converted(*images(count))
    assert len(calls) == len(handles) == len(names)


def test_class_attributes_and_copies(case, separated, monkeypatch):
    model, count = case
    values = images(count)
    model.register_forward_hook(double)
    converted, _, _ = separated(model, *values)
    assert isinstance(converted, type(model))
    assert type(converted).__name__ == type(model).__name__
    assert vars(converted).get("factor") == vars(model).get("factor")
    expected = converted(*values)
    assert close(expected, model(*values))
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):  # noqa: S301
        assert isinstance(again, type(model))
        assert torch.equal(again(*values), expected)  # the hook's factor of two, too
        assert vars(again).get("factor") == vars(model).get("factor")
        assert set(again.state_dict()) == set(converted.state_dict())


def double(module, inputs, output):
    return 2 * output


def test_dense_kernels_out_of_use_are_gone(case, separated):
    model, count = case
    converted, _, _ = separated(model, *images(count))
    kernels = {(3, 1, 5, 5), (3, 1, 11, 11), (1, 1, 5, 5), (3, 3, 3, 3)}
    assert not [name for name, value in converted.state_dict().items() if tuple(value.shape) in kernels]
    assert [
        name for name, value in model.state_dict().items() if tuple(value.shape) in kernels
    ] or isinstance(model, Made)


def test_other_dtypes(case, separated):
    model, count = case
    converted, _, _ = separated(model, *images(count))
    values = tuple(value.double() for value in images(count))
    assert close(copy.deepcopy(converted).double()(*values), copy.deepcopy(model).double()(*values))


def test_trained_kernels_stay_trained_and_fixed_ones_fixed(planted, separated):
    model = Mixed(planted(3, 3, padding=1, rank=1))
    converted, names, _ = separated(model, *images(1))
    assert names == {"conv2d_0", "conv2d_1", "blur.conv2d_0"}
    trained = {name.partition(".")[0] for name, _ in converted.named_parameters()}
    assert trained == {"conv2d_0", "conv2d_1"}
    converted(*images(1)).sum().backward()
    constant = converted.conv2d_1.bias  # which was no parameter, and is not trained now
    assert constant.grad is None
    others = [parameter for parameter in converted.parameters() if parameter is not constant]
    assert all(parameter.grad.abs().sum() > 0 for parameter in others)


class Branching(Blur):
    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        blurred = F.conv2d(x, self.kernel, groups=3)
        return blurred if self.condition(x) else 100 * blurred


CONDITIONS = {
    "width below 20": lambda x: x.shape[-1] < 20,
    "width above 7": lambda x: x.shape[-1] > 7,
    "square": lambda x: x.shape[-1] == x.shape[-2],
    "even": lambda x: x.shape[-1] % 2 == 0,
    "area": lambda x: x.shape[-1] * x.shape[-2] < 200,
    "batch below 5": lambda x: x.shape[0] < 5,
    "several": lambda x: x.shape[0] > 1,
    "wide": lambda x: x.shape[-1] >= x.shape[-2],
    "short side": lambda x: min(x.shape[-2:]) > 7,
    "either": lambda x: x.shape[-1] > 9 or x.shape[-2] > 30,
    "not 13": lambda x: x.shape[-1] != 13,
    "rows of two": lambda x: (x.shape[-1] // 2) % 3 == 0,
}


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_sizes_of_the_other_branch_are_refused(condition, separated):
    """The right answer, or an error: never the answer of the branch that was exported."""
    model = Branching(condition).eval()
    converted, names, _ = separated(model, *images(1, size=(12, 12)))
    assert names
    answered = refused = 0
    for size in ((12, 12), (12, 13), (13, 12), (13, 13), (14, 14), (30, 30), (6, 6), (30, 8), (8, 30)):
        for batch in BATCHES:
            [x] = images(1, batch, size)
            if condition(x):
                assert close(converted(x), model(x))
                answered += 1
            else:
                with pytest.raises(ValueError, match="only serves inputs with"):
                    converted(x)
                refused += 1
    assert answered
    assert refused


class CountingBuffer(Blur):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_forward_that_counts_in_a_buffer_goes_on_counting(separated):
    model = CountingBuffer()
    converted, names, _ = separated(model, *images(1))
    assert names
    assert model.calls == 0
    assert converted.calls == 0
    converted(*images(1))
    assert close(converted(*images(1)), model(*images(1)))
    assert converted.calls == 2


def test_one_tensor_for_two_inputs(separated):
    """As in `loss(x, x)`: the graph must still have two inputs."""
    model, [x] = Ssim(), images(1)
    converted, _, _ = separated(model, x, x)
    values = images(2)
    assert close(converted(*values), model(*values))


def test_a_conversion_of_a_conversion(separated, planted):
    """New names are free ones, and the class stays the user's."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("dense", torch.randn(3, 3, 3, 3))
            self.register_buffer("kernel", binomial(3))

        def forward(self, x):
            return F.conv2d(F.conv2d(x, self.dense), self.kernel, groups=3)

    model, values = Twice(), images(1)
    once, names, _ = separated(model, *values)
    assert names == {"conv2d_1"}
    once.dense.copy_(planted(3, 3, rank=1).weight.detach())
    twice, names, _ = separated(once, *values)
    assert names == {"conv2d_0"}
    once.dense.zero_()
    assert isinstance(twice, Twice)
    model.dense.copy_(planted(3, 3, rank=1).weight.detach())
    assert close(twice(*values), model(*values))


def test_a_graph_module_can_be_converted(separated):
    """As a loaded .pt2 is one."""
    values = images(1)
    model = torch.fx.symbolic_trace(nn.Sequential(Blur(), nn.ReLU(), Blur()))
    converted, names, _ = separated(model, *values)
    assert len(names) == 2
    assert close(converted(*values), model(*values))
    exported = torch.export.export(nn.Sequential(Blur(), nn.ReLU()).eval(), values).module()
    converted, names, _ = separated(exported, *values)
    assert names
    assert close(converted(*values), exported(*values))
    assert close(copy.deepcopy(converted)(*values), exported(*values))


def test_the_owner_may_be_shared(separated):
    blur = Blur()
    model = nn.Sequential(nn.Sequential(blur), nn.ReLU(), blur)
    converted, names, _ = separated(model, *images(1))
    assert names == {"0.0.conv2d_0"}
    assert converted[2] is converted[0][0]
    [x] = images(1, 3, (19, 14))
    assert close(converted(x), model(x))


FILTERS = {
    "gaussian": lambda filters: filters.GaussianBlur2d((5, 5), (1.2, 1.2), separable=False),
    "blur pool": lambda filters: filters.BlurPool2D(5),
    "sobel": lambda filters: filters.Sobel(),
}


@pytest.mark.parametrize("make", FILTERS.values(), ids=FILTERS)
def test_filters_of_kornia(make, separated):
    """They check shape and type of their input, so that torch.export must trace them."""
    from kornia import filters
    from kornia.core.exceptions import TypeCheckError

    values = images(1)
    model = nn.Sequential(make(filters))
    with pytest.raises((TypeCheckError, torch.fx.proxy.TraceError)):
        symbolic_graph(stand_in(model[0], training=False), values)
    graph = exported_graph(stand_in(model[0], training=False), values)
    assert [node for node in graph.graph.nodes if node.target is expect]
    converted, names, obstacles = separated(model, *values)
    assert names == {"0.conv2d_0"}, obstacles
    for batch, size in ((1, (16, 16)), (5, (33, 21))):
        values = images(1, batch, size)
        assert close(graph(*values), model(*values))
        assert close(converted(*values), model(*values))
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))  # noqa: S301
    assert torch.equal(again(*values), converted(*values))


class Lines(nn.Module):
    """A filter of which the column and the row are applied one after the other."""

    def forward(self, x):
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).div(16).expand(3, 1, 1, 5)
        return F.conv2d(F.conv2d(x, line, groups=3), line.mT, groups=3)


def test_filters_that_are_separated_already_are_left_as_they_are(separated):
    model, values = Lines(), images(1)
    converted, names, _ = separated(model, *values)
    assert not names
    assert torch.equal(converted(*values), model(*values))
