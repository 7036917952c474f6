"""Helpers of the exact tests: kernels with planted structure, and their factors multiplied out by numpy."""

from dataclasses import replace

import numpy as np
import torch
from strategies import PLANTS, plant, spec_of
from torch import nn

from sepconvert.factorize.exact.analysis import ZERO_BORDER, analyse
from sepconvert.factorize.exact.factors import factorize
from sepconvert.factorize.geometry import ConvSpec

SIZE = (32, 32)


def dense(weight, groups=1):
    """Plain geometry of a kernel."""
    out_channels, in_per_group, kh, kw = weight.shape
    return ConvSpec(groups * in_per_group, out_channels, (kh, kw), groups=groups)


def analysed(weight, groups=1, tol=None):
    analysis = analyse(dense(weight, groups), weight, [SIZE], tol)
    return analysis, {finding.scheme: finding for finding in analysis.findings}


def kernel_of(factorization, spec):
    """The dense kernel that the factors make, in float64, by numpy's einsum."""
    factors = [weight.double().numpy() for weight in factorization.weights]
    border = factorization.border
    if factorization.scheme == ZERO_BORDER:
        core = factors[0]
    else:
        left, right = PLANTS[factorization.scheme].split("->")[0].split(",")
        sizes = {
            "g": spec.groups,
            "o": spec.out_channels // spec.groups,
            "c": spec.in_channels // spec.groups,
            "i": spec.kernel_size[0] - border.top - border.bottom,
            "j": spec.kernel_size[1] - border.left - border.right,
            "r": factorization.rank,
        }
        shaped = [
            factor.reshape([sizes[axis] for axis in subscripts])
            for factor, subscripts in zip(factors, (left, right), strict=True)
        ]
        core = np.einsum(PLANTS[factorization.scheme], *shaped)
        core = core.reshape(spec.out_channels, sizes["c"], sizes["i"], sizes["j"])
    pads = (border.top, border.bottom), (border.left, border.right)
    return np.pad(core, ((0, 0), (0, 0), *pads))


def channel_errors(factorization, spec, weight):
    """‖ΔW_o‖ / ‖W_o‖ by numpy."""
    weight = weight.double().numpy()
    norms = np.sqrt((weight**2).sum(axis=(1, 2, 3)))
    errors = np.sqrt(((kernel_of(factorization, spec) - weight) ** 2).sum(axis=(1, 2, 3)))
    return errors / np.where(norms > 0, norms, 1)


def rank_four(out_channels, dtype=torch.float32, rank=4):
    axes = {"g": 1, "o": out_channels, "c": 16, "i": 3, "j": 3}
    weight = plant("spatial-vh", axes, rank, np.random.default_rng(0))
    return torch.from_numpy(weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True))).to(dtype)


def factors(conv, scheme, rank=None, size=(16, 16)):
    """The exact factors of a convolution."""
    analysis = analyse(spec_of(conv), conv.weight.detach(), [size])
    finding = next(finding for finding in analysis.findings if finding.scheme == scheme)
    return factorize(analysis, finding if rank is None else replace(finding, rank=rank), conv.weight.detach())


def conv_with(scheme="spatial-vh", rank=2, dtype=torch.float32, **options):
    """A convolution of 6 to 10 channels with a planted structure."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, **{"kernel_size": 3, "padding": 1, **options})
    kh, kw = conv.kernel_size
    axes = {"g": conv.groups, "o": 10 // conv.groups, "c": 6 // conv.groups, "i": kh, "j": kw}
    weight = plant(scheme, axes, rank, np.random.default_rng(0))
    conv.weight.data = torch.from_numpy(weight)
    return conv.to(dtype).requires_grad_(False)
