"""The structures that let one convolution be written as two: a table of unfoldings.

A kernel `W[o,c,i,j]` (per group, `O/g × C/g × kh × kw`) splits into two convolutions through an
inner dimension of size R exactly when a certain unfolding of it into matrices has rank R. Each
structure is therefore three einops patterns: the unfolding, whose rows belong to the first
convolution and whose columns belong to the second, and the layouts of the two factors of that matrix as
kernels. All patterns are invertible, so composing the two convolutions is the same table read backwards.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

from einops import rearrange
from torch import Tensor

from sepconvert.factorize.geometry import ConvSpec

Form = tuple[str, int]
"""The name of a structure or nested form, and its rank."""


@dataclass(frozen=True)
class Structure:
    """A way to write a dense convolution as two convolutions in a row.

    Axes: `g` groups, `o` and `c` output and input channels of a group, `i` and `j` kernel rows and
    columns, `r` the inner dimension (rank; channel multiplier where the factor is depthwise).
    """

    name: str
    unfolding: str  # kernel → batch × rows × columns
    first: str  # batch × rows × r → kernel of the first convolution
    second: str  # batch × r × columns → kernel of the second convolution
    applies: Callable[[ConvSpec], bool]
    # A rank above 1 is laid out as a sum of branches of rank 1: fast depthwise kernels of runtimes support
    # channel multiplier 1 alone.
    parallel: bool = False

    def unfold(self, spec: ConvSpec, weight: Tensor) -> Tensor:
        """Return a kernel O × C/g × kh × kw as matrices B × m × n, the largest rank of which decides."""
        return rearrange(weight, self.unfolding, **_sizes(self.unfolding, spec))

    def fold(self, spec: ConvSpec, matrices: Tensor) -> Tensor:
        """Return matrices B × m × n as a kernel O × C/g × kh × kw, the inverse of `unfold`."""
        pattern = _reverse(self.unfolding)
        return rearrange(matrices, pattern, **_sizes(pattern, spec))

    def kernels(self, spec: ConvSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrix factors B × m × r and B × r × n as the kernels of the two convolutions."""
        first = rearrange(left, self.first, **_sizes(self.first, spec))
        return first, rearrange(right, self.second, **_sizes(self.second, spec))

    def factors(self, spec: ConvSpec, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernels of the two convolutions as matrix factors, the inverse of `kernels`."""
        to_left, to_right = _reverse(self.first), _reverse(self.second)
        left = rearrange(first, to_left, **_sizes(to_left, spec))
        return left, rearrange(second, to_right, **_sizes(to_right, spec))

    def compose(self, spec: ConvSpec, *kernels: Tensor) -> Tensor:
        """Return the dense kernel O × C/g × kh × kw that equals the two convolutions."""
        left, right = self.factors(spec, *kernels)
        return self.fold(spec, left @ right)

    def split(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ConvSpec]:
        """Return the geometries of the two convolutions at inner dimension `rank`.

        Each axis of stride, padding and dilation goes to the convolution whose kernel extends along
        it. The first has no bias, since the second's zero padding would lack it at the border.
        """
        inner, per_group = _channels(self.first, spec, rank)
        first_groups = spec.in_channels // per_group
        second_groups = inner // _channels(self.second, spec, rank)[1]
        first_axes, second_axes = _extends(self.first), _extends(self.second)
        return (
            spec.restricted_to(first_axes).with_channels(spec.in_channels, inner, first_groups, bias=False),
            spec.restricted_to(second_axes).with_channels(
                inner, spec.out_channels, second_groups, bias=spec.bias
            ),
        )

    @property
    def axes(self) -> tuple[list[str], list[str], list[str]]:
        """The axes of the kernel that the unfolding makes batches, rows and columns of."""
        batch, rows, columns = _output_groups(self.unfolding)
        return batch, rows, columns

    def full_rank(self, spec: ConvSpec) -> int:
        """Return the rank at which every kernel has this form."""
        _, rows, columns = self.axes
        sizes = _axis_sizes(spec)
        return min(prod(sizes[axis] for axis in rows), prod(sizes[axis] for axis in columns))


def _axis_sizes(spec: ConvSpec) -> dict[str, int]:
    """Return the sizes of a kernel's axes by their letters in the patterns."""
    out_per_group, in_per_group = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    return {
        "g": spec.groups,
        "o": out_per_group,
        "c": in_per_group,
        "i": spec.kernel_size[0],
        "j": spec.kernel_size[1],
    }


def _sizes(pattern: str, spec: ConvSpec) -> dict[str, int]:
    """Return the sizes of the axes in a pattern that einops cannot infer, which are all but the rank."""
    named = set(re.findall("[a-z]", pattern))
    return {axis: size for axis, size in _axis_sizes(spec).items() if axis in named}


def _reverse(pattern: str) -> str:
    """Return the inverse of an einops pattern."""
    source, target = pattern.split("->")
    return f"{target.strip()} -> {source.strip()}"


def _output_groups(pattern: str) -> list[list[str]]:
    """Return the axes of each output dimension: "… -> g (c i) (o j)" gives [[g], [c, i], [o, j]]."""
    target = pattern.split("->")[1]
    return [re.findall("[a-z]", group) for group in re.findall(r"\([^)]*\)|\S+", target)]


def _channels(pattern: str, spec: ConvSpec, rank: int) -> tuple[int, int]:
    """Return the output channels, and input channels of a group, of the kernel that `pattern` makes."""
    sizes = _axis_sizes(spec) | {"r": rank}
    outputs, inputs = (prod(sizes[axis] for axis in group) for group in _output_groups(pattern)[:2])
    return outputs, inputs


def _extends(pattern: str) -> tuple[bool, bool]:
    """Return whether the kernel that `pattern` makes extends along (vertical, horizontal)."""
    axes = _output_groups(pattern)
    return "i" in axes[2], "j" in axes[3]


def _in_per_group(spec: ConvSpec) -> int:
    return spec.in_channels // spec.groups


def _out_per_group(spec: ConvSpec) -> int:
    return spec.out_channels // spec.groups


def _two_dimensional(spec: ConvSpec) -> bool:
    return min(spec.kernel_size) > 1


def _extended(spec: ConvSpec) -> bool:
    return max(spec.kernel_size) > 1


def _mixes(spec: ConvSpec) -> bool:
    return _in_per_group(spec) > 1 and _out_per_group(spec) > 1


# Each predicate excludes the cases in which another row of the table gives the same matrix.
STRUCTURES: tuple[Structure, ...] = (
    # W[o,c,i,j] = Σ_r H[o,r,j] V[r,c,i]
    Structure(
        name="spatial-vh",
        unfolding="(g o) c i j -> g (c i) (o j)",
        first="g (c i) r -> (g r) c i 1",
        second="g r (o j) -> (g o) r 1 j",
        applies=lambda spec: _two_dimensional(spec) and max(_in_per_group(spec), _out_per_group(spec)) > 1,
    ),
    # W[o,c,i,j] = Σ_r V[o,r,i] H[r,c,j]
    Structure(
        name="spatial-hv",
        unfolding="(g o) c i j -> g (c j) (o i)",
        first="g (c j) r -> (g r) c 1 j",
        second="g r (o i) -> (g o) r i 1",
        applies=lambda spec: _two_dimensional(spec) and max(_in_per_group(spec), _out_per_group(spec)) > 1,
    ),
    # depthwise: W[o,1,i,j] = Σ_r v[o,r,i] h[o,r,j]
    Structure(
        name="channelwise-spatial-vh",
        unfolding="(g o) c i j -> (g o) (c i) j",
        first="(g o) (c i) r -> (g o r) c i 1",
        second="(g o) r j -> (g o) r 1 j",
        applies=lambda spec: _two_dimensional(spec) and _in_per_group(spec) == 1,
    ),
    Structure(
        name="channelwise-spatial-hv",
        unfolding="(g o) c i j -> (g o) (c j) i",
        first="(g o) (c j) r -> (g o r) c 1 j",
        second="(g o) r i -> (g o) r i 1",
        applies=lambda spec: _two_dimensional(spec) and _in_per_group(spec) == 1,
    ),
    # W[o,c,i,j] = Σ_m P[o,(c,m)] D[(c,m),i,j]
    Structure(
        name="depthwise-pointwise",
        unfolding="(g o) c i j -> (g c) (i j) o",
        first="(g c) (i j) r -> (g c r) 1 i j",
        second="(g c) r o -> (g o) (c r) 1 1",
        applies=lambda spec: _extended(spec) and _mixes(spec),
        parallel=True,
    ),
    # W[o,c,i,j] = Σ_m D[(o,m),i,j] P[(o,m),c]
    Structure(
        name="pointwise-depthwise",
        unfolding="(g o) c i j -> (g o) c (i j)",
        first="(g o) c r -> (g o r) c 1 1",
        second="(g o) r (i j) -> (g o) r i j",
        applies=lambda spec: _extended(spec) and _mixes(spec),
        parallel=True,
    ),
    # W[o,c,i,j] = Σ_r K[o,r,i,j] P[r,c]
    Structure(
        name="input-subspace",
        unfolding="(g o) c i j -> g c (o i j)",
        first="g c r -> (g r) c 1 1",
        second="g r (o i j) -> (g o) r i j",
        applies=lambda spec: _extended(spec) and _in_per_group(spec) > 1,
    ),
    # W[o,c,i,j] = Σ_r P[o,r] K[r,c,i,j]
    Structure(
        name="output-subspace",
        unfolding="(g o) c i j -> g (c i j) o",
        first="g (c i j) r -> (g r) c i j",
        second="g r o -> (g o) r 1 1",
        applies=lambda spec: _out_per_group(spec) > 1 and (_in_per_group(spec) > 1 or _extended(spec)),
    ),
)


@dataclass(frozen=True)
class Nested:
    """A structure within another: the second convolution of `outer` is written as two by `inner`.

    Its rank is that of `outer`. The rank of `inner` is the same share of the output channels as that of
    `outer` is of the input channels, rounded up to a multiple of `block`.
    """

    name: str
    outer: Structure
    inner: Structure
    block: int
    parallel = False

    def applies(self, spec: ConvSpec) -> bool:
        """Return whether both structures apply to a layer of this geometry."""
        return self.outer.applies(spec) and self.inner.applies(spec)

    def inner_rank(self, spec: ConvSpec, rank: int) -> int:
        """Return the rank of `inner` for a rank of `outer`."""
        share = rank * _out_per_group(spec) / _in_per_group(spec)
        _, second = self.outer.split(spec, rank)
        return min(ceil(share / self.block) * self.block, self.inner.full_rank(second))

    def split(self, spec: ConvSpec, rank: int) -> tuple[ConvSpec, ...]:
        """Return the geometries of the three convolutions."""
        first, second = self.outer.split(spec, rank)
        return first, *self.inner.split(second, self.inner_rank(spec, rank))

    def compose(self, spec: ConvSpec, *kernels: Tensor) -> Tensor:
        """Return the dense kernel O × C/g × kh × kw that equals the three convolutions."""
        first, *others = kernels
        _, second = self.outer.split(spec, len(first) // spec.groups)
        return self.outer.compose(spec, first, self.inner.compose(second, *others))

    def full_rank(self, spec: ConvSpec) -> int:
        """Return the rank at which every kernel has this form."""
        return self.outer.full_rank(spec)


BY_NAME = {structure.name: structure for structure in STRUCTURES}

# W[o,c,i,j] = Σ_s Q[o,s] Σ_r K[s,r,i,j] P[r,c]  (Tucker's decomposition over the channels)
CHANNEL_SUBSPACE = Nested("channel-subspace", BY_NAME["input-subspace"], BY_NAME["output-subspace"], block=8)

FORMS: dict[str, Structure | Nested] = {**BY_NAME, CHANNEL_SUBSPACE.name: CHANNEL_SUBSPACE}
"""Every form that a layer can be replaced by. Nested forms are never found exact; their parts are."""
