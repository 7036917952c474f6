"""Is the converted model the original? Layer by layer, and as a whole, against derived tolerances."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sepconvert.export import cast, model_dtype
from sepconvert.factorize.exact import channel_errors
from sepconvert.layers import FactorizedConv2d
from sepconvert.spec import ConvSpec
from sepconvert.trace import ConvolutionInterceptor, ConvSite, DenseConv, Inputs, private_copy

Outputs = list[Tensor]

# Perturbations of random sign partly cancel where a true difference might add up.
_SAFETY = 4.0


@dataclass(frozen=True)
class LayerCheck:
    """Dense layer and factors on the input that the layer had in the model."""

    max_abs_diff_float64: float
    max_abs_diff: float  # each computed in the model's own dtype
    output_error: float  # ‖Δy‖ / ‖y‖, float64
    bound_float64: float  # on max |Δy|: max over positions and channels of ‖ΔW_o‖ · ‖patch‖
    kernel_error: float  # max over output channels of ‖ΔW_o‖ / ‖W_o‖
    kernel_tolerance: float

    @property
    def holds(self) -> bool:
        """Are the kernels the same but for rounding, and the outputs but for the kernels?"""
        return self.max_abs_diff_float64 <= self.bound_float64 and self.kernel_error <= self.kernel_tolerance


@dataclass(frozen=True)
class Comparison:
    """Largest difference of two lists of outputs, and how large it may be."""

    max_abs_diff: float
    tolerance: float
    dtype: str

    @property
    def holds(self) -> bool:
        """Within the tolerance? (NaN is not.)"""
        return self.max_abs_diff <= self.tolerance


def dense_convolution(spec: ConvSpec, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The dense layer by its definition: pad, then convolve."""
    (top, bottom), (left, right) = spec.padding
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(inputs, (left, right, top, bottom), mode=mode)
    return F.conv2d(padded, weight, bias, spec.stride, 0, spec.dilation, spec.groups)


def check_layer(conv: DenseConv, layer: FactorizedConv2d, tolerance: float) -> LayerCheck:
    """Compare a dense layer with its factors: the kernels, and the outputs on the input it had in the model.

    `tolerance` is the relative error that each output channel's kernel may have (its certificate's).
    """
    spec, double = conv.spec, private_copy(layer).cpu().double()
    inputs, weight = conv.inputs.double(), conv.weight.double()
    bias = None if conv.bias is None else conv.bias.double()
    with torch.no_grad():
        dense = dense_convolution(spec, inputs, weight, bias)
        factored = double(inputs)
        own = dense_convolution(spec, conv.inputs, conv.weight, conv.bias)
        own_factored = private_copy(layer).cpu()(conv.inputs)
        patch_norms = dense_convolution(spec, inputs.square(), torch.ones_like(weight), None).sqrt()
        magnitude = dense_convolution(spec, inputs.abs(), weight.abs(), None if bias is None else bias.abs())
        kernel_error = torch.linalg.vector_norm(double.weight - weight, dim=(1, 2, 3))[:, None, None]
    # Float64 rounding of both ways to compute the sum: n·eps times the sum of magnitudes.
    roundoff = weight[0].numel() * torch.finfo(torch.float64).eps * magnitude
    return LayerCheck(
        max_abs_diff_float64=_max_abs([factored - dense]),
        max_abs_diff=_max_abs([own_factored.double() - own.double()]),
        output_error=float(
            torch.linalg.vector_norm(factored - dense) / (torch.linalg.vector_norm(dense) or 1.0)
        ),
        bound_float64=_max_abs([kernel_error * patch_norms + 4 * roundoff]),
        kernel_error=float(channel_errors(double.weight.detach(), conv.weight).max()),
        kernel_tolerance=tolerance,
    )


