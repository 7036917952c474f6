"""Obstacles to replacing a convolution, found by replacing it by an equivalent one and running the model."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from sepconvert.base.errors import first_line
from sepconvert.factorize.border import Border
from sepconvert.factorize.exact.analysis import ZERO_BORDER
from sepconvert.network.copies import private_copy
from sepconvert.network.graph import call_graph, variable_argument
from sepconvert.network.rewrite import Replacement, rewrite
from sepconvert.network.symbolic import UntraceableError
from sepconvert.network.tensors import Inputs, fresh, tensor_leaves
from sepconvert.network.trace import ConvSite

_ROUNDING = 1e4
"""Times the rounding of the dtype that answers may move if a layer is another module, of the same kernel."""


_MOST_ROUNDING = 0.1


class Obstacles:
    """Why single convolutions of a model cannot be replaced, whatever by.

    Args:
        model: in any mode; left as it is.
        inputs: on which it was traced.
        sites: its convolutions.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, sites: Sequence[ConvSite]) -> None:
        self._model, self._inputs, self._sites = private_copy(model), inputs, sites
        # Tracing a forward is slow, and asked for by each of its convolutions.
        self._graph = functools.cache(self._graph_of)

    def of(self, site: ConvSite) -> str | None:
        """None where nothing is in the way."""
        return site.obstacle or self._in_graph(site) or self._in_trial.get(site.name)

    def _in_graph(self, site: ConvSite) -> str | None:
        if site.index is None:
            return None
        graph = self._graph(site.owner)
        if isinstance(graph, UntraceableError):
            return f"the forward of {site.owner or 'the model'} cannot be traced: {graph}"
        follows = variable_argument(graph, site.index)
        return None if follows is None else f"its {follows} is computed from the input"

    def _graph_of(self, owner: str) -> fx.GraphModule | UntraceableError:
        calls = [site for site in self._sites if site.owner == owner and site.index is not None]
        last = max(site.index or 0 for site in calls)
        try:
            return call_graph(self._model.get_submodule(owner), calls[0].owner_inputs, last + 1)
        except UntraceableError as error:
            return error

    @functools.cached_property
    def _in_trial(self) -> dict[str, str]:
        """What goes wrong once another module, which computes the same, stands in a layer's place.

        All at once as a rule; where that fails, one after the other.
        """
        sites = [site for site in self._sites if site.obstacle is None and self._in_graph(site) is None]
        original = self._model
        expected = self._answers(private_copy(original))
        eps = max((torch.finfo(answer.dtype).eps for answer in expected), default=0)
        tolerance = min(_MOST_ROUNDING, _ROUNDING * eps)
        if not _close(expected, self._answers(private_copy(original)), tolerance):
            tolerance = math.inf  # it draws random numbers, and can be asked no more than to run

        def failure(chosen: Sequence[ConvSite]) -> str | None:
            same = {site.name: _same_layer(site) for site in chosen}
            called: set[str] = set()
            try:
                trial = rewrite(original, self._sites, same)
                for name in same:
                    trial.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
                answers = self._answers(trial)
            except Exception as error:  # the user's code
                return f"the model does not run once it is replaced: {first_line(error)}"
            if called != set(same):
                return "the model calls it by another way than its name"
            if tolerance < math.inf and not _close(expected, answers, tolerance):
                return "the model answers otherwise once it is replaced"
            return None

        if not sites or failure(sites) is None:
            return {}
        found: dict[str, str] = {}
        fine: list[ConvSite] = []
        for site in sites:
            reason = failure([*fine, site])
            if reason is None:
                fine.append(site)
            else:
                found[site.name] = reason
        return found

    def _answers(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            leaves = tensor_leaves(model(*fresh(self._inputs)))
            return [leaf for leaf in leaves if leaf.is_floating_point()]


def _same_layer(site: ConvSite) -> Replacement:
    return Replacement(ZERO_BORDER, 1, Border(), (site.dense.weight,), site.dense.bias)


def _close(expected: Sequence[Tensor], answers: Sequence[Tensor], tolerance: float) -> bool:
    """Relative to the largest element; NaN and Inf in the same places."""
    if [answer.shape for answer in expected] != [answer.shape for answer in answers]:
        return False
    for wanted, given in zip(expected, answers, strict=True):
        finite = wanted.isfinite()
        if not torch.equal(finite, given.isfinite()):
            return False
        difference = (wanted - given)[finite].abs()
        if difference.numel() and bool(difference.max() > tolerance * wanted[finite].abs().max()):
            return False
    return True
