"""Check of one layer: a dense convolution against its factors, on the input that it had in the model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconvert.factorize.exact.certificate import channel_errors
from sepconvert.factorize.geometry import ConvSpec
from sepconvert.network.copies import private_copy
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.tensors import largest
from sepconvert.network.trace import DenseConv


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
        max_abs_diff_float64=largest([factored - dense]),
        max_abs_diff=largest([own_factored.double() - own.double()]),
        output_error=float(
            torch.linalg.vector_norm(factored - dense) / (torch.linalg.vector_norm(dense) or 1.0)
        ),
        bound_float64=largest([kernel_error * patch_norms + 4 * roundoff]),
        kernel_error=float(channel_errors(double.weight.detach(), conv.weight).max()),
        kernel_tolerance=tolerance,
    )
