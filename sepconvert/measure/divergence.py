"""Distances of the outputs of one model from those of another."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.values import Divergence
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import InputBatch, tensor_leaves

# Operators that arrange values, or average them, and leave them what they are: probabilities, for one.
_ARRANGING = (
    "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Slice", "Select", "Narrow", "Unbind",
    "Split", "SplitWithSizes", "Squeeze", "Unsqueeze", "Expand", "Clone", "Alias", "AsStrided", "ToCopy",
    "Index", "Clamp", "ClampMin", "ClampMax", "UpsampleNearest2D", "UpsampleBilinear2D",
)  # fmt: skip


_JOINING = ("Cat", "Stack")


# Of embeddings, where a model has other outputs too: activations, and the division by a norm.
_POOLING = ("Mean", "AdaptiveAvgPool2D", "AvgPool2D")
_OF_EMBEDDINGS = ("Relu", "Hardtanh", "Gelu", "Silu", "Tanh", "Div")


_OF_A_BOX = 4  # numbers, which are no logits of as many classes where a model has other outputs too


@dataclass(frozen=True)
class Kind:
    """Comparison of one output of a model with the original's.

    - `kl`: Kullback-Leibler divergence of distributions over the classes along `axis`, in nats: a mean over
      samples and positions.
    - `bernoulli`: the same of each value alone, the chance of yes against no: a mean over values.
    - `squared`: mean squared error, in the square of the output's unit.
    - `relative`: mean squared error over the variance of the original's output, without a unit. 1 is the
      error of a model that always returns the mean.

    Attributes:
        name: one of these.
        axis: of the classes, for kl.
        probabilities: whether kl and bernoulli are given probabilities; else logits. Logarithms of
            probabilities are logits.
        ndim: number of dimensions of the output.
    """

    name: Divergence
    axis: int = 1
    probabilities: bool = False
    ndim: int = 2

    def logits(self, output: Tensor) -> Tensor:
        """Return logits of the distributions that an output stands for, in float32 at least."""
        values = _precise(output)
        if not self.probabilities:
            return values
        limits = torch.finfo(values.dtype)
        if self.name == "kl":
            return values.clamp_min(limits.tiny).log()
        return values.clamp(limits.eps, 1 - limits.eps).logit()

    def distance(
        self, expected: Tensor, actual: Tensor, temperature: float, variance: Tensor | None = None
    ) -> Tensor:
        """Return the divergence of one output from another, 0-d.

        kl and bernoulli are taken at a temperature T, and multiplied by T² (Hinton et al., arXiv:1503.02531).
        A relative error is one to `variance`, by default that of `expected`.
        """
        if self.name == "kl":
            wanted, given = (
                (self.logits(t) / temperature).log_softmax(self.axis) for t in (expected, actual)
            )
            terms = F.kl_div(given, wanted, reduction="none", log_target=True)
            return temperature**2 * terms.sum(self.axis).mean()
        if self.name == "bernoulli":
            wanted, given = (self.logits(t) / temperature for t in (expected, actual))
            yes = wanted.sigmoid() * (F.logsigmoid(wanted) - F.logsigmoid(given))
            no = (-wanted).sigmoid() * (F.logsigmoid(-wanted) - F.logsigmoid(-given))
            return temperature**2 * (yes + no).mean()
        if self.name == "relative" and variance is None:
            return relative_error(expected, actual)
        squares = (_precise(actual) - _precise(expected)).square().mean()
        return squares if variance is None else squares / variance.to(squares)

    @property
    def has_scale(self) -> bool:
        """Whether it is a squared error, which depends on the scale of the outputs."""
        return self.name in ("squared", "relative")


@dataclass(frozen=True)
class Yardstick:
    """Comparison of a model's outputs with the original's: a kind for each floating-point output.

    Several outputs count alike: those with a scale relative to their variance. `variances` are those of the
    original's outputs over some data set, 1 where they do not vary; without them, those of each batch count.
    """

    kinds: tuple[Kind, ...]
    variances: tuple[float, ...] | None = None

    def divergence(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Tensor:
        """Return the divergence of `actual` from `expected`, the outputs for one batch; 0 means equal.

        It is that of the `Kind` of a single output, and the mean of all where there are several. The result
        is a 0-d tensor, differentiable and computed in float32 at least.

        Raises:
            SepconvertError: the tensors differ in number or shape, or there are none.
        """
        self._check(expected, actual)
        if len(self.kinds) == 1:
            return self.kinds[0].distance(expected[0], actual[0], 1)
        return self.scaled(expected, actual)

    def scaled(self, expected: Sequence[Tensor], actual: Sequence[Tensor], temperature: float = 1) -> Tensor:
        """Return the same without a unit, at a temperature: squared errors relative to the variance.

        Raises:
            SepconvertError: as `divergence`.
        """
        self._check(expected, actual)
        distances = [
            kind.distance(wanted, given, temperature, self.variance(number, wanted))
            for number, (kind, wanted, given) in enumerate(zip(self.kinds, expected, actual, strict=True))
        ]
        return distances[0] if len(distances) == 1 else torch.stack(distances).mean()

    @property
    def unit(self) -> float:
        """Divergence of a model as far from the original as 1 is in `scaled`."""
        is_squared = len(self.kinds) == 1 and self.kinds[0].name == "squared"
        return self.variances[0] if is_squared and self.variances else 1.0

    @property
    def names(self) -> list[Divergence]:
        """Names of the kinds, in the order of the outputs."""
        return [kind.name for kind in self.kinds]

    @property
    def classes(self) -> Kind | None:
        """The kind of a model's only output, if that is one over classes."""
        return self.kinds[0] if self.names == ["kl"] else None

    @property
    def is_classifier(self) -> bool:
        """Whether a model's first output is one over classes, N×K: a label of a sample says what it is."""
        return self.kinds[0].name == "kl" and self.kinds[0].ndim == 2

    def measured_on(self, batches: Iterable[Sequence[Tensor]]) -> "Yardstick":
        """Return the yardstick with the variances of the original's outputs for a data set."""
        sums = torch.zeros(len(self.kinds), 3, dtype=torch.float64)
        for batch in batches:
            for row, output in zip(sums, batch, strict=True):
                values = output.detach().cpu().double()
                row += torch.stack([torch.tensor(values.numel()), values.sum(), values.square().sum()])
        count, total, squares = sums.T
        variances = (squares / count - (total / count).square()).tolist()
        return replace(self, variances=tuple(value if value > 0 else 1.0 for value in variances))

    def variance(self, number: int, wanted: Tensor) -> Tensor | None:
        """Return the variance that an output's squared error is relative to; None to let its kind decide."""
        kind = self.kinds[number]
        if not kind.has_scale or (len(self.kinds) == 1 and kind.name == "relative"):
            return None
        if self.variances is not None:
            return torch.tensor(self.variances[number], dtype=torch.float64)
        variance = _precise(wanted).var(correction=0)
        return torch.where(variance > 0, variance, 1)

    def _check(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        shapes, others = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in actual]
        if shapes != others or len(shapes) != len(self.kinds):
            raise SepconvertError(
                f"outputs: expected {len(self.kinds)} floating-point tensors of the shapes {shapes}, as the "
                f"original's, got {others}; compare a model with its own conversion"
            )


