"""Pickled models: what is admitted, what is refused, and that nothing in a file runs."""

import argparse
import functools
import importlib
import pickle
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from model_files import (
    BYTES,
    COSTLY,
    FORMATS,
    FROM_TYPE,
    NET,
    NINE_GIGABYTES,
    PARTIAL,
    RELU,
    TENSOR,
    Evil,
    assert_same,
    built,
    naming,
    refused,
    small,
    write_checkpoint,
    write_pickle,
)
from torch import nn
from torch.nn import functional as F

from sepconvert.base import limits
from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.loading import load_model

pytestmark = pytest.mark.usefixtures("clean_imports")


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
def test_other_classes_are_refused_with_the_options_that_admit_them(project, zipped):
    sys.path.insert(0, str(project))
    net = importlib.import_module("userpkg.net")
    model = net.Net()
    model.act = net.Act()
    torch.save(model, "m.pt", _use_new_zipfile_serialization=zipped)
    refused(r"`allow` userpkg\.net\.Act `allow` userpkg\.net\.Net", "m.pt")
    refused(r"pass `allow` userpkg\.net\.Net,", "m.pt", allow=["userpkg.net.Act"])
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
    assert "`factory` file.py:callable" in message
    assert "`allow`" not in message


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


def test_tensors_of_old_files_are_made_without_a_size(tmp_path):
    """Which is how torch wrote them before 0.2: a class called with nothing, and its storage set."""
    write_pickle(tmp_path / "m.pt", b"ctorch\nFloatTensor\n)R")
    assert "does not say how to build the model" in refused("holds a state_dict", tmp_path / "m.pt")


def test_quantised_and_lazy_models_are_refused_for_what_they_are(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(built(), {nn.Linear})
        torch.save(quantised, tmp_path / "q.pt")
        torch.save(small(), tmp_path / "lazy.pt")
    refused("is quantised .*quantise the result", tmp_path / "q.pt")
    refused("lazy modules.*run the model once", tmp_path / "lazy.pt")


@FORMATS
@pytest.mark.parametrize(("pickled", "match"), COSTLY.values(), ids=COSTLY)
def test_pickles_that_cost_more_than_their_size_are_refused_unread(
    tmp_path, monkeypatch, pickled, match, zipped
):
    monkeypatch.setattr(limits, "_PROCESSOR_SECONDS", 1)
    write_pickle(tmp_path / "m.pt", pickled, zipped)
    start = time.process_time()
    refused(f"refused, {match}.*save the state_dict anew", tmp_path / "m.pt")
    assert time.process_time() - start < 5


NOT_CALLED = {
    "a function that is called later": (PARTIAL + BYTES + NINE_GIGABYTES + b"\x86R", "holds no weights"),
    "a function that is changed later": (
        PARTIAL + RELU + b"\x85R(" + BYTES + NINE_GIGABYTES + b"\x85}Ntb",
        "holds no weights",
    ),
    "a function that calls one that is called later": (
        FROM_TYPE + b"(" + PARTIAL + RELU + b"\x85R" + TENSOR + b")}tR",
        "cannot be read",
    ),
    "what a function made": (BYTES + b")R)R", "Trying to call reduce for unrecognized function"),
    "a list within itself": (b"]q\x00h\x00a", "holds no weights"),
}


@FORMATS
@pytest.mark.parametrize(("pickled", "match"), NOT_CALLED.values(), ids=NOT_CALLED)
def test_costly_calls_that_are_not_made_cost_nothing(tmp_path, pickled, match, zipped):
    write_pickle(tmp_path / "m.pt", pickled, zipped)
    refused(match, tmp_path / "m.pt")
