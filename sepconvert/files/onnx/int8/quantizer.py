"""ONNX Runtime's static quantizer: ranges of values, and the model in the form QDQ."""

import contextlib
import copy
import io
import logging
import math
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from sepconvert.base.environment import instruction_sets
from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.options.values import RangeMethod
from sepconvert.files.onnx.graph.protobuf import nodes_in
from sepconvert.files.onnx.graph.running import Feed, opened

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


_QUANTIZED = re.compile("Quantize|Integer|^QLinear|^QGemm|^QAttention")  # names of operators


_OPSET = 13  # the first in which weights have a scale for each channel


_CONTRIBUTED = "com.microsoft"  # domain of ONNX Runtime's own operators


_IR_VERSION = 4  # the first in which constants need not be inputs, too


@dataclass(frozen=True)
class Number:
    """The integers that a processor multiplies fast, without overflow.

    Weights are symmetric int8 in any case, with a scale for each output channel.

    Attributes:
        activations: "uint8" on x86, whose instructions multiply unsigned by signed bytes; else "int8". In
            ONNX Runtime 1.32 a ResNet-20 takes 2.7 times as long with signed activations on x86.
        reduced: whether weights keep to 7 bits. Without VNNI, x86 adds two products in 16 bits, which
            saturate.
    """

    activations: str
    reduced: bool

    @property
    def levels(self) -> int:
        """Steps of a weight on either side of 0."""
        return 64 if self.reduced else 127

    @classmethod
    def of_this_machine(cls) -> "Number":
        """Return those of the processor that this runs on."""
        return cls.of(instruction_sets())

    @classmethod
    def of(cls, sets: Collection[str]) -> "Number":
        """Return those of a processor with these instruction sets, as `environment` names them."""
        if "NEON" in sets:
            return cls("int8", reduced=False)
        return cls("uint8", reduced=not any("VNNI" in each or each == "AMX" for each in sets))


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model after ONNX Runtime's preparation: BatchNorms folded, constants computed, shapes known.

    Raises:
        SepconvertError: it cannot be prepared, or it is quantized already.
    """
    if any(_QUANTIZED.search(node.op_type) for node in model.graph.node):
        raise SepconvertError("`int8`: the model is quantized already; pass it in floating point")
    with _quiet("prepare"), tempfile.TemporaryDirectory() as folder:
        given, path = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, str(given))
        # Shapes that depend on symbols belong to transformers; ONNX's own inference does for convolutions.
        quant_pre_process(str(given), str(path), skip_symbolic_shape=True)
        found = onnx.load(str(path))
        versions = [each for each in found.opset_import if each.domain in ("", "ai.onnx")]
        if versions and versions[0].version < _OPSET:
            found = onnx.shape_inference.infer_shapes(onnx.version_converter.convert_version(found, _OPSET))
    found.ir_version = max(found.ir_version, _IR_VERSION)
    return found


def measured_ranges(model: onnx.ModelProto, feeds: Iterable[Feed], method: RangeMethod) -> TensorsData:
    """Return the range of each value over some inputs.

    Args:
        model: from `prepared`.
        feeds: batches of inputs.
        method: "minmax", "entropy" or "percentile", as in ONNX Runtime.

    Raises:
        SepconvertError: the model cannot run on the inputs, there are none, or a value is NaN or Inf.
    """
    session = opened(model, spinning=False)
    with _quiet("calibrate"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=_METHODS[method],
        )
        for feed in feeds:  # one by one, as the calibrator keeps all values of what it reads in one go
            calibrator.collect_data(_Reader(feed))
            # The calibrators skip NaN, which goes on to the outputs.
            if not all(
                np.isfinite(output).all() for output in session.run(None, feed) if output.dtype.kind == "f"
            ):
                raise SepconvertError(
                    "`int8`: outputs are NaN or Inf for some calibration images; check images and model"
                )
        found = calibrator.compute_data()
    if found is None:
        raise SepconvertError("`int8`: there are no calibration images to measure ranges on; pass some")
    for name in found:
        if not all(np.isfinite(end).all() for end in found[name].range_value):
            raise SepconvertError(
                f"`int8`: {name} is NaN or Inf for some calibration images; check the images and the model"
            )
    return found


def unknown_ranges(model: onnx.ModelProto) -> TensorsData:
    """Return a range of 1 for every value of a model: it runs as fast as with the right ones."""
    names = [value.name for value in model.graph.input]
    names += [name for node in model.graph.node for name in node.output if name]
    one = np.array(1, np.float32)
    return TensorsData(CalibrationMethod.MinMax, dict.fromkeys(names, TensorData(lowest=-one, highest=one)))


def quantized(
    model: onnx.ModelProto, ranges: TensorsData, number: Number, kept: Collection[str] = ()
) -> onnx.ModelProto:
    """Return a model with QuantizeLinear and DequantizeLinear around its operators, weights as integers.

    Args:
        model: from `prepared`; left as it is.
        ranges: of its values.
        number: the kind of integers.
        kept: names of convolutions that stay in floating point.

    Raises:
        SepconvertError: the quantizer fails.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    activations = QuantType.QUInt8 if number.activations == "uint8" else QuantType.QInt8
    with _quiet("quantize"):
        quantizer = QDQQuantizer(
            own, True, number.reduced, QuantType.QInt8, activations, copy.deepcopy(ranges), [], list(kept),
            sorted({*QLinearOpsRegistry, *QDQRegistry}), {},
        )  # fmt: skip
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        found: onnx.ModelProto = quantizer.model.model
    domains = {"ai.onnx" if node.domain == "" else node.domain for node in nodes_in(found.graph.node)}
    needed = [each for each in found.opset_import if (each.domain or "ai.onnx") in domains or found.functions]
    del found.opset_import[:]
    found.opset_import.extend(needed)
    for node in found.graph.node:
        if node.name in kept and node.op_type == "Conv":
            # Of a Conv between integers, ONNX Runtime would round the kernel after all. This is the same.
            node.op_type, node.domain = "FusedConv", _CONTRIBUTED
            if all(each.domain != _CONTRIBUTED for each in found.opset_import):
                found.opset_import.append(onnx.helper.make_opsetid(_CONTRIBUTED, 1))
    return found


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Reads one batch."""

    def __init__(self, feed: Feed) -> None:
        self._waiting: list[Feed] = [feed]

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the batch once, and then None."""
        return self._waiting.pop() if self._waiting else None


@contextlib.contextmanager
def _quiet(step: str) -> Iterator[None]:
    """Keep the quantizer's warnings to ourselves within the block, and turn its errors into ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except SepconvertError:
        raise
    except Exception as error:  # the quantizer raises errors of many kinds
        raise SepconvertError(
            f"`int8`: ONNX Runtime's quantizer cannot {step} the model ({type(error).__name__}: "
            f"{first_line(error)}); convert it without `int8`, or report that to ONNX Runtime"
        ) from error
    finally:
        logging.disable(before)


def widest(ranges: TensorsData, name: str) -> float:
    """Return the distance between the ends of a value's range; NaN where there is none."""
    if name not in ranges:
        return math.nan
    low, high = ranges[name].range_value
    return float(np.max(high) - np.min(low))
