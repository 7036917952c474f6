"""Files that are damaged or hostile are refused in one line, and nothing is written; messages are walked."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from files.onnx.graph.onnx_cases import (
    FLOAT,
    assert_close,
    conv,
    feed_of,
    kernel,
    model_of,
    node,
    one_conv,
    run,
    saved_apart,
    separable,
    value_of,
    values,
)
from onnx import TensorProto, helper, numpy_helper

import sepconvert
from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.graph.network import open_network
from sepconvert.files.onnx.graph.protobuf import (
    attribute,
    external_files,
    extracted,
    graphs_of,
    inputs_of,
    nodes_in,
    parsed,
    read_content,
    reads,
    tensors_of,
    with_data,
)

TESTS = Path(__file__).parents[3]
W = separable(8, 4)
CONTENT = one_conv(W).SerializeToString()


def edited(edit, model=None):
    """A model after an edit, as bytes."""
    model = one_conv(W) if model is None else model
    edit(model)
    return model.SerializeToString()


def weighted(weight, **attributes):
    """A Conv of 4 channels with a tensor as its weight, whatever that is."""
    model = model_of([conv(**attributes)], inputs=[value_of("x", 1, 4, 9, 10)])
    model.graph.initializer.append(weight)
    return model.SerializeToString()


def huge(*shape, **data):
    return weighted(TensorProto(name="w", data_type=FLOAT, dims=shape, **data))


def without_data():
    tensor = numpy_helper.from_array(W, "w")
    tensor.ClearField("raw_data")
    return weighted(tensor)


def cyclic():
    nodes = [node("Add", "x b", "a"), conv("a w", "c"), node("Relu", "c", "b"), node("Neg", "c", "y")]
    return model_of(nodes, {"w": kernel(4, 4, 1, 1)}).SerializeToString()


def cyclic_weight():
    nodes = [node("Identity", "b", "a"), node("Identity", "a", "b"), conv("x a", "y")]
    return model_of(nodes).SerializeToString()


def calls_itself(*names):
    """Functions of which each calls the next, and the last the first."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function(
            "own", name, ["a"], ["b"], [node(names[place - 1], "a", "b", domain="own")], imports
        )
        for place, name in enumerate(names)
    ]
    call = node(names[0], "x", "y", domain="own")
    return model_of([call], opset={"": 17, "own": 1}, functions=functions).SerializeToString()


def computed_weight(*nodes, **weights):
    return model_of([*nodes, conv()], weights).SerializeToString()


