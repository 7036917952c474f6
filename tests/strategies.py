"""Convolutions of every geometry with planted structure, made with numpy and torch's own `nn.Conv2d` alone.

Nothing in here uses the code under test but for its value types: numpy plants structure and measures
rank, and `nn.Conv2d` resolves padding.
"""

import warnings
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import nn

from sepconvert.factorize.geometry import ConvSpec

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Half the distance from 1 to the next number: 53, 24, 11 and 8 bits of significand.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# scheme: factors of a group (or, depthwise, of a channel n) and the kernel that they make.
PLANTS = {
    "spatial-vh": ("grci,gorj->gocij"),
    "spatial-hv": ("grcj,gori->gocij"),
    "channelwise-spatial-vh": ("gocri,gorj->gocij"),
    "channelwise-spatial-hv": ("gocrj,gori->gocij"),
    "depthwise-pointwise": ("gcrij,gocr->gocij"),
    "pointwise-depthwise": ("gorc,gorij->gocij"),
    "input-subspace": ("grc,gorij->gocij"),
    "output-subspace": ("grcij,gor->gocij"),
}
SCHEMES = tuple(PLANTS)


def numbered(examples):
    """Settings of a property test: as many examples as the profile has, but no more than `examples`."""
    return settings(max_examples=min(examples, settings.default.max_examples))


@dataclass(frozen=True)
class Geometry:
    """Arguments of an `nn.Conv2d`, and the input that it is to have."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    bias: bool
    dtype: torch.dtype
    size: tuple[int, int]
    batch: int | None  # None: C × H × W
    seed: int

    @property
    def axes(self):
        """Sizes of a group's kernel by the letters of `PLANTS`."""
        kh, kw = self.kernel_size
        return {
            "g": self.groups,
            "o": self.out_channels // self.groups,
            "c": self.in_channels // self.groups,
            "i": kh,
            "j": kw,
        }

    def conv(self, weight=None):
        """The dense layer in its dtype; `weight` is numpy's, in float64."""
        with warnings.catch_warnings():
            # torch: "Using padding='same' with even kernel lengths and odd dilation may require a copy"
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
            torch.manual_seed(self.seed)
            module = nn.Conv2d(
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                self.dilation, self.groups, self.bias, self.padding_mode, dtype=torch.float64,
            )  # fmt: skip
        if weight is not None:
            module.weight.data = torch.from_numpy(np.ascontiguousarray(weight))
        return module.to(self.dtype).requires_grad_(False)

    def inputs(self):
        shape = (self.in_channels, *self.size)
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape if self.batch is None else (self.batch, *shape), generator=generator)
        return x.to(self.dtype)


def run(module, inputs):
    """`module(inputs)`, without torch's remark that 'same' for even kernels copies the input."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return module(inputs)


def spec_of(conv):
    """Geometry of an `nn.Conv2d`; torch itself has resolved 'same' and 'valid'."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return ConvSpec(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=((top, bottom), (left, right)),
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        bias=conv.bias is not None,
    )


@st.composite
def geometries(draw, least_kernel=1, dtypes=DTYPES, multiplied=False):
    """Every combination that `nn.Conv2d` takes. `multiplied`: depthwise, with a channel multiplier."""
    if multiplied:
        groups = draw(st.integers(1, 5))
        in_per_group, out_per_group = 1, draw(st.integers(1, 3))
    else:
        groups = draw(st.sampled_from((1, 1, 2, 3)))
        in_per_group, out_per_group = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    kernel_size = draw(st.integers(least_kernel, 5)), draw(st.integers(least_kernel, 5))
    dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extents = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    padding = draw(st.sampled_from(("same", "valid", "numbers", "numbers")))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    before, after = {
        "same": ([e // 2 for e in extents], [e - e // 2 for e in extents]),
        "valid": ([0, 0], [0, 0]),
        "numbers": ([draw(st.integers(0, 4)), draw(st.integers(0, 4))],) * 2,
    }[padding]
    # reflect wants more input than padding, circular as much, and the kernel must fit
    least = [max(e + 1 - b - a, b + 1, a + 1) for e, b, a in zip(extents, before, after, strict=True)]
    return Geometry(
        in_channels=groups * in_per_group,
        out_channels=groups * out_per_group,
        kernel_size=kernel_size,
        stride=stride,
        padding=tuple(before) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        padding_mode=draw(st.sampled_from(("zeros", "reflect", "replicate", "circular"))),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        size=(least[0] + draw(st.integers(0, 5)), least[1] + draw(st.integers(0, 5))),
        batch=draw(st.sampled_from((None, 1, 2))),
        seed=draw(st.integers(0, 2**20)),
    )


def factor_shapes(scheme, axes, rank):
    """Shapes of the two factors in `PLANTS`."""
    sizes = axes | {"r": rank}
    return [
        tuple(sizes[axis] for axis in subscripts) for subscripts in PLANTS[scheme].split("->")[0].split(",")
    ]


def plant(scheme, axes, rank, rng):
    """A random kernel O × C/g × kh × kw of the structure `scheme`, in float64."""
    factors = [rng.standard_normal(shape) for shape in factor_shapes(scheme, axes, rank)]
    return np.einsum(PLANTS[scheme], *factors).reshape(-1, axes["c"], axes["i"], axes["j"])


def unfolded(scheme, weight, groups):
    """The matrices whose rank decides, one more for each group or channel."""
    out_channels, c, kh, kw = weight.shape
    o = out_channels // groups
    kernel = weight.reshape(groups, o, c, kh, kw)
    if scheme == "spatial-vh":
        return kernel.transpose(0, 2, 3, 1, 4).reshape(groups, c * kh, o * kw)
    if scheme == "spatial-hv":
        return kernel.transpose(0, 2, 4, 1, 3).reshape(groups, c * kw, o * kh)
    if scheme.startswith("channelwise"):
        return kernel.reshape(groups * o, kh, kw)
    if scheme == "depthwise-pointwise":
        return kernel.transpose(0, 2, 1, 3, 4).reshape(groups * c, o, kh * kw)
    if scheme == "pointwise-depthwise":
        return kernel.reshape(groups * o, c, kh * kw)
    if scheme == "input-subspace":
        return kernel.transpose(0, 2, 1, 3, 4).reshape(groups, c, o * kh * kw)
    return kernel.reshape(groups, o, c * kh * kw)


def spectra(scheme, weight, groups):
    """Singular values of the matrices, output channels scaled to unit norm."""
    norms = np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))
    return np.linalg.svd(unfolded(scheme, weight / np.where(norms, norms, 1), groups), compute_uv=False)


