"""What is set for the time of a conversion, and set back."""

import subprocess
import sys

import pytest
import torch
from conversions import decided
from torch import nn
from torch.backends import cudnn

from sepconvert.base.determinism import reproducible


def settings():
    return (
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, cudnn.enabled,
        torch.get_float32_matmul_precision(),
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_settings_are_those_of_the_user_again(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        before = settings()
        with reproducible():
            assert settings() == (False, False, True, True, "highest")
            torch.export.export(
                nn.Conv2d(1, 1, 3), (torch.rand(1, 1, 5, 5),)
            )  # which reads and sets them too
            assert settings() == (False, False, True, True, "highest")
        assert settings() == before
        with pytest.raises(ZeroDivisionError), reproducible():
            _ = 1 / 0
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_conversions_run_under_them():
    seen = set()
    model = nn.Conv2d(4, 4, 3)
    model.register_forward_pre_hook(lambda *_: seen.add(cudnn.allow_tf32))
    decided(model, torch.rand(1, 4, 8, 8))
    assert seen == {False}


@pytest.mark.slow
def test_settings_that_torch_cannot_tell():
    program = (
        "import torch, sepconvert\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "try: sepconvert.convert(torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 8, 8), check='torch')\n"
        "except sepconvert.SepconvertError as error: print(error)\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("torch: expected settings of TensorFloat-32")
