"""Float32 products in float32, and the same sums in every run where torch has an algorithm for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.backends import cudnn

from sepconvert.base.errors import SepconvertError


@contextmanager
def reproducible() -> Iterator[None]:
    """Forbid TensorFloat-32, and cuDNN what differs from run to run; then all is as the user had it.

    By default cuDNN rounds the factors of float32 products to 10 bits of mantissa where the GPU can
    (TensorFloat-32): a thousand times what a comparison with another runtime, or of an exact form with its
    kernel, is to tell. Some gradients on a GPU have no algorithm that sums in one order, those of reflected
    borders for instance: there, weights may differ in their last digits. torch's random numbers go on, too,
    where they were.

    Raises:
        SepconvertError: torch cannot say what the settings are.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # parameters made there could never be trained
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            # By the older interface, of which torch.export asks as well; the newer must not be mixed with it.
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
