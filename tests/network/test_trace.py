"""Every convolution is found. The oracle: a dispatch mode of this file, and fvcore's counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from sepconvert.base.errors import SepconvertError
from sepconvert.measure.cost import FlopCountAnalysis
from sepconvert.network.trace import traced


class CountConvolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # TorchScript calls the second.
        self.calls += func in (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
        return func(*args, **(kwargs or {}))


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


class Reused(nn.Module):
    """One convolution under two names, called three times at two sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first

    def forward(self, x):
        return self.first(self.again(x)) + F.interpolate(self.first(x[..., ::2, ::2]), scale_factor=2)


class Functional(nn.Module):
    """Kernels that are a parameter, a buffer and a constant; every way to call a convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("blur", torch.ones(4, 1, 3, 3) / 9)

    def forward(self, x):
        x = F.conv2d(x, self.weight, padding="same")
        x = torch.conv2d(input=x, weight=self.blur, padding=1, groups=4)
        x = torch.ops.aten.conv2d(x, torch.ones(4, 4, 1, 1))
        x = torch.ops.aten.conv2d.default(x, torch.ones(2, 4, 1, 1))
        x = torch.convolution(x, torch.ones(2, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution.default(
            x, torch.ones(2, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        )


class OtherKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 3, 3, padding=1)
        self.three = nn.Conv3d(1, 2, 3)
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)

    def forward(self, x):
        y = self.one(x.flatten(2)).view_as(x)
        return (
            self.up(y).mean()
            + self.three(y[:, None]).mean()
            + F.conv_transpose2d(y, torch.ones(3, 2, 2, 2)).mean()
        )


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, k, padding=k // 2), nn.ReLU()) for k in (1, 3, 5)
        )
        self.table = nn.ModuleDict({"last": nn.Conv2d(3, 5, 3, stride=2, dilation=2, groups=1)})

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.table["last"](x)


class ByForward(nn.Module):
    """Convolutions called past `__call__`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv.forward(x)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)).eval()
        self.inner = torch.jit.trace(inner, torch.zeros(1, 3, 8, 8))
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.conv(self.inner(x))


def normed(norm):
    def make():
        return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU())

    return make


MODELS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, (1, 5), padding="same")),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
    "reused": Reused,
    "functional": Functional,
    "other kinds": OtherKinds,
    "deep": Deep,
    "by forward": ByForward,
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "orthogonal": normed(parametrizations.orthogonal),
    "old spectral norm": normed(nn.utils.spectral_norm),
    "old weight norm": normed(torch.nn.utils.weight_norm),
}
OLD_NORM = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def fvcore_macs(model, x):
    """fvcore's count of convolutions, with a rule for `padding="same"`, for which it has none."""

    def same(inputs, outputs):
        weight, output = (value.type().sizes() for value in (inputs[1], outputs[0]))
        return torch.Size(output).numel() // output[1] * torch.Size(weight).numel()

    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle("aten::_convolution_mode", same)
    counts = analysis.by_operator()
    return counts["conv"] + counts["_convolution_mode"]


@OLD_NORM
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_calls_and_macs_are_those_that_torch_executes(name, batch):
    model, x = seeded(MODELS[name]), torch.randn(batch, 3, 8, 8)
    sites = traced(model, (x,)).sites
    with torch.no_grad(), CountConvolutions() as counted:
        model(x)
    # Sizes are noted for two dimensions alone.
    assert sum(len(site.sizes) or 1 for site in sites) == counted.calls
    with torch.no_grad():
        assert sum(site.macs for site in sites) * batch == fvcore_macs(model, x)


@OLD_NORM
@pytest.mark.parametrize("name", MODELS)
def test_each_site_is_the_convolution_that_ran(name):
    """The dense convolution that a site describes, on the input that it notes, occurs in the model."""
    model, x = seeded(MODELS[name]), torch.randn(2, 3, 8, 8)
    outputs = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs.append(func(*args, **(kwargs or {})))
            return outputs[-1]

    with torch.no_grad(), Outputs():
        model(x)
    for site in traced(model, (x,)).sites:
        if site.conv is None:
            continue
        spec, (top, bottom), (left, right) = site.conv.spec, *site.conv.spec.padding
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        already = (site.conv.inputs.shape[-2] - site.sizes[0][0]) if mode == "circular" else 0
        padded = F.pad(site.conv.inputs, (0,) * 4 if already else (left, right, top, bottom), mode=mode)
        expected = F.conv2d(
            padded, site.conv.weight, site.conv.bias, spec.stride, 0, spec.dilation, spec.groups
        )
        assert any(
            isinstance(value, torch.Tensor)
            and value.shape == expected.shape
            and torch.allclose(value, expected, atol=1e-5)
            for value in outputs
        )


