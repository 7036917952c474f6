"""Convert ONNX files of any origin in exact mode, and check the results in ONNX Runtime.

    onnx_files.py export FOLDER                      write nets of torchvision and timm at several opsets
    onnx_files.py run FILE_OR_FOLDER … --results FILE [--planted]   one process per file; results are kept
    onnx_files.py table FILE                         print the table

With --planted, every second spatial convolution of a copy of the file gets a kernel with a structure, which
exact mode must find. README.md beside this file says what must hold for a file to pass.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import timm
import torch
import torchvision
from onnx import numpy_helper
from tabulate import tabulate
from timm.layers import BlurPool2d
from torch import Tensor, nn

import sepconvert
from sepconvert.base.environment import Runtime, environment
from sepconvert.base.errors import first_line
from sepconvert.files.onnx.graph.convolutions import OnnxGraph

Array = npt.NDArray[Any]

SECONDS = 480  # time limit of a process
IMAGE, SMALL = 224, 64  # guesses for open sizes: of images with three channels, and of all else
# Difference of outputs, relative to the largest element, that rounding explains where ONNX Runtime with and
# without its optimisations agrees with itself by chance; by bytes of the dtype.
CLOSE = {2: 1e-2, 4: 1e-4, 8: 1e-10}
NOISES = 10  # times ONNX Runtime's own difference
CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv")
INSERTED = ("Conv", "Pad", "Add", "Identity")  # operators that may take the place of a Conv


# Inputs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """What the command line says about inputs, by their names, and whether kernels are planted."""

    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, float]
    planted: bool

    def key(self) -> str:
        """Return a text that is the same for the same flags."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return json.dumps([shapes, dict(self.values), self.planted], sort_keys=True)


def example(model: onnx.ModelProto, flags: Flags) -> tuple[dict[str, Array], dict[str, list[int]], bool]:
    """Return random inputs, the shapes that were guessed, and whether the file gives all but the batch."""
    random = np.random.default_rng(0)
    known = {tensor.name for tensor in model.graph.initializer}
    feed, guessed, complete = {}, {}, True
    for value in model.graph.input:
        if value.name in known:
            continue
        kind = value.type.tensor_type
        sizes = [size.dim_value or size.dim_param or None for size in kind.shape.dim]
        if value.name in flags.shapes:
            shape = list(flags.shapes[value.name])
            complete = False
        else:
            shape = [guess(sizes, axis) for axis in range(len(sizes))]
            complete = complete and all(isinstance(size, int) for size in sizes[1:])
            if any(not isinstance(size, int) and not is_batch(size, axis) for axis, size in enumerate(sizes)):
                guessed[value.name] = shape
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if value.name in flags.values:
            feed[value.name] = np.full(shape, flags.values[value.name], dtype)
            complete = False
        elif np.issubdtype(dtype, np.floating):
            feed[value.name] = random.random(shape).astype(dtype)
        else:
            feed[value.name] = np.zeros(shape, dtype)
    return feed, guessed, complete


def guess(sizes: Sequence[int | str | None], axis: int) -> int:
    """Return the size of an axis: the file's, 1 for a batch, or a guess."""
    size = sizes[axis]
    if isinstance(size, int):
        return size
    if is_batch(size, axis):
        return 1
    return IMAGE if len(sizes) == 4 and 3 in (sizes[1], sizes[3]) else SMALL


def is_batch(size: str | None, axis: int) -> bool:
    """Return whether an axis of open size is that of the samples."""
    return axis == 0 or "batch" in (size or "").lower()


# Planted kernels -----------------------------------------------------------------------------------


