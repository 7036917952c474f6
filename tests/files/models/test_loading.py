"""Model files: formats, state_dicts and factories, damaged files, input shapes."""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import FORMATS, NET, X, assert_same, built, refused
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.loading import load_model

pytestmark = pytest.mark.usefixtures("clean_imports")


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
        refused(f"{name} of a ReLU is not as torch makes it", tmp_path / "m.pt")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(4, 3, 3, 3).to_sparse())
    torch.save(model, tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of checking them
        refused("has sparse weights; save them dense", tmp_path / "m.pt")


def test_pipes_and_devices_are_no_models(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        refused("is no regular file", path)


def test_archives_that_inflate_are_refused_before_they_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(2**28))
        archive.writestr("m/version", "3")
    refused(r"inflates from 0\.3 to 268 MB, and torch writes no compressed archives", tmp_path / "m.pt")


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
    refused("`factory` pkg.mod:callable", "m.bin")


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

    check("state_dict .2 entries.*`factory` pkg.mod:callable or `factory` file.py:callable", good)
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
    refused("holds no weights, only model", "m.pt")


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


ARGUMENTS = """from torch import nn

class Net(nn.Sequential):
    def __init__(self, width, *, depth=1):
        super().__init__(*[nn.Conv2d(3, width, 3) for _ in range(depth)])

def anything(**arguments):
    return Net(arguments["width"])
"""


def test_a_factory_is_called_with_its_arguments(project):
    (project / "sized.py").write_text(ARGUMENTS)
    torch.save({"0.weight": torch.ones(5, 3, 3, 3), "0.bias": torch.ones(5)}, "m.pt")
    for factory in ("sized.py:Net", "sized.py:anything"):
        assert load_model("m.pt", factory=factory, factory_args={"width": 5}).model[0].out_channels == 5
    build = {"factory": "sized.py:Net"}
    refused(r"called with as `factory_args`$", "m.pt", **build)
    refused(r"^m\.pt: does not fit.*lacks 1\.weight", "m.pt", **build, factory_args={"width": 5, "depth": 2})
    refused(
        r"`factory_args`: widht is no parameter of sized\.py:Net, which takes width, depth; correct the name",
        "m.pt",
        **build,
        factory_args={"widht": 5},
    )
    refused(
        r"calling it with width='wide' failed \(TypeError", "m.pt", **build, factory_args={"width": "wide"}
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_are_built_by_name():
    pytest.importorskip("timm")
    loaded = load_model("timm:test_resnet?num_classes=7")
    assert (loaded.path, loaded.weights) == (Path("timm:test_resnet?num_classes=7"), "random")
    assert [each.shape for each in loaded.example_inputs] == [(1, 3, 160, 160)]
    assert loaded.normalisation.mean == (0.5, 0.5, 0.5)
    assert loaded.model(*loaded.example_inputs).shape == (1, 7)
    state = b"".join(each.numpy().tobytes() for each in loaded.model.state_dict().values())
    assert loaded.sha256 == hashlib.sha256(state).hexdigest()
    refused("is built by timm, and `factory` builds a model as well", "timm:test_resnet", factory="a:b")
    # The channels are none that the library's size holds for.
    assert load_model("timm:test_resnet?in_chans=4").example_inputs is None


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
    np.savez(tmp_path / "d.npz", x=np.ones(3))
    check(r"zip file that is no model .it holds x\.npy", (tmp_path / "d.npz").read_bytes())


def test_a_file_that_is_named_like_an_onnx_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\xff")
    refused("m.onnx: not an ONNX model", tmp_path / "m.onnx")


@FORMATS
def test_truncated_files(tmp_path, zipped):
    whole = tmp_path / "whole.pt"
    torch.save(built(), whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for length in (3, 20, 60, 300, len(content) // 2, len(content) - 30):
        (tmp_path / "m.pt").write_bytes(content[:length])
        refused("damaged|truncated|no model|begins|not write", tmp_path / "m.pt")


@settings(deadline=None)  # every file is read in two processes
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
    assert "`factory`" in refused("TorchScript", tmp_path / "m.pt")


# Models that have their weights already -----------------------------------------------------------

TRAINED = """import torch
from userpkg.net import Net

torch.manual_seed(3)
first = Net()

def trained():
    model = Net()
    model.load_state_dict(first.state_dict())
    return model

def another():
    model = trained()
    model.conv.bias.data += 1
    return model

def empty():
    with torch.device("meta"):
        return Net()
"""


@pytest.fixture
def trained(project):
    (project / "trained.py").write_text(TRAINED)
    return {"factory": "trained.py:trained"}


@pytest.mark.parametrize("name", ["yolov8", "resnet50.a1_in1k"])
def test_a_factory_gives_the_weights_of_a_name(trained, name):
    loaded = load_model(name, **trained)
    assert type(loaded.model).__name__ == "Net"
    assert loaded.path == Path(name)
    assert loaded.notes == (f"{name}: there is no such file; the weights are those that `factory` gives",)
    # Another model of the same name is noticed.
    assert load_model(name, **trained).sha256 == loaded.sha256
    assert load_model(name, factory="trained.py:another").sha256 != loaded.sha256


def test_a_file_of_another_framework_is_where_the_weights_came_from(trained):
    Path("m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    loaded = load_model("m.onnx", **trained)
    assert loaded.sha256 == hashlib.sha256(Path("m.onnx").read_bytes()).hexdigest()
    assert loaded.notes == ("m.onnx: is no model file of torch; the weights are those that `factory` gives",)
    refused("not an ONNX model", "m.onnx")
    # The content decides, also here.
    model = nn.Sequential()
    model.conv = nn.Conv2d(3, 2, 3)
    torch.save(model.state_dict(), "m.onnx")
    loaded = load_model("m.onnx", **trained)
    assert torch.equal(loaded.model.conv.weight, model.conv.weight)
    assert loaded.notes == ()


@pytest.mark.parametrize("path", ["m.pt", "m.ckpt", "m.onnx", "nets/m", "./nets/m", "/m"])
def test_a_mistyped_path_is_no_name(trained, path):
    refused("there is no such file; expected a model", path, **trained)


def test_a_file_without_its_extension_is_no_name(trained):
    Path("m.pth").touch()
    Path("m.py").touch()
    Path("n.py").touch()
    refused(r"^m: there is no such file, but m\.pth; pass that", "m", **trained)
    assert load_model("n", **trained).path == Path("n")


def test_a_damaged_file_is_no_name(trained):
    for content in (b"", b"PK\x03\x04", b"version https://git-lfs", b"\x80\x02."):
        Path("m.ckpt").write_bytes(content)
        refused(r"^m\.ckpt: ", "m.ckpt", **trained)
    refused("is a directory", "userpkg", **trained)


def test_random_weights_are_not_taken(project, trained):
    Path("m.tflite").write_bytes(b"....TFL3")
    for name, found in (("net", "there is no such file"), ("m.tflite", "is no model file of torch")):
        refused(
            f"^{name}: {found}, and the weights that `factory` gives are random", name, factory="model:build"
        )
    refused("meta device", "net", factory="trained:empty")


def test_extra_keys_need_a_factory(project):
    weights = {"conv.weight": torch.ones(2, 3, 3, 3), "conv.bias": torch.ones(2), "head.bias": torch.ones(3)}
    torch.save(weights, "m.pt")
    loaded = load_model("m.pt", factory="model.py:build", ignore_extra_keys=["head.*"])
    assert loaded.notes == ("m.pt: 1 key is left out (`ignore_extra_keys`): head.bias",)
    refused("`ignore_extra_keys`: only for weights that the model of `factory` takes", "m.pt",
            ignore_extra_keys=["head.*"])  # fmt: skip