def by_name(model, *inputs):
    return {site.name: site for site in traced(model, inputs).sites}


def test_names_sizes_and_kinds():
    sites = by_name(seeded(Reused), torch.randn(2, 3, 8, 8))
    assert set(sites) == {"first"}
    assert sites["first"].aliases == ("again",)
    assert sites["first"].sizes == ((8, 8), (8, 8), (4, 4))
    sites = by_name(nn.Sequential(nn.Identity(), seeded(Functional)), torch.randn(1, 3, 8, 8))
    assert list(sites) == [
        "1.conv2d_0", "1.conv2d_1", "1.conv2d_2", "1.conv2d_3", "1.convolution_4", "1.convolution_5",
    ]  # fmt: skip
    assert [site.params for site in sites.values()] == [108, 0, 0, 0, 0, 0]
    assert sites["1.conv2d_0"].conv.spec.padding == ((1, 1), (1, 1))
    assert set(by_name(seeded(ByForward), torch.randn(1, 3, 8, 8))) == {"conv2d_0"}


def test_a_block_shared_by_two_parents_is_one_site():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    site = by_name(
        nn.Sequential(nn.Sequential(block), nn.Sequential(nn.ReLU(), block)), torch.randn(1, 3, 8, 8)
    )
    assert list(site) == ["0.0.0"]
    assert site["0.0.0"].aliases == ("1.1.0",)
    assert site["0.0.0"].sizes == ((8, 8), (8, 8))


def test_other_kinds_are_listed_with_a_reason():
    sites = traced(seeded(OtherKinds), (torch.randn(1, 3, 8, 8),)).sites
    assert [(site.kind, site.obstacle) for site in sites] == [
        ("Conv1d", "1-D convolutions are not factorised"),
        ("ConvTranspose2d", "transposed convolutions are not factorised"),
        ("Conv3d", "3-D convolutions are not factorised"),
        ("functional conv_transpose2d", "transposed convolutions are not factorised"),
    ]


def ops():
    """Return torchvision's operators; without them, the test that asks is skipped."""
    return pytest.importorskip("torchvision.ops")


