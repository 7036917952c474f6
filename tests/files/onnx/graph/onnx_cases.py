"""Small ONNX models, and what judges a conversion of them: ONNX Runtime, and the bytes of the messages."""

import contextlib
import shutil
import traceback
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import sepconvert
from sepconvert.pipeline import convert as pipeline

FLOAT = TensorProto.FLOAT


def values(*shape, seed=0, dtype=np.float32):
    """Random numbers of unit variance."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def kernel(*shape, seed=0, dtype=np.float32):
    """A dense kernel O × C/g × kh × kw of no structure, which keeps the variance."""
    return (values(*shape, seed=seed, dtype=np.float64) / np.sqrt(np.prod(shape[1:]))).astype(dtype)


def separable(outputs, inputs, height=3, width=3, *, seed=0, groups=1, dtype=np.float32):
    """W[o,c,i,j] = V[c,i] H[o,j] within a group: rank 1 of "spatial-vh". `inputs` are those of a group."""
    return composed(*vertical_horizontal(outputs, inputs, height, width, seed, groups), groups).astype(dtype)


def vertical_horizontal(outputs, inputs, height=3, width=3, seed=0, groups=1):
    """The two factors of `separable`: g × C/g × kh × 1 and O × 1 × 1 × kw."""
    vertical = values(groups, inputs, height, 1, seed=seed, dtype=np.float64)
    horizontal = values(outputs, 1, 1, width, seed=seed + 1, dtype=np.float64)
    return vertical / np.sqrt(inputs * height), horizontal / np.sqrt(width)


def composed(vertical, horizontal, groups=1):
    """The kernel of two factors, of which each group has one row."""
    outputs = horizontal.reshape(groups, -1, horizontal.shape[3])
    return np.einsum("gci,goj->gocij", vertical[..., 0], outputs).reshape(
        -1, vertical.shape[1], vertical.shape[2], outputs.shape[2]
    )


def two_branches(outputs, inputs, size=5, seed=0):
    """Depthwise kernels C·2 × 1 × k × k and pointwise ones O × C·2 × 1 × 1, and the kernel that they make."""
    depthwise = values(inputs, 2, size, size, seed=seed, dtype=np.float64) / size
    pointwise = values(outputs, inputs, 2, seed=seed + 1, dtype=np.float64) / np.sqrt(inputs)
    dense = np.einsum("ocm,cmij->ocij", pointwise, depthwise)
    return depthwise.reshape(-1, 1, size, size), pointwise.reshape(outputs, -1, 1, 1), dense


def sparse_rows(outputs, inputs, *, seed=0, border=((1, 0), (0, 2)), size=5, dtype=np.float32):
    """A kernel of no structure but a border of zeros: ((top, bottom), (left, right))."""
    (top, bottom), (left, right) = border
    inner = kernel(outputs, inputs, size - top - bottom, size - left - right, seed=seed, dtype=dtype)
    return np.pad(inner, ((0, 0), (0, 0), *border))


def value_of(name, *shape, kind=FLOAT):
    """The type of an input or output; names stand for open sizes."""
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind, inputs, outputs, **attributes):
    """A node; inputs and outputs are names, parted by blanks."""
    return helper.make_node(kind, inputs.split(" "), outputs.split(" "), **attributes)


def conv(inputs="x w", outputs="y", **attributes):
    """A Conv named after its output, unless it has a name."""
    return node("Conv", inputs, outputs, **{"name": outputs, **attributes})


def model_of(nodes, weights=(), *, inputs=None, outputs=("y",), opset=17, ir=8, defaults=(), **fields):
    """A model of nodes in a row.

    Args:
        nodes: the nodes.
        weights: arrays by name.
        inputs: their types; by default one picture of 4 channels, of an open batch.
        outputs: types, or names, whose types are inferred.
        opset: version of the operators, or versions by domain.
        ir: version of the format.
        defaults: names of the weights that are inputs, too; of IR 3, all are.
        fields: of the model.
    """
    weights = dict(weights)
    inputs = [value_of("x", "batch", 4, 9, 10)] if inputs is None else list(inputs)
    listed = weights if ir < 4 else defaults
    inputs += [
        value_of(name, *weights[name].shape, kind=helper.np_dtype_to_tensor_dtype(weights[name].dtype))
        for name in listed
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [
            helper.make_tensor_value_info(each, FLOAT, None) if isinstance(each, str) else each
            for each in outputs
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    versions = {"": opset} if isinstance(opset, int) else opset
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir, producer_name="tests", **fields)
    if model.functions:  # onnx 1.18 does not come back from one that calls itself
        return model
    with contextlib.suppress(onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        inferred = onnx.shape_inference.infer_shapes(model)
        for mine, known in zip(model.graph.output, inferred.graph.output, strict=True):
            mine.CopyFrom(known)
    return model


def one_conv(weight, *, shape=None, bias=None, kind=FLOAT, opset=17, ir=8, defaults=(), **attributes):
    """A model of one Conv named `conv`, of `x` of the shape N × C × H × W, to `y`."""
    groups = attributes.get("group", 1)
    shape = shape or ("batch", weight.shape[1] * groups, 9, 10)
    weights = {"w": weight} if bias is None else {"w": weight, "b": bias}
    return model_of(
        [conv(" ".join(["x", *weights]), name="conv", **attributes)],
        weights,
        inputs=[value_of("x", *shape, kind=kind)],
        outputs=[value_of("y", *["a", "b", "c", "d"], kind=kind)],
        opset=opset,
        ir=ir,
        defaults=defaults,
    )


def feed_of(model, batch=2, seed=0):
    """Random arrays for the inputs that have no default; open sizes are the batch where first, else 9."""
    weights = {each.name for each in model.graph.initializer}
    feed = {}
    for number, each in enumerate(each for each in model.graph.input if each.name not in weights):
        kind = each.type.tensor_type
        shape = [size.dim_value or (9 if place else batch) for place, size in enumerate(kind.shape.dim)]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        scale = 1 if np.issubdtype(dtype, np.floating) else 20
        drawn = np.asarray(values(*shape, seed=seed + number, dtype=np.float64) * scale)
        feed[each.name] = np.asarray(drawn > 0 if dtype.kind == "b" else drawn.astype(dtype))
    return feed


def run(model, feed, *, optimised=True):
    """What ONNX Runtime makes of a model, or of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"]).run(None, feed)


