"""Metrics of the user's own: functions, and metrics of torchmetrics."""

import copy
import warnings
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError, first_line, quoted
from sepconvert.base.options.values import Task
from sepconvert.files.callables import resolve_callable
from sepconvert.measure.metrics.evaluation import Scoring, one_of
from sepconvert.measure.metrics.metric import Metric, Statistics, Weights, means
from sepconvert.measure.metrics.named import NAMES, named
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import Inputs, batch_dimension, tensors_in


def scoring_of(task: Task, model: nn.Module | None = None, inputs: Inputs = ()) -> Scoring:
    """Return how a task judges outputs; where it does not say which dimension counts samples, a model does.

    Raises:
        SepconvertError: a callable cannot be found, or there is no such metric.
    """
    postprocess, axis = task.postprocess, task.batch_dim
    if isinstance(postprocess, str):
        postprocess = resolve_callable(postprocess, "postprocess")
    deepest = max((value.ndim for value in tensors_in(inputs)), default=axis or 0)
    if axis is not None and inputs and axis >= deepest:
        raise SepconvertError(
            f"`batch_dim` {axis}: the inputs have {deepest} dimensions, numbered from 0; pass one of them"
        )
    if axis is None:
        axis = 0 if model is None else batch_dimension(private_copy(model), inputs)
    return Scoring(metric_of(task.metric, task.ignore_index), postprocess, task.output, axis)


def metric_of(given: Any, ignore_index: int | None = None) -> Metric | None:
    """Return the metric that the user asked for; None for none.

    Args:
        given: a name, `pkg.mod:callable` or `file.py:callable`, a function `(outputs, targets) → N scores`, a
            `torchmetrics.Metric`, a class of these, or a function without arguments that returns one. A
            function's attributes `higher_is_better` (True by default) and `unit` ("" by default) are used.
        ignore_index: class number that is not scored, of the metrics that have a name.

    Raises:
        SepconvertError: it is none of these.
    """
    if given is None or isinstance(given, Metric):
        return given
    if isinstance(given, str) and given in NAMES:
        return named(given, ignore_index)
    if isinstance(given, str):
        if ":" not in given:
            raise SepconvertError(
                f"`metric` {given}: expected one of {', '.join(NAMES)}, or file.py:callable or "
                "pkg.mod:callable"
            )
        name, given = given.rpartition(":")[2], resolve_callable(given, "metric")
    else:
        name = getattr(given, "__name__", type(given).__name__)
    if ignore_index is not None:
        raise SepconvertError(
            f"`ignore_index`: is for metrics that have a name, not for {name}; leave it out"
        )
    made = given
    if callable(given) and not _is_torchmetric(given) and not _required(given):
        try:
            made = given()
        except Exception as error:  # the user's code
            raise SepconvertError(f"`metric` {name}: failed ({first_line(error)}); check it") from error
    if _is_torchmetric(made):
        return _of_torchmetric(name, made)
    if not callable(given) or isinstance(given, type) or len(_required(given)) != 2:
        raise SepconvertError(
            f"`metric` {name}: expected a function of (outputs, targets), or a torchmetrics.Metric, got "
            f"{quoted(given)}; for a class that takes arguments, pass a function without any that makes one"
        )
    return Metric(
        name,
        str(getattr(given, "unit", "")),
        bool(getattr(given, "higher_is_better", True)),
        _by_function(name, given),
        means,
        is_mean=True,
    )


def _required(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that a call has to fill by position."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions have none
        return ["outputs", "targets"]
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters if each.kind in positional and each.default is Parameter.empty]


def _by_function(name: str, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Statistics]:
    def statistics(outputs: Any, targets: Any) -> Statistics:
        try:
            given = function(outputs, targets)
            scores = torch.as_tensor(given).detach().cpu().double().numpy()
        except Exception as error:  # the user's code
            raise SepconvertError(
                f"`metric` {name}: failed with {type(error).__name__}: {first_line(error)}; it is called "
                "with the outputs and the targets of a batch, and returns a score for each sample"
            ) from error
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise SepconvertError(
                f"`metric` {name}: expected a finite number for each sample, got "
                f"{'NaN or Inf' if scores.ndim == 1 else f'shape {scores.shape}'}; return one score a sample"
            )
        return scores

    return statistics


