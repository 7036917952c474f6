"""Checks that the converted model computes what the original does: each layer, and the whole model.

Tolerances are derived, from rounding and from the certificates of the layers.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.factorize.exact.certificate import channel_errors
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.files.onnx.export import runtime_dtype
from sepconvert.network.calls import Call, ConvolutionInterceptor
from sepconvert.network.copies import private_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import Inputs, cast, floating, fresh, model_dtype, tensor_leaves
from sepconvert.network.trace import ConvSite, DenseConv

Outputs = list[Tensor]
"""Tensors that a model returns, as float64 on the CPU."""


# Perturbations of random sign partly cancel where a true difference might add up.
_SAFETY = 4.0


_RUNTIME_NOISE = 16.0


@dataclass(frozen=True)
class LayerCheck:
    """Differences of a dense layer and its factors, on the input that the layer had in the model."""

    max_abs_diff_float64: float
    max_abs_diff: float  # each computed in the model's own dtype
    output_error: float  # ‖Δy‖ / ‖y‖, float64
    bound_float64: float  # on max |Δy|: max over positions and channels of ‖ΔW_o‖ · ‖patch‖
    kernel_error: float  # max over output channels of ‖ΔW_o‖ / ‖W_o‖
    kernel_tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the kernels differ by rounding alone, and the outputs only as far as the kernels do."""
        return self.max_abs_diff_float64 <= self.bound_float64 and self.kernel_error <= self.kernel_tolerance


@dataclass(frozen=True)
class OutputCheck:
    """Largest difference of two lists of outputs, and how large it may be; None sets no limit."""

    max_abs_diff: float
    tolerance: float | None
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance (NaN is not)."""
        return self.tolerance is None or self.max_abs_diff <= self.tolerance


def dense_convolution(spec: ConvSpec, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output of a dense layer by its definition: pad, then convolve."""
    (top, bottom), (left, right) = spec.padding
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    padded = F.pad(inputs, (left, right, top, bottom), mode=mode)
    return F.conv2d(padded, weight, bias, spec.stride, 0, spec.dilation, spec.groups)


def check_layer(conv: DenseConv, layer: FactorizedConv2d, tolerance: float) -> LayerCheck:
    """Compare a dense layer with its factors: the kernels, and the outputs on the input it had in the model.

    `tolerance` is the relative error that each output channel's kernel may have (its certificate's).
    """
    spec, double = conv.spec, private_copy(layer, torch.float64).cpu()
    # A NaN or Inf from an earlier layer would hide what this one computes.
    noise = torch.randn(conv.inputs.shape, generator=torch.Generator().manual_seed(0))
    seen = torch.where(conv.inputs.isfinite(), conv.inputs, noise.to(conv.inputs))
    inputs, weight = seen.double(), conv.weight.double()
    bias = None if conv.bias is None else conv.bias.double()
    with torch.no_grad():
        dense = dense_convolution(spec, inputs, weight, bias)
        # Not by calling the layers: the user's hooks may change values.
        factored: Tensor = double.forward(inputs)
        # Under autocast a layer receives another dtype than its kernel's.
        own_input = seen.to(conv.weight.dtype)
        own = dense_convolution(spec, own_input, conv.weight, conv.bias)
        own_factored = private_copy(layer).cpu().forward(own_input)
        # All outputs of a group see the same patch.
        shared = spec.out_channels // spec.groups
        patches = dense_convolution(spec, inputs.square(), torch.ones_like(weight[::shared]), None)
        patch_norms = patches.sqrt().repeat_interleave(shared, -3)
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
    """Return standard normal tensors of the same shapes; integer tensors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    return floating(lambda value: torch.randn(value.shape, generator=generator).to(value), inputs)


def float64_outputs(model: nn.Module, inputs: Inputs) -> Outputs:
    """Return all tensors that a model returns, as float64 on the CPU.

    Raises `SepconvertError` if there are none.
    """
    with torch.no_grad():
        leaves = list(tensor_leaves(model(*fresh(inputs))))
    if not leaves:
        raise SepconvertError(
            "verification: the model returns no tensor; wrap it so that it returns its outputs"
        )
    return [leaf.double().cpu() for leaf in leaves]


@dataclass(frozen=True)
class Reference:
    """Outputs of the original model in high precision, and how far they may move."""

    inputs: tuple[Inputs, ...]
    outputs: tuple[Outputs, ...]  # one for each of `inputs`
    tolerances: tuple[list[float], ...]  # by rounding of the converted kernels; one for each output
    noise: tuple[list[float], ...]  # distance of the same in the runtime's dtype; one for each output
    dtype: torch.dtype


def reference(
    model: nn.Module,
    inputs: Inputs,
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
) -> Reference:
    """Run the original on the given and on random inputs, in float64.

    The tolerance is found by letting the network propagate the permitted errors: the output of each converted
    layer is moved by ±τ (|W| ∗ |x|) with random signs, where τ is the error that its certificate permits and
    |W| ∗ |x| the sum of the magnitudes of the terms (a componentwise bound). The model's output may move four
    times as far as it moves then.

    A model that runs in its own dtype alone is run in that, and one that refuses random inputs runs on the
    given ones alone.
    """
    attempts = [
        (dtype, chosen)
        for chosen in ((inputs, random_like(inputs, seed)), (inputs,))
        for dtype in (torch.float64, model_dtype(model))
    ]
    for dtype, chosen in attempts[:-1]:
        with contextlib.suppress(Exception):  # the user's code may raise anything
            return _reference(model, chosen, sites, tolerances, seed, dtype)
    dtype, chosen = attempts[-1]
    return _reference(model, chosen, sites, tolerances, seed, dtype)


def _reference(
    model: nn.Module,
    inputs: tuple[Inputs, ...],
    sites: Sequence[ConvSite],
    tolerances: Mapping[str, float],
    seed: int,
    dtype: torch.dtype,
) -> Reference:
    precise, runtime = private_copy(model, dtype), private_copy(model, runtime_dtype(model))
    exact: list[Outputs] = []
    moved: list[list[float]] = []
    noise: list[list[float]] = []
    for value in inputs:
        plain = float64_outputs(precise, cast(value, dtype))
        perturbed = _perturbed(precise, cast(value, dtype), sites, tolerances, seed)
        rounded = float64_outputs(runtime, cast(value, runtime_dtype(model)))
        exact.append(plain)
        moved.append(
            [
                _SAFETY * _difference(p, e) + 100 * torch.finfo(dtype).eps * _magnitude(e)
                for p, e in zip(perturbed, plain, strict=True)
            ]
        )
        noise.append([_difference(r, e) for r, e in zip(rounded, plain, strict=True)])
    return Reference(inputs, tuple(exact), tuple(moved), tuple(noise), dtype)


def _perturbed(
    model: nn.Module, inputs: Inputs, sites: Sequence[ConvSite], tolerances: Mapping[str, float], seed: int
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    permitted = {site.place: tolerances[site.name] for site in sites if site.name in tolerances}

    def on_call(call: Call) -> Tensor:
        output, tolerance = call.run(), permitted.get(call.place)
        if tolerance is None:
            return output
        inputs, weight = call.arguments["input"], call.arguments["weight"]
        magnitude = call.run(input=inputs.abs(), weight=weight.abs(), bias=None)
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output + tolerance * signs * magnitude

    interceptor = ConvolutionInterceptor(model, on_call)
    with interceptor.watching():
        return float64_outputs(model, inputs)


def compare_with(expected: Reference, converted: nn.Module) -> OutputCheck:
    """Check the outputs of the converted model against the original's reference."""
    precise = private_copy(converted, expected.dtype)
    pairs = [
        (_difference(a, e), tolerance)
        for value, outs, tolerances in zip(
            expected.inputs, expected.outputs, expected.tolerances, strict=True
        )
        for a, e, tolerance in zip(
            float64_outputs(precise, cast(value, expected.dtype)), outs, tolerances, strict=True
        )
    ]
    return _worst(pairs, str(expected.dtype).removeprefix("torch."))


