"""Importance of each output of a convolution to the model's outputs: Fisher information."""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import unshadowed
from sepconvert.calibration.footprint import footprint
from sepconvert.measure.divergence import Kind, Yardstick, outputs, yardstick_of
from sepconvert.network.calls import Call, ConvolutionInterceptor
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import ConvSite

BATCHES = 4
"""Most batches that are used."""


_AT_ONCE = 16  # images of which all activations are held, if memory allows it


def fisher_information(
    model: nn.Module,
    batches: Mapping[int, InputBatch],
    sites: Sequence[ConvSite],
    *,
    seed: int,
    yardstick: Yardstick | None = None,
) -> dict[str, Tensor]:
    """Return E Σ g gᵀ over positions for each layer by name: groups × O/groups × O/groups, in float64.

    g is the gradient of log p(z) by the layer's outputs at one position, and z a label drawn from the model's
    own prediction: the labels of the data are not used. To second order the divergence of the model's outputs
    is then ½ E Σ δᵀ g gᵀ δ when the layer's outputs move by δ (J. Martens, arXiv:1412.1193). Outputs that are
    compared by squared errors are treated as means of Gaussians.

    Args:
        model: the original; left as it is.
        batches: images by number, this process's share of them; the first `BATCHES` of all are used.
        sites: convolutions to look at. Left out are those that the images or the gradients do not reach, and
            all of a model that cannot be differentiated.
        seed: of the labels drawn.
        yardstick: what outputs are compared by; decided from the model's if there is none.
    """
    yardstick = yardstick or yardstick_of(model, next(iter(batches.values())))
    private = private_copy(model)
    for parameter in unshadowed(private).parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    places = {site.place: site for site in sites}
    probes: list[tuple[ConvSite, Tensor]] = []

    def on_call(call: Call) -> Tensor:
        output, site = call.run(), places.get(call.place)
        if site is None:
            return output
        # A summand of its own, since the output may be overwritten in place.
        probes.append((site, torch.zeros_like(output, requires_grad=True)))
        return output + probes[-1][1]

    found: dict[str, Tensor] = {}
    at_once = footprint(model, next(iter(batches.values()))[:1].inputs).differentiated(_AT_ONCE)
    first = {number: batch for number, batch in batches.items() if number < BATCHES}
    for number, batch in first.items():
        for part, images in enumerate(batch.split(at_once)):
            probes.clear()
            generator = torch.Generator().manual_seed(hash((seed, number, part)))
            try:
                with torch.enable_grad(), ConvolutionInterceptor(private, on_call).watching():
                    predicted = outputs(private, images)
                    likelihood = _log_likelihood(yardstick, predicted, len(images), generator)
                if not probes:  # the images reach none of the layers
                    break
                gradients = torch.autograd.grad(likelihood, [probe for _, probe in probes], allow_unused=True)
            except (RuntimeError, SepconvertError):  # its operators have no derivative
                break
            for (site, _), gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    _add(found, {site.name: _by_group(site, gradient)})
    total: dict[str, Tensor] = {}
    images_seen = 0
    for count, sums in gather((sum(map(len, first.values())), found)):
        images_seen += count
        _add(total, sums)
    return {name: sums / images_seen for name, sums in total.items() if sums.isfinite().all()}


def _add(total: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def _log_likelihood(
    yardstick: Yardstick, predicted: Sequence[Tensor], samples: int, generator: torch.Generator
) -> Tensor:
    """Return the log-likelihood of what is drawn from the model's outputs, as distributions of their kinds.

    Scaled so that the squares of its gradients are the curvature of the divergence, a mean over positions.
    """
    total = predicted[0].new_zeros(())
    for number, (kind, output) in enumerate(zip(yardstick.kinds, predicted, strict=True)):
        positions = max(output.numel() // samples, 1)
        if kind.name == "kl":
            share = _of_classes(kind, output, generator) / math.sqrt(positions // output.shape[kind.axis])
        elif kind.name == "bernoulli":
            logits = kind.logits(output)
            drawn = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=generator).to(logits)
            share = -F.binary_cross_entropy_with_logits(logits, drawn, reduction="sum") / math.sqrt(positions)
        else:
            variance = _variance(yardstick, number, output.detach())
            noise = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1
            scale = (2 / (len(predicted) * positions * variance)) ** 0.5
            total = total + (output * noise.to(output) * scale).sum()
            continue
        total = total + share / math.sqrt(len(predicted))
    return total


def _of_classes(kind: Kind, output: Tensor, generator: torch.Generator) -> Tensor:
    logits = kind.logits(output).movedim(kind.axis, -1).flatten(0, -2)
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
    return logits.log_softmax(1).gather(1, drawn.to(logits.device)).sum()


def _variance(yardstick: Yardstick, number: int, output: Tensor) -> Tensor:
    """Return what squared errors of an output are relative to."""
    if yardstick.names == ["squared"]:
        return output.new_ones(())
    known = yardstick.variance(number, output)
    variance = output.var(correction=0) if known is None else known.to(output)
    return torch.where(variance > 0, variance, 1)


def _by_group(site: ConvSite, gradient: Tensor) -> Tensor:
    batched = gradient if gradient.ndim == 4 else gradient[None]
    rows = rearrange(batched.double().cpu(), "n (g o) h w -> g o (n h w)", g=site.dense.spec.groups)
    return rows @ rows.mT