# Metrics of torchmetrics ----------------------------------------------------------------------------


def _is_torchmetric(given: Any) -> bool:
    from torchmetrics import Metric as TorchMetric

    return isinstance(given, TorchMetric)


def _of_torchmetric(name: str, metric: Any) -> Metric:
    """Return a metric whose statistics are the states of torchmetrics' metric after each sample alone."""
    if metric.higher_is_better is None:
        raise SepconvertError(
            f"`metric` {name}: does not say whether higher is better; set higher_is_better in its class"
        )
    metric = copy.deepcopy(metric).cpu()
    found = {state: _combined_by(metric, state) for state in metric._defaults}
    states = {state: combine for state, combine in found.items() if combine is not None}
    if len(states) < len(found):
        raise SepconvertError(
            f"`metric` {name}: its states are neither sums, means, extremes nor lists over samples, so that "
            "it has no interval; pass another metric, or a function that returns a score for each sample"
        )

    def statistics(outputs: Any, targets: Any) -> Statistics:
        samples = len(next(iter(targets.values()))) if isinstance(targets, dict) else len(targets)
        records = np.empty(samples, dtype=object)
        for index in range(samples):
            metric.reset()
            try:
                metric.update(
                    _on_cpu(one_of(outputs, index, samples)), _on_cpu(one_of(targets, index, samples))
                )
            except Exception as error:  # torchmetrics checks what it is given, in many ways
                raise SepconvertError(
                    f"`metric` {name}: cannot take outputs and targets: {first_line(error)}; pass "
                    "`postprocess`, or other data"
                ) from error
            records[index] = [_kept(getattr(metric, state)) for state in states]
        return records

    def values(statistics: Statistics, weights: Weights) -> npt.NDArray[np.float64]:
        found = []
        for counts in weights:
            metric.reset()
            drawn = [(statistics[index], int(counts[index])) for index in np.flatnonzero(counts)]
            for place, (state, combine) in enumerate(states.items()):
                setattr(metric, state, combine([(record[place], times) for record, times in drawn]))
            metric._update_count, metric._computed = 1, None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of classes that a drawn data set lacks
                found.append(_number(name, metric.compute()))
        return np.array(found)

    return Metric(
        name,
        str(getattr(metric, "unit", "")),
        bool(metric.higher_is_better),
        statistics,
        values,
        costly=True,
    )


def _number(name: str, value: Any) -> float:
    """Return a metric's value.

    Raises:
        SepconvertError: it is more than one number.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise SepconvertError(
            f"`metric` {name}: expected a value that is one number, got a {type(value).__name__}; pass a "
            "metric that averages, or a function that returns a score for each sample"
        ) from error


Drawn = Sequence[tuple[Any, int]]
"""States of single samples, and how often each is drawn."""


def _combined_by(metric: Any, state: str) -> Callable[[Drawn], Any] | None:
    """Return what makes one state of those of single samples, as torchmetrics does across processes."""
    default, reduction = metric._defaults[state], getattr(metric._reductions[state], "__name__", "")
    if isinstance(default, list):
        return lambda drawn: [each for record, times in drawn for each in record * times]
    if reduction == "dim_zero_sum":
        return lambda drawn: torch.stack([record * times for record, times in drawn]).sum(0).to(default.dtype)
    if reduction == "dim_zero_mean":
        return lambda drawn: torch.stack([record for record, times in drawn for _ in range(times)]).mean(0)
    if reduction in ("dim_zero_max", "dim_zero_min"):
        extreme = torch.amax if reduction == "dim_zero_max" else torch.amin
        return lambda drawn: extreme(torch.stack([record for record, _ in drawn]), 0)
    return None


def _kept(state: Any) -> Any:
    return list(state) if isinstance(state, list) else state.clone()


def _on_cpu(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda value: value.detach().cpu(), values)
