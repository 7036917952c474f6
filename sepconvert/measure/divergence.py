"""How far a model's outputs are from its original's: what distillation lowers and calibration compares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.errors import SepconvertError, first_line
from sepconvert.measure import Progress
from sepconvert.measure.accuracy import evaluation_mode, tensor_leaves
from sepconvert.trace import fresh, placed


def divergence(expected: Sequence[Tensor], actual: Sequence[Tensor], temperature: float = 1) -> Tensor:
    """How far `actual` is from `expected`, the outputs of one batch: a mean over samples, differentiable.

    Both are floating-point tensors with the batch in dimension 0, as `outputs` returns them. The rule:

    - One tensor that `is_logits` is compared by `T² KL(softmax(expected / T) ‖ softmax(actual / T))` over
      dimension 1, a mean over samples and positions (Hinton et al., arXiv:1503.02531). At the temperature
      T = 1 that is the Kullback-Leibler divergence in nats.
    - Anything else (regression, pictures, several tensors) by `relative_error`, a mean over the tensors;
      1 means as far off as if the mean had been answered. The temperature has no part in it.

    It is computed in float32 at least. Returns a 0-d tensor. Raises `SepconvertError` if the tensors differ
    in number or shape, or there are none.
    """
    shapes, others = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in actual]
    if shapes != others or not shapes:
        raise SepconvertError(
            f"outputs: expected floating-point tensors of the shapes {shapes}, as the original's, got"
            f" {others}; compare a model with its own conversion"
        )
    if len(expected) == 1 and is_logits(expected[0]):
        wanted, given = ((_precise(t) / temperature).log_softmax(1) for t in (expected[0], actual[0]))
        terms = F.kl_div(given, wanted, reduction="none", log_target=True)
        return temperature**2 * terms.sum(1).mean()
    return torch.stack([relative_error(e, a) for e, a in zip(expected, actual, strict=True)]).mean()


def is_logits(output: Tensor) -> bool:
    """Whether a model's only output is read as logits over dimension 1.

    N×K with K ≥ 2 is, and so is N×K×H×W, except with 1 or 3 channels: that is a picture.
    """
    classes = output.shape[1] if output.ndim > 1 else 0
    return (output.ndim == 2 and classes >= 2) or (output.ndim == 4 and classes not in (0, 1, 3))


def relative_error(expected: Tensor, actual: Tensor) -> Tensor:
    """Mean squared difference over the variance of `expected` (where that is 0: the difference alone)."""
    wanted, given = _precise(expected), _precise(actual)
    variance = wanted.var(correction=0)
    return (given - wanted).square().mean() / torch.where(variance > 0, variance, 1)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The floating-point tensors in what `model` answers to the batch `x`.

    Raises `SepconvertError` if it cannot run on `x`.
    """
    try:
        answer = model(fresh(x))
    except Exception as error:  # whatever the user's forward raises
        raise SepconvertError(
            f"data: expected inputs that the model takes, got shape {tuple(x.shape)}, on which it fails with"
            f" {type(error).__name__}: {first_line(error)}; check the size and the channels of the data"
        ) from error
    return [leaf for leaf in tensor_leaves(answer) if leaf.is_floating_point()]


@torch.no_grad()
def mean_divergence(
    original: nn.Module,
    converted: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    progress: Progress | None = None,
) -> float:
    """`divergence` of `converted` from `original` over a data set, weighted by the sizes of the batches.

    Both run in eval mode, on their own device and dtype; their training flags are restored. `loader` yields
    batches `(x, y)`, of which the labels are not looked at. `progress` wraps it, as `tqdm` does.

    Raises `SepconvertError` if the loader is empty, a model cannot run on a batch, or the outputs do not
    match.
    """
    total, samples = 0.0, 0
    with evaluation_mode(original), evaluation_mode(converted):
        for x, _ in progress(loader) if progress else loader:
            expected = [t.cpu() for t in outputs(original, placed(x, original))]
            actual = [t.cpu() for t in outputs(converted, placed(x, converted))]
            total += len(x) * float(divergence(expected, actual))
            samples += len(x)
    if not samples:
        raise SepconvertError("data: expected at least one sample, got none; check the data path")
    return total / samples


def _precise(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