def outputs_of(network, feed):
    """What a network returns for the same, as arrays."""
    with torch.no_grad():
        found = network(*(torch.from_numpy(np.asarray(value)) for value in feed.values()))
    return [each.numpy() for each in ([found] if isinstance(found, torch.Tensor) else found)]


def assert_close(actual, expected, tolerance=2e-5):
    """Compare outputs in dtype, shape and values, these relative to the largest of the output."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if other.size:
            scale = float(np.abs(other.astype(np.float64)).max()) or 1.0
            np.testing.assert_allclose(
                one.astype(np.float64), other.astype(np.float64), rtol=0, atol=tolerance * scale
            )


def assert_all_else_is_kept(original, converted, *, nodes=(), weights=()):
    """Hold a converted model against the original, byte by byte and in order.

    Args:
        original: the user's.
        converted: the edited one.
        nodes: outputs of the nodes that must be gone or are replaced.
        weights: names of the initializers that must be gone.
    """
    before, after = original.graph, converted.graph
    assert _without_graph(converted) == _without_graph(original)
    made = {name for each in after.node for name in each.output}
    known = made | {_name(each) for each in (*after.initializer, *after.sparse_initializer, *after.input)}
    gone = {*nodes, *weights} - known
    assert not {*weights} & known
    others = {name for each in before.node for name in each.output} - {*nodes}
    kept = [each.SerializeToString() for each in before.node if not {*nodes} & {*each.output}]
    assert [each.SerializeToString() for each in after.node if others & {*each.output}] == kept
    assert not [each for each in before.node if {*nodes} & {*each.output} and each in after.node]
    assert nodes or len(after.node) == len(before.node)
    for field in ("initializer", "input", "value_info", "quantization_annotation", "sparse_initializer"):
        ours = [each.SerializeToString() for each in getattr(before, field) if _name(each) not in gone]
        theirs = [each.SerializeToString() for each in getattr(after, field)]
        added = theirs[len(ours) :]
        assert theirs[: len(ours)] == ours, field
        assert not added or field == "initializer" or (field == "input" and converted.ir_version < 4), field
    assert {each.name for each in after.value_info} <= known
    for field in ("name", "doc_string"):
        assert getattr(before, field) == getattr(after, field)
    for field in ("output", "metadata_props"):
        assert list(getattr(before, field)) == list(getattr(after, field))


def _without_graph(model):
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    return rest.SerializeToString()


def _name(message):
    if isinstance(message, onnx.SparseTensorProto):
        return message.values.name
    return message.tensor_name if isinstance(message, onnx.TensorAnnotation) else message.name


def saved_apart(model, path, location="weights.bin"):
    """Save a model with all weights in one file beside it, whose folder is made."""
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    content = b""
    for tensor in copied.graph.initializer:
        data = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": len(content), "length": len(data)}.items():
            tensor.external_data.add(key=key, value=str(value))
        content += data
    (path.parent / location).write_bytes(content)
    path.write_bytes(copied.SerializeToString())
    return path


def mutated(content, seed):
    """A file with one or two bytes exchanged, left out, put in, or cut off at the end."""
    random = np.random.default_rng(seed)
    changed = bytearray(content)
    for _ in range(random.integers(1, 3)):
        place, kind = int(random.integers(len(changed))), int(random.integers(8))
        if kind < 5:
            changed[place] = (
                int(random.integers(256)) if kind < 3 else changed[place] ^ 1 << int(random.integers(8))
            )
        elif kind == 5:
            del changed[place]
        elif kind == 6:
            changed.insert(place, int(random.integers(256)))
        elif seed % 4 == 0:
            del changed[max(place, 1) :]
    return bytes(changed)


def judge_mutations(folder, count):
    """Convert mutated files, one after the other, and print each outcome: a crash leaves lines missing.

    Reports are left out: they take most of the time, and say nothing of the files.
    """
    pipeline.write_documents = lambda *arguments: None
    contents = [each.SerializeToString() for each in mutable()]
    for number in range(count):
        given, out = folder / f"{number}.onnx", folder / f"out-{number}"
        given.write_bytes(mutated(contents[number % len(contents)], number))
        print(number, end=" ", flush=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sepconvert.convert(given, timing=sepconvert.Timing(runs=0), out=out)
            outcome = "success"
        except sepconvert.SepconvertError as error:
            outcome = "refused"
            if "\n" in str(error):
                outcome = f"several lines: {error!r}"
            if out.exists() and list(out.iterdir()):
                outcome = f"left {[each.name for each in out.iterdir()]} behind"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = [each for each in frames if "sepconvert" in each.filename][-1]
            outcome = f"{type(error).__name__}: {str(error)[:80]!r} at {place.filename}:{place.lineno}"
        print(outcome.replace("\n", " "), flush=True)
        shutil.rmtree(out, ignore_errors=True)


def mutable():
    """Two files of few bytes, in which most are structure."""
    weight = separable(2, 2, 2, 2)
    whole = model_of(
        [
            helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(weight)),
            node("Identity", "v", "w"),
            conv("x w b", "c", pads=[1, 0, 1, 0], strides=[2, 1], group=1, dilations=[1, 1]),
            node("BatchNormalization", "c b b b b", "n"),
            node("Relu", "n", "y"),
        ],
        {"b": np.ones(2, np.float32)},
        inputs=[value_of("x", "batch", 2, 5, 5)],
    )
    other = model_of(
        [conv("x w", "c", auto_pad="SAME_UPPER", group=2), node("Reshape", "c shape", "y")],
        {"w": kernel(2, 1, 2, 2), "shape": np.array([1, -1])},
        inputs=[value_of("x", 1, 2, 4, 4)],
        outputs=[value_of("y", 1, 32)],
        ir=3,
        opset=9,
    )
    return whole, other
