"""Files: checked by onnx, run by ONNX Runtime, loaded by torch.export. The oracle is PyTorch's output."""

import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sepconvert.base.errors import ExportError, SepconvertError
from sepconvert.files.onnx.export import export_program, save_archive, save_onnx


def seeded(make):
    torch.manual_seed(0)
    return make()


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())


class Outputs(nn.Module):
    """Two inputs; outputs in a container made by `make`."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), make

    def forward(self, a, b):
        return self.make(self.conv(a), self.conv(a - 2 * b))


MAKERS = {
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "nested": lambda a, b: {"a": [a, (b,)]},
}


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))


def close(actual, expected, tolerance=1e-5):
    return np.allclose(actual, expected.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("example", [1, 3])
def test_one_checked_file_for_every_batch(example, tmp_path):
    model = seeded(small).train()
    export = export_program(model, (torch.randn(example, 3, 8, 8),))
    save_onnx(export, tmp_path / "model.onnx")
    note = export.note
    assert note.dynamic_batch
    assert note.reason is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert model.training
    assert model[1].num_batches_tracked == 0
    model.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        [output] = run(tmp_path / "model.onnx", x)
        assert close(output, model(x))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("twice", [False, True])
def test_several_inputs_and_outputs(make, twice, tmp_path):
    """Even if the example is one tensor for both inputs."""
    model, (a, b) = seeded(lambda: Outputs(make)).eval(), torch.randn(2, 2, 3, 8, 8)
    save_onnx(export_program(model, (a, a if twice else b)), tmp_path / "model.onnx")
    first, second = run(tmp_path / "model.onnx", a, b)
    assert close(first, model.conv(a))
    assert close(second, model.conv(a - 2 * b))


def test_archive_loads_and_computes_the_same(tmp_path):
    model = seeded(small).eval()
    save_archive(export_program(model, (torch.randn(1, 3, 8, 8),)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(loaded(x), model(x))


class OfFixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("offset", torch.randn(2, 1, 1, 1))

    def forward(self, x):
        return self.conv(x) + self.offset


class Asserting(OfFixedBatch):
    def forward(self, x):
        if x.shape[0] != 2:
            raise ValueError(f"expected two, got {x.shape[0]}")
        return self.conv(x)


@pytest.mark.parametrize("cls", [OfFixedBatch, Asserting])
def test_a_fixed_batch_is_exported_with_the_reason(cls, tmp_path):
    model, x = seeded(cls).eval(), torch.randn(2, 3, 8, 8)
    export = export_program(model, (x,))
    assert not export.note.dynamic_batch
    assert export.note.reason
    assert "\n" not in export.note.reason
    save_onnx(export, tmp_path / "model.onnx")
    assert close(run(tmp_path / "model.onnx", x)[0], model(x))
    save_archive(export, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_the_file_tells_nothing_of_the_machine_but_of_the_layers(tmp_path):
    save_onnx(export_program(seeded(small), (torch.randn(1, 3, 8, 8),)), tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert b"/" + bytes(__file__.split("/")[-1], "ascii") not in content
    assert b'File "' not in content
    assert b"pkg.torch.onnx.name_scopes" in content


def test_a_dynamic_batch_can_be_declined(tmp_path):
    export = export_program(seeded(small), (torch.randn(2, 3, 8, 8),), dynamic_batch=False)
    assert (export.note.dynamic_batch, export.note.reason) == (False, None)
    save_onnx(export, tmp_path / "m.onnx")
    shape = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0].shape
    assert shape == [2, 3, 8, 8]


@pytest.mark.parametrize(
    ("dtype", "exported", "tolerance"),
    [
        (torch.float64, "float32", 1e-5),
        (torch.float32, "float32", 1e-5),
        (torch.float16, "float16", 1e-2),
        (torch.bfloat16, "float32", 5e-2),
    ],
)
def test_dtypes(dtype, exported, tolerance, tmp_path):
    model, x = seeded(small).eval().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    export = export_program(model, (x,))
    save_onnx(export, tmp_path / "model.onnx")
    assert export.note.onnx_dtype == exported
    assert export.dtype == getattr(torch, exported)
    assert {p.dtype for p in model.parameters()} == {dtype}
    [output] = run(tmp_path / "model.onnx", x.to(getattr(torch, exported)))
    assert output.dtype == np.dtype(exported)
    assert close(output, model(x).float(), tolerance)


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x)


class Untraceable(nn.Module):
    def forward(self, x):
        return x * float(x.sum().item() > 0) if x.mean() > 0 else x


def test_what_cannot_be_exported_is_one_line():
    with pytest.raises(ExportError, match=r"cannot export this model.*`debug`$") as caught:
        export_program(Untraceable(), (torch.randn(2, 3),))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_translated_is_one_line_and_no_file(tmp_path):
    export = export_program(Untranslatable(), (torch.randn(2, 4, 4),))
    with pytest.raises(ExportError, match="ONNX cannot export this model") as caught:
        save_onnx(export, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_both_files_of_one_export_are_those_of_exports_of_their_own(tmp_path):
    model, inputs = seeded(small).eval(), (torch.randn(1, 3, 8, 8),)
    shared = export_program(model, inputs)
    save_onnx(shared, tmp_path / "shared.onnx")
    save_archive(shared, tmp_path / "shared.pt2")
    save_onnx(export_program(model, inputs), tmp_path / "own.onnx")
    save_archive(export_program(model, inputs), tmp_path / "own.pt2")
    assert (tmp_path / "shared.onnx").read_bytes() == (tmp_path / "own.onnx").read_bytes()
    assert members(tmp_path / "shared.pt2") == members(tmp_path / "own.pt2")


def test_the_archive_keeps_the_dtype_if_asked(tmp_path):
    model, x = seeded(small).eval().double(), torch.randn(2, 3, 8, 8).double()
    save_archive(export_program(model, (x,), torch.float64), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize(("save", "name"), [(save_onnx, "m.onnx"), (save_archive, "m.pt2")])
def test_a_folder_that_is_not_there(save, name, tmp_path):
    export = export_program(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),))
    with pytest.raises(SepconvertError, match=r"cannot be written: .*pass another `out`"):
        save(export, tmp_path / "none" / name)


class OwnLength(nn.Module):
    """A class that torch's exporters see through a stand-in."""

    def __init__(self, outputs):
        super().__init__()
        self.conv, self.outputs = nn.Conv2d(3, 4, 3), outputs

    def __len__(self):
        return 3

    def forward(self, x):
        return self.outputs(self.conv(x))


@pytest.mark.parametrize("outputs", [lambda y: y, lambda y: {"out": y, "more": [y + 1]}])
def test_classes_with_methods_of_containers_keep_an_open_batch(outputs, tmp_path):
    model = OwnLength(outputs).eval()
    export = export_program(model, (torch.randn(1, 3, 8, 8),))
    assert export.note.dynamic_batch
    save_onnx(export, tmp_path / "model.onnx")
    x = torch.randn(5, 3, 8, 8)
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model.conv(x).detach(), rtol=1e-4, atol=1e-5)