def yardstick_of(
    model: nn.Module,
    samples: InputBatch,
    asked: Divergence | None = None,
    targets: Literal["classes", "pictures", "any"] = "any",
) -> Yardstick:
    """Return what the outputs of conversions of a model are compared with its own by.

    The operator that an output comes from tells sigmoids and softmaxes, its shape the rest: N×K and N×K×H×W
    are logits, except that N×C×H×W of 1 or 3 channels are pictures unless the metric's targets are classes;
    anything else is relative.

    Args:
        model: the original; left as it is.
        samples: inputs that it is run on.
        asked: the kind of all outputs, if the user said so.
        targets: what the targets of the metric are. A single output of one channel is one of logits if these
            are class numbers, and no output is one if they are pictures.

    Raises:
        SepconvertError: the model cannot run on the samples, has no floating-point output, or an output is
            none over classes where that is asked for.
    """
    found = _traced_outputs(model, samples[:1])
    if not found:
        raise SepconvertError("outputs: expected a floating-point tensor, got none; return one from forward")
    if asked is not None:
        return Yardstick(tuple(_asked(asked, output) for output in found))
    if len(found) > 1:
        kinds = tuple(_kind_of(output, several=True) for output in found)
        if targets == "classes" and not any(kind.name in ("kl", "bernoulli") for kind in kinds):
            # Four numbers, which beside other classes would be a box, are the classes themselves.
            kinds = tuple(
                Kind("kl", ndim=output.ndim) if _is_box(output) else kind
                for output, kind in zip(found, kinds, strict=True)
            )
        return Yardstick(kinds)
    return Yardstick((_kind_of(found[0], targets),))