def distinct_schemes(axes):
    """Structures that say something about a kernel of these sizes, no two of them being the same matrix."""
    c, o, i, j = (axes[axis] for axis in "coij")
    flat, mixes = i == j == 1, c > 1 and o > 1
    schemes = []
    if i > 1 and j > 1 and (c > 1 or o > 1):
        schemes += ["spatial-vh", "spatial-hv"]
    if i > 1 and j > 1 and c == 1:
        schemes += ["channelwise-spatial-vh", "channelwise-spatial-hv"]
    if not flat and mixes:
        schemes += ["depthwise-pointwise", "pointwise-depthwise"]
    if not flat and c > 1:
        schemes += ["input-subspace"]
    if o > 1 and (c > 1 or not flat):
        schemes += ["output-subspace"]
    return schemes


@dataclass(frozen=True)
class Planted:
    """A dense layer whose kernel has the structure `scheme` of rank `rank` inside a border of zeros."""

    geometry: Geometry
    scheme: str
    rank: int
    border: tuple[int, int, int, int]  # top, bottom, left, right
    conv: nn.Conv2d

    @property
    def factor_params(self):
        """Weights of the two factors."""
        kh, kw = self.kept
        axes = self.geometry.axes | {"i": kh, "j": kw}
        return sum(prod(shape) for shape in factor_shapes(self.scheme, axes, self.rank))

    @property
    def kept(self):
        top, bottom, left, right = self.border
        kh, kw = self.geometry.kernel_size
        return kh - top - bottom, kw - left - right


@st.composite
def planted(draw, bordered=False, dtypes=DTYPES):
    """A layer with one of its structures planted, well above the rounding of its dtype."""
    multiplied = draw(st.sampled_from((False, False, True)))
    geometry = draw(geometries(dtypes=dtypes, multiplied=multiplied))
    kh, kw = geometry.kernel_size
    border = (0, 0, 0, 0)
    if bordered:
        top, left = draw(st.integers(0, min(kh - 1, 2))), draw(st.integers(0, min(kw - 1, 2)))
        bottom, right = (
            draw(st.integers(0, min(kh - 1 - top, 2))),
            draw(st.integers(0, min(kw - 1 - left, 2))),
        )
        border = top, bottom, left, right
        assume(any(border))
    axes = geometry.axes | {"i": kh - border[0] - border[1], "j": kw - border[2] - border[3]}
    schemes = distinct_schemes(axes)
    assume(schemes)
    scheme = draw(st.sampled_from(schemes))
    full = min(
        unfolded(scheme, np.zeros((axes["o"] * axes["g"], *(axes[a] for a in "cij"))), axes["g"]).shape[1:]
    )
    rank = draw(st.integers(1, min(full, 6)))
    core = plant(scheme, axes, rank, np.random.default_rng(geometry.seed))
    tolerance = 8 * ROUNDOFF[geometry.dtype]
    values = spectra(scheme, core, geometry.groups)
    assume((values[:, rank - 1] > tolerance * np.sqrt((values**2).sum(axis=1))).all())
    magnitude = np.abs(core / np.sqrt((core**2).sum(axis=(1, 2, 3), keepdims=True))).max(axis=(0, 1))
    assume(
        min(edge.max() for edge in (magnitude[0], magnitude[-1], magnitude[:, 0], magnitude[:, -1]))
        > tolerance
    )
    weight = np.pad(core, ((0, 0), (0, 0), border[:2], border[2:]))
    return Planted(geometry, scheme, rank, border, geometry.conv(weight))