def random_like(inputs: Inputs, seed: int) -> Inputs:
    """Standard normal tensors of the same shapes; integer tensors as they are."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(value.shape, generator=generator).to(value)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in inputs
    )


def outputs(model: nn.Module, inputs: Inputs) -> Outputs:
    """All floating-point tensors that a model returns, in eval mode, as float64."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*inputs))
    return [leaf.double().cpu() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class Reference:
    """The original model's outputs in high precision, and how far rounding of its kernels may move them."""

    inputs: tuple[Inputs, ...]
    outputs: tuple[Outputs, ...]  # one for each of `inputs`
    tolerances: tuple[list[float], ...]  # one for each output
    dtype: torch.dtype


def reference(
    model: nn.Module,
    inputs: Sequence[Inputs],
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
) -> Reference:
    """Run the original in float64, or in its own dtype if it insists on that.

    The tolerance is what the network itself makes of the permitted errors: each converted layer's
    output is moved by ±τ (|W| ∗ |x|), τ being what its certificate permits and |W| ∗ |x| the sum of
    the magnitudes of the terms (a componentwise bound), with random signs; the output may move
    four times as far as it does then.
    """
    try:
        return _reference(model, inputs, sites, tolerances, seed, torch.float64)
    except RuntimeError:  # a forward with a fixed dtype
        return _reference(model, inputs, sites, tolerances, seed, model_dtype(model))


def _reference(
    model: nn.Module,
    inputs: Sequence[Inputs],
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
    dtype: torch.dtype,
) -> Reference:
    precise = private_copy(model).to(dtype)
    cast_inputs = [cast(value, dtype) for value in inputs]
    plain = [outputs(precise, value) for value in cast_inputs]
    moved: list[list[float]] = []
    for value, expected in zip(cast_inputs, plain, strict=True):
        perturbed = _perturbed(precise, value, sites, tolerances, seed)
        responses = [_max_abs([p - e]) for p, e in zip(perturbed, expected, strict=True)]
        rounding = [100 * torch.finfo(dtype).eps * _max_abs([e]) for e in expected]
        moved.append(
            [_SAFETY * response + floor for response, floor in zip(responses, rounding, strict=True)]
        )
    return Reference(tuple(inputs), tuple(plain), tuple(moved), dtype)


def _perturbed(
    model: nn.Module, inputs: Inputs, sites: Sequence[ConvSite], tolerances: Mapping[str, float], seed: int
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    permitted = {
        (model.get_submodule(site.owner), site.index or 0): tolerances[site.name]
        for site in sites
        if site.name in tolerances
    }

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], output: Tensor
    ) -> Tensor:
        tolerance = permitted.get((module, index))
        if tolerance is None:
            return output
        magnitudes = {"input": arguments["input"].abs(), "weight": arguments["weight"].abs()}
        rest = {name: value for name, value in arguments.items() if name not in ("input", "weight", "bias")}
        run: Callable[..., Tensor] = torch.convolution if function == "convolution" else torch.conv2d
        bias = {"bias": None} if function == "convolution" else {}
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output + tolerance * signs * run(**magnitudes, **bias, **rest)

    interceptor = ConvolutionInterceptor(model, on_call)
    with interceptor.watching():
        return outputs(model, inputs)


def compare_with(expected: Reference, converted: nn.Module) -> Comparison:
    """Whole-model check of the converted model against the original's reference."""
    precise = private_copy(converted).to(expected.dtype)
    pairs = [
        (_max_abs([a - e]), tolerance)
        for value, outs, tolerances in zip(
            expected.inputs, expected.outputs, expected.tolerances, strict=True
        )
        for a, e, tolerance in zip(
            outputs(precise, cast(value, expected.dtype)), outs, tolerances, strict=True
        )
    ]
    return _worst(pairs, str(expected.dtype).removeprefix("torch."))


def compare_runs(
    expected: Reference, original: Sequence[Outputs], converted: Sequence[Outputs], dtype: str
) -> Comparison:
    """Check of two runtime models on the inputs of `expected`.

    The runtime's own rounding, seen as the distance of the original from its float64 outputs, may
    come in twice on top of the tolerance, in another order of summation.
    """
    pairs = []
    for outs, tolerances, ours, theirs in zip(
        expected.outputs, expected.tolerances, original, converted, strict=True
    ):
        for exact, tolerance, a, b in zip(outs, tolerances, ours, theirs, strict=True):
            noise = _max_abs([a - exact]) + torch.finfo(torch.float32).eps * _max_abs([exact])
            pairs.append((_max_abs([b - a]), tolerance + 4 * noise))
    return _worst(pairs, dtype)


def _worst(pairs: Sequence[tuple[float, float]], dtype: str) -> Comparison:
    """The pair (difference, tolerance) that comes nearest to failing, or fails by most."""
    # NaN must lose: no comparison with it is true.
    difference, tolerance = max(
        pairs, key=lambda pair: math.inf if not pair[0] <= pair[1] else pair[0] / (pair[1] or 1.0)
    )
    return Comparison(difference, tolerance, dtype)


def _max_abs(tensors: Sequence[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