class ByOtherOperators(nn.Module):
    """Convolutions by operators of torchvision, of torch's backends and of the user's, and by hand."""

    def __init__(self):
        super().__init__()
        self.offsets, self.deform = nn.Conv2d(4, 18, 3, padding=1), ops().DeformConv2d(4, 6, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.matrix = nn.Parameter(torch.randn(4, 4 * 9))
        self.patches = nn.Unfold(2, stride=2)

    def forward(self, x):
        offsets = self.offsets(x)
        x = ops().deform_conv2d(self.deform(x, offsets), offsets, self.kernel, padding=1)
        for _ in range(2):
            x = (self.matrix @ F.unfold(x, 3, padding=1)).view_as(x)
        x = F.fold(self.patches(x), x.shape[-2:], 2, stride=2)
        x = torch.ops.aten.mkldnn_convolution(x, torch.ones(4, 4, 1, 1), None, [0, 0], [1, 1], [1, 1], 1)
        x = torch.ops.user.smooth(torch.ops.user.conv_by_user(x), self.kernel, self.matrix)
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        x = torch.einsum("nchwij,kcij->nkhw", patches, self.kernel[:, :4])
        x = x + x.as_strided((*x.shape, 2), (*x.stride(), 0)).sum(-1)
        return torch.fft.irfft2(torch.fft.rfft2(x))


@torch.library.custom_op("user::conv_by_user", mutates_args=())
def conv_by_user(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("user::smooth", mutates_args=())
def smooth(x: torch.Tensor, kernel: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_other_operators_that_convolve_are_listed_with_a_reason():
    """The multiply-adds of a deformable convolution are those of a dense one: positions × weights."""
    sites = traced(seeded(ByOtherOperators), (torch.randn(2, 4, 8, 8),)).sites
    deformable = "a deformable convolution reads its input at computed positions, as no separable form does"
    assert [(site.name, site.kind, site.macs, site.params, site.is_convolution) for site in sites] == [
        ("offsets", "Conv2d", 64 * 18 * 36, 18 * 37, True),
        ("deform", "DeformConv2d", 64 * 6 * 36, 6 * 37, True),
        ("deform_conv2d_0", "functional deform_conv2d", 64 * 4 * 54, 4 * 54, True),
        ("unfold_0", "functional unfold", 0, 0, False),
        ("unfold_1", "functional unfold", 0, 0, False),
        ("patches", "Unfold", 0, 0, False),
        ("fold_0", "functional fold", 0, 0, False),
        ("mkldnn_convolution_0", "functional mkldnn_convolution", 0, 0, True),
        ("conv_by_user_0", "functional conv_by_user", 0, 0, True),
        ("smooth_0", "functional smooth", 0, 4 * 54 + 16 * 9, False),
        ("unfold_2", "functional unfold", 0, 0, False),
        ("unfold_3", "functional unfold", 0, 0, False),
        ("as_strided_0", "functional as_strided", 0, 0, False),
        ("fft_0", "functional fft", 0, 0, False),
    ]
    assert [site.obstacle for site in sites[:4]] == [
        None, deformable, deformable, "it cuts out patches, for a convolution or for something else",
    ]  # fmt: skip
    assert sites[6].obstacle == "it adds up patches, for a transposed convolution or for something else"
    assert (
        sites[8].obstacle == "it is a call of user::conv_by_user; only torch's own convolutions are replaced"
    )
    assert sites[9].obstacle == ("it is a call of user::smooth with a kernel, which sepconvert does not know")
    assert sites[13].obstacle == "it transforms a spectrum back, for a convolution or for something else"
    assert all(site.conv is None for site in sites[1:])


def test_a_layer_that_is_called_twice_and_a_module_named_as_a_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.offsets, self.deform = nn.Conv2d(4, 18, 3, padding=1), ops().DeformConv2d(4, 4, 3, padding=1)
            self.unfold_0 = nn.Identity()

        def forward(self, x):
            offsets = self.offsets(x)
            return F.unfold(self.deform(self.deform(x, offsets), offsets), 2)

    sites = by_name(Twice(), torch.randn(2, 4, 8, 8))
    assert set(sites) == {"offsets", "deform", "unfold_0_"}
    assert (sites["deform"].calls, sites["deform"].macs) == (2, 2 * 64 * 4 * 36)


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.fft.rfft2(x).abs(), lambda x: x.to(torch.float64), lambda x: x.unfold(2, 4, 4)],
)
def test_operators_that_are_no_part_of_a_convolution(function):
    class Other(nn.Module):
        def forward(self, x):
            return function(x)

    assert by_name(Other(), torch.randn(2, 4, 8, 8)) == {}


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
def test_torchscript_convolutions_are_listed():
    model, x = seeded(Scripted), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), CountConvolutions() as counted:
        model(x)
    assert counted.calls == 3
    sites = traced(model, (x,)).sites
    hidden = [site for site in sites if site.kind == "TorchScript or C++"]
    assert len(hidden) == 1
    assert "2 convolutions" in hidden[0].obstacle
    assert [site.name for site in sites if site.obstacle is None] == ["conv"]


def test_calls_under_a_transform_are_listed():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mapped = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 9, 3)

        def forward(self, x):
            within = self.first(x)
            return torch.vmap(lambda image: self.mapped(image[None])[0])(within) + self.mapped(within)

    sites = by_name(Mapped(), torch.randn(2, 3, 8, 8))
    assert sites["first"].obstacle is None
    assert sites["mapped"].obstacle == "it runs under a transform of torch.func, such as vmap"
    assert sites["mapped"].kind == "Conv2d"
    assert len(sites) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
@pytest.mark.parametrize(
    "differentiated",
    [
        lambda conv, x: torch.func.jvp(conv, (x,), (x,))[0],
        lambda conv, x: torch.func.grad(lambda x: conv(x).sum())(x),
    ],
)
def test_models_that_differentiate_a_convolution_are_refused(differentiated):
    class Differentiating(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return differentiated(self.conv, x)

    with pytest.raises(SepconvertError, match="differentiates a convolution"):
        traced(Differentiating(), (torch.randn(2, 3, 8, 8),))
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_what_is_not_executed_is_listed():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 9, 3)

        def forward(self, x):
            return self.used(x)

    sites = by_name(Partly(), torch.randn(1, 3, 8, 8))
    assert sites["used"].obstacle is None
    assert sites["unused"].obstacle == "not executed on these inputs"
    assert sites["unused"].params == 3 * 9 * 9 + 9


