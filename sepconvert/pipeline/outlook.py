"""What an approximate conversion is going to try, how long it may take, and how much memory it needs."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.notes import Reason
from sepconvert.base.options.values import Calibration
from sepconvert.calibration.footprint import AT_ONCE, images_at_once
from sepconvert.calibration.split import heldout_of, size_of
from sepconvert.calibration.stream import bytes_of_moments
from sepconvert.factorize.structures import Form
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch, Inputs
from sepconvert.network.trace import ConvSite
from sepconvert.pipeline.job import Job
from sepconvert.pipeline.modes.approximate import obstacles_to
from sepconvert.pipeline.original import Subject, given_model, trace_selected
from sepconvert.planning.forms import candidate_forms, counted_prices, exact_forms

# Times that each image passes through the network, or a part of it. With these, the middle of the range was
# 176 s for a ResNet-9 that took 165 s, 113 for a ResNet-20 that took 94, 184 for a SqueezeNet that took 185,
# and 813 for a VDSR that took 888 (AMD EPYC, AVX-512 VNNI, beside other work).
_PASSES_OF_FITTED, _PASSES_OF_HELD_OUT, _PASSES_OF_SCORED = 14, 30, 2

_SECONDS_ANYWAY = 12.0  # to load, trace, export, verify and measure

_SECONDS_A_FORM = 0.08  # to time a form

_SWEEPS = 12  # multiplications of a kernel by its moments in a fit

_RANGE = 2.0  # factor by which the estimate may be wrong, either way

_MATRIX = 512  # rows of the product that the speed of fits is measured by


@dataclass(frozen=True)
class LayerOutlook:
    """The forms of a layer that would be tried, or why it would be kept."""

    site: ConvSite
    forms: tuple[Form, ...]
    reason: Reason | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values: name, MACs, numbers of ranks by structure, and the reason."""
        return {
            "name": self.site.name,
            "kind": self.site.kind,
            "macs": self.site.macs,
            "forms": dict(Counter(scheme for scheme, _ in self.forms)),
            "reason": None if self.reason is None else self.reason.text,
        }


@dataclass(frozen=True)
class Outlook:
    """An estimate of a conversion.

    Attributes:
        layers: what would be tried for each convolution.
        seconds: range of the time, in seconds.
        bytes: the most that the process is expected to hold.
        images: how many are fitted to, held out and scored.
        uncounted: parts of the conversion that take more time than `seconds`.
    """

    layers: tuple[LayerOutlook, ...]
    seconds: tuple[float, float]
    bytes: int
    images: Mapping[str, int]
    uncounted: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "seconds": list(self.seconds),
            "bytes": self.bytes,
            "images": dict(self.images),
            "uncounted": list(self.uncounted),
        }


def outlook(
    model: Subject,
    example_inputs: Tensor | Inputs | None,
    data: DataLoader[Any] | None,
    calib: DataLoader[Any] | None,
    job: Job,
) -> Outlook:
    """Estimate a conversion in approx or auto mode, from a few forward passes; nothing is fitted.

    Args:
        model: the model.
        example_inputs: that it is run on; None if it is an ONNX file that says them.
        data: that it would be scored on.
        calib: that factors would be fitted to; None for a part of `data`.
        job: the settings.

    Raises:
        SepconvertError: the model cannot be run.
    """
    model, inputs = given_model(model, example_inputs)
    found = trace_selected(model, inputs, job.selection)
    reasons = obstacles_to(found, job)
    layers = tuple(
        LayerOutlook(site, () if site.name in reasons else _forms(site, job), reasons.get(site.name))
        for site in found.sites
    )
    images = _images(data, calib, job.calibration)
    uncounted = ["fine-tuning"] * bool(job.finetuning) + ["int8"] * bool(job.int8)
    seconds = _seconds(model, inputs, layers, images, job)
    return Outlook(layers, seconds, _bytes(layers), images, tuple(uncounted))


def _forms(site: ConvSite, job: Job) -> tuple[Form, ...]:
    """Return the forms of a layer that pass the gate by MACs; those that are slower are dropped later."""
    exact = exact_forms(site) if job.mode == "auto" else None
    forms = candidate_forms(site, job.budget.rank, exact)
    return tuple(counted_prices(site, forms, exact or (), job.gate, "macs").forms)


def _images(
    data: DataLoader[Any] | None, calib: DataLoader[Any] | None, calibration: Calibration
) -> dict[str, int]:
    """Return the numbers of images that are fitted to, held out, and scored."""
    scored, given = (0 if each is None else size_of(each) for each in (data, calib))
    fitted = min(calibration.images, given if calib is not None else scored // 2)
    if calib is None:
        scored -= fitted
    heldout = heldout_of(fitted)
    return {"fitted": fitted - heldout, "held out": heldout, "scored": scored}


def _seconds(
    model: nn.Module, inputs: Inputs, layers: Sequence[LayerOutlook], images: Mapping[str, int], job: Job
) -> tuple[float, float]:
    """Return the range of seconds that a conversion is expected to take."""
    passes = (
        _PASSES_OF_FITTED * images["fitted"]
        + _PASSES_OF_HELD_OUT * images["held out"]
        + _PASSES_OF_SCORED * images["scored"]
    )
    products = sum(map(_products, layers))
    timed = _SECONDS_A_FORM * sum(len(each.forms) for each in layers) if job.gate == "latency" else 0.0
    seconds = (
        _SECONDS_ANYWAY
        + passes * _seconds_a_sample(model, inputs, job)
        + products / _products_a_second()
        + min(timed, job.timing.measure_seconds)
    )
    return seconds / _RANGE, seconds * _RANGE


def _products(layer: LayerOutlook) -> int:
    """Return the multiply-adds of all fits of a layer."""
    if not layer.forms:
        return 0
    spec = layer.site.dense.spec
    return _SWEEPS * spec.out_channels * math.prod(spec.weight_shape[1:]) ** 2 * len(layer.forms)


def _seconds_a_sample(model: nn.Module, inputs: Inputs, job: Job) -> float:
    """Return the seconds of a forward pass for one sample, in the batch that calibration would use."""
    private, example = private_copy(model), InputBatch(inputs, job.task.batch_dim or 0)
    size = images_at_once(model, example, 32)
    samples = InputBatch.joined([example[:1]] * size)

    def seconds() -> float:
        start = time.perf_counter()
        samples.run(private)
        return time.perf_counter() - start

    with torch.no_grad():
        seconds()
        return median(seconds() for _ in range(3)) / size


def _products_a_second() -> float:
    """Return the multiply-adds in double precision that this machine does in a second."""
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=torch.float64)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return float(_MATRIX**3 / (time.perf_counter() - start))


def _bytes(layers: Sequence[LayerOutlook]) -> int:
    """Return the bytes of the process now, of activations, and of the moments of the largest layer."""
    moments = max((bytes_of_moments(each.site) for each in layers if each.forms), default=0)
    return psutil.Process().memory_info().rss + 2 * AT_ONCE + moments
