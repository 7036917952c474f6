"""Archives of torch.export: what is read, and that no part of one runs code."""

import importlib
import io
import json
import os
import pickle
import sys

import pytest
import torch
from model_files import COSTLY, MEMORY, Evil, X, refused, write_pickle
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter
from torch.nn import functional as F

from sepconvert.files.models.loading import load_model

pytestmark = pytest.mark.usefixtures("clean_imports")


class Branchy(nn.Module):
    """Symbolic shapes, constants, a buffer that is not saved, nested outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
        self.register_buffer("kernel", torch.ones(4, 1, 3, 3), persistent=False)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = F.gelu(block(x)) + x
        x = F.conv2d(x, self.kernel, groups=4, stride=2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = x[:, :, : x.shape[2] // 2].reshape(x.shape[0], -1)
        return x, {"sum": [x.sum(), torch.einsum("ij,ij->i", x, x)]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    model = Branchy().eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    example = torch.randn(2, 3, 12, 12)
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=(sizes,)), path)
    return path, model, example


@pytest.fixture
def edited(archive, tmp_path):
    """Writes the archive again with some records changed or added."""

    def write(changes=(), program=lambda _: None):
        reader = PT2ArchiveReader(str(archive[0]))
        skipped = (".data/", "byteorder")
        records = {n: reader.read_bytes(n) for n in reader.get_file_names() if not n.startswith(skipped)}
        described = json.loads(records["models/model.json"])
        program(described)
        records["models/model.json"] = json.dumps(described).encode()
        records.update(changes)
        path = tmp_path / "edited.pt2"
        with PT2ArchiveWriter(str(path)) as writer:
            for name, content in records.items():
                writer.write_bytes(name, content)
        return path

    return write


def test_exported_programs(archive, edited):
    path, model, example = archive
    for file in (path, edited()):
        loaded = load_model(file)
        (got,) = loaded.example_inputs
        assert torch.equal(got, example)
        x = torch.randn(3, 3, 16, 12)
        torch.testing.assert_close(loaded.model(x), model(x))
    torch.testing.assert_close(load_model(path, trust=True).model(x), model(x))


def test_exported_weights_for_a_factory(project):
    sys.path.insert(0, str(project))
    net = importlib.import_module("userpkg.net").Net()
    torch.export.save(torch.export.export(net, (X,)), "m.pt2")
    loaded = load_model("m.pt2", factory="model.py:build").model
    assert type(loaded) is type(net)
    assert torch.equal(loaded.conv.weight, net.conv.weight)


def test_the_environment_is_left_as_it_was(archive, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    load_model(archive[0])
    assert dict(os.environ) == before


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("dump", [saved, pickle.dumps])
def test_malicious_payloads_of_an_export_never_run(edited, archive, marker, dump):
    reader = PT2ArchiveReader(str(archive[0]))
    evil = dump(Evil(marker))
    refused("cannot be read as a pt2 file", edited({"data/sample_inputs/model.pt": evil}))
    refused("cannot be read as a pt2 file", edited({"data/weights/model.pt": evil}))
    refused("cannot be read as a pt2 file", edited({"data/constants/model.pt": evil}))

    def config(kind, path_name):
        name = f"data/{kind}/model_{kind}_config.json"
        content = json.loads(reader.read_bytes(name))
        entry = next(iter(content["config"].values()))
        entry.update(use_pickle=True, path_name=path_name, tensor_meta=None)
        return {name: json.dumps(content).encode(), f"data/{kind}/{path_name}": evil}

    refused("cannot be read as a pt2 file", edited(config("weights", "weight_0")))
    refused("cannot be read as a pt2 file", edited(config("constants", "tensor_0")))
    refused("path_name 'custom_obj_0'", edited(config("constants", "custom_obj_0")))
    refused("path_name 'opaque_obj_0'", edited(config("constants", "opaque_obj_0")))
    refused("path_name", edited(config("weights", "../constants/custom_obj_0")))
    refused("compiled code", edited({"data/aotinductor/model/a.so": b""}))
    refused("expected one program", edited({"models/other.json": b"{}"}))


def code(marker):
    return f"__import__('os').mkdir({str(marker)!r})"


def set_target(program, target):
    program["graph_module"]["graph"]["nodes"][-1]["target"] = target


def rename_output(program, name):
    program["graph_module"]["graph"]["nodes"][0]["outputs"][0] = {"as_tensor": {"name": name}}


def set_size(program, text):
    sizes = next(
        size
        for meta in program["graph_module"]["graph"]["tensor_values"].values()
        for size in meta["sizes"]
        if "as_expr" in size
    )
    sizes["as_expr"]["expr_str"] = text


def set_parameter(program, name):
    spec = next(s for s in program["graph_module"]["signature"]["input_specs"] if "parameter" in s)
    spec["parameter"]["parameter_name"] = name


def set_call(program, field, value):
    program["graph_module"]["module_call_graph"][0]["signature"][field] = value


def tree(kind="builtins.tuple", context="null"):
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


IMPORTING = json.dumps([{"\u005f_enum__": True, "fqn": "antigravity:X", "name": "x"}])


INJECTIONS = {
    "sympy": lambda p, c: set_size(p, c),
    "sympy call": lambda p, c: set_size(p, "eval(Symbol('s0'))"),
    "sympy attribute": lambda p, c: set_size(p, "Symbol('s0').func.mro()"),
    "node name": lambda p, c: rename_output(p, f"x = 1; {c}; y"),
    "node attribute": lambda p, c: rename_output(p, "torch.relu"),
    "parameter": lambda p, c: set_parameter(p, f'x", {c}, "'),
    "dunder parameter": lambda p, c: set_parameter(p, "conv.__class__.forward"),
    "argument name": lambda p, c: set_call(p, "forward_arg_names", [f"x={c}"]),
    "spec": lambda p, c: set_call(
        p, "in_spec", tree("collections.defaultdict", '{"default_factory_module": "antigravity"}')
    ),
    "enum": lambda p, c: set_call(p, "in_spec", tree("builtins.dict", IMPORTING)),
    "torch attribute": lambda p, c: set_target(p, "torch.os.system"),
    "load_library": lambda p, c: set_target(p, "torch.ops.load_library"),
    "call": lambda p, c: set_target(p, "_operator.methodcaller"),
    "file": lambda p, c: set_target(p, "torch.ops.aten.from_file.default"),
    "save": lambda p, c: set_target(p, "torch.ops.aten.save"),
    "operator argument": lambda p, c: p["graph_module"]["graph"]["nodes"][-1]["inputs"][0].update(
        arg={"as_operator": "torch.os.system"}
    ),
    "keyword": lambda p, c: p["graph_module"]["graph"]["nodes"][-1]["inputs"][0].update(name=f"x={c},y"),
    "dict key": lambda p, c: p["graph_module"]["graph"]["nodes"][-1]["inputs"][0].update(
        arg={"as_string_to_argument": {c: {"as_int": 1}}}
    ),
}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_code_in_an_exported_program_never_runs(edited, marker, injection):
    path = edited(program=lambda p: INJECTIONS[injection](p, code(marker)))
    refused("could run code", path)
    assert "antigravity" not in sys.modules


def test_guards_of_an_exported_program_are_not_compiled(edited, archive, marker):
    def add_guard(program):
        program["guards_code"] = [code(marker)]

    loaded = load_model(edited(program=add_guard))
    torch.testing.assert_close(loaded.model(archive[2]), archive[1](archive[2]))


def test_programs_for_another_device_say_so(edited):
    def move(program):
        for meta in program["graph_module"]["graph"]["tensor_values"].values():
            meta["device"] = {"type": "cuda", "index": 0}

    refused("exported on the device 'cuda'", edited(program=move))


@pytest.mark.parametrize("place", ["data/sample_inputs/model.pt", "data/weights/weight_0"])
def test_costly_pickles_within_a_program_are_refused(edited, archive, tmp_path, place):
    write_pickle(tmp_path / "inner.pt", COSTLY["an array of bytes"][0])
    changes = {place: (tmp_path / "inner.pt").read_bytes()}
    reader = PT2ArchiveReader(str(archive[0]))
    assert place in reader.get_file_names()
    if "weight" in place:
        name = "data/weights/model_weights_config.json"
        config = json.loads(reader.read_bytes(name))
        (entry,) = (each for each in config["config"].values() if each["path_name"] == "weight_0")
        entry["use_pickle"] = True
        changes[name] = json.dumps(config).encode()
    refused(MEMORY, edited(changes))
