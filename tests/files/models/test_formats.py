"""What models are read from, by name, path and first bytes; torch and numpy are not needed for that."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.formats import model_format


def save_archive(path: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), path)


WRITERS = {
    "torch.save": lambda path: torch.save(nn.ReLU(), path),
    "legacy torch.save": lambda path: torch.save(nn.ReLU(), path, _use_new_zipfile_serialization=False),
    "pt2": save_archive,
    "safetensors": lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("built", [False, True])
def test_formats_are_recognised_by_their_content(tmp_path, name, built):
    WRITERS[name](tmp_path / "m.pt2")
    (tmp_path / "m.pt2").rename(tmp_path / "m.onnx")
    assert model_format(tmp_path / "m.onnx", built=built) == name


def test_other_files_are_models_of_onnx_by_name_or_where_the_weights_of_a_factory_came_from(tmp_path):
    for name in ("m.onnx", "m.tflite"):
        (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch\xff")
        assert model_format(tmp_path / name, built=True) == "origin"
    assert model_format(tmp_path / "m.onnx", built=False) == "onnx"
    with pytest.raises(SepconvertError, match=r"m\.tflite: is no model file, or damaged"):
        model_format(tmp_path / "m.tflite", built=False)
    assert model_format(Path("resnet50"), built=True) == "origin"
    with pytest.raises(SepconvertError, match="resnet50: there is no such file"):
        model_format(Path("resnet50"), built=False)


def test_archives_of_something_else_are_no_models(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("readme.txt", "no model")
    with pytest.raises(SepconvertError, match=r"a zip file that is no model \(it holds readme\.txt\)"):
        model_format(tmp_path / "m.pt", built=False)


def test_no_heavy_library_is_imported():
    program = (
        "import sys, sepconvert.files.models.formats\n"
        "print({'torch', 'numpy', 'onnx', 'safetensors', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "set()\n"
