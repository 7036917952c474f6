"""How much each output of a convolution matters to what the model answers: Fisher information."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sepconvert.base.distributed import gather
from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.footprint import footprint
from sepconvert.measure.divergence import is_logits, outputs
from sepconvert.network.calls import ConvolutionInterceptor
from sepconvert.network.copies import private_copy
from sepconvert.network.trace import ConvSite

BATCHES = 4
"""Batches that are looked at, at most."""


_AT_ONCE = 16  # images, of which all activations are held, if memory allows it


def fisher_information(
    model: nn.Module, batches: Mapping[int, Tensor], sites: Sequence[ConvSite], *, seed: int
) -> dict[str, Tensor]:
    """E Σ g gᵀ over positions, g × O/g × O/g of each layer's groups, in float64.

    g is the gradient of log p(z) by the layer's outputs at one position, z a label drawn from the model's own
    answer: no label is used. To second order the divergence of the outputs is then ½ E Σ δᵀ g gᵀ δ when the
    layer's outputs move by δ (J. Martens, arXiv:1412.1193). Answers that are no logits are taken for means of
    Gaussians of which the variance is that of the answers (`sepconvert.measure.divergence.relative_error`).

    Args:
        model: the original; left as it is.
        batches: of images by number, this process's share of them; the first `BATCHES` of all are used.
        sites: convolutions to look at. Those that the images do not reach are left out, and so are those that
            no gradient reaches, and all of a model that cannot be differentiated.
        seed: of the labels.
    """
    private = private_copy(model)
    for parameter in private.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    places = {site.place: site for site in sites}
    names = {module: name for name, module in private.named_modules()}
    probes: list[tuple[ConvSite, Tensor]] = []

    def on_call(
        module: nn.Module, index: int, function: str, arguments: dict[str, Any], call: Callable[..., Tensor]
    ) -> Tensor:
        output = call()
        site = places.get((names[module], index))
        if site is None:
            return output
        # A summand of its own, since the output may be overwritten in place.
        probes.append((site, torch.zeros_like(output, requires_grad=True)))
        return output + probes[-1][1]

    found: dict[str, Tensor] = {}
    at_once = footprint(model, (next(iter(batches.values()))[:1],)).differentiated(_AT_ONCE)
    first = {number: batch for number, batch in batches.items() if number < BATCHES}
    for number, batch in first.items():
        for part, images in enumerate(torch.split(batch, at_once)):
            probes.clear()
            generator = torch.Generator().manual_seed(hash((seed, number, part)))
            try:
                with torch.enable_grad(), ConvolutionInterceptor(private, on_call).watching():
                    likelihood = _log_likelihood(outputs(private, images), generator)
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


def _log_likelihood(answers: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Of answers drawn from the model's own."""
    if len(answers) == 1 and is_logits(answers[0]):
        logits = answers[0].movedim(1, -1).flatten(0, -2)
        drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
        positions = math.prod(answers[0].shape[2:])
        drawn_ones: Tensor = logits.log_softmax(1).gather(1, drawn.to(logits.device))
        return drawn_ones.sum() / math.sqrt(positions)
    total = answers[0].new_zeros(())
    for answer in answers:
        variance = answer.detach().var(correction=0)
        noise = torch.randint(0, 2, answer.shape, generator=generator) * 2.0 - 1
        scale = (2 / (len(answers) * answer[0].numel() * torch.where(variance > 0, variance, 1))) ** 0.5
        total = total + (answer * noise.to(answer) * scale).sum()
    return total


def _by_group(site: ConvSite, gradient: Tensor) -> Tensor:
    batched = gradient if gradient.ndim == 4 else gradient[None]
    rows = rearrange(batched.double().cpu(), "n (g o) h w -> g o (n h w)", g=site.dense.spec.groups)
    return rows @ rows.mT
