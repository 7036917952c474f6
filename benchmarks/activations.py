"""Errors of activation functions in ONNX Runtime, against float64, in roundings of their scale.

    python benchmarks/activations.py [--dtype float32]

`sepconvert.measure.verification.activations.OPERATOR_ERRORS` holds the bounds that these figures support.
Each activation of torch is exported as `sepconvert` exports models, and run on 200,200 values from -100 to
100, most of them near 0. The table also shows where the exporter or the runtime computes something else.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import onnxruntime as ort
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from sepconvert.base.environment import Runtime, environment
from sepconvert.files.onnx.export import export_program, save_onnx
from sepconvert.files.onnx.structured import onnx_feed
from sepconvert.measure.latency import Deployed, session
from sepconvert.measure.verification.activations import OPERATOR_ERRORS, ActivationErrors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "glu": lambda x: F.glu(x, 1),
    "softmin": lambda x: F.softmin(x, 1),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3)[0, 0],
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "softshrink": F.softshrink,
}


class Activation(nn.Module):
    """One activation as a model; the parameter gives it a dtype."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.zero = function, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to x + 0."""
        return self.function(x + self.zero)


def values() -> Tensor:
    """Return 1001 × 200 values in [-100, 100], half of them in [-20, 20], in random order."""
    generator = torch.Generator().manual_seed(0)
    near = torch.linspace(-20, 20, 100_100)
    far = torch.linspace(-1, 1, 100_100).sign() * torch.logspace(-6, 2, 100_100).flip(0)
    order = torch.randperm(200_200, generator=generator)
    return torch.cat([near, far])[order].view(1001, 200)


def measured(name: str, x: Tensor, dtype: torch.dtype) -> list[object]:
    """Return the row of one activation: its largest error, where that is, and its share of the bound."""
    model = Activation(ACTIVATIONS[name]).to(dtype).eval()
    given = x.to(dtype)
    exact = ACTIVATIONS[name](given.double())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activation.onnx"
        save_onnx(export_program(model, (given,), dynamic_batch=False), path)
        runner = session(Deployed(path, Runtime(1)))
        (found,) = runner.run(None, onnx_feed(model, (given,)))
    error = (torch.from_numpy(found).double() - exact).abs()
    with ActivationErrors(torch.finfo(dtype).eps, "equal", 0) as moving:
        allowed = (ACTIVATIONS[name](given.double()) - exact).abs()
    worst = int(error.argmax())
    own = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    share = (error / (allowed + own)).max()
    at = float(given.flatten()[worst]) if exact.shape == given.shape else float("nan")
    rounded = float((ACTIVATIONS[name](given).double() - exact).abs().max())
    return [name, float(error.max()), at, rounded, moving.count, float(share)]


@click.command(help=__doc__)
@click.option("--dtype", "name", type=click.Choice(["float32", "float16", "float64"]), default="float32")
def main(name: str) -> None:
    """Print the table."""
    dtype = getattr(torch, name)
    rows = []
    for name in ACTIVATIONS:
        try:
            rows.append(measured(name, values(), dtype))
        except Exception as error:
            rows.append([name, f"{type(error).__name__}: {str(error)[:60]}"])
    headers = ["activation", "largest error", "at x", "PyTorch's own", "moved", "share of the bound"]
    click.echo(tabulate(rows, headers, floatfmt=".3g"))
    machine = environment(Runtime(1))
    click.echo(f"\nonnxruntime {ort.__version__}, torch {torch.__version__}, {machine['cpu']}, {dtype}")
    bounds = {name: each.roundings for name, each in OPERATOR_ERRORS.items()}
    click.echo(f"Bounds, in roundings: {bounds}")


if __name__ == "__main__":
    main()
