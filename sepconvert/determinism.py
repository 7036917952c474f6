"""Float32 products in float32, and the same sums in every run where torch has an algorithm for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.backends import cudnn

from sepconvert.errors import SepconvertError


@contextmanager
def reproducible() -> Iterator[None]:
    """Forbid TensorFloat-32, and cuDNN what differs from run to run; the user's settings come back after it.

    By default cuDNN rounds the factors of float32 products to 10 bits of mantissa where the GPU can
    (TensorFloat-32): a thousand times what a comparison with another runtime, or of an exact form with its
    kernel, is to tell. Some gradients on a GPU have no algorithm that sums in one order, those of reflected
    borders for instance: there, weights may differ in their last digits.

    Raises:
        SepconvertError: torch cannot say what the settings are.
    """
    with ExitStack() as stack:
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
