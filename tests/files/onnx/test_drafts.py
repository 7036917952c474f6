"""Drafts compute what conversions do, and ONNX Runtime makes the same of them as of exported files."""

import ast
from collections import Counter

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbered
from torch import nn
from torch.nn import functional as F

from sepconvert.factorize.approximate.problem import Problem
from sepconvert.factorize.approximate.weighted import Moments
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.network.rewrite import rewrite
from sepconvert.network.tensors import arguments
from sepconvert.network.trace import traced
from sepconvert.planning.fits.fitting import replacement
from sepconvert.planning.forms import all_forms

X = torch.rand(1, 3, 12, 11, generator=torch.Generator().manual_seed(0))


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), **options)


def norm(channels):
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for value, low in (
            (layer.weight, 0.5),
            (layer.bias, -1),
            (layer.running_mean, -1),
            (layer.running_var, 0.5),
        ):
            value.uniform_(low, 2)
    return layer


class Residual(nn.Module):
    """BatchNorms behind convolutions, in a branch and at its end; a convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = conv(3, 8, bias=False), norm(8)
        self.body = nn.Sequential(conv(8, 8, bias=False), norm(8), nn.ReLU(), conv(8, 8, bias=True), norm(8))
        self.twice, self.head = conv(8, 8, 3, bias=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.body(x)).relu()
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


class Filters(nn.Module):
    """Two calls of convolutions of one shape, and a module among them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.randn(4, 4, 3, 3) / 6)
        self.second = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.between = conv(4, 4)

    def forward(self, x):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.first)
        return x + F.conv2d(self.between(x).relu(), self.second, padding=1)


class Functional(nn.Module):
    """Functional convolutions in a module, which may be called twice, and in the root."""

    def __init__(self, calls=1):
        super().__init__()
        self.calls = calls
        self.kernel = nn.Parameter(torch.randn(4, 3, 5, 5) / 9)
        self.filters = Filters()

    def forward(self, x):
        x = F.conv2d(x, self.kernel, stride=2)
        for _ in range(self.calls):
            x = self.filters(x)
        return x


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x):
        return {"out": self.conv(x).relu(), "aux": (x.mean((2, 3)), None)}


NETS = {
    "residual": Residual,
    "reflected": lambda: nn.Sequential(
        conv(3, 8, padding_mode="reflect"), norm(8), nn.ReLU(), conv(8, 8, 3, groups=2)
    ),
    "strided": lambda: nn.Sequential(
        conv(3, 8, 5, stride=2), nn.ReLU(), conv(8, 8, dilation=2, padding="same")
    ),
    "one layer": lambda: conv(3, 8),
    "functional": Functional,
    "named with-None": Named,
}


def fitted(model, picks, inputs=(X,)):
    """A conversion with a form for each layer, picked by a number."""
    found = traced(model, inputs)
    fits = {}
    for site, pick in zip(found.sites, picks, strict=False):
        forms = all_forms(site.dense.spec) if site.conv is not None else []
        if forms and pick:
            moments = Moments.of_weights(site.dense.spec, site.dense.weight)
            form = forms[pick % len(forms)]
            fits[site.name] = replacement(
                site, Problem(site.dense.spec, site.dense.weight, moments).fit(*form, 1)
            )
    return rewrite(found, fits, old_memory=True)


def optimised(path, place):
    """Operators of the graph that ONNX Runtime makes of a file, and the shapes of its constants."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(place), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(place).graph
    return Counter(each.op_type for each in graph.node), {tuple(each.dims) for each in graph.initializer}


def model_of(name):
    torch.manual_seed(0)
    return NETS[name]().eval()


@pytest.mark.parametrize("name", NETS)
@numbered(3)
@given(picks=st.lists(st.integers(0, 60), min_size=6, max_size=6))
def test_a_draft_computes_what_its_model_does(name, picks):
    model = model_of(name)
    converted, drafts = fitted(model, picks), Drafts(model, (X,))
    more = torch.rand(3, 3, 12, 11)
    with torch.no_grad():
        expected, found = converted(more), drafts.module(converted)(more)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_the_runtime_makes_the_same_of_a_draft_as_of_an_exported_file(name, tmp_path, monkeypatch):
    model = model_of(name)
    converted, drafts = fitted(model, [7, 3, 11, 5, 2, 9]), Drafts(model, (X,))
    for each, label in ((model, "original"), (converted, "converted")):
        draft, exported = tmp_path / f"{label}-draft.onnx", tmp_path / f"{label}-exported.onnx"
        with monkeypatch.context() as without:
            if each is converted and name != "reflected":  # which must not be exported
                without.setattr("sepconvert.files.onnx.drafts.export_program", None)
            draft.write_bytes(drafts.timed(each).SerializeToString())
        write_onnx(each, (X,), exported, dynamic_batch=False)
        assert optimised(draft, tmp_path / "a.onnx") == optimised(exported, tmp_path / "b.onnx")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("functional", "strided") else name
        for name in NETS
    ],
)
def test_the_file_that_is_delivered_has_the_nodes_and_the_names_of_an_exported_one(name, tmp_path):
    model = model_of(name)
    converted, drafts = fitted(model, [7, 3, 11, 5, 2, 9]), Drafts(model, (X,))
    delivered = drafts.delivered(converted)
    if name == "reflected":  # where factors pad each by themselves, which the file of the original does not
        assert delivered is None
        return
    exported = tmp_path / "exported.onnx"
    write_onnx(converted, (X,), exported, interface=drafts.interface)
    expected, found = onnx.load(exported), ir.to_proto(delivered)
    onnx.checker.check_model(found, full_check=True)
    assert Counter(node.op_type for node in found.graph.node) == Counter(
        node.op_type for node in expected.graph.node
    )
    for ends in ("input", "output"):
        assert list(getattr(found.graph, ends)) == list(getattr(expected.graph, ends))
    factors = {f"{path}.weight" for path, each in converted.named_modules() if "branches." in path}
    initializers = {each.name for each in found.graph.initializer}
    assert {each for each in factors if each in {w.name for w in expected.graph.initializer}} <= initializers
    scopes = {
        ast.literal_eval(each.value)[-2]
        for node in found.graph.node
        for each in node.metadata_props
        if node.op_type == "Conv" and each.key == "pkg.torch.onnx.name_scopes"
    }
    assert {weight.removesuffix(".weight") for weight in factors & initializers} <= scopes


class Scaled(nn.Module):
    """A parameter that the exporter folds into a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain = conv(3, 8), nn.Parameter(torch.rand(2, 4))

    def forward(self, x):
        return self.conv(x) * self.gain.exp().reshape(1, 8, 1, 1)