def spatial(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[tuple[onnx.NodeProto, Array]]:
    """Return the 2-D convolutions with constant kernels of floats, larger than 1×1, and the kernels.

    Rows and columns that are grouped, or of one channel, are left out: they have no structure that pays.
    """
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}

    def is_constant(name: str) -> bool:
        if name in known or not name:
            return True
        node = producers.get(name)
        plain = node is not None and not any(each.HasField("g") for each in node.attribute)
        return plain and node.op_type != "DequantizeLinear" and all(map(is_constant, node.input))

    nodes = [node for node in graph.node if node.op_type == "Conv" and is_constant(node.input[1])]
    computed = sorted({node.input[1] for node in nodes} - known.keys())
    found = answers(model, feed, computed, optimised=False) if computed else []
    values = dict(zip(computed, found, strict=True))
    values |= {node.input[1]: numpy_helper.to_array(known[node.input[1]])
               for node in nodes if node.input[1] in known}  # fmt: skip
    pairs = [(node, values[node.input[1]]) for node in nodes]
    return [
        (node, weight)
        for node, weight in pairs
        if weight.ndim == 4 and max(weight.shape[2:]) > 1 and weight.dtype in (np.float32, np.float16)
        and (min(weight.shape[2:]) > 1 or (groups_of(node) == 1 and max(weight.shape[:2]) > 1))
    ]  # fmt: skip


def groups_of(node: onnx.NodeProto) -> int:
    """Return the number of groups of a convolution."""
    return next((each.i for each in node.attribute if each.name == "group"), 1)


def plant(model: onnx.ModelProto, feed: Mapping[str, Array]) -> tuple[onnx.ModelProto, list[str]]:
    """Return a copy with a structure in every second spatial kernel, and the outputs of these convolutions.

    Kernels are written where the file has them: in an initializer or a Constant. One that other nodes compute
    becomes an initializer, and each of the convolutions that read it gets its name.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    random = np.random.default_rng(1)
    new: dict[str, Array] = {}
    for number, (node, weight) in enumerate(spatial(copy, feed)[::2]):
        if node.input[1] not in new:
            new[node.input[1]] = structured(weight, groups_of(node), number, random)
    for name, kernel in new.items():
        _write_constant(copy, name, kernel)
    written = new.keys() | {f"{name}.planted" for name in new}
    return copy, [node.output[0] for node in copy.graph.node
                  if node.op_type == "Conv" and node.input[1] in written]  # fmt: skip


def structured(weight: Array, groups: int, number: int, random: np.random.Generator) -> Array:
    """Return a kernel of the same shape, dtype and norm with a structure, one of three in turn."""
    outputs, inputs, height, width = weight.shape
    each = outputs // groups
    rank = max(1, min(each, inputs) // 4)
    normal = random.standard_normal
    kind = number % 3 if groups == 1 else 0
    if inputs == 1 and kind == 2:  # a single channel has no subspace
        kind = 0
    if min(height, width) == 1 and kind == 0:  # a row or a column separates no further
        kind = 1 if inputs == 1 else 2
    if outputs == 1 and kind == 1:  # any kernel is such a product
        kind = 2 if inputs > 1 else 0
    if kind == 0:
        first, second = normal((groups, each, rank, width)), normal((groups, rank, inputs, height))
        kernel = np.einsum("gorj,grci->gocij", first, second).reshape(weight.shape)
    elif kind == 1:
        area = height * width  # two branches where they pay, whose outputs are summed
        branches = 2 if 2 * (area + outputs) < area * outputs else 1
        points, depths = normal((outputs, branches, inputs)), normal((branches, inputs, height, width))
        kernel = np.einsum("obc,bcij->ocij", points, depths)
    else:
        kernel = np.einsum("orij,rc->ocij", normal((outputs, rank, height, width)), normal((rank, inputs)))
    norm = np.linalg.norm(weight.astype(np.float64)) or 1.0
    return (kernel * (norm / np.linalg.norm(kernel))).astype(weight.dtype)


def _write_constant(model: onnx.ModelProto, name: str, value: Array) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value, name))
            return
    for node in model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", numpy_helper.from_array(value)))
            return
    tensor = numpy_helper.from_array(value, f"{name}.planted")
    model.graph.initializer.append(tensor)
    if model.ir_version < 4:  # every initializer has to be an input, too
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] == name:
            node.input[1] = tensor.name


# Checks --------------------------------------------------------------------------------------------


def answers(
    model: onnx.ModelProto,
    feed: Mapping[str, Array],
    names: Sequence[str] | None = None,
    *,
    optimised: bool = True,
) -> list[Array]:
    """Return the outputs that are arrays or, given `names`, the values of these names."""
    asked = model
    if names is not None:
        asked = onnx.ModelProto()
        asked.CopyFrom(model)
        there = {value.name for value in asked.graph.output}
        asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(asked.SerializeToString(), options, ["CPUExecutionProvider"])
    except RuntimeError:  # ONNX Runtime 1.32 fuses a Conv that is asked for with the Add behind it
        if names is None or not optimised:
            raise
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = ort.InferenceSession(asked.SerializeToString(), options, ["CPUExecutionProvider"])
    return [each for each in session.run(names, dict(feed)) if isinstance(each, np.ndarray)]


def difference(expected: Array, actual: Array) -> float:
    """Return the largest difference, relative to the largest expected element; NaN and Inf must agree."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf
    if not np.issubdtype(expected.dtype, np.number):
        return 0.0 if np.array_equal(expected, actual) else math.inf
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    wanted, found = expected[finite].astype(np.float64), actual[finite].astype(np.float64)
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))


@dataclass(frozen=True)
class Comparison:
    """Largest differences of values, relative; `explained` if none exceeds what rounding explains."""

    difference: float
    noise: float
    explained: bool


def compare(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feed: Mapping[str, Array],
    names: Sequence[str] | None = None,
) -> Comparison:
    """Compare outputs, or values by name, by the differences that optimisation makes to those of `before`."""
    runs = [[answers(model, feed, names, optimised=optimised) for optimised in (True, False)]
            for model in (before, after)]  # fmt: skip
    moved, noises, explained = [0.0], [0.0], True
    for optimised, plain, converted, converted_plain in zip(*runs[0], *runs[1], strict=True):
        noise = difference(optimised, plain)
        found = max(difference(optimised, converted), difference(plain, converted_plain))
        floor = CLOSE[optimised.dtype.itemsize] if np.issubdtype(optimised.dtype, np.floating) else 0.0
        explained = explained and found <= max(NOISES * noise, floor)
        moved.append(found)
        noises.append(noise)
    return Comparison(max(moved), max(noises), explained)


def alterations(before: onnx.ModelProto, after: onnx.ModelProto, replaced: set[str]) -> Iterator[str]:
    """Yield what surgery changed besides the convolutions with these outputs and what hangs on them."""
    old, new = ([node.SerializeToString() for node in model.graph.node] for model in (before, after))
    old_set, new_set = set(old), set(new)
    if [each for each in old if each in new_set] != [each for each in new if each in old_set]:
        yield "the order of the other nodes changed"
    read = values_read(after)
    made = {name for node in after.graph.node for name in node.output}
    for node, content in zip(before.graph.node, old, strict=True):
        if content in new_set:
            if node.output and node.output[0] in replaced:
                yield f"{node.op_type} {node.output[0]} is said to be replaced, and is still there"
            continue
        is_replaced = node.op_type == "Conv" and node.output[0] in replaced
        is_folded = (
            node.op_type == "BatchNormalization" and node.input[0] in replaced and node.output[0] in made
        )
        is_unread = not read & set(node.output)
        if not (is_replaced or is_folded or is_unread):
            yield f"{node.op_type} {node.output[0]} changed or is gone"
    for node, content in zip(after.graph.node, new, strict=True):
        if content not in old_set and node.op_type not in INSERTED:
            yield f"{node.op_type} {node.name} was added"
    tensors = {tensor.name: tensor.SerializeToString() for tensor in after.graph.initializer}
    for tensor in before.graph.initializer:
        if tensor.name in tensors:
            if tensors[tensor.name] != tensor.SerializeToString():
                yield f"initializer {tensor.name} changed"
        elif tensor.name in read:
            yield f"initializer {tensor.name} is gone"
    if frame(before) != frame(after):
        yield "inputs, outputs, opsets, metadata or functions changed"


def values_read(model: onnx.ModelProto) -> set[str]:
    """Return the names of all values that some node reads, at any depth, or that are outputs."""
    found = {value.name for value in model.graph.output}
    for _, graph in graphs(model.graph):
        found |= {value.name for value in graph.output} | {each for node in graph.node for each in node.input}
    return found


def graphs(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[int, onnx.GraphProto]]:
    """Yield a graph and those within its nodes, each with its depth."""
    yield depth, graph
    for node in graph.node:
        for each in node.attribute:
            for body in ([each.g] if each.HasField("g") else []) + list(each.graphs):
                yield from graphs(body, depth + 1)


def frame(model: onnx.ModelProto) -> bytes:
    """Return the content of a model without nodes, weights and types of values within."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {tensor.name for tensor in copy.graph.initializer}
    inputs = [value for value in copy.graph.input if value.name not in known]
    for field in ("node", "initializer", "sparse_initializer", "value_info", "quantization_annotation"):
        copy.graph.ClearField(field)
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    return bytes(copy.SerializeToString(deterministic=True))


def invalid(model: onnx.ModelProto) -> str | None:
    """Return what onnx's checker says against a model."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # checker and shape inference have errors of their own
        return first_line(error)
    return None


# One file ------------------------------------------------------------------------------------------


def attempt(path: Path, flags: Flags) -> dict[str, Any]:
    """Inspect and convert a file, and check the result."""
    model = onnx.load(path)
    standard = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    found: dict[str, Any] = {
        "name": path.stem, "path": str(path), "sha256": sha256(path), "flags": flags.key(),
        "opset": standard[0] if standard else None, "ir": model.ir_version, "nodes": len(model.graph.node),
        "environment": environment(Runtime(1)),
    }  # fmt: skip
    stage, start, wrong = "inputs", time.perf_counter(), list[str]()
    try:
        feed, found["guessed"], complete = example(model, flags)
        found["shapes"] = {name: list(value.shape) for name, value in feed.items()}
        inputs = tuple(torch.from_numpy(value) for value in feed.values())
        stage = "ONNX Runtime, with the original"
        answers(model, feed)
        stage = "inspect"
        layers = sepconvert.inspect(path, None if complete else inputs).to_json()["layers"]
        found |= listed(model, layers)
        if found["unlisted"]:
            wrong.append(f"{found['unlisted']} convolutions are not listed")
        stage = "convert"
        result = sepconvert.convert(path, inputs, mode="exact", timing=sepconvert.Timing(runs=0))
        found["own"] = judged(model, result, feed, wrong)
        if flags.planted:
            stage = "convert, planted"
            planted, outputs = plant(model, feed)
            result = sepconvert.convert(planted, inputs, mode="exact", timing=sepconvert.Timing(runs=0))
            found["planted"] = judged(planted, result, feed, wrong, outputs)
        found |= {"outcome": "failed" if wrong else "passed", "error": "; ".join(wrong) or None}
    except Exception as error:  # any failure is a result of the benchmark
        message = f"{stage}: {type(error).__name__}: {first_line(error)}"
        found |= {"outcome": "failed", "error": message}
    found["seconds"] = time.perf_counter() - start
    return found


def listed(model: onnx.ModelProto, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many convolutions are listed, why some can never be replaced, and how many are missing."""
    there = sum(node.op_type in CONVOLUTIONS for _, graph in graphs(model.graph) for node in graph.node)
    kept = [layer["reason"] for layer in layers if layer["reason_code"] == "obstacle"]
    sizes = [layer["kernel"]["kernel_size"] for layer in layers
             if layer["reason_code"] != "obstacle" and layer["kernel"]]  # fmt: skip
    return {
        "convolutions": len(layers),
        "spatial": sum(max(size) > 1 for size in sizes),
        "pointwise": sum(max(size) == 1 for size in sizes),
        "obstacles": dict(Counter(kept)),
        "unlisted": max(there - len(layers), 0),
    }


def judged(
    model: onnx.ModelProto,
    result: Any,
    feed: Mapping[str, Array],
    wrong: list[str],
    planted: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the facts of a conversion; what must not be is added to `wrong`."""
    label = "" if planted is None else "planted: "
    after, layers = result.onnx_model, {layer["name"]: layer for layer in result.report["layers"]}
    outputs = {each.name: each.output for each in OnnxGraph(model).convolutions}
    decided = {outputs[name]: layer for name, layer in layers.items() if name in outputs}
    replaced = {output for output, layer in decided.items() if is_replaced(layer)}
    wrong += [label + each for each in alterations(model, after, replaced)]
    compared = compare(model, after, feed)
    common = {name for node in after.graph.node for name in node.output} & replaced
    inner = compare(model, after, feed, sorted(common)) if common else Comparison(0, 0, True)
    for where, each in (("outputs", compared), ("outputs of the replaced layers", inner)):
        if not each.explained:
            wrong.append(f"{label}{where} differ by {each.difference:.1e}, noise {each.noise:.1e}")
    if (says := invalid(after)) is not None and invalid(model) is None:
        wrong.append(f"{label}onnx's checker: {says}")
    if not result.verification.holds:
        wrong.append(f"{label}verification: {result.verification.failure}")
    facts = {
        "converted": len(replaced), "difference": compared.difference, "noise": compared.noise,
        "inner_difference": inner.difference, "inner_noise": inner.noise,
        "checker": invalid(model), "macs_ratio": result.report["delta"]["macs_ratio"],
        "schemes": dict(Counter(layer["scheme"] for layer in decided.values() if layer["scheme"])),
    }  # fmt: skip
    if planted is None:
        return facts
    unknown = {"reason": "not among the convolutions", "reason_code": None}
    missed = {output: decided.get(output, unknown) for output in planted if output not in replaced}
    lost = {output: layer["reason"] for output, layer in missed.items()
            if layer["reason_code"] != "costs-more"}  # fmt: skip
    if lost:
        output, reason = next(iter(lost.items()))
        wrong.append(f"{label}{len(lost)} not found, the first {output} ({reason})")
    missed = {output: layer["reason"] for output, layer in missed.items()}
    return facts | {"planted": len(planted), "missed": missed, "dear": len(missed) - len(lost)}


def is_replaced(layer: Mapping[str, Any]) -> bool:
    """Return whether other nodes take the place of a convolution."""
    return layer["decision"] == "converted" or layer["reason_code"] == "merged"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Exports -------------------------------------------------------------------------------------------


class Crnn(nn.Module):
    """A small reader of text lines: convolutions, an LSTM over columns, and a class for each."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.reader = nn.LSTM(64 * 8, 48, bidirectional=True, batch_first=True)
        self.head = nn.Linear(96, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Map N × 1 × 64 × W to N × W/8 × 20."""
        columns = self.features(x).flatten(1, 2).transpose(1, 2)
        found: Tensor = self.head(self.reader(columns)[0])
        return found


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the number of their input channels
    "resnet18": (torchvision.models.resnet18, 3),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 3),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 3),
    "resnetblur10": (partial(timm.create_model, "resnet10t", aa_layer=BlurPool2d), 3),
    "crnn": (Crnn, 1),
}
# Exporter by opset, with what makes its files differ: BatchNorm in convolutions or on its own, weights as
# inputs or not, torch's older and newer exporter.
EXPORTERS: dict[int, dict[str, Any]] = {
    11: {"dynamo": False, "keep_initializers_as_inputs": True},
    13: {"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False},
    17: {"dynamo": False},
    20: {"dynamo": True},
}


def write_export(folder: Path, name: str, opset: int) -> Path:
    """Export a net with seeded random weights; its batch is open."""
    torch.manual_seed(0)
    build, channels = NETS[name]
    model, images = build().eval(), torch.rand(2, channels, SMALL, SMALL)
    path = folder / f"{name}-opset{opset}.onnx"
    options = dict(EXPORTERS[opset])
    if options["dynamo"]:
        options |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False,
                    "verbose": False}  # fmt: skip
    else:
        options |= {"dynamic_axes": {"images": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter's age, and of LSTMs
        torch.onnx.export(model, (images,), str(path), input_names=["images"], opset_version=opset, **options)
    return path


# Commands ------------------------------------------------------------------------------------------


@click.group()
def cli() -> None:
    """Convert ONNX files; README.md beside this file says what is checked."""


class _Named(click.ParamType[Any]):
    """NAME=VALUE, where names may hold colons and slashes."""

    name = "NAME=VALUE"

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, equals, text = str(value).rpartition("=")
        try:
            if not name or not equals:
                raise ValueError
            return name, self._read(text)
        except ValueError:
            self.fail(f"{value}: expected NAME=1x3x224x224, or NAME=NUMBER for a value", param, ctx)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split("x")) if text else ()


def flags_of_inputs(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what inputs are, and whether to plant kernels."""
    for option in (
        click.option("--planted", is_flag=True, help="Plant structures, and check that they are found."),
        click.option("--value", "values", multiple=True, type=_Named(float), metavar="NAME=NUMBER",
                     help="Fill this input with a number instead of noise. Repeatable."),
        click.option("--shape", "shapes", multiple=True, type=_Named(_sizes), metavar="NAME=1x3x224x224",
                     help="Shape of this input. Repeatable."),
    ):  # fmt: skip
        function = option(function)
    return function


@cli.command()
@click.argument("places", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--results", "path", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="JSON file of the results.")  # fmt: skip
@flags_of_inputs
def run(
    places: Sequence[Path],
    path: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    values: Sequence[tuple[str, float]],
    planted: bool,
) -> None:
    """Convert the files of PLACES, and of all folders within, one process per file."""
    flags = Flags(dict(shapes), dict(values), planted)
    results = {_key(each): each for each in _read(path)} if path.exists() else {}
    for file in files_in(places):
        key = sha256(file), flags.key()
        if key in results:
            continue
        found = results[key] = _in_a_process(file, flags)
        _write(path, results.values())
        click.echo(
            f"{found['name']}: {found['outcome']} {found.get('seconds', 0):.0f} s {found['error'] or ''}"
        )


def files_in(places: Iterable[Path]) -> list[Path]:
    """Return the ONNX files among places and in folders, each once, in order."""
    found = (
        file for place in places for file in (sorted(place.rglob("*.onnx")) if place.is_dir() else [place])
    )
    return list(dict.fromkeys(found))


def _in_a_process(file: Path, flags: Flags) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", str(file)]
    command += [f"--shape={name}={'x'.join(map(str, shape))}" for name, shape in flags.shapes.items()]
    command += [f"--value={name}={value}" for name, value in flags.values.items()]
    command += ["--planted"] if flags.planted else []
    broken = {"name": file.stem, "path": str(file), "sha256": sha256(file), "flags": flags.key(),
              "outcome": "failed"}  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603  (our own script)
            command, capture_output=True, text=True, timeout=SECONDS, check=False, env=dict(os.environ)
        )
    except subprocess.TimeoutExpired:
        return {**broken, "error": f"not done within {SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {**broken, "error": f"exit code {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _key(result: Mapping[str, Any]) -> tuple[str, str]:
    return result["sha256"], result["flags"]


def _read(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write one line per result, atomically."""
    lines = ",\n".join(json.dumps(each) for each in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    part.replace(path)


@cli.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@flags_of_inputs
def one(
    file: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    values: Sequence[tuple[str, float]],
    planted: bool,
) -> None:
    """Convert one file in this process; the last line of the output is the result."""
    click.echo(json.dumps(attempt(file, Flags(dict(shapes), dict(values), planted))))


@cli.command("table")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def print_table(path: Path) -> None:
    """Print the table of all results."""
    click.echo("\n".join(table(_read(path))))


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, one row per file, then guesses, obstacles, what was missed and failed."""
    rows, notes = [], []
    names = labels(found)
    for name, each in zip(names, found, strict=True):
        own, planted = each.get("own"), each.get("planted")
        rows.append({
            "file": name,
            "opset/IR": f"{each.get('opset', '')}/{each.get('ir', '')}",
            "nodes": each.get("nodes", ""),
            "2-D spatial, 1×1, listed": _counts(each),
            "by itself": "" if own is None else own["converted"],
            "planted/found": "" if planted is None else _found(planted),
            "outputs (noise)": _difference(own if planted is None else planted, ""),
            "layers (noise)": _difference(own if planted is None else planted, "inner_"),
            "seconds": f"{each['seconds']:.0f}" if "seconds" in each else "",
            "outcome": each["outcome"],
        })  # fmt: skip
        for value, shape in (each.get("guessed") or {}).items():
            notes.append(f"- {name}: {value} was guessed to be {'×'.join(map(str, shape))}")
        for reason, times in each.get("obstacles", {}).items():
            notes.append(f"- {name}: {times} listed: {reason}")
        reasons = Counter(generic(each) for each in (planted or {}).get("missed", {}).values())
        for reason, times in reasons.items():
            notes.append(f"- {name}: {times} planted and kept: {reason}")
        if (own or {}).get("checker"):
            notes.append(f"- {name}: onnx's checker already refuses the original: {own['checker']}")
    yield tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    yield ""
    outcomes = Counter(each["outcome"] for each in found)
    yield ", ".join(f"{times} {outcome}" for outcome, times in sorted(outcomes.items())) + "."
    yield from notes
    for name, each in zip(names, found, strict=True):
        if each["outcome"] == "failed":
            yield f"- {name} failed: {each['error']}"


def labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each result, with a number where several have the same."""
    times, numbers = Counter(each["name"] for each in found), Counter[str]()
    names = []
    for each in found:
        numbers[each["name"]] += 1
        many = times[each["name"]] > 1
        names.append(f"{each['name']} ({numbers[each['name']]})" if many else each["name"])
    return names


def generic(reason: str) -> str:
    """Return a reason without its numbers."""
    return reason.partition(":")[0].partition(";")[0].partition(" but costs")[0]


def _counts(each: Mapping[str, Any]) -> str:
    if "spatial" not in each:
        return ""
    return f"{each['spatial']}, {each['pointwise']}, {sum(each['obstacles'].values())}"


def _found(planted: Mapping[str, Any]) -> str:
    dear = f" ({planted['dear']} would cost more)" if planted["dear"] else ""
    return f"{planted['planted']}/{planted['planted'] - len(planted['missed'])}{dear}"


def _difference(facts: Mapping[str, Any] | None, where: str) -> str:
    if facts is None or (where and not facts["converted"]):
        return ""
    return f"{facts[f'{where}difference']:.0e} ({facts[f'{where}noise']:.0e})"


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--net", "nets", multiple=True, type=click.Choice(list(NETS)), help="Only this one. Repeatable."
)
@click.option("--opset", "opsets", multiple=True, type=click.Choice(list(map(str, EXPORTERS))),
              help="Only this one. Repeatable.")  # fmt: skip
def export(folder: Path, nets: Sequence[str], opsets: Sequence[str]) -> None:
    """Write exports of nets with random weights to FOLDER; files that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in nets or NETS:
        for opset in map(int, opsets or EXPORTERS):
            path = folder / f"{name}-opset{opset}.onnx"
            if not path.exists():
                write_export(folder, name, opset)
                click.echo(path)


if __name__ == "__main__":
    cli()
