import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import pickle
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter
from torch.nn import functional as F

from sepconvert.base.errors import SepconvertError
from sepconvert.files.callables import resolve_callable
from sepconvert.files.models import load_model, parse_input_shape

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )


def built():
    model = small()
    model(torch.zeros(1, 3, 6, 6))
    return model


NET = """from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
"""
X = torch.linspace(-1, 1, 3 * 36).reshape(1, 3, 6, 6)


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("torch", "timm", "sympy")):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with the user's code, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "userpkg").mkdir()
    (tmp_path / "userpkg" / "__init__.py").touch()
    (tmp_path / "userpkg" / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 2, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x)\n"
        "class Act(nn.ReLU):\n"
        "    pass\n"
        "def build():\n    return Net()\n"
        "def needs_argument(x):\n    return Net()\n"
        "def no_model():\n    return 3\n"
        "number = 3\n"
    )
    (tmp_path / "model.py").write_text("from userpkg.net import Net\ndef build():\n    return Net()\n")
    return tmp_path


def write_checkpoint(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")


def naming(name):
    """A pickle of the class or function `name`."""
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n."


class Evil:
    """Runs when it is unpickled: creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that no code in a model file may create."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of the file ran"


def refused(match, path, **options):
    with pytest.raises(SepconvertError, match=match) as error:
        load_model(path, **options)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


def assert_same(model, reference):
    assert not any(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(model(X), reference(X))


# Whole modules


@FORMATS
@pytest.mark.parametrize("training", [True, False])
def test_module_keeps_its_weights_and_mode(tmp_path, zipped, training):
    model = built().train(training)
    path = tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    loaded = load_model(path)
    assert loaded.model.training == training
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.path == path
    assert loaded.example_inputs is None
    assert_same(loaded.model.eval(), model.eval())


@FORMATS
def test_wrapped_modules(tmp_path, zipped):
    model = built().eval()
    path = tmp_path / "checkpoint.tar"
    for wrapped in ({"epoch": 3, "model": model}, {"net": {"module": model}}, nn.DataParallel(model)):
        torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
        assert_same(load_model(path).model, model)


def test_the_content_decides_not_the_extension(tmp_path):
    model = built().eval()
    for name in ("model", "model.safetensors", "model.pt2", "model.onnx"):
        torch.save(model, tmp_path / name)
        assert_same(load_model(tmp_path / name).model, model)


class _Plain(nn.Sequential):
    pass


@FORMATS
def test_harmless_values_in_a_module(tmp_path, zipped):
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.rate = np.float32(0.25)
    model.count = np.int64(-7)
    model.order = np.array(3, ">i4")[()]
    model.flag = np.bool_(True)
    model.norm = functools.partial(nn.LayerNorm, eps=1e-6)
    model.act = F.relu
    model.args = argparse.Namespace(lr=0.1)
    path = tmp_path / "m.pt"
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    loaded = load_model(path).model
    assert (loaded.rate, loaded.count, loaded.order, loaded.flag) == (0.25, -7, 3, True)
    assert loaded.norm(4).eps == 1e-6
    assert loaded.act is F.relu
    assert loaded.args.lr == 0.1


@FORMATS
def test_torchvision_and_timm_models(tmp_path, zipped):
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    models = [
        torchvision.models.mobilenet_v3_small(weights=None),
        timm.create_model("test_convnext"),
        timm.create_model("test_vit"),
        nn.Sequential(
            torchvision.transforms.Normalize([0.5], [0.5]), torchvision.ops.Conv2dNormActivation(1, 2)
        ),
    ]
    path = tmp_path / "m.pt"
    for model in models:
        torch.save(model, path, _use_new_zipfile_serialization=zipped)
        loaded = load_model(path).model
        assert type(loaded) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


def test_timm_models_say_what_they_take(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "m.pt"
    torch.save(timm.create_model("test_resnet").half(), path)
    (example,) = load_model(path).example_inputs
    assert example.shape == (1, 3, 160, 160)
    assert example.dtype == torch.float16
    torch.save(timm.create_model("test_resnet", in_chans=4), path)
    assert load_model(path).example_inputs is None


@pytest.mark.parametrize("size", [(3, 0, 5), (3, 5), "abc", (3, 1200, 1200), (3.0, 5, 5), 7])
def test_nonsense_for_an_input_size_is_ignored(tmp_path, size):
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.pretrained_cfg = {"input_size": size}
    torch.save(model, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").example_inputs is None


# Classes that must be allowed


@FORMATS
def test_other_classes_are_refused_with_the_options_that_admit_them(project, zipped):
    sys.path.insert(0, str(project))
    net = importlib.import_module("userpkg.net")
    model = net.Net()
    model.act = net.Act()
    torch.save(model, "m.pt", _use_new_zipfile_serialization=zipped)
    refused(r"--allow userpkg\.net\.Act --allow userpkg\.net\.Net", "m.pt")
    refused(r"pass --allow userpkg\.net\.Net,", "m.pt", allow=["userpkg.net.Act"])
    loaded = load_model("m.pt", allow=["userpkg.net.Act", "userpkg.net.Net", "never.imported.Class"])
    assert type(loaded.model) is net.Net


def test_refusal_imports_nothing(project, marker):
    (project / "sly.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    sys.path.insert(0, str(project))
    for name in ("sly.Net", "timm.models.sly.Net", "torch.nn.sly"):
        write_checkpoint(project / "m.pt", naming(name))
        refused("allow", "m.pt")
    assert "sly" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "torch.fx.graph_module.GraphModule",
        "torchvision.models.feature_extraction.DualGraphModule",
        "torch.jit._script.ScriptModule",
        "torchvision.models.os.system",
        "torchvision.models.resnet.nn.Conv2d",
        "torch.nn.modules.container.OrderedDict",
        "torch.nn.modules.module.torch.hub.load",
        "torch.nn.modules.module.Tensor",
        "torch.nn.functional.handle_torch_function",
        "torch.hub.load",
        "timm.create_model",
        "timm.models.create_model",
        "timm.models.resnet.resnet18",
        "timm.task.distillation.DistillationTeacher",
        "timm.models.__builtins__.eval",
    ],
)
def test_names_that_only_look_like_modules_are_refused(tmp_path, name):
    write_checkpoint(tmp_path / "m.pt", naming(name))
    refused("refused, it needs classes", tmp_path / "m.pt")


def test_classes_of_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr(_Plain, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "_Plain", _Plain, raising=False)
    torch.save(_Plain(), tmp_path / "m.pt")
    message = refused("__main__._Plain", tmp_path / "m.pt")
    assert "--factory file.py:callable" in message
    assert "--allow" not in message


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("os.mkdir", "expected a class of the model's own code"),
        ("builtins.eval", "expected a class of the model's own code"),
        ("subprocess.Popen", "expected a class of the model's own code"),
        ("__main__.Net", "expected a class of the model's own code"),
        ("userpkg.net.build", "only classes are admitted"),
        ("userpkg.net.Absent", "defines no 'Absent'"),
        ("absent.Net", "No module named 'absent'"),
    ],
)
def test_what_allow_does_not_admit(project, name, match):
    write_checkpoint(project / "m.pt", naming(name))
    refused(match, "m.pt", allow=[name])


def test_trust_runs_the_file(tmp_path):
    model = built().eval()
    model.side_effect = Evil(tmp_path / "ran")
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(SepconvertError):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()
    assert_same(load_model(tmp_path / "m.pt", trust=True).model, model)
    assert (tmp_path / "ran").exists()


# Malicious pickles


@FORMATS
def test_malicious_pickles_never_run(project, marker, zipped):
    sys.path.insert(0, str(project))
    net = importlib.import_module("userpkg.net")
    hidden = nn.Conv2d(3, 3, 1)
    hidden.extra_repr_value = Evil(marker)
    hooked = net.Net()
    hooked._forward_hooks[0] = Evil(marker)
    allow = ["userpkg.net.Net", "userpkg.net.Act"]
    for content in (
        Evil(marker),
        {"state_dict": built().state_dict(), "optimizer": Evil(marker)},
        hidden,
        hooked,
        nn.Sequential(hidden),
        functools.partial(nn.Conv2d, Evil(marker)),
        {Evil(marker): 1},
    ):
        torch.save(content, "m.pt", _use_new_zipfile_serialization=zipped)
        assert "mkdir" in refused("refused, its pickle calls", "m.pt", allow=allow)
        refused("refused", "m.pt", factory="model.py:build", allow=allow)
        refused("only|own code", "m.pt", allow=[*allow, "posix.mkdir", "nt.mkdir"])


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
@FORMATS
def test_other_pickle_protocols_never_run(tmp_path, marker, protocol, zipped):
    path = tmp_path / "m.pt"
    torch.save(Evil(marker), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused("refused|cannot be read|expected a model", path)
    path.write_bytes(pickle.dumps(Evil(marker), protocol))
    refused("expected a model saved by torch.save", path)


def test_constructors_that_act_are_out_of_reach(tmp_path):
    # torch would call the class with arguments of the file's choice: this one downloads a model
    pytest.importorskip("timm")
    pickled = b"\x80\x02ctimm.task.distillation\nDistillationTeacher\nX\x01\x00\x00\x00x\x85R."
    write_checkpoint(tmp_path / "m.pt", pickled)
    refused("timm.task.distillation.DistillationTeacher", tmp_path / "m.pt")


@FORMATS
def test_constructors_of_layers_are_not_called(tmp_path, zipped):
    """A file of three kilobytes could have a layer of any size built; classes that are allowed are no way."""

    class Built:
        def __reduce__(self):
            return nn.Conv2d, (8, 8, 3)

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.further = Built()
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    refused("calls the constructor of Conv2d", tmp_path / "m.pt")
    assert nn.Conv2d(3, 4, 3)(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def write_pickle(path, pickled, zipped=True):
    """A dictionary of one weight and what `pickled` puts on the stack."""
    whole = b"\x80\x02}X\x01\x00\x00\x00a" + pickled + b"s."
    if zipped:
        write_checkpoint(path, whole)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        parts = path.read_bytes().split(b"\x80\x02}q\x00.")
        path.write_bytes(parts[0] + whole + parts[1])


def named(module, name):
    return b"c%s\n%s\n" % (module.encode(), name.encode())


def nested(first, pair, times=40):
    """A container of one container twice, and so on."""
    doubled = (bytes([*pair[0], *b"h", n, *b"h", n, *pair[1], *b"q", n + 1]) for n in range(times))
    return first + b"q\x00" + b"".join(doubled)


NINE_GIGABYTES = b"\x8a\x05" + (9 * 10**9).to_bytes(5, "little")
BYTES, TENSOR, PARTIAL = (
    named("__builtin__", "bytearray"),
    named("torch", "Tensor"),
    named("functools", "partial"),
)
FROM_TYPE = named("torch._tensor", "_rebuild_from_type_v2")
TUPLES, LISTS = nested(b")", (b"", b"\x86")), nested(b"]", (b"](", b"e"))
ENCODED = b"X\x03\x00\x00\x00\xe9\x9b\xb6X\x08\x00\x00\x00punycode"
COSTLY = {
    "an array of bytes": (BYTES + NINE_GIGABYTES + b"\x85R", "calls __builtin__.bytearray"),
    "a tensor": (TENSOR + NINE_GIGABYTES + b"\x85R", "calls torch.Tensor"),
    "a new tensor": (named("torch", "FloatTensor") + NINE_GIGABYTES + b"\x85\x81", "calls torch.FloatTensor"),
    "arguments in a list": (TENSOR + b"](" + NINE_GIGABYTES + b"eR", "calls torch.Tensor"),
    "a function that is called later": (
        PARTIAL + BYTES + NINE_GIGABYTES + b"\x86R",
        "calls functools.partial",
    ),
    "a function that is changed later": (
        PARTIAL + named("torch.nn.functional", "relu") + b"\x85R(" + BYTES + NINE_GIGABYTES + b"\x85}Ntb",
        "calls functools.partial",
    ),
    "a function that calls": (
        FROM_TYPE + b"(" + BYTES + TENSOR + NINE_GIGABYTES + b"\x85}tR",
        "calls torch._tensor._rebuild_from_type_v2",
    ),
    "a function that calls one that is called later": (
        FROM_TYPE + b"(" + PARTIAL + named("torch.nn.functional", "relu") + b"\x85R" + TENSOR + b")}tR",
        "calls torch._tensor._rebuild_from_type_v2",
    ),
    "what it made": (BYTES + b")R)R", "calls what it made"),
    "a slow codec": (named("_codecs", "encode") + ENCODED + b"\x86R", "calls _codecs.encode"),
    "a tuple that is hashed for ever": (b"}" + TUPLES + b"K\x01s", "nests containers without end"),
    "a tuple that is printed for ever": (TUPLES, "nests containers without end"),
    "a list that is called, and printed for ever": (LISTS + b")R", "calls what it made"),
    "a list that is walked for ever": (LISTS, "nests containers without end"),
    "a list within itself": (b"]q\x00h\x00a", "nests containers without end"),
    "instructions without end": (b"N0" * (10**6 + 10) + b"N", "has more than 2,000,000 instructions"),
}


@FORMATS
@pytest.mark.parametrize(("pickled", "match"), COSTLY.values(), ids=COSTLY)
def test_pickles_that_cost_more_than_their_size_are_refused_unread(tmp_path, pickled, match, zipped):
    write_pickle(tmp_path / "m.pt", pickled, zipped)
    start = time.monotonic()
    refused(f"refused, its pickle {match}.*save the state_dict anew", tmp_path / "m.pt")
    assert time.monotonic() - start < 5


def test_costly_pickles_within_a_program_are_refused(tmp_path):
    program = torch.export.export(built().eval(), (X,))
    torch.export.save(program, tmp_path / "m.pt2")
    write_pickle(tmp_path / "inner.pt", COSTLY["an array of bytes"][0])
    reader = PT2ArchiveReader(str(tmp_path / "m.pt2"))
    inner = (tmp_path / "inner.pt").read_bytes()
    with PT2ArchiveWriter(str(tmp_path / "n.pt2")) as writer:
        for name in reader.get_file_names():
            if name not in (
                "archive_format",
                "archive_version",
                "byteorder",
                ".data/serialization_id",
                "version",
            ):
                content = inner if name.endswith("sample_inputs/model.pt") else reader.read_bytes(name)
                writer.write_bytes(name, content)
    assert any(name.endswith("sample_inputs/model.pt") for name in reader.get_file_names())
    refused("calls __builtin__.bytearray", tmp_path / "n.pt2")


@FORMATS
def test_what_costly_pickles_are_made_of_may_be_harmless(project, tmp_path, zipped):
    """Bytes that are in the file, and classes that are named and not called."""
    model = built()
    content = {
        "model": model.state_dict(),
        "bytes": bytearray(b"some"),
        "kinds": (torch.Tensor, nn.Parameter),
        "history": [[0.5] * 20] * 1000,
        "slices": [torch.zeros(2**20)[n:] for n in range(3)],
    }
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    (project / "net.py").write_text(NET)
    assert_same(load_model(tmp_path / "m.pt", factory="net.py:make").model.eval(), model.eval())


def test_averaged_weights_are_read(project, tmp_path):
    model = built()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "m.pt")
    (project / "net.py").write_text(NET)
    assert_same(load_model(tmp_path / "m.pt", factory="net.py:make").model.eval(), model.eval())


def test_slices_of_one_tensor_take_no_more_than_it(tmp_path):
    whole = torch.zeros(2**22)
    model = built()
    for number in range(40):
        model.register_buffer(f"slice_{number}", whole[number:])
    torch.save(model, tmp_path / "m.pt")
    load_model(tmp_path / "m.pt")


def test_tensors_of_old_files_are_made_without_a_size(tmp_path):
    """Which is how torch wrote them before 0.2: a class called with nothing, and its storage set."""
    write_pickle(tmp_path / "m.pt", b"ctorch\nFloatTensor\n)R")
    assert "does not say how to build the model" in refused("holds a state_dict", tmp_path / "m.pt")


@FORMATS
def test_weights_that_repeat_what_is_stored_are_refused_by_size(tmp_path, zipped):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model[0].weight = nn.Parameter(torch.zeros(1).expand(15000, 15000, 3, 3))
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    refused("its weights take 8,100 MB, and the file 0.0", tmp_path / "m.pt")


def test_weights_that_are_stored_once_and_used_often_are_read(tmp_path):
    model = built()
    many = nn.Sequential(*[model for _ in range(50)])
    torch.save(many, tmp_path / "m.pt")
    assert len(load_model(tmp_path / "m.pt").model) == 50


def test_modules_that_are_not_as_torch_makes_them_are_refused(tmp_path):
    for name, value in (
        ("_forward_hooks", torch.zeros(4)),
        ("_forward_pre_hooks", {"x": 3}),
        ("_modules", ()),
    ):
        model = built()
        vars(model[2])[name] = value
        torch.save(model, tmp_path / "m.pt")
        refused(f"{name} of a ReLU is not what torch makes", tmp_path / "m.pt")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(4, 3, 3, 3).to_sparse())
    torch.save(model, tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of checking them
        refused("has sparse weights; save them dense", tmp_path / "m.pt")


def test_quantised_and_lazy_models_are_refused_for_what_they_are(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(built(), {nn.Linear})
        torch.save(quantised, tmp_path / "q.pt")
        torch.save(small(), tmp_path / "lazy.pt")
    refused("is quantised .*quantise the result", tmp_path / "q.pt")
    refused("lazy modules.*run the model once", tmp_path / "lazy.pt")


def test_pipes_and_devices_are_no_models(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        refused("is no regular file", path)


def test_archives_that_inflate_are_refused_before_they_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(2**28))
        archive.writestr("m/version", "3")
    refused(r"inflates from 0\.3 to 268 MB, and torch writes no compressed archives", tmp_path / "m.pt")


# State dicts


WRAPPERS = [
    lambda weights: weights,
    lambda weights: {"state_dict": weights, "epoch": 3, "best_acc1": torch.tensor(71.5)},
    lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.1)},
    lambda weights: {"model_state_dict": weights, "best_prec1": np.float64(71.5), "step": np.int64(4)},
    lambda weights: {"net": {"state_dict": weights}},
    lambda weights: {"state_dict_ema": weights, "optimizer": {"state": {}}},
    lambda weights: {"model": None, "ema": weights},
    lambda weights: {f"module.{key}": value for key, value in weights.items()},
    lambda weights: {f"module._orig_mod.{key}": value for key, value in weights.items()},
    lambda weights: {"state_dict": {f"_orig_mod.module.{key}": value for key, value in weights.items()}},
]


@FORMATS
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_state_dicts_with_a_factory(project, zipped, wrap):
    reference = nn.Module()
    reference.conv = nn.Conv2d(3, 2, 3)
    torch.save(wrap(reference.state_dict()), "m.pth", _use_new_zipfile_serialization=zipped)
    for factory in ("model.py:build", "userpkg.net:build", "userpkg.net:Net"):
        loaded = load_model("m.pth", factory=factory).model
        assert type(loaded).__name__ == "Net"
        assert torch.equal(loaded.conv.weight, reference.conv.weight)


def test_safetensors(project):
    reference = nn.Module()
    reference.conv = nn.Conv2d(3, 2, 3)
    safetensors.torch.save_file(reference.state_dict(), "m.bin")
    assert torch.equal(load_model("m.bin", factory="model.py:build").model.conv.bias, reference.conv.bias)
    refused("--factory pkg.mod:callable", "m.bin")


def test_a_module_gives_its_weights_to_a_factory(project):
    model = nn.Sequential()
    model.conv = nn.Conv2d(3, 2, 3)
    torch.save(model, "m.pt")
    loaded = load_model("m.pt", factory="model.py:build").model
    assert type(loaded).__name__ == "Net"
    assert torch.equal(loaded.conv.weight, model.conv.weight)


def test_a_submodule_called_module_keeps_its_name(project):
    (project / "nested.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    m = nn.Module()\n"
        "    m.module = nn.Linear(2, 2)\n"
        "    return m\n"
    )
    weights = {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    torch.save(weights, "m.pt")
    assert load_model("m.pt", factory="nested:build").model.module.weight.sum() == 4
    torch.save({f"module.{key}": value for key, value in weights.items()}, "m.pt")
    assert load_model("m.pt", factory="nested:build").model.module.weight.sum() == 4


def test_state_dicts_need_a_factory_that_fits(project):
    conv = nn.Conv2d(3, 2, 3).state_dict()
    good = {f"conv.{key}": value for key, value in conv.items()}

    def check(match, content, **options):
        torch.save(content, "m.pt")
        refused(match, "m.pt", **options)

    check("state_dict .2 entries.*--factory pkg.mod:callable or --factory file.py:callable", good)
    build = {"factory": "model.py:build"}
    check(r"lacks conv\.bias;", {"conv.weight": good["conv.weight"]}, **build)
    check(
        r"also holds fc\.weight, fc\.x;", good | {"fc.weight": torch.ones(1), "fc.x": torch.ones(1)}, **build
    )
    check(r"conv\.bias \(3,\) for \(2,\)", good | {"conv.bias": torch.ones(3)}, **build)
    others = {f"l{number}": torch.ones(1) for number in range(10)}
    check(r"lacks conv\.weight, conv\.bias and also holds l0, l1, l2, l3 and 6 more;", others, **build)
    check("Error", good | {"conv.bias": "text"}, **build)
    check("no weights, only epoch, optimizer", {"epoch": 1, "optimizer": {}}, **build)
    check("no weights, only an empty dict", {}, **build)
    check("holds a Tensor", torch.ones(3), **build)
    check("holds a list", [good], **build)
    check("meta device", {"conv.weight": torch.ones(1, device="meta")}, **build)


def test_a_wrapper_that_holds_itself(project):
    content = {}
    content["model"] = content
    torch.save(content, "m.pt")
    refused("nests containers without end", "m.pt")


# --factory and --data


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nothing", "expected pkg.mod:callable or file.py:callable"),
        (":build", "expected pkg.mod:callable"),
        ("model.py:", "expected pkg.mod:callable"),
        ("absent.py:build", "no file absent.py"),
        ("absent:build", "No module named 'absent'"),
        ("model.py:absent", "defines no 'absent'"),
        ("userpkg.net:number", "is a int; expected a callable"),
        ("broken.py:build", "SyntaxError"),
        ("quits.py:build", "SystemExit"),
    ],
)
def test_callables_that_cannot_be_had(project, spec, match):
    (project / "broken.py").write_text("def")
    (project / "quits.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(SepconvertError, match=match) as error:
        resolve_callable(spec, "--factory")
    assert str(error.value).startswith(f"--factory {spec}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        ("userpkg.net:needs_argument", "without arguments failed.*TypeError"),
        ("userpkg.net:no_model", "a int; expected"),
    ],
)
def test_factories_that_build_nothing(project, factory, match):
    torch.save({"conv.bias": torch.ones(2)}, "m.pt")
    refused(match, "m.pt", factory=factory)


def test_files_are_run_once_and_hide_no_other_module(project):
    (project / "runs").touch()
    (project / "counted.py").write_text(
        "from pathlib import Path\nPath('runs').write_bytes(Path('runs').read_bytes() + b'x')\nf = print\n"
    )
    assert resolve_callable("counted.py:f", "--data") is resolve_callable(f"{project}/counted.py:f", "--data")
    assert Path("runs").read_text() == "x"
    (project / "torch.py").write_text("def build():\n    return 3\n")
    assert resolve_callable("torch.py:build", "--factory")() == 3
    assert sys.modules["torch"] is torch


# Files that are no model


def test_files_that_are_no_model(tmp_path):
    def check(match, content, name="m.pt"):
        (tmp_path / name).write_bytes(content)
        message = refused(match, tmp_path / name)
        assert "expected a model saved by torch.save" in message

    refused("no such file", tmp_path / "absent.pt")
    refused("is a directory", tmp_path)
    check("is empty", b"")
    check("text file that begins 'hello", b"hello")
    check("git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    check("that torch.save did not write", pickle.dumps([1, 2]))
    check("begins with the bytes 89 50", b"\x89PNG\r\n\x1a\n" + bytes(40))
    check("ONNX model", b"\x08\x08\x12\x07pytorch\xff", "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones(3))
    check(r"zip file that is no model .it holds x\.npy", (tmp_path / "d.npz").read_bytes())


@FORMATS
def test_truncated_files(tmp_path, zipped):
    whole = tmp_path / "whole.pt"
    torch.save(built(), whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for length in (3, 20, 60, 300, len(content) // 2, len(content) - 30):
        (tmp_path / "m.pt").write_bytes(content[:length])
        refused("damaged|truncated|no model|begins|not write", tmp_path / "m.pt")


@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_damaged_files_end_in_a_model_or_an_error_of_ours(tmp_path_factory, position, byte):
    buffer = io.BytesIO()
    torch.save(nn.Conv2d(1, 1, 1), buffer, _use_new_zipfile_serialization=byte % 2 == 0)
    content = bytearray(buffer.getvalue())
    content[int(position * len(content))] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own remarks on odd pickles
        with contextlib.suppress(SepconvertError):
            load_model(path)


def test_damaged_safetensors(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(100)}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[:-50])
    refused("cannot be read as a safetensors file", tmp_path / "m.safetensors")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_names_the_way_out(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 1), X), tmp_path / "m.pt")
    assert "--factory" in refused("TorchScript", tmp_path / "m.pt")


# torch.export archives


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


# Shapes


@given(st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_input_shapes_round_trip(sizes):
    assert parse_input_shape("x".join(map(str, sizes))) == tuple(sizes)
    assert parse_input_shape(" " + " X ".join(map(str, sizes))) == tuple(sizes)


@pytest.mark.parametrize(
    "text",
    ["", "x", "3x", "3,224,224", "-3x4", "3x0x5", "3x1.5", "3xax5", "99999x99999x99999", "9" * 5000, "３x4"],
)
def test_input_shapes_that_make_no_sense(text):
    with pytest.raises(SepconvertError, match="3x224x224"):
        parse_input_shape(text)