def _traced_outputs(model: nn.Module, samples: InputBatch) -> list[Tensor]:
    """Return the outputs with their graph; without it where the model cannot be differentiated."""
    private = private_copy(model)
    for parameter in unshadowed(private).parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    inputs = samples.on(private)
    try:
        with torch.enable_grad():
            return outputs(private, inputs)
    except SepconvertError:  # it may run where no graph is made
        with torch.no_grad():
            return outputs(private, inputs)


def _kind_of(
    output: Tensor, targets: Literal["classes", "pictures", "any"] = "any", *, several: bool = False
) -> Kind:
    """Return the kind of an output by its operator and shape."""
    of_classes = targets == "classes" and output.ndim == 4 and output.shape[1] > 1
    is_picture = output.ndim == 4 and output.shape[1] in (1, 3) and not of_classes
    if targets == "pictures":
        return Kind("squared" if is_picture else "relative", ndim=output.ndim)
    origin = _origin(output.grad_fn)
    if origin in ("Softmax", "LogSoftmax"):
        axis = _class_axis(output if origin == "Softmax" else output.exp())
        if axis is not None:
            return Kind("kl", axis, origin == "Softmax", output.ndim)
    elif origin == "Sigmoid":
        return Kind("bernoulli", probabilities=True, ndim=output.ndim)
    elif of_classes or (is_logits(output) and not (several and _is_no_class_score(output))):
        return Kind("kl", ndim=output.ndim)
    elif targets == "classes" and output.ndim in (2, 4) and output.shape[1] == 1:
        return Kind("bernoulli", ndim=output.ndim)
    elif is_picture:
        return Kind("squared", ndim=4)
    return Kind("relative", ndim=output.ndim)


def _asked(name: Divergence, output: Tensor) -> Kind:
    """Return the kind that the user asked for, told by its values whether an output holds probabilities."""
    if name == "bernoulli":
        return Kind(name, probabilities=bool(((output >= 0) & (output <= 1)).all()), ndim=output.ndim)
    if name != "kl":
        return Kind(name, ndim=output.ndim)
    axis = _class_axis(output) if output.numel() and bool((output >= 0).all()) else None
    if axis is not None:
        return Kind(name, axis, True, output.ndim)
    axis = 2 if output.ndim == 3 else 1
    if output.ndim < 2 or output.shape[axis] < 2:
        raise SepconvertError(
            f"`divergence` kl: expected outputs over classes, such as N×K or N×K×H×W, got one of shape "
            f"{tuple(output.shape)}; pass bernoulli, squared or relative"
        )
    return Kind(name, axis, ndim=output.ndim)


def _origin(node: Any, *more: str) -> str | None:
    """Return the operator whose results a tensor holds, however arranged, by the name of its derivative.

    Operators named `more` are passed over as well.
    """
    if node is None:
        return None
    name = str(node.name()).partition("Backward")[0]
    if name in _JOINING:
        found = {_origin(before, *more) for before, _ in node.next_functions}
        return found.pop() if len(found) == 1 else None
    return _origin(node.next_functions[0][0], *more) if name in (*_ARRANGING, *more) else name


def _class_axis(probabilities: Tensor) -> int | None:
    """Return the dimension along which probabilities sum to 1: the second, the last, or another."""
    last = probabilities.ndim - 1
    axes: list[int] = [1, last, *range(last)]
    for axis in axes:
        if axis <= last and probabilities.shape[axis] > 1:
            sums = probabilities.detach().float().sum(axis)
            if torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
                return axis
    return None


def _is_no_class_score(output: Tensor) -> bool:
    """Return whether one of several outputs N×K or N×K×H×W is rather a box, or an embedding N×K."""
    is_embedding = output.ndim == 2 and _origin(output.grad_fn, *_POOLING) in _OF_EMBEDDINGS
    return _is_box(output) or is_embedding


