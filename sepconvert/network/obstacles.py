"""Obstacles to the replacement of convolutions, found by replacing them by equivalent ones."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from sepconvert.base.errors import first_line
from sepconvert.base.modules import submodule
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.network.copies import private_copy
from sepconvert.network.graph import call_graph, variable_argument
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.symbolic import UntraceableError
from sepconvert.network.tensors import fresh, tensor_leaves
from sepconvert.network.trace import ConvSite, TracedModel

_ROUNDING = 1e4
"""Allowed change of the outputs, in units of eps, when a layer is swapped for an equivalent module."""


_MOST_ROUNDING = 0.1


class Obstacles:
    """Reasons why single convolutions of a model cannot be replaced, whatever their replacement.

    This is the postcondition of `rewrite`, checked before there is anything to replace a layer by: the model
    is rewritten with each layer replaced by a module that computes the same, and run on its inputs. It must
    run, call the new modules, and return what it returned before.

    Args:
        traced: the model, left as it is, its inputs and its convolutions.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = replace(traced, model=private_copy(traced.model))
        # Tracing a forward is slow, and each of its convolutions needs the result.
        self._graph = functools.cache(self._graph_of)

    def of(self, site: ConvSite) -> str | None:
        """Return the reason why a convolution cannot be replaced; None if it can."""
        return site.obstacle or self._in_graph(site) or self._in_trial.get(site.name)

    def _in_graph(self, site: ConvSite) -> str | None:
        if site.index is None:
            return None
        graph = self._graph(site.owner)
        if isinstance(graph, UntraceableError):
            return f"the forward of {site.owner or 'the model'} cannot be traced: {graph}"
        argument = variable_argument(graph, site.index)
        return None if argument is None else f"its {argument} is computed from the input"

    def _graph_of(self, owner: str) -> fx.GraphModule | UntraceableError:
        calls = [site for site in self._traced.sites if site.owner == owner and site.index is not None]
        last = max(site.index or 0 for site in calls)
        module = submodule(self._traced.model, owner)
        try:
            return call_graph(module, calls[0].owner_inputs, last + 1)
        except UntraceableError as error:
            return error

    @functools.cached_property
    def _in_trial(self) -> dict[str, str]:
        """Reasons by name of the layers that fail once an equivalent module stands in their place.

        All layers are tried at once, which is usually enough; if that fails, one after the other.
        """
        sites = [site for site in self._traced.sites if site.obstacle is None]
        sites = [site for site in sites if self._in_graph(site) is None]
        expected = self._outputs(private_copy(self._traced.model))
        tolerance = self._tolerance(expected)
        if not sites or self._failure(sites, expected, tolerance) is None:
            return {}
        reasons: dict[str, str] = {}
        passed: list[ConvSite] = []
        for site in sites:
            reason = self._failure([*passed, site], expected, tolerance)
            if reason is None:
                passed.append(site)
            else:
                reasons[site.name] = reason
        return reasons

    def _tolerance(self, expected: Sequence[Tensor]) -> float:
        """Return the allowed change of the outputs, relative to the largest element."""
        eps = max((torch.finfo(output.dtype).eps for output in expected), default=0)
        tolerance = min(_MOST_ROUNDING, _ROUNDING * eps)
        if _close(expected, self._outputs(private_copy(self._traced.model)), tolerance):
            return tolerance
        return math.inf  # the model draws random numbers: that it runs is all that can be checked

    def _failure(self, sites: Sequence[ConvSite], expected: Sequence[Tensor], tolerance: float) -> str | None:
        """Replace these layers by equivalent modules and run the model; return what fails, or None."""
        equivalents = {site.name: _equivalent(site) for site in sites}
        called: set[str] = set()
        try:
            trial = rewrite(self._traced, equivalents)
            for name in equivalents:
                layer = submodule(trial, name)
                nn.Module.register_forward_hook(layer, lambda *_, name=name: called.add(name))
            outputs = self._outputs(trial)
        except Exception as error:  # the user's code
            return f"the model does not run once it is replaced: {first_line(error)}"
        if called != set(equivalents):
            return "the model calls it by another way than its name"
        if tolerance < math.inf and not _close(expected, outputs, tolerance):
            return "the model's outputs change once it is replaced"
        return None

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            leaves = tensor_leaves(model(*fresh(self._traced.inputs)))
            return [leaf for leaf in leaves if leaf.is_floating_point()]


def _equivalent(site: ConvSite) -> Replacement:
    return Replacement(ZERO_BORDER, 1, Border(), (site.dense.weight,), site.dense.bias)


def _close(expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float) -> bool:
    """Compare outputs relative to the largest element; NaN and Inf must be in the same places."""
    if [output.shape for output in expected] != [output.shape for output in actual]:
        return False
    for wanted, found in zip(expected, actual, strict=True):
        finite = wanted.isfinite()
        if not torch.equal(finite, found.isfinite()):
            return False
        difference = (wanted - found)[finite].abs()
        if difference.numel() and bool(difference.max() > tolerance * wanted[finite].abs().max()):
            return False
    return True
