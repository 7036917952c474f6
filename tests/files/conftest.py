import importlib
import sys

import numpy as np
import pytest
from data_files import IMAGES
from PIL import Image


@pytest.fixture
def clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("torch", "timm", "sympy")):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch, clean_imports):
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


@pytest.fixture
def marker(tmp_path):
    """A path that no code in a model file may create."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code of the file ran"


@pytest.fixture
def npz(tmp_path):
    def save(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return str(path)

    return save


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for index, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(IMAGES[3 * index + number]).save(root / name / f"{number}.png")
        (root / name / "notes.txt").write_text("no image")
    return root