def _is_box(output: Tensor) -> bool:
    """Return whether an output has four numbers, as many as a box."""
    return is_logits(output) and output.shape[1] == _OF_A_BOX


def is_logits(output: Tensor) -> bool:
    """Return whether an output has the shape of logits over dimension 1.

    N×K with K ≥ 2 has, and so has N×K×H×W, except with 1 or 3 channels: that is a picture.
    """
    classes = output.shape[1] if output.ndim > 1 else 0
    return (output.ndim == 2 and classes >= 2) or (output.ndim == 4 and classes not in (0, 1, 3))


def relative_error(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the mean squared difference over the variance of `expected`, which counts as 1 if it is 0."""
    wanted, given = _precise(expected), _precise(actual)
    variance = wanted.var(correction=0)
    return (given - wanted).square().mean() / torch.where(variance > 0, variance, 1)


def returned_by(model: nn.Module, samples: InputBatch) -> Any:
    """Return what `model` returns for some samples.

    Raises `SepconvertError` if it cannot run on them.
    """
    try:
        return samples.run(model)
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join(str((len(samples), *shape)) for shape in samples.shapes)
        raise SepconvertError(
            f"data: expected inputs that the model takes, got shape {shapes}, on which it fails with"
            f" {type(error).__name__}: {first_line(error)}; check the size and the channels of the data"
        ) from error


def floating_outputs(returned: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returned."""
    return [leaf for leaf in tensor_leaves(returned) if leaf.is_floating_point()]


def outputs(model: nn.Module, samples: InputBatch) -> list[Tensor]:
    """Return the floating-point tensors among the outputs of `model` for some samples.

    Raises `SepconvertError` if it cannot run on them.
    """
    return floating_outputs(returned_by(model, samples))


def _precise(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True)
class OutputDifference:
    """Difference of one output b from the base's output a, over all samples.

    `max_abs` and `mean_abs` are those of |b − a|, `relative` is ‖b − a‖ / ‖a‖ and `cosine` is a·b / (‖a‖
    ‖b‖), over all elements as one vector; `snr_db` is 10 log₁₀(‖a‖² / ‖b − a‖²), None for equal outputs.
    `agreement` is the share of samples whose largest element is the same one, for outputs N×K with K ≥ 2.
    What is not defined, or not finite, is None.
    """

    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    snr_db: float | None
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return an entry of `outputs` in the JSON of a comparison."""
        return asdict(self)


class OutputComparison:
    """Sums over the batches of one output, in float64."""

    def __init__(self) -> None:
        self._largest = self._absolute = 0.0
        self._error = self._base = self._other = self._product = 0.0
        self._elements = self._samples = self._equal = 0
        self._ranked = True

    def add(self, base: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
        """Add a batch of both, in the same shape."""
        a, b = base.astype(np.float64), other.astype(np.float64)
        # NaN and Inf in either are an infinite difference, not a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(a == b, 0.0, np.abs(b - a))
            finite = np.isfinite(difference).all()
            self._largest = max(self._largest, float(difference.max(initial=0)) if finite else math.inf)
            self._absolute += float(difference.sum())
            self._error += float(np.square(difference).sum())
            self._base += float(np.square(a).sum())
            self._other += float(np.square(b).sum())
            self._product += float((a * b).sum())
        self._elements += a.size
        self._ranked &= a.ndim == 2 and a.shape[1] > 1
        if self._ranked:
            self._samples += len(a)
            self._equal += int((a.argmax(1) == b.argmax(1)).sum())

    def result(self) -> OutputDifference:
        """Return the difference over all batches that were added."""
        norms = math.sqrt(self._base) * math.sqrt(self._other)
        return OutputDifference(
            max_abs=_finite(self._largest),
            mean_abs=_finite(self._absolute / self._elements) if self._elements else None,
            relative=_finite(math.sqrt(self._error / self._base)) if self._base else None,
            cosine=_finite(self._product / norms) if norms else None,
            snr_db=10 * (math.log10(self._base) - math.log10(self._error))
            if all(0 < power < math.inf for power in (self._base, self._error))
            else None,
            agreement=self._equal / self._samples if self._ranked and self._samples else None,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
