"""Replacement of convolutions, of modules and of functional calls alike, in a copy of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sepconvert.base.modules import put, submodule
from sepconvert.factorize.border import Border
from sepconvert.network.copies import duplicate, shared_parameters
from sepconvert.network.graph import call_graph, replace_calls
from sepconvert.network.layers import FactorizedConv2d
from sepconvert.network.trace import ConvSite, TracedModel


@dataclass(frozen=True)
class Replacement:
    """Factors that take the place of one convolution."""

    scheme: str  # name of the structure
    rank: int
    border: Border
    weights: tuple[Tensor, ...]  # kernels, in the shapes that the structure defines
    bias: Tensor | None  # of the last factor


def rewrite(
    traced: TracedModel, replacements: Mapping[str, Replacement], *, old_memory: bool = False
) -> nn.Module:
    """Return a copy of the model in which convolutions are replaced; training flags and hooks are kept.

    Args:
        traced: the model, left as it is, and its convolutions.
        replacements: by name of the convolution.
        old_memory: let all other parameters share the model's memory, for a copy that is not trained.

    Raises:
        UntraceableError: a functional convolution is replaced whose forward cannot be traced (`call_graph`).
    """
    model = traced.model
    converted = duplicate(model, shared_parameters(model) if old_memory else None)
    chosen = [site for site in traced.sites if site.name in replacements]
    # Forwards first: they are traced as they were, and may read the weight of a layer that is replaced.
    owners = {site.owner: site for site in chosen if site.index is not None}
    for owner in owners:
        calls = {site.index: site for site in chosen if site.owner == owner and site.index is not None}
        module = submodule(converted, owner)
        graph = call_graph(module, owners[owner].owner_inputs, max(calls) + 1)
        layers = {index: _layer(site, replacements[site.name]) for index, site in calls.items()}
        names = {index: site.name.rpartition(".")[2] for index, site in calls.items()}
        replace_calls(module, graph, layers, names)
    for site in chosen:
        if site.index is None:
            dense = submodule(converted, site.owner)
            layer = _layer(site, replacements[site.name])
            _keep_mode_and_hooks(dense, layer)
            converted = _put(converted, site, layer)
    return converted


def _layer(site: ConvSite, replacement: Replacement) -> FactorizedConv2d:
    layer = FactorizedConv2d(site.dense.spec, replacement.scheme, replacement.rank, replacement.border)
    layer.set_factors(replacement.weights, replacement.bias, fixed=site.params == 0, frozen=site.frozen)
    return layer.to(site.dense.device)


def _put(model: nn.Module, site: ConvSite, module: nn.Module) -> nn.Module:
    """Set `module` at every path of a convolution; return the model, which is `module` for the root."""
    if not site.owner:
        return module
    for path in (site.owner, *site.aliases):
        put(model, path, module)
    return model


def _keep_mode_and_hooks(dense: nn.Module, layer: nn.Module) -> None:
    layer.train(dense.training)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for key, hook in getattr(dense, name).items():
            # These compute the dense weight, which is gone.
            if not isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                getattr(layer, name)[key] = hook
    for name in (
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        getattr(layer, name).update(getattr(dense, name))
    layer._is_full_backward_hook = dense._is_full_backward_hook