HOSTILE = {
    "empty": b"",
    "truncated": CONTENT[: len(CONTENT) // 2],
    "truncated by a byte": CONTENT[:-1],
    "text": b"not a model\nat all\n",
    "a zip": b"PK\x03\x04" + bytes(60),
    "zeros": bytes(500),
    "no nodes": edited(lambda model: model.graph.ClearField("node")),
    "no graph": edited(lambda model: model.ClearField("graph")),
    "no outputs": edited(lambda model: model.graph.ClearField("output")),
    "no input": edited(lambda model: model.graph.ClearField("input")),
    "an input without a type": edited(lambda model: model.graph.input[0].ClearField("type")),
    "cycle": cyclic(),
    "a cycle of weights": cyclic_weight(),
    "missing opset": edited(lambda model: model.ClearField("opset_import")),
    "future opset": edited(lambda model: setattr(model.opset_import[0], "version", 2**40)),
    "negative opset": edited(lambda model: setattr(model.opset_import[0], "version", -1)),
    "future format": edited(lambda model: setattr(model, "ir_version", 2**40)),
    "no weight": edited(lambda model: model.graph.ClearField("initializer")),
    "a Conv of one input": edited(lambda model: model.graph.node[0].input.pop()),
    "a Conv of no input": edited(lambda model: model.graph.node[0].ClearField("input")),
    "a Conv of no output": edited(lambda model: model.graph.node[0].ClearField("output")),
    "a Conv of an empty weight's name": edited(lambda model: model.graph.node[0].input.__setitem__(1, "")),
    "an operator that is no text": CONTENT.replace(b"\x22\x04Conv", b"\x22\x04Con\xff"),
    "an auto_pad that is no text": one_conv(W, auto_pad="VALID")
    .SerializeToString()
    .replace(b"VALID", b"VALI\xff"),
    "strides of no type": edited(
        lambda model: model.graph.node[0].attribute.add(name="strides", ints=[1, 1])
    ),
    "a group of no value": edited(lambda model: model.graph.node[0].attribute.add(name="group", type=2)),
    "a weight's name that is no text": CONTENT.replace(b"\x01w", b"\x01\xff"),
    "an output's name that is no text": CONTENT.replace(b"\x01y", b"\x01\xff"),
    "channels that do not match": weighted(numpy_helper.from_array(kernel(8, 3, 3, 3), "w")),
    "groups that do not divide": weighted(numpy_helper.from_array(kernel(8, 4, 3, 3), "w"), group=3),
    "no groups": weighted(numpy_helper.from_array(kernel(8, 4, 3, 3), "w"), group=0),
    "negative groups": weighted(numpy_helper.from_array(kernel(8, 4, 3, 3), "w"), group=-1),
    "a kernel larger than the picture": weighted(numpy_helper.from_array(kernel(8, 4, 11, 11), "w")),
    "a kernel of no size": weighted(numpy_helper.from_array(np.zeros((8, 4, 0, 3), np.float32), "w")),
    "a kernel of two dimensions": weighted(numpy_helper.from_array(kernel(8, 4), "w")),
    "a kernel that is a number": weighted(numpy_helper.from_array(np.float32(1), "w")),
    "a kernel of text": weighted(numpy_helper.from_array(np.array(["a"], object), "w")),
    "a kernel of an unknown type": weighted(TensorProto(name="w", data_type=99, dims=[1], raw_data=b"1234")),
    "kernel_shape": weighted(numpy_helper.from_array(W, "w"), kernel_shape=[5, 5]),
    "kernel_shape of three": weighted(numpy_helper.from_array(W, "w"), kernel_shape=[3, 3, 3]),
    "pads of two": weighted(numpy_helper.from_array(W, "w"), pads=[1, 1]),
    "negative pads": weighted(numpy_helper.from_array(W, "w"), pads=[-1, 0, -1, 0]),
    "pads beyond all": weighted(numpy_helper.from_array(W, "w"), pads=[2**40] * 4),
    "pads beyond 64 bits": weighted(numpy_helper.from_array(W, "w"), pads=[2**62] * 4),
    "no stride": weighted(numpy_helper.from_array(W, "w"), strides=[0, 1]),
    "negative stride": weighted(numpy_helper.from_array(W, "w"), strides=[-1, 1]),
    "strides of one": weighted(numpy_helper.from_array(W, "w"), strides=[2]),
    "dilation beyond all": weighted(numpy_helper.from_array(W, "w"), dilations=[2**40, 1]),
    "no dilation": weighted(numpy_helper.from_array(W, "w"), dilations=[0, 1]),
    "auto_pad": weighted(numpy_helper.from_array(W, "w"), auto_pad="SAME"),
    "auto_pad that is a number": weighted(numpy_helper.from_array(W, "w"), auto_pad=3),
    "strides that are text": weighted(numpy_helper.from_array(W, "w"), strides="two"),
    "dilated SAME": weighted(numpy_helper.from_array(W, "w"), auto_pad="SAME_UPPER", dilations=[2, 2]),
    "a bias of another size": model_of([conv("x w b")], {"w": W, "b": values(3)}).SerializeToString(),
    "a bias of two dimensions": model_of([conv("x w b")], {"w": W, "b": values(8, 1)}).SerializeToString(),
    "a weight without data": without_data(),
    "a weight of 2^40 numbers": huge(2**40),
    "a weight of 2^40 channels": huge(2**40, 4, 3, 3),
    "a weight of 2^160 numbers": huge(2**40, 2**40, 2**40, 2**40, float_data=[1.0]),
    "a weight of a negative size": huge(-1, 4, 3, 3, float_data=values(8 * 36)),
    "a picture of 2^40": edited(
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[3], "dim_value", 2**40)
    ),
    "a batch of 2^40": edited(
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2**40)
    ),
    "a negative picture": edited(
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[3], "dim_value", -4)
    ),
    "a computed weight of 2^42": computed_weight(
        node("ConstantOfShape", "s", "w"), s=np.array([2**40, 4, 3, 3])
    ),
    "a computed weight that fails": computed_weight(
        node("Reshape", "v s", "w"), v=W.ravel(), s=np.array([7, 4, 3, 3])
    ),
    "a computed weight of no operator": computed_weight(node("Nothing", "v", "w"), v=W),
    "a function that calls itself": calls_itself("Own"),
    "functions that call each other": calls_itself("First", "Second", "Third"),
}


