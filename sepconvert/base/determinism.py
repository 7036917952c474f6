"""Full float32 precision, and the same sums in every run where torch has an algorithm for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.backends import cudnn

from sepconvert.base.errors import SepconvertError


@contextmanager
def reproducible() -> Iterator[None]:
    """Forbid TensorFloat-32 and non-deterministic cuDNN algorithms; restore the user's settings on leaving.

    By default, where the GPU can, cuDNN rounds the factors of float32 products to 10 bits of mantissa
    (TensorFloat-32): an error a thousand times larger than the differences that verification must detect.
    Some gradients on a GPU have no deterministic algorithm, those of reflected borders for instance; there,
    weights may differ in their last digits. The state of torch's random generators is restored, too.

    Raises:
        SepconvertError: torch cannot report its settings.
    """
    with ExitStack() as stack:
        stack.enter_context(
            torch.inference_mode(False)
        )  # parameters made in inference mode could never be trained
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            # The older interface, which torch.export reads as well; it must not be mixed with the newer one.
            stack.enter_context(
                cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False)
            )
        except RuntimeError as error:
            raise SepconvertError(
                "torch: expected settings of TensorFloat-32 by torch.backends.cudnn.allow_tf32 and "
                "torch.set_float32_matmul_precision, which torch.export reads, got some by fp32_precision; "
                "leave those as they are until the conversion is done"
            ) from error
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield
