"""The int8 form of a model and of its conversions: files to deploy, to time and to score."""

import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import onnx
import torch
from onnxruntime.quantization.calibrate import TensorsData
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sepconvert.base.errors import SepconvertError
from sepconvert.base.modules import submodule, unshadowed
from sepconvert.base.options.values import Int8
from sepconvert.base.progress import Stage, stage
from sepconvert.files.onnx.graph.network import OnnxNetwork, open_network
from sepconvert.files.onnx.graph.running import Feed, with_sizes
from sepconvert.files.onnx.int8.bias import convolutions_in, with_corrected_biases
from sepconvert.files.onnx.int8.equalize import equalized, pairs_in, quieter, rotated
from sepconvert.files.onnx.int8.quantizer import (
    Number,
    measured_ranges,
    prepared,
    quantized,
    unknown_ranges,
    widest,
)
from sepconvert.files.onnx.int8.statistics import Channels, channel_statistics
from sepconvert.files.onnx.naming import Interface, interface_of
from sepconvert.files.onnx.structured import example_of, filled, onnx_feed
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.network.copies import duplicate, shared_parameters
from sepconvert.network.layers import Conv
from sepconvert.network.tensors import InputBatch, Inputs, StandIn, ordered_like

MOST_IMAGES = 256
"""Calibration images that ranges are measured on; more change them little, and take longer for every plan."""


@dataclass(frozen=True)
class QuantizationNote:
    """The way in which a model was quantized, for the report."""

    method: str  # of ranges: minmax, entropy or percentile
    images: int  # that they are measured on
    activations: str  # uint8 or int8
    weights: str  # int8, or int8 in the range of 7 bits
    opset: int
    ir_version: int


@dataclass(frozen=True)
class _Calibrated:
    """A model that is ready to be quantized, and what its values are like on the calibration images."""

    model: onnx.ModelProto
    ranges: TensorsData
    channels: Mapping[str, Channels]  # of the inputs of its convolutions


class Int8Form:
    """Makes the int8 files of one original and of what it is converted to, all in the same way.

    A model is exported and prepared by ONNX Runtime; channels between two convolutions are mixed and scaled
    so that rounding harms least; ranges are measured on the calibration images; biases are corrected for
    rounded kernels; and it is quantized.
    """

    def __init__(
        self,
        settings: Int8,
        original: nn.Module,
        inputs: Inputs,
        samples: Sequence[InputBatch],
        interface: Interface | None = None,
    ) -> None:
        """Take the calibration images, of which the first `MOST_IMAGES` are used.

        Raises:
            SepconvertError: there are none.
        """
        self._settings, self._inputs, self._original = settings, inputs, original
        self._interface = interface or interface_of(original, inputs)
        self._samples = list(_first(samples, MOST_IMAGES))
        if not self._samples:
            raise SepconvertError("`int8`: there are no calibration images to measure ranges on; pass some")
        self.number = Number.of_this_machine()
        # On disk: there may be many plans of a large model.
        self._folder = Path(mkdtemp(prefix="sepconvert-"))
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._exported: MutableMapping[nn.Module, Path] = WeakIdKeyDictionary()
        self._made: MutableMapping[nn.Module, Path] = WeakIdKeyDictionary()
        self._kept: MutableMapping[nn.Module, frozenset[str]] = WeakIdKeyDictionary()  # layers
        self._last: tuple[Path, _Calibrated] | None = None
        self._example = None if isinstance(original, OnnxNetwork) else example_of(original, inputs)

    def feed(self, inputs: Inputs) -> Feed:
        """Return inputs as the files take them."""
        return onnx_feed(self._original, ordered_like(self._inputs, inputs), self._interface)

    def keep(self, model: nn.Module, layers: frozenset[str]) -> None:
        """Let some convolutions of a model, which is not quantized yet, stay in floating point."""
        self._kept[model] = layers

    def variant(self, model: nn.Module, layers: frozenset[str]) -> nn.Module:
        """Return a copy of a model, on the same memory, of which some layers stay in floating point."""
        copy = duplicate(model, shared_parameters(model))
        self.float_model(model)
        self._exported[copy] = self._exported[model]
        self.keep(copy, layers)
        return copy

    def keepable(self, model: nn.Module, layers: Collection[str]) -> frozenset[str]:
        """Return the layers whose convolutions are known in a model's file, so that they can be kept."""
        return frozenset(nodes_of(self.float_model(model), model, layers))

    @stage(Stage.QUANTIZATION)
    def model(self, model: nn.Module) -> onnx.ModelProto:
        """Return the file of a model to deploy.

        Raises:
            ExportError: torch cannot export it.
            SepconvertError: it cannot be quantized, or an activation is constant or not finite.
        """
        if model not in self._made:
            made = self._quantized(model)
            self._made[model] = self._folder / f"{uuid.uuid4()}.onnx"
            self._made[model].write_bytes(made.SerializeToString())
        return onnx.load(str(self._made[model]))

    @stage(Stage.QUANTIZATION)
    def timed(self, model: nn.Module, *, quantize: bool = True) -> bytes:
        """Return a file as fast as the one to deploy, for inputs of one size: its ranges are not measured."""
        sized = with_sizes(self.float_model(model), self.feed(self._inputs))
        if not quantize:
            return bytes(sized.SerializeToString())
        ready = prepared(sized)
        kept = self._nodes_to_keep(ready, model)
        return bytes(quantized(ready, unknown_ranges(ready), self.number, kept).SerializeToString())

    def layer(self, content: bytes, *, in_float: bool = False) -> bytes:
        """Return the model of a layer, such as `layer_onnx` makes, in this form, for timing.

        The layer itself may stay in floating point; its surroundings do not.
        """
        model = onnx.load_model_from_string(content)
        for number, node in enumerate(model.graph.node):
            node.name = f"node_{number}"
        kept = [node.name for node in model.graph.node if in_float and node.op_type == "Conv"]
        return bytes(quantized(model, unknown_ranges(model), self.number, kept).SerializeToString())

    def module(self, model: nn.Module) -> nn.Module:
        """Return the file of a model as a module, which ONNX Runtime runs; it returns what the model does."""
        return _Deployed(self._original, open_network(self.model(model)), self._example).eval()

    def share(self, model: nn.Module, copy: nn.Module) -> None:
        """Take the files of a model for those of its copy."""
        self.model(model)
        self._exported[copy], self._made[copy] = self._exported[model], self._made[model]
        self._kept[copy] = self._kept.get(model, frozenset())

    def example(self, model: nn.Module) -> Feed:
        """Return the first calibration images as the files of a model take them."""
        return next(self._feeds(self.float_model(model)))

    def note(self, model: nn.Module) -> QuantizationNote:
        """Return how the file of a model was quantized."""
        made = self.model(model)
        opset = next(each.version for each in made.opset_import if each.domain in ("", "ai.onnx"))
        return QuantizationNote(
            self._settings.ranges,
            sum(map(len, self._samples)),
            self.number.activations,
            "int8 in the range of 7 bits" if self.number.reduced else "int8",
            opset,
            made.ir_version,
        )

    def float_model(self, model: nn.Module) -> onnx.ModelProto:
        """Return the file of a model in floating point, for any batch if it allows that."""
        if model not in self._exported:
            path = self._folder / f"{uuid.uuid4()}.onnx"
            write_onnx(model, self._inputs, path, check=False, interface=self._interface)
            self._exported[model] = path
        return onnx.load(str(self._exported[model]))

    def _quantized(self, module: nn.Module) -> onnx.ModelProto:
        found = self._calibrated(module)
        kept = self._nodes_to_keep(found.model, module)
        rough = quantized(found.model, found.ranges, self.number, kept)
        corrected = with_corrected_biases(found.model, rough, found.channels)
        return quantized(corrected, found.ranges, self.number, kept)

    def _calibrated(self, module: nn.Module) -> "_Calibrated":
        """Return what is measured of a model before it is quantized; variants of one file share it."""
        content = self.float_model(module)
        path = self._exported[module]
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        ready = prepared(content)
        between = {pair.between: len(_kernel(ready, pair.first)) for pair in pairs_in(ready)}
        if between:
            before = channel_statistics(ready, between, self._feeds(ready))
            other = rotated(ready, before)
            after = channel_statistics(other, between, self._feeds(other))
            ready = equalized(*quieter(ready, other, (before, after)))
        ranges = measured_ranges(ready, self._feeds(ready), self._settings.ranges)
        for node in convolutions_in(ready):
            if widest(ranges, node.output[0]) == 0:
                raise SepconvertError(
                    f"`int8`: the outputs of {node.input[1].removesuffix('.weight')} are the same number for "
                    "all calibration images, which gives them no range; pass images like those of deployment"
                )
        inputs = {node.input[0]: len(_kernel(ready, node)) for node in convolutions_in(ready)}
        found = _Calibrated(ready, ranges, channel_statistics(ready, inputs, self._feeds(ready)))
        self._last = path, found
        return found

    def _nodes_to_keep(self, model: onnx.ModelProto, module: nn.Module) -> list[str]:
        found = nodes_of(model, module, self._kept.get(module, frozenset()))
        return [name for names in found.values() for name in names]

    def _feeds(self, model: onnx.ModelProto) -> Iterator[Feed]:
        """Yield the calibration images in batches that a file takes."""
        axis = self._samples[0].axis
        shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
        size = next(
            (
                shapes[name][axis].dim_value
                for name, array in self.feed(self._samples[0].inputs).items()
                if array.ndim > axis and array.shape[axis] == len(self._samples[0])
            ),
            0,
        )
        if not size:
            batches: Iterable[InputBatch] = self._samples
        else:
            whole = InputBatch.joined(self._samples)
            if len(whole) < size:  # repeated, to fill the batch that the file fixes
                whole = whole[torch.arange(size) % len(whole)]
            batches = (part for part in whole.split(size) if len(part) == size)
        for batch in batches:
            yield self.feed(batch.inputs)


class _Deployed(StandIn):
    """A network that takes the arguments of another one, and returns its outputs in the structure of that."""

    def __init__(self, model: nn.Module, network: OnnxNetwork, example: Any) -> None:
        super().__init__(model)
        self.network, self.example = network, example

    def forward(self, *inputs: Tensor) -> Any:
        """Return the outputs for some inputs."""
        found = self.network(*inputs)
        if self.example is None:
            return found
        return filled(self.example, iter(found if isinstance(found, tuple) else (found,)))


def nodes_of(model: onnx.ModelProto, module: nn.Module, layers: Collection[str]) -> dict[str, list[str]]:
    """Return the names of the nodes in a file that are some layers of the module that it was made of.

    They are known by their kernels, which have the names of parameters, or, in a file that was given, by
    their outputs. A layer that is a function call is not known, and left out.
    """
    by_value = {f"{layer}.weight": layer for layer in layers}
    for layer in layers:
        part = submodule(module, layer) if layer in dict(unshadowed(module).named_modules()) else None
        if isinstance(part, Conv):
            by_value |= dict.fromkeys(part.labels, layer)
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        for value in (*node.input[1:2], *node.output):
            if node.op_type == "Conv" and value in by_value:
                found.setdefault(by_value[value], []).append(node.name)
    return found


def _kernel(model: onnx.ModelProto, node: onnx.NodeProto) -> Sequence[int]:
    """Return the shape of a convolution's kernel, which has as many dimensions as its input and output."""
    return next(tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name == node.input[1])


def _first(samples: Sequence[InputBatch], most: int) -> Iterator[InputBatch]:
    for batch in samples:
        if most <= 0:
            return
        yield batch[:most] if len(batch) > most else batch
        most -= len(batch)