class OfInput(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.register_buffer("fixed", torch.ones(3, 1, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel(self, x), groups=3)


@pytest.mark.parametrize(
    ("kernel", "obstacle"),
    [
        (lambda self, x: self.fixed.to(x), None),
        (lambda self, x: self.fixed * x.mean(), "computed from the input"),
        (lambda self, x: self.fixed * x.shape[0], "computed from the input"),
        (lambda self, x: self.fixed * float("nan"), "NaN or Inf"),
        (lambda self, x: self.fixed / 0, "NaN or Inf"),
    ],
    ids=["fixed", "of the values", "of the batch", "nan", "inf"],
)
def test_kernels_that_are_not_constant_or_not_finite_are_refused(kernel, obstacle):
    [site] = by_name(OfInput(kernel), torch.randn(2, 3, 8, 8)).values()
    assert (site.obstacle is None) if obstacle is None else (obstacle in site.obstacle)


def test_one_call_with_two_kernels_or_geometries_is_refused():
    class Alternating(nn.Module):
        def __init__(self, kernels, strides):
            super().__init__()
            self.kernels, self.strides, self.calls = kernels, strides, 0

        def forward(self, x):
            index, self.calls = self.calls % 2, self.calls + 1
            return F.conv2d(x, self.kernels[index], stride=self.strides[index])

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).mean() + self.inner(x).mean()

    a, b, x = torch.randn(3, 3, 3, 3), torch.randn(3, 3, 3, 3), torch.randn(1, 3, 8, 8)
    for kernels, strides, obstacle in [
        ((a, b), (1, 1), "different kernels"),
        ((a, a), (1, 2), "different geometries"),
    ]:
        [site] = traced(Twice(Alternating(kernels, strides)), (x,)).sites
        assert obstacle in site.obstacle
        assert len(site.sizes) == 2


class Padding(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class PaddingToEven(nn.Conv2d):
    """Does nothing but convolve at even sizes."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, x.shape[-1] % 2)))


class Scaling(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Gated(nn.Conv2d):
    def forward(self, x, gate):
        return super().forward(x) if gate else x


class Renamed(nn.Conv2d):
    def forward(self, image):
        return F.conv2d(image, self.weight - self.weight.mean(), self.bias)


class Calling(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x, True) if isinstance(self.conv, Gated) else self.conv(x)


@pytest.mark.parametrize(
    ("cls", "replaceable"),
    [(Padding, False), (PaddingToEven, False), (Scaling, False), (Gated, False), (Renamed, True)],
)
def test_subclasses_with_a_forward_of_their_own(cls, replaceable):
    [site] = by_name(Calling(cls(3, 4, 3)), torch.randn(1, 3, 8, 8)).values()
    assert site.name == "conv"
    assert (site.obstacle is None) == replaceable
    assert replaceable or "does more than convolve" in site.obstacle


def test_several_inputs_of_which_not_all_are_batches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(5, 3)

        def forward(self, x, index, scale):
            return self.conv(x) * scale[:, None, None] + self.table(index)[:, :, None, None]

    x, index, scale = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), torch.ones(3)
    [site] = by_name(Two(), x, index, scale).values()
    assert site.obstacle is None
    assert site.macs == 8 * 8 * 81


def test_images_cut_from_a_sample_count_as_calls():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x.unfold(3, 4, 4).movedim(3, 1).flatten(0, 1))

    [site] = by_name(Crops(), torch.randn(2, 3, 8, 8)).values()
    assert site.sizes == ((8, 4), (8, 4))
    assert site.macs == 2 * 6 * 2 * 81


def test_a_failing_forward_is_one_line():
    with pytest.raises(SepconvertError, match=r"failed on input 1x4x8x8: .* 3 channels") as caught:
        traced(nn.Conv2d(3, 4, 3), (torch.randn(1, 4, 8, 8),))
    assert "\n" not in str(caught.value)