def compare_export(expected: Reference, runs: Sequence[Outputs], dtype: torch.dtype) -> OutputCheck:
    """Check the outputs of a model in the runtime against those in PyTorch.

    The runtime sums in another order: its rounding error may be sixteen times PyTorch's in the same dtype.
    """
    pairs = [
        (_difference(output, exact), rounding)
        for outs, roundings, run in zip(expected.outputs, _roundings(expected, dtype), runs, strict=True)
        for exact, rounding, output in zip(outs, roundings, run, strict=True)
    ]
    return _worst(pairs, str(dtype).removeprefix("torch."))


def compare_runs(
    expected: Reference, original: Sequence[Outputs], converted: Sequence[Outputs], dtype: torch.dtype
) -> OutputCheck:
    """Check the converted model against the original, both in the runtime, on the inputs of `expected`."""
    pairs = [
        (_difference(b, a), tolerance + 2 * rounding)
        for tolerances, roundings, ours, theirs in zip(
            expected.tolerances, _roundings(expected, dtype), original, converted, strict=True
        )
        for tolerance, rounding, a, b in zip(tolerances, roundings, ours, theirs, strict=True)
    ]
    return _worst(pairs, str(dtype).removeprefix("torch."))


def _roundings(expected: Reference, dtype: torch.dtype) -> list[list[float]]:
    return [
        [
            _RUNTIME_NOISE * (seen + torch.finfo(dtype).eps * _magnitude(exact))
            for exact, seen in zip(outs, noise, strict=True)
        ]
        for outs, noise in zip(expected.outputs, expected.noise, strict=True)
    ]


def _worst(pairs: Sequence[tuple[float, float]], dtype: str) -> OutputCheck:
    """Return the check of the pair (difference, tolerance) that comes nearest to failing or fails by most."""
    # NaN must lose: no comparison with it is true.
    difference, tolerance = max(
        pairs, key=lambda pair: math.inf if not pair[0] <= pair[1] else pair[0] / (pair[1] or 1.0)
    )
    return OutputCheck(difference, tolerance, dtype)


def _magnitude(values: Tensor) -> float:
    """Return the largest finite absolute value."""
    return _max_abs([values[values.isfinite()]])


def _difference(a: Tensor, b: Tensor) -> float:
    """Return max |a − b| over elements where one is finite (a model may have NaN or Inf in its weights)."""
    same = (a == b) | ~(a.isfinite() | b.isfinite())
    return _max_abs([torch.where(same, 0.0, a - b)])


def _max_abs(tensors: Sequence[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
