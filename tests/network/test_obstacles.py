"""What a rewritten model would not do is kept, with the reason; the user's objects are not changed."""

import logging
import random
import types
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sepconvert import Calibration, Selection, SepconvertError, Timing, apply, convert, inspect, profile


def separable(seed=0):
    """A 4 × 4 × 3 × 3 kernel of rank 1."""
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(size, generator=generator) for size in (4, 4, 3, 3))
    return torch.einsum("o,c,i,j->ocij", *factors)


def conv(cls=nn.Conv2d, seed=0):
    layer = cls(4, 4, 3, padding=1)
    layer.weight.data.copy_(separable(seed))
    return layer


@pytest.fixture
def x():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


class Fixed(nn.Module):
    """A fixed kernel, and what forwards do with it; the identity keeps torch.export out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", separable())
        self.register_buffer("bank", torch.stack([separable(seed) for seed in range(3)]))
        self.register_buffer("mean", torch.ones(4))
        self.conv, self.identity = conv(seed=2), nn.Identity()
        self.list = [self.conv]
        self.conv.gain = 2.0
        self.embedding = nn.Embedding(3, 4)


def model_with(forward):
    cls = type("Model", (Fixed,), {"forward": forward})
    return cls().eval()


def without_gradients(self, x):
    with torch.no_grad():
        return F.conv2d(x, self.kernel, padding=1)


def residual(self, x, other=None):
    y = self.identity(F.conv2d(x, self.kernel, padding=1))
    return y if other is None else y + other


def by_class(self, x):
    return next(each for each in self.children() if isinstance(each, nn.Conv2d))(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (without_gradients, "the forward of the model cannot be traced: it switches gradients or autocast"),
        (residual, "does not run once it is replaced"),
        (lambda self, x: self.conv(x) * self.conv.gain, "does not run once it is replaced"),
        (lambda self, x: self.conv(input=x), "does not run once it is replaced"),
        (by_class, "does not run once it is replaced"),
        (lambda self, x: self.list[0](x), "calls it by another way"),
        (lambda self, x: F.conv2d(x, self.kernel / x.shape[-1]), "its weight is computed from the input"),
        (lambda self, x: F.conv2d(x, self.kernel, stride=x.shape[-1] // 8), "its stride is computed"),
        (lambda self, x: F.conv2d(x, self.kernel, padding=x.size(3) % 2 + 1), "its padding is computed"),
    ],
)
def test_what_a_rewritten_model_would_not_do(x, forward, reason):
    model = model_with(forward)
    layers = inspect(model, x.clone()).to_json()["layers"]
    assert {layer["decision"] for layer in layers} == {"kept"}
    assert any(reason in layer["reason"] for layer in layers), layers


@pytest.mark.parametrize(
    ("forward", "reason", "values"),
    [
        (lambda self, x, d: F.conv2d(x, self.kernel, padding=d, dilation=d), "its padding", (1, 2)),
        (lambda self, x, i: F.conv2d(x, self.bank[i]), "its weight", (0, 1)),
        (
            lambda self, x, i: F.conv2d(x, self.kernel, self.embedding(i)[0]),
            "its bias",
            (torch.tensor([0]), torch.tensor([1])),
        ),
    ],
)
def test_kernels_that_follow_another_argument(x, forward, reason, values):
    model = model_with(forward)
    result = convert(model, (x, values[0]), check="torch")
    assert f"{reason} is computed from the input" in result.report["layers"][0]["reason"]
    assert all(torch.equal(result.model(x, value), model(x, value)) for value in values)


def test_sizes_of_channels_are_no_input(x):
    """As filters do that are the same for each channel."""

    def blur(self, x):
        _, c, _, _ = x.shape
        return F.conv2d(
            x, self.kernel[:1, :1].expand(c, 1, 3, 3), groups=c, padding=self.kernel.shape[-1] // 2
        )

    layers = inspect(model_with(blur), x).to_json()["layers"]
    assert [layer["decision"] for layer in layers if layer["name"] == "conv2d_0"] == ["converted"]


def test_buffers_that_a_forward_computes_with_stay_buffers(x):
    model = model_with(lambda self, x: self.identity(F.conv2d(x - self.mean.view(1, 4, 1, 1), self.kernel)))
    result = convert(model, x, check="torch")
    for each in (model, result.model):
        each.mean.fill_(3.0)
    assert torch.allclose(result.model(x), model(x), atol=1e-3)
    assert "converted" in {layer["decision"] for layer in result.report["layers"]}


@pytest.mark.slow
def test_a_forward_may_write_to_its_input(x):
    """Normalising in place is common."""
    model = model_with(lambda self, x: self.conv(x.sub_(0.5).div_(0.25)))
    before = x.clone()
    calib = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.rand(80, 4, 16, 16)), batch_size=20
    )
    images = calib.dataset.tensors[0].clone()
    for options in (
        {},
        {
            "mode": "approx",
            "calib": calib,
            "calibration": Calibration(images=80),
            "rank": 1,
            "selection": Selection(include=("conv",)),
        },
    ):
        result = convert(model, x, timing=Timing(runs=0), **options)
        assert torch.equal(x, before)
        assert result.report["verification"]["onnx_reason"] is None
        assert [layer["decision"] for layer in result.report["layers"] if layer["name"] == "conv"] == [
            "converted"
        ]
    assert torch.equal(calib.dataset.tensors[0], images)


class Renormalised(nn.Conv2d):
    def forward(self, x):
        self.weight.data.renorm_(2, 0, 0.5)
        return super().forward(x)


def test_a_forward_that_writes_to_its_parameters_is_refused(x):
    model = nn.Sequential(conv(Renormalised))
    before = model[0].weight.clone()
    with pytest.raises(SepconvertError, match=r"writes to the parameter 0\.weight"):
        inspect(model, x)
    assert torch.equal(model[0].weight, before)


def test_methods_put_on_an_instance(x):
    model = model_with(lambda self, x: self.identity(x))
    model.identity.register_buffer("kernel", separable())
    model.identity.forward = types.MethodType(lambda self, x: F.conv2d(x, self.kernel), model.identity)
    assert "calls it by another way" in inspect(model, x).to_json()["layers"][0]["reason"]


class Registered(nn.Module):
    """A class that keeps a list of those that inherit from it, and wants a word from each."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, word, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.known.append(cls)