def test_a_trained_parameter_that_is_part_of_a_constant_is_exported():
    torch.manual_seed(0)
    model = Scaled().eval()
    converted, drafts = fitted(model, [7]), Drafts(model, (X,))
    assert drafts.delivered(converted) is not None
    converted.gain = nn.Parameter(converted.gain.detach() * 1.0001)  # a new one: the original holds the other
    assert drafts.delivered(converted) is None
    torch.testing.assert_close(drafts.module(converted)(X), converted(X).detach(), rtol=1e-5, atol=1e-6)


def test_estimated_statistics_are_in_the_draft():
    model = model_of("residual")
    converted, drafts = fitted(model, [5, 5, 5, 5, 5]), Drafts(model, (X,))
    before = drafts.module(converted)(X)
    converted.body[4].running_mean = converted.body[4].running_mean + 3
    with torch.no_grad():
        expected = converted(X)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(drafts.module(converted)(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drafts.module(model)(X), model(X).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_functional_convolutions_that_are_called_again_are_counted_in_no_other_way():
    torch.manual_seed(0)
    model = Functional(calls=2).eval()
    converted = fitted(model, [5, 3, 7, 2])
    with torch.no_grad():
        expected = converted(X)
    torch.testing.assert_close(Drafts(model, (X,)).module(converted)(X), expected, rtol=1e-3, atol=1e-3)


def test_what_differs_by_more_than_convolutions_is_exported():
    """Here, by an activation that somebody exchanged."""
    model = model_of("strided")
    converted = fitted(model, [3, 5])
    converted[1] = nn.Tanh()
    with torch.no_grad():
        expected = converted(X)
    torch.testing.assert_close(Drafts(model, (X,)).module(converted)(X), expected, rtol=1e-4, atol=1e-4)


def test_the_draft_of_a_file_is_an_edited_file(tmp_path):
    write_onnx(model_of("strided"), (X,), tmp_path / "model.onnx")
    network = open_network(tmp_path / "model.onnx")
    converted = fitted(network, [3, 5])
    drafts = Drafts(network, (X,))
    with torch.no_grad():
        expected = converted(X)
    torch.testing.assert_close(drafts.module(converted)(X), expected, rtol=1e-4, atol=1e-4)


def test_samples_of_other_sizes_run_in_torch():
    model = model_of("strided")
    other = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(Drafts(model, (X,)).module(model)(other), model(other))


def test_a_model_that_fixes_the_batch_is_not_run_by_a_file():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, x):
            return self.conv(x.reshape(1, 3, 12, 11))

    drafts = Drafts(Fixed().eval(), (X,))
    assert drafts.module(drafts.original) is None
    assert not drafts.are_faster_than_torch(0, 8)
    assert onnx_feed(drafts.original, (X,)).keys() == {"x"}


def test_a_model_that_cannot_be_exported_runs_in_torch():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) > 0 else x

    assert not Drafts(Branching().eval(), (X,)).are_faster_than_torch(0, 8)


def test_a_file_that_computes_something_else_is_not_taken(monkeypatch):
    model = model_of("strided")
    drafts = Drafts(model, (X,))
    monkeypatch.setattr(drafts, "module", lambda each: lambda x: model(x) + 1)
    assert not drafts.are_faster_than_torch(0, 8)


def test_inputs_by_name_are_taken_as_the_model_takes_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, left, right):
            return self.conv(left - right)

    model = Two().eval()
    drafts, left, right = Drafts(model, (X, X + 1)), torch.rand(2, 3, 12, 11), torch.rand(2, 3, 12, 11)
    running = drafts.module(model)
    for yielded in ({"right": right, "left": left}, (left, right)):
        inputs = arguments(running, yielded)
        torch.testing.assert_close(running(*inputs), model(left, right).detach(), rtol=1e-4, atol=1e-4)
    assert not [*running.parameters()]


@pytest.mark.parametrize("nested", [False, True])
def test_entries_of_a_mapping_may_come_in_another_order_than_those_of_the_example(nested):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 8)

        def forward(self, views, scale=None):
            return self.conv(views["left"] - 2 * views["right"]) * (1.0 if scale is None else scale)

    model, rest = Mapped().eval(), (torch.full((len(X), 1, 1, 1), 2.0),) if nested else ()
    drafts = Drafts(model, ({"left": X, "right": X + 1}, *rest))
    left, right = torch.rand(X.shape), torch.rand(X.shape)
    swapped = {"right": right, "left": left}
    with torch.no_grad():
        expected = model(swapped, *rest)
    found = drafts.module(model)
    assert found is not None
    torch.testing.assert_close(found(swapped, *rest), expected, rtol=1e-4, atol=1e-4)
