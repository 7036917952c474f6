"""Graphs of forwards, and forwards that have none that would do the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sepconvert.network.graph import call_graph
from sepconvert.network.symbolic import UntraceableError

KERNEL = torch.outer(torch.ones(3), torch.arange(1.0, 4.0)).repeat(3, 1, 1, 1)
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", KERNEL)
        self.identity, self.kept, self.cache = nn.Identity(), [], {}

    def forward(self, x):
        return F.conv2d(x, self.kernel, groups=3)


class Alone(Blur):
    """Without a submodule, which torch.export would dissolve."""

    def __init__(self):
        super().__init__()
        del self.identity


def blurred(self, x):
    return F.conv2d(x, self.kernel, groups=3)


def without_gradients(self, x):
    with torch.no_grad():
        return blurred(self, x)


def with_gradients(self, x):
    with torch.enable_grad():
        return blurred(self, x)


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return blurred(self, x)


def with_autocast(self, x):
    with torch.autocast("cpu", enabled=True):
        return blurred(self, x).float()


def collecting(self, x):
    self.kept.append(blurred(self, x))
    return self.kept[-1]


def caching(self, x):
    self.cache["y"] = self.identity(blurred(self, x))
    return self.cache["y"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (without_gradients, "switches gradients or autocast"),
        (torch.no_grad()(blurred), "switches gradients or autocast"),
        (with_gradients, "switches gradients or autocast"),
        (without_autocast, "switches gradients or autocast"),
        (with_autocast, "switches gradients or autocast"),
        (lambda self, x: blurred(self, x) * (1 + torch.rand(1, 3, 1, 1)), "draws random numbers"),
        (collecting, "changes what the attribute kept holds"),
        (caching, "changes what the attribute cache holds"),
    ],
)
def test_settings_and_effects_that_a_graph_does_not_have(forward, reason):
    model = type("Model", (Blur,), {"forward": forward})().eval()
    before = torch.get_rng_state()
    with pytest.raises(UntraceableError, match=reason):
        call_graph(model, (X,), 1)
    assert (model.kept, model.cache) == ([], {})
    assert torch.equal(torch.get_rng_state(), before)


class Dropping(Alone):
    def forward(self, x):
        return F.dropout(F.conv2d(x, self.kernel, groups=3), 0.5, self.training)


class DroppingByShape(Dropping):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] > 7 else x


class Counting(Alone):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Remembering(Alone):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class CountingByShape(Counting):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] > 7 else x


class OneTuple(Alone):
    def forward(self, x):
        return (super().forward(x),) if x.shape[-1] > 7 else (x,)


class ByType(Alone):
    def forward(self, x):
        return super().forward(x) * (1 if x.dtype == torch.float32 and x.shape[-1] > 7 else 100)


class ByValue(Alone):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class Parts(Alone):
    """Branches, and has a submodule, which torch.export would dissolve."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(super().forward(x)) if x.shape[-1] > 7 else x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Dropping, "training mode"),
        (DroppingByShape, "training mode"),
        (Counting, "sets the attribute calls"),
        (CountingByShape, "sets the attribute calls"),
        (Remembering, "sets the attribute last"),
        (OneTuple, "something else than a tensor"),
        (ByType, "float64"),
        (ByValue, "control flow"),
        (Parts, "dissolve its submodules"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*assigned during export:UserWarning")
def test_what_a_graph_cannot_hold(cls, reason, training):
    model = cls().train(training)
    state = copy.deepcopy(vars(model))
    with pytest.raises(UntraceableError, match=reason):
        call_graph(model, (X,), 1)
    assert type(model) is cls
    assert str(vars(model)) == str(state)


def test_a_graph_for_every_size_unless_the_forward_branches():
    class Branching(Alone):
        def forward(self, x):
            return super().forward(x) if x.shape[-1] > 7 else x

    for model, small in ((Alone(), True), (Branching(), False)):
        graph = call_graph(model, (X,), 1)
        assert torch.equal(graph(X[:1, :, :9]), model(X[:1, :, :9]))
        if small:
            assert torch.equal(graph(X[..., :6]), model(X[..., :6]))
        else:
            with pytest.raises(ValueError, match="only serves inputs with"):
                graph(X[..., :6])


def test_calls_that_are_missing_from_the_graph():
    with pytest.raises(UntraceableError, match="a convolution is missing from the graph"):
        call_graph(Alone(), (X,), 2)
    with pytest.raises(UntraceableError, match="takes other arguments than tensors"):
        call_graph(Alone(), None, 2)
