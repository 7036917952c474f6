"""ONNX models run by ONNX Runtime as they are, for their answers and for the shapes of their values."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime as ort

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.network.tensors import Inputs, tensors_in

Feed = dict[str, npt.NDArray[Any]]
"""Arrays by name of the input."""


def feed_by_name(names: Sequence[str], inputs: Inputs) -> Feed:
    """Return the tensors among inputs as arrays by name, as ONNX Runtime takes them."""
    arrays = (tensor.detach().cpu().contiguous().numpy() for tensor in tensors_in(inputs))
    return dict(zip(names, arrays, strict=True))


def opened(
    model: onnx.ModelProto, *, optimised: bool = True, spinning: bool = True, threads: int = 0
) -> ort.InferenceSession:
    """Return a session of ONNX Runtime on the CPU, whose threads may wait for work by `spinning`.

    0 `threads` are as many as there are cores.

    Raises:
        SepconvertError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(
            # Without its fallback to other providers, which it prints.
            model.SerializeToString(),
            options,
            ["CPUExecutionProvider"],
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise SepconvertError(
            f"ONNX Runtime cannot load the model: {first_line(error)}; see whether it runs there by itself"
        ) from error


def answers(model: onnx.ModelProto, feed: Feed, *, optimised: bool = True) -> list[npt.NDArray[Any]]:
    """Return the outputs of a model.

    Raises:
        SepconvertError: ONNX Runtime cannot load it, or run it on these inputs.
    """
    session = opened(model, optimised=optimised)
    try:
        found: list[npt.NDArray[Any]] = session.run(None, feed)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise SepconvertError(
            f"ONNX Runtime cannot run the model on these inputs: {' '.join(str(error).split())}; check their "
            "shapes and dtypes"
        ) from error
    return found


def shapes_of(model: onnx.ModelProto, feed: Feed, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that values have when the model runs: exact, whatever is open in the file.

    Raises:
        SepconvertError: ONNX Runtime cannot load the model, or run it on these inputs.
    """
    wanted = sorted(names)
    if not wanted:
        return {}
    asking = onnx.ModelProto()
    asking.CopyFrom(model)
    del asking.graph.output[:]
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for number, name in enumerate(wanted):
        output = f"sepconvert.shape.{number}"
        while output in taken:
            output += "_"
        asking.graph.node.append(onnx.helper.make_node("Shape", [name], [output]))
        asking.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT64, None))
    found = answers(asking, feed, optimised=False)
    return {name: tuple(map(int, shape)) for name, shape in zip(wanted, found, strict=True)}


def with_sizes(model: onnx.ModelProto, feed: Feed) -> onnx.ModelProto:
    """Return a model whose inputs have the sizes of some arrays."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]  # which have the open sizes
    for value in fixed.graph.input:
        if value.name in feed:
            shape = feed[value.name].shape
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    return fixed