def assert_refused(path):
    """Convert a file, to be refused in one line, and with nothing written."""
    before = {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()}
    with pytest.raises(SepconvertError) as caught:
        sepconvert.convert(path, timing=sepconvert.Timing(runs=0), out=path.parent / "out")
    assert "\n" not in str(caught.value)
    assert not list(path.parent.glob("out/*"))
    after = {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()}
    assert after == before
    return str(caught.value)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("name", ["empty", "text", "zeros", "no nodes", "no graph"])
def test_what_is_no_model_is_said_to_be_none(name, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(HOSTILE[name])
    assert "not an ONNX model" in assert_refused(path)


@pytest.mark.parametrize("name", [name for name in HOSTILE if "no graph" in name or "no nodes" in name])
def test_models_in_memory_are_refused_too(name):
    with pytest.raises(SepconvertError):
        open_network(onnx.ModelProto.FromString(HOSTILE[name]))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SepconvertError, match=r"none\.onnx"):
        open_network(tmp_path / "none.onnx")
    with pytest.raises(SepconvertError, match=r"none\.onnx"):
        sepconvert.convert(tmp_path / "none.onnx")


def test_a_folder_and_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path, tmp_path / "pipe.onnx"):
        with pytest.raises(SepconvertError, match="no regular file"):
            read_content(path)