class Blur(Registered, word="blur"):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", separable())

    def forward(self, x):
        return F.conv2d(x, self.kernel)


def test_classes_that_register_themselves(x):
    result = convert(Blur(), x, check="torch")
    assert result.report["layers"][0]["decision"] == "converted"
    assert Registered.known == [Blur]
    assert isinstance(result.model, Blur)


def test_global_settings_stay(x):
    logging.disable(logging.INFO)
    with torch.inference_mode():
        model = nn.Sequential(conv(), nn.Dropout()).train()
    state, other = torch.get_rng_state(), random.getstate()
    try:
        with torch.inference_mode():
            result = convert(model, x, check="torch")
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    result.model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_a_pair_in_a_wrapper_is_merged(x):
    pair = nn.Sequential(nn.Conv2d(4, 4, (3, 1), bias=False), nn.Conv2d(4, 4, (1, 3)), nn.ReLU(), conv())
    result = convert(
        nn.DataParallel(pair).eval(),
        x,
        mode="auto",
        gate="macs",
        target_macs=0.95,
        check="torch",
        selection=Selection(include=("0", "1", "3")),
    )
    assert [merge["first"] for merge in result.report["approximation"]["merges"]] == ["0"]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_is_frozen_alone(x, frozen):
    """As biases alone are trained at times."""
    model = nn.Sequential(conv())
    model[0].get_parameter(frozen).requires_grad_(False)
    layer = convert(model, x, check="torch").model[0]
    assert layer.bias.requires_grad is (frozen != "bias")
    assert {each.weight.requires_grad for each in layer.convolutions} == {frozen != "weight"}


