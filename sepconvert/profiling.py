"""What one model costs and how well it does, as a value that can be stored and compared."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sepconvert.environment import Runtime, available_cores
from sepconvert.errors import SepconvertError, first_line
from sepconvert.export import cast, onnx_feed, runtime_dtype, save_onnx
from sepconvert.measure.accuracy import Accuracy, evaluate
from sepconvert.measure.cost import count
from sepconvert.measure.latency import Latency, measure_single
from sepconvert.measure.statistics import Interval
from sepconvert.trace import Inputs, private_copy

SCHEMA = "sepconvert.profile/1"


@dataclass(frozen=True)
class Profile:
    """Costs of one sample, and quality.

    `macs` is fvcore's count (one fused multiply-add = 1) and `flops` is twice that. Operators that
    fvcore has no count for are in `uncounted_ops`.
    """

    params: int
    macs: int
    onnx_bytes: int | None
    latency: Latency | None
    accuracy: Accuracy | None
    uncounted_ops: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of one sample: 2 × `macs`."""
        return 2 * self.macs

    def to_json(self) -> dict[str, Any]:
        """The PROFILE object of the report."""
        return {
            "params": self.params,
            "macs": self.macs,
            "flops": self.flops,
            "onnx_bytes": self.onnx_bytes,
            "latency_ms": None if self.latency is None else self.latency.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "uncounted_ops": dict(self.uncounted_ops),
        }


def read_profile(path: Path) -> Profile:
    """Read a profile that `sepconvert profile` wrote.

    Raises:
        SepconvertError: no such file, no profile, or of another version, with the key at fault.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise SepconvertError(f"{path}: expected schema {SCHEMA!r}, got {document['schema']!r}")
        latency, accuracy = document["latency_ms"], document["accuracy"]
        return Profile(
            params=int(document["params"]),
            macs=int(document["macs"]),
            onnx_bytes=document["onnx_bytes"],
            latency=None
            if latency is None
            else Latency(
                float(latency["median"]), Interval(*map(float, latency["ci95"])), float(latency["p90"]),
                int(latency["runs"]), int(latency["threads"]), int(latency["batch"]),
            ),
            accuracy=None
            if accuracy is None
            else Accuracy(float(accuracy["top1"]), accuracy["top5"], int(accuracy["n"])),
            uncounted_ops=dict(document["uncounted_ops"]),
        )  # fmt: skip
    except OSError as error:
        raise SepconvertError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except (ValueError, TypeError, KeyError) as error:
        raise SepconvertError(
            f"{path}: not a profile that `sepconvert profile` wrote ({first_line(error)}); make it anew"
        ) from error


def profile(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    runs: int = 50,
    threads: int | None = None,
    graph_optimization: str = "all",
    seed: int = 0,
) -> Profile:
    """Measure a model: MACs and parameters, ONNX size, latency in ONNX Runtime, accuracy on `data`.

    Args:
        model: left as it is.
        example_inputs: N × … tensor, or a tuple of positional arguments; N is the batch that is timed.
        data: labelled batches (x, y), for accuracy.
        runs: timed runs; 0 for no latency.
        threads: of ONNX Runtime; all cores if None.
        graph_optimization: of ONNX Runtime: "all" as is its default, "extended", "basic" or "none".
        seed: of the order of runs.

    Raises:
        SepconvertError: the model does not run on these inputs, or cannot be exported.
    """
    inputs = as_inputs(example_inputs)
    runtime = Runtime(available_cores() if threads is None else threads, graph_optimization)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, inputs, path)
        feed = onnx_feed(cast(inputs, runtime_dtype(model)))
        batch = batch_size(inputs)
        latency = (
            measure_single(path, feed, runs=runs, runtime=runtime, batch=batch, seed=seed) if runs else None
        )
        size = path.stat().st_size
    cost = count(private_copy(model), inputs)
    accuracy = None if data is None else evaluate(private_copy(model), data).accuracy()
    return Profile(cost.params, cost.macs, size, latency, accuracy, cost.uncounted_ops)


def as_inputs(example_inputs: Tensor | Inputs) -> Inputs:
    """A single tensor as the tuple of positional arguments."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def batch_size(inputs: Inputs) -> int:
    """First dimension of the first tensor."""
    return next((int(value.shape[0]) for value in inputs if isinstance(value, Tensor) and value.ndim), 1)