def located(location, tmp_path, **entries):
    """A file in a folder of its own that names data at a location, and a secret outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    data = W.tobytes()
    (tmp_path / "secret").write_bytes(data)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_bytes(data)
    tensor = TensorProto(name="w", data_type=FLOAT, dims=W.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(weighted(tensor))
    return path


LOCATIONS = {
    "above": "../secret",
    "far above": "../../../../../../../../etc/passwd",
    "above, in a detour": "sub/../../secret",
    "absolute": "/etc/passwd",
    "missing": "none.bin",
    "the folder": ".",
    "empty": "",
    "of no file": "a\0b",
    "too long": "a" * 5000,
    "the home": "~/secret",
    "windows": "..\\secret",
    "a URL": "file:///etc/passwd",
}


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS)
def test_data_at_other_places_are_not_read(location, tmp_path):
    path = located(location, tmp_path)
    (path.parent / "sub").mkdir()
    message = assert_refused(path)
    assert "data" in message


def test_an_absolute_path_into_the_folder_itself(tmp_path):
    path = located(str(tmp_path / "model" / "weights.bin"), tmp_path)
    (path.parent / "weights.bin").write_bytes(W.tobytes())
    assert "outside its own folder" in assert_refused(path)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../elsewhere/secret"])
def test_links_that_lead_out_of_the_folder(target, tmp_path):
    path = located("link.bin", tmp_path)
    (path.parent / "link.bin").symlink_to(target)
    assert "outside its own folder" in assert_refused(path)


def test_a_folder_that_is_a_link_out(tmp_path):
    path = located("sub/secret", tmp_path)
    (path.parent / "sub").symlink_to(tmp_path / "elsewhere")
    assert "outside its own folder" in assert_refused(path)


def test_a_loop_of_links(tmp_path):
    path = located("a.bin", tmp_path)
    (path.parent / "a.bin").symlink_to("b.bin")
    (path.parent / "b.bin").symlink_to("a.bin")
    assert_refused(path)


def test_two_locations_of_one_tensor(tmp_path):
    """Readers may go by the first or by the last."""
    path = located("weights.bin", tmp_path)
    (path.parent / "weights.bin").write_bytes(W.tobytes())
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data.add(key="location", value="../secret")
    path.write_bytes(model.SerializeToString())
    assert "outside its own folder" in assert_refused(path)


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "-8"}, {"offset": "much"}, {"offset": str(2**70)}, {"length": "-1"}, {"length": "7"},
        {"offset": "4"}, {"length": str(2**40)}, {"location": None},
    ],
    ids=str,
)  # fmt: skip
def test_places_in_external_data_that_are_wrong(entries, tmp_path):
    path = located(
        "weights.bin", tmp_path, **{key: value for key, value in entries.items() if key != "location"}
    )
    if "location" in entries:
        model = onnx.load(path, load_external_data=False)
        del model.graph.initializer[0].external_data[:]
        path.write_bytes(model.SerializeToString())
    (path.parent / "weights.bin").write_bytes(W.tobytes())
    assert_refused(path)


def test_data_outside_named_by_a_constant_a_body_and_a_function(tmp_path):
    """Wherever a tensor may stand."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=W.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    body = helper.make_graph(
        [constant, conv("x w", "a")], "body", [], [helper.make_tensor_value_info("a", FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Neg", "x", "b")], "other", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    inputs = [value_of("x", 1, 4, 9, 10), value_of("on", kind=TensorProto.BOOL)]
    choice = node("If", "on", "y", then_branch=body, else_branch=other)
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Block", ["x"], ["c"], [constant, conv("x w", "c")], imports)
    call = node("Block", "x", "y", domain="own")
    (tmp_path / "secret").write_bytes(W.tobytes())
    (tmp_path / "model").mkdir()
    for number, model in enumerate(
        [
            model_of([constant, conv()]),
            model_of([choice], inputs=inputs),
            model_of([call], opset={"": 17, "own": 1}, functions=[function]),
        ]
    ):
        path = tmp_path / "model" / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        assert external_files(model) == ["../secret"]
        assert "outside its own folder" in assert_refused(path)


def test_a_model_in_memory_has_no_folder(tmp_path):
    path = located("weights.bin", tmp_path)
    (path.parent / "weights.bin").write_bytes(W.tobytes())
    with pytest.raises(SepconvertError, match="external data cannot be read"):
        open_network(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_mutations(tmp_path, count):
    """In a process of its own, whose end would tell of a crash."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)\n"
        "from pathlib import Path\n"
        "from files.onnx.graph.onnx_cases import judge_mutations\n"
        "judge_mutations(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, str(tmp_path), str(count)],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert found.returncode == 0, (found.returncode, lines[-1:], found.stderr[-2000:])
    outcomes = dict(line.split(" ", 1) for line in lines if line.split(" ", 1)[0].isdigit())
    assert len(outcomes) == count
    wrong = {number: each for number, each in outcomes.items() if each not in ("success", "refused")}
    assert not wrong
    assert {*outcomes.values()} == {"success", "refused"}
    assert lines == [line for line in lines if line.split(" ", 1)[0].isdigit()]  # nothing else is printed


# Messages -------------------------------------------------------------------------------------------


def nested():
    """An If within an If, whose inner branch reads from both levels above, and from itself."""
    inner = helper.make_graph(
        [node("Add", "outer own", "sum"), node("Mul", "sum x", "inner")],
        "inner",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
        [numpy_helper.from_array(np.ones(1, np.float32), "own")],
    )
    plain = helper.make_graph(
        [node("Neg", "w", "plain")], "plain", [], [helper.make_tensor_value_info("plain", FLOAT, None)]
    )
    middle = helper.make_graph(
        [node("Relu", "x", "outer"), node("If", "on", "middle", then_branch=inner, else_branch=plain)],
        "middle",
        [],
        [helper.make_tensor_value_info("middle", FLOAT, None)],
    )
    through = helper.make_graph([], "through", [], [helper.make_tensor_value_info("z", FLOAT, None)])
    return node("If", "first", "y", then_branch=middle, else_branch=through)


def test_what_a_node_reads():
    assert reads(conv("x w b")) == {"x", "w", "b"}
    assert reads(helper.make_node("Clip", ["x", "", "most"], ["y"])) == {"x", "most"}
    assert reads(nested()) == {"first", "on", "x", "w", "z"}


def test_a_body_reads_what_it_makes_later_from_outside():
    """A name that is read before the body makes a value of that name is one of outside."""
    body = helper.make_graph(
        [node("Neg", "x", "a"), node("Relu", "a", "b")], "body", [value_of("x", 1)], [value_of("b", 1)]
    )
    assert reads(node("Loop", "count on start", "y", body=body)) == {"count", "on", "start"}


def test_all_nodes_graphs_and_tensors_are_walked():
    function = helper.make_function("own", "F", ["a"], ["b"], [nested()], [helper.make_opsetid("", 17)])
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(values(2), "k"))
    model = model_of([constant, nested(), conv()], {"w": W}, functions=[function])
    names = [each.op_type for each in nodes_in(model.graph.node)]
    assert names == ["Constant", "If", "Relu", "If", "Neg", "Add", "Mul", "Conv"]
    assert sorted(each.name for each in graphs_of(model)) == sorted(
        ["graph", *["through", "middle", "plain", "inner"] * 2]
    )
    assert sorted(each.name for each in tensors_of(model)) == ["k", "own", "own", "w"]


def test_attributes_are_values_of_python():
    each = node("Conv", "x w", "y", pads=[1, 2, 3, 4], auto_pad="VALID", group=2)
    assert attribute(each, "pads") == [1, 2, 3, 4]
    assert (attribute(each, "auto_pad"), attribute(each, "group")) == ("VALID", 2)
    assert (attribute(each, "strides"), attribute(each, "strides", [1, 1])) == (None, [1, 1])


def test_inputs_without_default():
    model = one_conv(W, bias=values(8), ir=3, opset=9)
    assert [each.name for each in model.graph.input] == ["x", "w", "b"]
    assert [each.name for each in inputs_of(model.graph)] == ["x"]


@pytest.mark.parametrize("ir", [3, 8])
def test_an_extract_is_a_model_of_its_own(ir):
    """It computes what the nodes compute in the whole, and holds no other weights."""
    nodes = [conv("x w", "a"), node("Relu", "a", "b"), conv("b v", "c"), node("Neg", "c", "y")]
    model = model_of(nodes, {"w": W, "v": kernel(5, 8, 3, 3)}, outputs=("b", "c", "y"), ir=ir, opset=9)
    before = model.SerializeToString()
    part = extracted(model, model.graph.node[2:], [value_of("b", "n", 8, 7, 8)], ["y", "c"])
    assert model.SerializeToString() == before
    assert [each.name for each in part.graph.initializer] == ["v"]
    feed = feed_of(model)
    middle, inner, end = run(model, feed)
    assert_close(run(part, {"b": middle}), [end, inner])


def test_data_are_fetched_into_a_copy(tmp_path):
    model = one_conv(W, bias=values(8))
    path = saved_apart(model, tmp_path / "model.onnx", "data/weights.bin")
    given = parsed(read_content(path), path)
    assert external_files(given) == ["data/weights.bin"]
    before = given.SerializeToString()
    whole = with_data(given, tmp_path)
    assert given.SerializeToString() == before
    assert external_files(whole) == []
    for one, other in zip(whole.graph.initializer, model.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


def test_a_model_that_holds_its_data_is_not_copied():
    model = one_conv(W)
    assert with_data(model, None) is model