def test_a_forward_may_catch_what_a_submodule_raises(x):
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError

    def forward(self, x):
        try:
            return self.identity(x)
        except ValueError:
            return F.conv2d(x, self.kernel)

    model = model_with(forward)
    model.identity = Failing()
    assert [layer["name"] for layer in inspect(model, x).to_json()["layers"]] == ["conv2d_0", "conv"]


def test_a_first_argument_that_is_no_tensor(x, tmp_path):
    model = model_with(lambda self, scale, x: self.conv(x) * scale)
    result = convert(model, (2.0, x), timing=Timing(runs=0), out=tmp_path)
    replayed = apply(model, tmp_path / "plan.json", (2.0, x))
    for each in (result.model, replayed):
        assert torch.allclose(each(2.0, x), model(2.0, x), atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_refused_by_name(x):
    scripted = torch.jit.trace(nn.Sequential(conv()), x)
    with pytest.raises(SepconvertError, match="the model is TorchScript"):
        inspect(scripted, x)


def test_answers_that_are_no_tensors_of_numbers(x):
    """Flags and objects of the user's own are no reason to keep a layer."""

    class Answer:
        def __init__(self, **parts):
            self.__dict__.update(parts)

    def forward(self, x):
        y = self.conv(x)
        return {"y": y, "positive": y > 0, "answer": Answer(y=y), "classes": y.argmax(1)}

    layers = {layer["name"]: layer for layer in inspect(model_with(forward), x).to_json()["layers"]}
    assert layers["conv"]["decision"] == "converted"


def test_parameters_without_a_shape(x):
    """Get one when they run, on inputs that the user knows best."""
    model = model_with(lambda self, x: self.conv(x))
    model.unused = nn.LazyConv2d(4, 3)
    for function in (inspect, convert, profile):
        with pytest.raises(SepconvertError, match=r"^unused\.weight has no shape yet; run the model"):
            function(model, x)
    model.unused(x)
    assert len(inspect(model, x).to_json()["layers"]) == 2


class Parts(Fixed):
    """Beside a layer that separates, one that tools which follow a forward pass stumble over."""

    def __init__(self, second):
        super().__init__()
        self.second = second

    def forward(self, x):
        return self.second(self.conv(x))


class ByName(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(4, 4, 3))

    def forward(self, x):
        return getattr(self, self.name)(x)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(4, 4, 3)]

    def forward(self, x):
        return self.layers[0](x)


class Checkpointed(ByName):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Called(ByName):
    def forward(self, x):
        layer = getattr(self, self.name)
        return functional_call(layer, dict(layer.named_parameters()), (x,))


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:The .grad attribute")  # of copies of TorchScript
@pytest.mark.parametrize(
    "make",
    [
        lambda: ByName("a/b"),
        Hidden,
        lambda: Checkpointed("layer"),
        lambda: Called("layer"),
        lambda: torch.jit.script(nn.Conv2d(4, 4, 3)),
    ],
    ids=["slash", "list", "checkpoint", "functional_call", "TorchScript"],
)
def test_a_part_that_cannot_be_followed_is_listed_and_the_others_converted(make, x):
    model = Parts(make()).eval()
    result = convert(model, x, check="torch")
    layers = [(layer["name"], layer["decision"]) for layer in result.report["layers"]]
    assert layers[0] == ("conv", "converted")
    assert [decision for _, decision in layers[1:]] == ["kept"]
    assert torch.allclose(result.model(x), model(x), atol=1e-4)
    assert result.report["original"]["macs"] - result.report["converted"]["macs"] == 16 * 16 * (
        4 * 4 * 9 - (4 * 3 + 4 * 3)
    )


def test_names_that_are_reserved_in_python(x, tmp_path):
    """Files that could not be loaded are not written."""
    model = Parts(ByName("class")).eval()
    result = convert(model, x, timing=Timing(runs=0), out=tmp_path)
    missing = result.report["export"]["missing"]
    assert set(missing) == {"original.onnx", "converted.onnx", "converted.pt2"}
    assert all("the name 'class' of a part of it is reserved" in reason for reason in missing.values())
    assert not {path.suffix for path in tmp_path.iterdir()} & {".onnx", ".pt2"}
    assert torch.allclose(result.model(x), model(x), atol=1e-4)
