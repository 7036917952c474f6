"""Facts read from ONNX files. The oracle is arithmetic on graphs that are built by hand."""

import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.facts import onnx_sizes, read_onnx

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((8, 3, 3, 3), np.float32)
LINEAR = RNG.standard_normal((32, 5), np.float32)


def write(path, batch="N", kind=TensorProto.FLOAT, sizes=(3, 6, 4), nodes=None, constants=None):
    """A convolution, a ReLU, an addition and a matrix product on 3 × 6 × 4 inputs."""
    nodes = nodes or [
        helper.make_node("Conv", ["input", "weight"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "linear"], ["output"]),
    ]
    constants = {"weight": WEIGHT, "linear": np.vstack([LINEAR, LINEAR])} if constants is None else constants
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", kind, [batch, *sizes])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_costs_are_those_of_one_sample_and_memory_that_of_a_batch(tmp_path, batch):
    path = write(tmp_path / "m.onnx", batch)
    found = read_onnx(path)
    assert found.shapes == ((None if batch == "N" else batch, 3, 6, 4),)
    assert found.dtypes == (np.dtype(np.float32),)
    assert found.macs == (4 * 2) * 8 * 27 + 64 * 5
    assert found.params == WEIGHT.size + 2 * LINEAR.size
    assert found.uncounted_ops == {"Relu": 1, "Add": 1, "Flatten": 1}
    # a, b and c, each 8 × 4 × 2, are alive while the addition runs; the input, 3 × 6 × 4, is smaller.
    assert found.peak_activation_bytes == 3 * 64 * 4 * (1 if batch == "N" else batch)
    assert found.sizes == onnx_sizes(path) == (path.stat().st_size, 4 * found.params)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_transposed_convolutions_and_products(tmp_path):
    nodes = [
        helper.make_node("ConvTranspose", ["input", "weight"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Gemm", ["linear", "b"], ["output"], transA=1, transB=1),
    ]
    constants = {
        "weight": RNG.standard_normal((3, 2, 3, 3), np.float32),
        "linear": RNG.standard_normal((2 * 8 * 6, 5), np.float32),
    }
    found = read_onnx(write(tmp_path / "m.onnx", 1, nodes=nodes, constants=constants))
    assert found.macs == (3 * 6 * 4) * (2 * 9) + 5 * 96
    assert found.uncounted_ops == {"Flatten": 1}


def test_what_cannot_be_inferred_is_not_counted(tmp_path):
    nodes = [
        helper.make_node("Unknown", ["input"], ["a"], domain="elsewhere"),
        helper.make_node("Conv", ["a", "weight"], ["output"], kernel_shape=[3, 3]),
    ]
    found = read_onnx(write(tmp_path / "m.onnx", nodes=nodes, constants={"weight": WEIGHT}))
    assert (found.macs, found.peak_activation_bytes) == (0, None)
    assert found.uncounted_ops == {"Unknown": 1, "Conv": 1}


def test_weights_beside_the_file_count(tmp_path):
    model = onnx.load(str(write(tmp_path / "m.onnx")))
    onnx.save(
        model, str(tmp_path / "n.onnx"), save_as_external_data=True, location="n.data", size_threshold=0
    )
    total, weights = onnx_sizes(tmp_path / "n.onnx")
    assert total == sum((tmp_path / name).stat().st_size for name in ("n.onnx", "n.data"))
    assert weights == onnx_sizes(tmp_path / "m.onnx")[1]


def test_what_is_refused(tmp_path):
    def refused(match, path):
        with pytest.raises(SepconvertError, match=match) as error:
            read_onnx(path)
        assert "\n" not in str(error.value)

    refused("cannot be read: No such file", tmp_path / "gone.onnx")
    refused("is no regular file", tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    refused("not an ONNX model", tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"")
    refused("it has no operators", tmp_path / "m.onnx")
    refused("its input input is no tensor of numbers", write(tmp_path / "m.onnx", kind=TensorProto.STRING))
    for sizes in ((3, 2**20, 2**20), (3, -1, 4)):
        refused("of more than .* elements", write(tmp_path / "m.onnx", sizes=sizes))
